//! The live disk: an image behind a gate, shared by the queues of one guest disk.
//!
//! Threads: each virtqueue worker owns a [`DiskQueue`]; one migration thread at most closes and
//! opens the gate, turns tracking and mirroring on and off and replaces the image. Lock order:
//! `queues` before `mirror` before a queue's `half` before the table of the zones; `queues` before
//! `prepared`; the gate's lock and those of the claims and of the limits are leaves.

mod claims;
mod disk;
mod gate;
mod latency;
mod mirror;
mod queue;
mod rate;
#[cfg(test)]
mod rate_tests;
mod zones;

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use claims::MOST_REGIONS;
pub(crate) use claims::{Claims, region_bytes};
pub use disk::{LiveDisk, Observer};
pub(crate) use gate::Gate;
pub(crate) use mirror::Mirror;
pub use queue::DiskQueue;
pub(crate) use zones::{Ticket, Turn, Zones};
