//! Network interfaces: virtio-net over a tap.
//!
//! `device.rs` is what the guest sees, `tap.rs` the host's side, `rx.rs` and `tx.rs` the two
//! directions, `worker.rs` the thread that both share. Packets go between the tap and guest memory
//! by `readv` and `writev`, without a copy; the kernel's own virtio-net header travels in front of
//! each, so that checksums and segmentation are left to whoever can do them best.

mod device;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
mod worker;

pub use device::{Link, NetCounters, QUEUE_SIZE, SavedNet, VirtioNet};
pub use tap::{NetBackend, Offloads, Tap};

/// The header in front of each packet, here and at the tap.
const HEADER: usize = 12;
/// Where in it the number of buffers is that a received packet takes.
const NUM_BUFFERS: u64 = 10;
/// The longest packet with its header: 64 KiB of segments, an Ethernet header and a VLAN tag.
const FRAME_LIMIT: usize = HEADER + 14 + 4 + 65_535;
/// Packets per step and direction.
const BATCH: usize = 64;
