//! Datastores and images as files: nothing here knows VMs or the inventory's records.
//!
//! * [`store`]: a datastore's directory and the room in it.
//! * [`location`]: where a disk's data is, and in which format: what a binding says.
//! * [`chain`]: what a binding names is opened for a monitor, with everything below it.
//! * [`merge`]: an image goes into the one below it, while nobody uses them.
//! * [`image`]: one file: looked at, created, opened and locked, removed.
//! * [`identity`]: which file a file is, whatever its name.
//! * [`removal`]: files are removed only if they are the ones that are meant.

pub(crate) mod chain;
pub(crate) mod identity;
pub(crate) mod image;
pub(crate) mod location;
pub(crate) mod merge;
pub(crate) mod removal;
pub(crate) mod store;
#[cfg(test)]
mod tests;
