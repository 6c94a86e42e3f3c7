//! The live disk: an image behind a gate, shared by the queues of one guest disk.
//!
//! Threads: each virtqueue worker owns a [`DiskQueue`]; one migration thread at most closes and
//! opens the gate, turns tracking on and off and replaces the image. Lock order: `queues` before
//! `prepared`; the gate's lock is a leaf.

mod disk;
mod gate;
mod queue;

#[cfg(test)]
mod tests;

pub use disk::{LiveDisk, Observer};
pub(crate) use gate::Gate;
pub use queue::DiskQueue;
