//! Datastores and images as files: nothing here knows VMs or the inventory's records.
//!
//! * [`store`]: a datastore's directory and the room in it.
//! * [`image`]: images: looked at, created, opened and locked, removed.
//! * [`identity`]: which file a file is, whatever its name.
//! * [`removal`]: files are removed only if they are the ones that are meant.
//! * [`lock`]: the locks that keep an image to one VM.

pub(crate) mod identity;
pub(crate) mod image;
pub(crate) mod lock;
pub(crate) mod removal;
pub(crate) mod store;
#[cfg(test)]
mod tests;
