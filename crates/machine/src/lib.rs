//! One guest's machine, put together and kept running.
//!
//! The way through a monitor, top to bottom: [`control::Server::serve`] takes the daemon's
//! requests; `Configure` makes [`Machine::build`] put memory, vCPUs and devices together; `Start`
//! lets the vCPUs' threads into the guest; a guest's access that KVM does not handle goes from
//! there over the buses to a device, a doorbell goes to the device's worker, and its requests go
//! to a `LiveDisk`, a tap or the console. The end of the guest comes back through the [`Mailbox`].
//!
//! An export ([`Machine::export`]) is a machine without a guest: its disk's requests come from other
//! programs, over vhost-user or NBD. Jobs, pauses and the end are the same.
//!
//! # Threads
//! | thread | does | owns |
//! | --- | --- | --- |
//! | `control` (main) | the control socket, pauses, the end | the machine, the session |
//! | `vcpu0` … | the guest, register accesses | its vCPU |
//! | workers of devices | virtqueues, console | their queues |
//! | front-ends of an export | their protocol | their connections |
//! | a migration's | copies, switches | its copy of the bitmap |
//!
//! Nothing waits for a vCPU but a pause, and that for a bounded time; vCPUs wait for nobody but
//! a device's registers.

mod adapters;
mod boot_disk;
mod build;
pub mod control;
mod descriptors;
mod export;
mod handover;
mod images;
mod jobs;
mod machine;
mod mailbox;
pub mod observations;
mod platform;
mod threads;
mod vcpus;

pub use descriptors::Descriptors;
pub use jobs::{ConsolidateRequest, MigrationRequest, SnapshotRequest};
pub use machine::Machine;
pub use mailbox::{MAILBOX_CAPACITY, Mailbox};
pub use threads::{Confinement, ThreadKind, set_confinement};
