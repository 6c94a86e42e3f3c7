//! Virtio devices over vhost-user: the rings are those of another program's guest.
//!
//! A front-end (QEMU, Cloud Hypervisor, …) connects to a unix socket, shares its guest's memory as
//! descriptors and says where the rings are; from then on the device works for its guest as it
//! would for one of ours. It is the same device behind another transport: what `VirtioPci` is for
//! our own guests, [`VhostUserServer`] is for those of others.
//!
//! ```text
//!  front-end              thread `vhost-user`                workers, one per ring that runs
//!  ─────────              ───────────────────                ───────────────────────────────
//!  connect ─────────────▶ Server: accepts, one at a time
//!  messages ────────────▶ Session: regions.rs, rings ──────▶ Work (that of the device)
//!  kick (eventfd) ─────────────────────────────────────────▶ VirtQueue ─▶ call (eventfd)
//!  GET_VRING_BASE, new memory, hang-up: the workers are drained and end
//! ```
//!
//! * A ring runs while it has a kick descriptor and is enabled. Whatever changes it (its size,
//!   addresses, base, the features, the memory) stops it first: all that was taken out of it is
//!   finished, in the memory that it was taken from. So nothing is ever written into memory that the
//!   front-end has taken back, and a ring's position is where its used ring ends.
//! * A drain waits for the disk, and so for the short time that a switch-over keeps the disk's gate
//!   closed. The front-end waits meanwhile; nobody else does.
//! * One front-end at a time: the next one waits to be accepted until the last request of the one
//!   before is finished.
//! * `inflight.rs`: what is in flight is noted in memory that the front-end keeps. If this process
//!   dies, the next one takes up the very requests that were not completed.
//!
//! # What a front-end can do
//! Everything it says is checked: numbers of rings, sizes, addresses (each must lie in the memory it
//! shared), descriptor chains (see `queue.rs`). A ring beyond sense stops, a message beyond sense
//! ends the connection; the disk and the other front-ends of other exports do not notice.
//! It can, however, take its memory away from under us (truncate the file that it shared), which
//! ends this process like any access to memory that is gone. Nothing flushed is lost by that, but
//! only those who own the guest's disk should be able to connect.

mod inflight;
mod regions;
mod ring;
mod server;
mod session;
#[cfg(test)]
mod tests;

pub(crate) use inflight::Journal;
pub use server::VhostUserServer;
