//! The daemon's side of a monitor: its process and its control socket. Nothing here knows the
//! inventory.
//!
//! * [`packet`]: packets with descriptors over `SOCK_SEQPACKET`.
//! * [`descriptors`]: the descriptors of a packet.
//! * [`connection`]: requests and their replies; events as they come.
//! * [`process`]: the monitor's process, ours or inherited from a daemon before us.
//! * [`spawn`]: how a monitor is started.

pub(crate) mod connection;
pub(crate) mod descriptors;
pub mod packet;
pub(crate) mod process;
pub(crate) mod spawn;
#[cfg(test)]
mod tests;
