//! The guest's disks: virtio-blk over a live disk.
//!
//! `device.rs` is what the guest sees, `request.rs` understands what it sends, `worker.rs` moves
//! it: one thread per virtqueue, each with a queue of its own on the [`LiveDisk`], so that queues
//! share nothing but the disk's gate.
//!
//! [`LiveDisk`]: strake_block::LiveDisk

mod device;
mod request;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{BlkConfig, MAX_QUEUES, QUEUE_SIZE, SERIAL_BYTES, SavedBlk, VirtioBlk};
