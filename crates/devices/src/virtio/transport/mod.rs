//! Virtio over PCI, the modern way.
//!
//! One 64-bit BAR holds everything:
//!
//! ```text
//! 0x0000  common configuration      common.rs: the status state machine
//! 0x1000  ISR                       interrupt.rs
//! 0x2000  device configuration      the device's own
//! 0x3000  notifications, 4 bytes per queue; an ioeventfd each while the BAR is decoded
//! 0x4000  MSI-X table               pci::Msix
//! 0x5000  MSI-X pending bits
//! ```
//!
//! vCPU threads come in through [`PciFunction`]. Locks, in order: `space` (configuration space and
//! the doorbells that follow from it) → `driver` (what the driver negotiated, and the workers) →
//! the table of MSI-X. Notifications, the ISR and the device's configuration need neither `space`
//! nor `driver`.
//!
//! **Reset.** Writing zero to the status asks the workers to end and waits [`RESET_PATIENCE`] for
//! them. If a backend is slower, the vCPU goes on and the status stays non-zero until the last
//! worker has ended, which is what the standard tells drivers to wait for; a migration that stops
//! the vCPUs while the disk's gate is closed therefore cannot dead-lock with a guest's reset.

mod common;
mod interrupt;
mod saved;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use strake_memory::Ram;
use strake_observe::{Because, Observation, OsContext, Result, State, recorder};
use strake_state::Records;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::common::Driver;
pub use self::interrupt::ConfigSignal;
pub(crate) use self::interrupt::Interrupter;
pub use self::saved::{SavedQueue, SavedVirtioPci};
use super::VirtioDevice;
use super::worker::{Fault, QUIESCE_BOUND};
use crate::interrupt::{Doorbells, MsiBroker};
use crate::lifecycle::{Component, Phase, PhaseCell};
use crate::observations::{DeviceUnusable, DoorbellRefused, QuiesceTimeout};
use crate::pci::{
    BarRange, BarSize, BarWidth, ConfigSpace, Identity, MSIX_CAPABILITY, Msix, PciFunction,
    TABLE_ENTRY_SIZE,
};
use crate::throttle::Throttle;

/// How long a vCPU that resets a device waits for its workers.
const RESET_PATIENCE: Duration = Duration::from_millis(50);

/// Most queues of a device, bounded by the notification page and the MSI-X table.
const QUEUE_LIMIT: usize = 128;

const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x8000;
/// Each area has a page of its own.
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0x0000;
const COMMON_BYTES: u32 = 64;
const DEVICE_BYTES: u32 = 0x1000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_STEP: u32 = 4;
const NOTIFY_WIDTH: u8 = 2;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM_BASE: u16 = 0x40;
/// Revision 1 or higher tells old drivers that there is no transitional interface.
const REVISION: u8 = 1;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// A virtio device as a PCI function.
pub struct VirtioPci<D> {
    device: Arc<D>,
    ram: Ram,
    phase: PhaseCell,
    kicks: Vec<EventFd>,
    interrupter: Interrupter,
    msix: Arc<Msix>,
    doorbells: Arc<dyn Doorbells>,
    space: Mutex<Space>,
    driver: Mutex<Driver>,
    /// It came from another process and has not run here yet: it interrupts its driver once, for what
    /// may have been on its way.
    arrived: AtomicBool,
    /// Which features are offered, of those that the device has.
    offers: AtomicU64,
}

struct Space {
    config: ConfigSpace,
    msix_capability: usize,
    pci_capability: usize,
    /// The address of the notification area that the doorbells are attached at, and which of them.
    attached: Option<(u64, Vec<bool>)>,
    reports: Throttle,
}

impl<D: VirtioDevice> fmt::Debug for VirtioPci<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci")
            .field("device", &self.device.name())
            .field("phase", &self.phase.get())
            .finish_non_exhaustive()
    }
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// The function for `device`, with one MSI-X vector per queue and one for its configuration.
    ///
    /// # Errors
    /// The host lacks interrupt lines or descriptors.
    pub fn new(
        device: D,
        ram: Ram,
        msi: &dyn MsiBroker,
        doorbells: Arc<dyn Doorbells>,
    ) -> Result<Arc<Self>> {
        let name = device.name().to_owned();
        let sizes = device.queue_sizes();
        let unusable = || DeviceUnusable {
            device: name.clone(),
            doing: "building it".to_owned(),
        };
        let queues = u16::try_from(sizes.len())
            .ok()
            .filter(|count| usize::from(*count) <= QUEUE_LIMIT)
            .ok_or_else(|| Observation::from(unusable()))?;
        let kicks = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).os("eventfd", &name))
            .collect::<Result<Vec<_>>>()
            .because_of(unusable)?;
        let msix = Arc::new(Msix::new(&name, queues + 1, msi)?);
        let interrupter = Interrupter::new(&name, Arc::clone(&msix), queues);
        device.connect(ConfigSignal::new(interrupter.clone()));
        Ok(Arc::new(Self {
            space: Mutex::new(Space::new(&device, queues)),
            driver: Mutex::new(Driver::new(&sizes)),
            device: Arc::new(device),
            ram,
            phase: PhaseCell::default(),
            kicks,
            interrupter,
            msix,
            doorbells,
            arrived: AtomicBool::new(false),
            offers: AtomicU64::new(u64::MAX),
        }))
    }

    /// The device behind the transport.
    #[must_use]
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    fn kick(&self, offset: u64) {
        let queue = usize::try_from(offset / u64::from(NOTIFY_STEP)).ok();
        if let Some(event) = queue.and_then(|queue| self.kicks.get(queue)) {
            let _ = event.write(1);
        }
    }

    /// Brings the doorbells in accord with where the BAR is now.
    fn follow_bar(&self, space: &mut Space) {
        let wanted = space
            .config
            .decoded()
            .first()
            .map(|range| range.base.saturating_add(NOTIFY));
        if wanted == space.attached.as_ref().map(|(address, _)| *address) {
            return;
        }
        if let Some((address, attached)) = space.attached.take() {
            self.detach(address, &attached);
        }
        let Some(address) = wanted else {
            return;
        };
        let mut attached = Vec::new();
        for (event, at) in self.kicks.iter().zip(bells(address)) {
            let done = self.doorbells.attach(at, NOTIFY_WIDTH, event);
            attached.push(done.is_ok());
            if let Err(cause) = done
                && space.reports.pass()
            {
                let seen = Observation::from(DoorbellRefused {
                    device: self.device.name().to_owned(),
                    address: at,
                });
                recorder().record(seen.because(cause), State::Open);
            }
        }
        space.attached = Some((address, attached));
    }

    fn detach(&self, address: u64, attached: &[bool]) {
        for ((event, at), attached) in self.kicks.iter().zip(bells(address)).zip(attached) {
            if *attached && let Err(seen) = self.doorbells.detach(at, NOTIFY_WIDTH, event) {
                recorder().record(seen, State::Open);
            }
        }
    }

    /// The access that the PCI configuration capability describes at this moment.
    fn window(space: &Space) -> Option<(u64, usize)> {
        let mut fields = [0; 12];
        space.config.read(space.pci_capability + 4, &mut fields);
        let [bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3] = fields;
        let offset = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        (bar == BAR && matches!(length, 1 | 2 | 4) && offset < BAR_BYTES)
            .then_some((offset, length as usize))
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The addresses of the doorbells.
fn bells(address: u64) -> impl Iterator<Item = u64> {
    (0u64..).map(move |queue| address.saturating_add(queue * u64::from(NOTIFY_STEP)))
}

impl Space {
    fn new<D: VirtioDevice>(device: &D, queues: u16) -> Self {
        let kind = device.kind();
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE.wrapping_add(kind.id),
            revision: REVISION,
            class: kind.class,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM_BASE.wrapping_add(kind.id),
        });
        config.add_bar(BarSize {
            index: BAR,
            size: BAR_BYTES,
            width: BarWidth::Bits64,
        });
        let msix_capability = config.add_capability(
            MSIX_CAPABILITY,
            &msix_body(queues + 1),
            &[0, 0xc0], // enable and function mask
        );
        let notify_bytes = u32::from(queues)
            .saturating_mul(NOTIFY_STEP)
            .max(NOTIFY_STEP);
        for (kind, offset, length) in [
            (CAP_COMMON, COMMON, COMMON_BYTES),
            (CAP_ISR, ISR, 1),
            (CAP_DEVICE, DEVICE, DEVICE_BYTES),
        ] {
            config.add_capability(CAPABILITY_VENDOR, &cap_body(kind, offset, length, &[]), &[]);
        }
        config.add_capability(
            CAPABILITY_VENDOR,
            &cap_body(CAP_NOTIFY, NOTIFY, notify_bytes, &NOTIFY_STEP.to_le_bytes()),
            &[],
        );
        let pci_capability = config.add_capability(
            CAPABILITY_VENDOR,
            &cap_body(CAP_PCI, 0, 0, &[0; 4]),
            // bar; offset, length and data
            &[
                0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                0xff, 0xff,
            ],
        );
        Self {
            config,
            msix_capability,
            pci_capability,
            attached: None,
            reports: Throttle::default(),
        }
    }
}

/// The MSI-X capability behind identifier and link.
#[allow(clippy::cast_possible_truncation)] // of constants below `BAR_BYTES`
fn msix_body(vectors: u16) -> Vec<u8> {
    debug_assert!(usize::from(vectors) * TABLE_ENTRY_SIZE <= PAGE as usize);
    let mut body = (vectors - 1).to_le_bytes().to_vec();
    body.extend((TABLE as u32 | u32::from(BAR)).to_le_bytes());
    body.extend((PENDING as u32 | u32::from(BAR)).to_le_bytes());
    body
}

/// A virtio capability behind identifier and link.
#[allow(clippy::cast_possible_truncation)] // of constants below `BAR_BYTES`, and of 16 or 20
fn cap_body(kind: u8, offset: u64, length: u32, extra: &[u8]) -> Vec<u8> {
    let bytes = (16 + extra.len()) as u8;
    let mut body = vec![bytes, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra);
    body
}

impl<D: VirtioDevice> PciFunction for VirtioPci<D> {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let mut space = self.space();
        let field = space.pci_capability + 16;
        if overlaps(offset, data.len(), field)
            && let Some((at, length)) = Self::window(&space)
        {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..length) {
                self.bar_read(BAR, at, value);
            }
            space.config.put(field, &value);
        }
        space.config.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut space = self.space();
        space.config.write(offset, data);
        let field = space.pci_capability + 16;
        if overlaps(offset, data.len(), field)
            && let Some((at, length)) = Self::window(&space)
        {
            let mut value = [0; 4];
            space.config.read(field, &mut value);
            if let Some(value) = value.get(..length) {
                self.bar_write(BAR, at, value);
            }
        }
        if overlaps(offset, data.len(), space.msix_capability) {
            let mut control = [0; 2];
            space.config.read(space.msix_capability + 2, &mut control);
            self.msix
                .control(control[1] & 0x80 != 0, control[1] & 0x40 != 0);
        }
        self.follow_bar(&mut space);
    }

    fn bars(&self) -> Vec<BarSize> {
        self.space().config.bars().to_vec()
    }

    fn place(&self, bar: u8, base: u64) {
        self.space().config.place(bar, base);
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.space().config.decoded()
    }

    fn bar_read(&self, _: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.read_common(within, data),
            ISR if within == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.interrupter.take_isr();
                }
            }
            DEVICE => {
                let offset = usize::try_from(within).unwrap_or(usize::MAX);
                self.device.read_config(offset, data);
            }
            TABLE => self.msix.read_table(within, data),
            PENDING => self.msix.read_pending(within, data),
            _ => {}
        }
    }

    fn bar_write(&self, _: u8, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.write_common(within, data),
            DEVICE => {
                let offset = usize::try_from(within).unwrap_or(usize::MAX);
                self.device.write_config(offset, data);
            }
            NOTIFY => self.kick(within),
            TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }
}

/// Whether an access meets the four bytes at `field`.
fn overlaps(offset: usize, len: usize, field: usize) -> bool {
    offset < field + 4 && offset.saturating_add(len) > field
}

impl<D: VirtioDevice> Component for VirtioPci<D> {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn phase(&self) -> Phase {
        self.phase.get()
    }

    fn start(&self) -> Result<()> {
        self.phase.step(
            self.device.name(),
            "start",
            (Phase::Prepared, Phase::Running),
            || Ok(()),
        )
    }

    /// Bounded by [`QUIESCE_BOUND`]. Not to be called while the gate of a disk is closed: what
    /// waits at the gate is in flight.
    fn quiesce(&self) -> Result<()> {
        self.phase.step(
            self.device.name(),
            "quiesce",
            (Phase::Running, Phase::Quiesced),
            || {
                if self.driver().halt(QUIESCE_BOUND, &self.interrupter)? {
                    return Ok(());
                }
                let waited_ms = u64::try_from(QUIESCE_BOUND.as_millis()).unwrap_or(u64::MAX);
                Err(QuiesceTimeout {
                    device: self.device.name().to_owned(),
                    waited_ms,
                }
                .into())
            },
        )
    }

    fn resume(&self) -> Result<()> {
        self.phase.step(
            self.device.name(),
            "resume",
            (Phase::Quiesced, Phase::Running),
            || {
                let arrived = self.arrived.swap(false, Ordering::Relaxed);
                let resumed = self.driver().go_on(self.device.name(), &self.interrupter);
                if arrived {
                    self.interrupt_all();
                }
                if let Err(cause) = &resumed {
                    // The works are gone with the failure: the driver may start over.
                    self.interrupter.fault(Fault::backend(0, cause.clone()));
                }
                resumed
            },
        )
    }

    /// Doorbells and interrupt routes: each makes the hypervisor wait for all of its readers.
    fn sketch(&self, records: &mut Records) -> Result<()> {
        records.put(self.device.name(), &self.to_saved())
    }

    fn prepare(&self, records: &mut Records) -> Result<()> {
        self.phase.step(
            self.device.name(),
            "prepare",
            (Phase::Prepared, Phase::Prepared),
            || self.prepare_for(records.take(self.device.name())?),
        )
    }

    fn save(&self, records: &mut Records) -> Result<()> {
        self.phase.step(
            self.device.name(),
            "be saved",
            (Phase::Quiesced, Phase::Quiesced),
            || {
                records.put(self.device.name(), &self.to_saved())?;
                self.device.save(records)
            },
        )
    }

    fn restore(&self, records: &mut Records) -> Result<()> {
        self.phase.step(
            self.device.name(),
            "be restored",
            (Phase::Prepared, Phase::Quiesced),
            || {
                let saved = records.take(self.device.name())?;
                self.device.restore(records)?;
                self.become_saved(saved)
            },
        )
    }
}

impl<D> Drop for VirtioPci<D> {
    fn drop(&mut self) {
        let space = self.space.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some((address, attached)) = space.attached.take() {
            for ((event, at), attached) in self.kicks.iter().zip(bells(address)).zip(attached) {
                if attached {
                    let _ = self.doorbells.detach(at, NOTIFY_WIDTH, event);
                }
            }
        }
        // The workers end with `driver`, before `ram` could: they hold it themselves.
    }
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// What an activation takes of guest memory: the map of this instant, which never changes.
    fn memory(&self) -> Arc<strake_memory::GuestMemory> {
        self.ram.memory().into_inner()
    }
}
