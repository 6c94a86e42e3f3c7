//! Virtio 1.2 devices over modern PCI.
//!
//! ```text
//!  vCPU thread                         worker thread of a device
//!  ───────────                         ─────────────────────────
//!  config / BAR access ─▶ VirtioPci
//!     DRIVER_OK ─────────▶ activate ─▶ Work owns its VirtQueues
//!  doorbell ── ioeventfd ────────────▶ Work::ready ─▶ backend
//!                                      VirtQueue::notify ─▶ Msix ─▶ irqfd
//!     status = 0 ────────▶ stop ─────▶ drains, ends
//! ```
//!
//! A device ([`VirtioDevice`]) says what it is and makes [`Work`]s; the transport
//! ([`VirtioPci`]) runs the registers and the life of the workers. A virtqueue belongs to exactly
//! one worker from `DRIVER_OK` until that worker has ended, so none is locked.
//!
//! What the guest writes into a ring is read once, checked, and only then used. A ring that is
//! beyond sense makes its worker stop taking requests and the device ask for a reset
//! (`NEEDS_RESET`); it never panics and never touches memory outside of guest RAM.

pub mod blk;
pub mod console;
mod guest;
mod handshake;
pub mod net;
mod queue;
pub mod rng;
mod transport;
mod vhost_user;
mod worker;

use std::sync::Arc;

use strake_memory::GuestMemory;
use strake_observe::Result;
use strake_state::Records;
use vmm_sys_util::eventfd::EventFd;

pub use guest::{Buffers, HostRange, OutsideMemory, Part};
pub use queue::{CHAIN_LIMIT, Chain, VirtQueue};
pub use transport::{ConfigSignal, SavedQueue, SavedVirtioPci, VirtioPci};
pub use vhost_user::VhostUserServer;
pub use worker::{
    Fault, Poller, Progress, QUIESCE_BOUND, Ready, Work, WorkerEntry, set_worker_entry,
};

/// The bit of a feature number.
#[must_use]
pub const fn feature(number: u32) -> u64 {
    1 << number
}

/// The driver speaks virtio 1: without it nothing is spoken here.
pub const VERSION_1: u64 = feature(virtio_bindings::virtio_config::VIRTIO_F_VERSION_1);
/// Indirect descriptors.
pub const INDIRECT_DESC: u64 = feature(virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC);
/// Notification suppression by index.
pub const EVENT_IDX: u64 = feature(virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX);

/// What a device is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// The virtio device number.
    pub id: u16,
    /// The PCI class `0xCCSSPP`.
    pub class: u32,
}

/// A virtio device, behind whichever transport.
pub trait VirtioDevice: Send + Sync + 'static {
    /// Its name within the machine, for example `blk-root`.
    fn name(&self) -> &str;

    /// What it is.
    fn kind(&self) -> Kind;

    /// The features that it offers, those of the transport and the rings aside.
    fn features(&self) -> u64;

    /// Whether a driver may accept exactly `features` (a subset of those offered): some depend on
    /// others.
    fn accepts(&self, features: u64) -> bool;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The guest reads the device's configuration; bytes beyond it read as zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The guest writes the device's configuration.
    fn write_config(&self, offset: usize, data: &[u8]);

    /// Takes the way to tell the driver of a changed configuration. Called once.
    fn connect(&self, signal: ConfigSignal);

    /// Makes the workers for a driver that is ready.
    ///
    /// # Errors
    /// A backend cannot be set up; the device then asks for a reset.
    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Work>>>;

    /// The driver reset the device: what it changed in the configuration is undone. The workers
    /// have ended.
    fn reset(&self);

    /// Prepares for being restored with queues of these sizes in use: opens what takes long.
    ///
    /// # Errors
    /// A backend cannot be set up.
    fn prepare(&self, sizes: &[u16]) -> Result<()>;

    /// Adds its own record: what the guest sees of it beside the transport, and what it would miss.
    /// The workers stand still.
    ///
    /// # Errors
    /// It cannot be saved.
    fn save(&self, records: &mut Records) -> Result<()>;

    /// Makes it what was saved; before the workers are made.
    ///
    /// # Errors
    /// The record is missing, or was saved by another device.
    fn restore(&self, records: &mut Records) -> Result<()>;
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// What was negotiated.
    pub features: u64,
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// The queues by number; those that the driver did not enable are absent.
    pub queues: Vec<Option<ActiveQueue>>,
}

impl Activation {
    /// Takes a queue out, if the driver enabled it.
    pub fn take(&mut self, index: usize) -> Option<ActiveQueue> {
        self.queues.get_mut(index).and_then(Option::take)
    }
}

/// A queue that the driver enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The rings.
    pub queue: VirtQueue,
    /// Signalled when the driver kicks.
    pub kick: EventFd,
}

/// Reads from a configuration structure that is given as bytes: beyond its end, zero.
pub(crate) fn read_bytes(source: &[u8], offset: usize, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        let at = offset.checked_add(index);
        *byte = at.and_then(|at| source.get(at)).copied().unwrap_or(0);
    }
}

/// An interrupter without a transport, for workers that run in a test's own thread.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn bare_interrupter(
    device: &str,
    msix: Arc<crate::pci::Msix>,
    queues: u16,
) -> transport::Interrupter {
    transport::Interrupter::new(device, msix, queues)
}
