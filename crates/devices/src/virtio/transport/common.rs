//! The common configuration: features, queues, and the status state machine.
//!
//! ```text
//!            ACKNOWLEDGE, DRIVER       FEATURES_OK            DRIVER_OK
//!   0 ─────────────────────────▶ … ───────────────▶ … ──────────────────▶ Serving
//!   ▲                                (refused if the        (works start; on a
//!   │                                 features make          failure NEEDS_RESET)
//!   │                                 no sense)                     │
//!   └──── all workers ended ◀──── Resetting ◀──── status = 0 ───────┘
//! ```
//!
//! The driver only adds bits; the only way back is zero. What it writes at a time when the
//! standard does not let it (queues of a running device, features after `FEATURES_OK`) is dropped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use strake_observe::{Observation, Result, State, recorder};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::interrupt::Interrupter;
use super::{RESET_PATIENCE, VirtioPci};
use crate::lifecycle::Phase;
use crate::virtio::queue::VirtQueue;
use crate::virtio::worker::{Fault, Work, Workers};
use crate::virtio::{
    Activation, ActiveQueue, EVENT_IDX, INDIRECT_DESC, VERSION_1, VirtioDevice, read_bytes,
};

// Bits of the status, in the standard's section 2.1.
pub(super) const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;

/// What the driver has set up, and who works for it.
pub(super) struct Driver {
    pub(super) status: u8,
    pub(super) offered_select: u32,
    pub(super) accepted_select: u32,
    pub(super) accepted: u64,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueSetup>,
    crew: Crew,
}

/// Who works for the driver.
enum Crew {
    /// Nobody: the driver is not ready.
    None,
    /// Threads.
    Serving(Workers),
    /// Nobody at the moment: the component is quiesced.
    Standing(Vec<Box<dyn Work>>),
    /// Threads that were asked to end.
    Resetting(Workers),
}

#[derive(Clone)]
pub(super) struct QueueSetup {
    pub(super) limit: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

/// Where a queue goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// At its begin: the driver has just made it.
    Begin,
    /// Where its used ring ends: with nothing in flight, what was taken is what was given back.
    UsedRing,
}

impl QueueSetup {
    fn new(limit: u16) -> Self {
        Self {
            limit,
            size: limit,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        }
    }

    /// The rings, if all of them make sense.
    fn rings(&self) -> std::result::Result<Queue, virtio_queue::Error> {
        let mut rings = Queue::new(self.limit)?;
        rings.try_set_size(self.size)?;
        rings.try_set_desc_table_address(GuestAddress(self.descriptors))?;
        rings.try_set_avail_ring_address(GuestAddress(self.driver))?;
        rings.try_set_used_ring_address(GuestAddress(self.device))?;
        rings.set_ready(true);
        Ok(rings)
    }
}

impl Driver {
    pub(super) fn new(limits: &[u16]) -> Self {
        Self {
            status: 0,
            offered_select: 0,
            accepted_select: 0,
            accepted: 0,
            queue_select: 0,
            queues: limits.iter().copied().map(QueueSetup::new).collect(),
            crew: Crew::None,
        }
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue as long as the driver may set it up.
    fn settable(&mut self) -> Option<&mut QueueSetup> {
        if self.status & DRIVER_OK != 0 || matches!(self.crew, Crew::Resetting(_)) {
            return None;
        }
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !queue.enabled)
    }

    /// Ends the threads within `bound` and keeps their works. Says whether that was possible;
    /// otherwise they go on.
    pub(super) fn halt(&mut self, bound: Duration, interrupter: &Interrupter) -> Result<bool> {
        match std::mem::replace(&mut self.crew, Crew::None) {
            Crew::Serving(workers) => match workers.stop(bound, interrupter) {
                Ok((works, seen)) => {
                    report(seen);
                    self.crew = Crew::Standing(works);
                    Ok(true)
                }
                Err(Ok(revived)) => {
                    self.crew = Crew::Serving(revived);
                    Ok(false)
                }
                Err(Err(cause)) => {
                    // Those that had ended cannot be started again: the driver may start over.
                    interrupter.fault(Fault::backend(0, cause.clone()));
                    Err(cause)
                }
            },
            Crew::Resetting(workers) => {
                let ended = workers.wait(bound);
                self.crew = Crew::Resetting(workers);
                Ok(ended)
            }
            other @ (Crew::None | Crew::Standing(_)) => {
                self.crew = other;
                Ok(true)
            }
        }
    }

    /// Lets kept works go on.
    pub(super) fn go_on(&mut self, device: &str, interrupter: &Interrupter) -> Result<()> {
        match std::mem::replace(&mut self.crew, Crew::None) {
            Crew::Standing(works) => {
                self.crew = Crew::Serving(Workers::spawn(device, works, interrupter)?);
            }
            other => self.crew = other,
        }
        Ok(())
    }
}

/// What workers left behind when they died.
fn report(seen: Vec<Observation>) {
    for seen in seen {
        recorder().record(seen, State::Open);
    }
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// What the device offers. A driver that came from another process is offered what it was
    /// offered there.
    pub(super) fn offered(&self) -> u64 {
        let all = self.device.features() | VERSION_1 | INDIRECT_DESC | EVENT_IDX;
        all & self.offers.load(Ordering::Relaxed)
    }

    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut driver = self.driver();
        self.settle_reset(&mut driver);
        let half = |features: u64, select: u32| match select {
            0 => (features & 0xffff_ffff) as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let queue = driver.selected();
        let mut image = Vec::with_capacity(64);
        image.extend(driver.offered_select.to_le_bytes());
        image.extend(half(self.offered(), driver.offered_select).to_le_bytes());
        image.extend(driver.accepted_select.to_le_bytes());
        image.extend(half(driver.accepted, driver.accepted_select).to_le_bytes());
        image.extend(self.interrupter.config_vector().to_le_bytes());
        image.extend(
            u16::try_from(driver.queues.len())
                .unwrap_or(0)
                .to_le_bytes(),
        );
        image.push(self.status(&driver));
        image.push(self.interrupter.generation());
        image.extend(driver.queue_select.to_le_bytes());
        image.extend(queue.map_or(0, |queue| queue.size).to_le_bytes());
        let vector = self.interrupter.queue_vector(driver.queue_select);
        image.extend(vector.to_le_bytes());
        image.extend(
            queue
                .map_or(0, |queue| u16::from(queue.enabled))
                .to_le_bytes(),
        );
        // The offset in units of the notification step: the queue's own number.
        image.extend(queue.map_or(0, |_| driver.queue_select).to_le_bytes());
        image.extend(queue.map_or(0, |queue| queue.descriptors).to_le_bytes());
        image.extend(queue.map_or(0, |queue| queue.driver).to_le_bytes());
        image.extend(queue.map_or(0, |queue| queue.device).to_le_bytes());
        drop(driver);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        read_bytes(&image, offset, data);
    }

    // Each value is as wide as its field, which was matched.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn write_common(&self, offset: u64, data: &[u8]) {
        let Some(value) = number(data) else {
            return;
        };
        let mut driver = self.driver();
        self.settle_reset(&mut driver);
        // An access has the width of its field; a 64-bit field is also written by halves.
        match (offset, data.len()) {
            (0, 4) => driver.offered_select = value as u32,
            (8, 4) => driver.accepted_select = value as u32,
            (12, 4) if driver.status & FEATURES_OK == 0 => match driver.accepted_select {
                0 => set_half(&mut driver.accepted, 0, value),
                1 => set_half(&mut driver.accepted, 32, value),
                _ => {}
            },
            (16, 2) => self.interrupter.set_config_vector(value as u16),
            (20, 1) => self.write_status(&mut driver, value as u8),
            (22, 2) => driver.queue_select = value as u16,
            (24, 2) => set(&mut driver, |queue| queue.size = value as u16),
            (26, 2) => {
                let queue = driver.queue_select;
                self.interrupter.set_queue_vector(queue, value as u16);
            }
            (28, 2) => set(&mut driver, |queue| queue.enabled = value == 1),
            (32, 8) => set(&mut driver, |queue| queue.descriptors = value),
            (40, 8) => set(&mut driver, |queue| queue.driver = value),
            (48, 8) => set(&mut driver, |queue| queue.device = value),
            (32, 4) => set(&mut driver, |queue| {
                set_half(&mut queue.descriptors, 0, value)
            }),
            (36, 4) => set(&mut driver, |queue| {
                set_half(&mut queue.descriptors, 32, value)
            }),
            (40, 4) => set(&mut driver, |queue| set_half(&mut queue.driver, 0, value)),
            (44, 4) => set(&mut driver, |queue| set_half(&mut queue.driver, 32, value)),
            (48, 4) => set(&mut driver, |queue| set_half(&mut queue.device, 0, value)),
            (52, 4) => set(&mut driver, |queue| set_half(&mut queue.device, 32, value)),
            _ => {}
        }
    }

    fn status(&self, driver: &Driver) -> u8 {
        let needs_reset = if self.interrupter.needs_reset() {
            NEEDS_RESET
        } else {
            0
        };
        driver.status | needs_reset
    }

    fn write_status(&self, driver: &mut Driver, value: u8) {
        if matches!(driver.crew, Crew::Resetting(_)) {
            return;
        }
        if value == 0 {
            return self.reset(driver);
        }
        let mut added = value & !driver.status & !NEEDS_RESET;
        if added & FEATURES_OK != 0 && !self.acceptable(driver.accepted) {
            added &= !FEATURES_OK;
        }
        let ready = (driver.status | added) & FEATURES_OK != 0;
        let failed = (driver.status | added) & FAILED != 0;
        if added & DRIVER_OK != 0 && (!ready || failed) {
            added &= !DRIVER_OK;
        }
        driver.status |= added;
        if added & DRIVER_OK != 0 {
            self.interrupter.set_driver_ready();
            let standing = self.phase.get() == Phase::Quiesced;
            if let Err(fault) = self.activate(driver, From::Begin, standing) {
                self.interrupter.fault(fault);
            }
        }
    }

    fn acceptable(&self, accepted: u64) -> bool {
        let device = self.device.features();
        accepted & !self.offered() == 0
            && accepted & VERSION_1 != 0
            && self.device.accepts(accepted & device)
    }

    /// Hands the queues to the device's workers and starts them.
    pub(super) fn activate(
        &self,
        driver: &mut Driver,
        from: From,
        standing: bool,
    ) -> Result<(), Fault> {
        let memory = self.memory();
        let mut queues = Vec::new();
        for (index, setup) in (0..).zip(&driver.queues) {
            queues.push(if setup.enabled {
                Some(self.active_queue(index, setup, driver.accepted, &memory, from)?)
            } else {
                None
            });
        }
        let works = self
            .device
            .activate(Activation {
                features: driver.accepted,
                memory,
                queues,
            })
            .map_err(|cause| Fault::backend(0, cause))?;
        driver.crew = if standing {
            Crew::Standing(works)
        } else {
            let workers = Workers::spawn(self.device.name(), works, &self.interrupter);
            Crew::Serving(workers.map_err(|cause| Fault::backend(0, cause))?)
        };
        Ok(())
    }

    fn active_queue(
        &self,
        index: u16,
        setup: &QueueSetup,
        features: u64,
        memory: &Arc<strake_memory::GuestMemory>,
        from: From,
    ) -> Result<ActiveQueue, Fault> {
        let mut rings = setup
            .rings()
            .map_err(|error| Fault::ring(index, error.to_string()))?;
        if !rings.is_valid(&**memory) {
            return Err(Fault::ring(index, "its rings are not in guest RAM"));
        }
        rings.set_event_idx(features & EVENT_IDX != 0);
        if from == From::UsedRing {
            let used = rings
                .used_idx(&**memory, Ordering::Acquire)
                .map_err(|error| Fault::ring(index, error.to_string()))?;
            rings.set_next_avail(used.0);
            rings.set_next_used(used.0);
        }
        let kick = self
            .kicks
            .get(usize::from(index))
            .and_then(|kick| kick.try_clone().ok())
            .ok_or_else(|| Fault::ring(index, "its doorbell cannot be shared"))?;
        Ok(ActiveQueue {
            queue: VirtQueue::new(index, rings, Arc::clone(memory), self.interrupter.clone()),
            kick,
        })
    }

    fn reset(&self, driver: &mut Driver) {
        match std::mem::replace(&mut driver.crew, Crew::None) {
            Crew::Serving(workers) | Crew::Resetting(workers) => {
                workers.ask_to_stop();
                workers.wait(RESET_PATIENCE);
                driver.crew = Crew::Resetting(workers);
            }
            // Works that stand still have nothing in flight.
            Crew::Standing(_) | Crew::None => {
                self.clear(driver);
                return;
            }
        }
        self.settle_reset(driver);
    }

    /// Completes a reset whose workers have ended.
    pub(super) fn settle_reset(&self, driver: &mut Driver) {
        match std::mem::replace(&mut driver.crew, Crew::None) {
            Crew::Resetting(workers) if workers.wait(Duration::ZERO) => {
                report(workers.join().1);
                self.clear(driver);
            }
            other => driver.crew = other,
        }
    }

    fn clear(&self, driver: &mut Driver) {
        let limits: Vec<u16> = driver.queues.iter().map(|queue| queue.limit).collect();
        *driver = Driver::new(&limits);
        self.interrupter.reset();
        for kick in &self.kicks {
            // Forget kicks of the driver's former life.
            let _ = kick.read();
        }
        self.device.reset();
    }
}

/// Up to eight bytes as a number.
fn number(data: &[u8]) -> Option<u64> {
    let mut bytes = [0; 8];
    bytes.get_mut(..data.len())?.copy_from_slice(data);
    Some(u64::from_le_bytes(bytes))
}

fn set(driver: &mut Driver, change: impl FnOnce(&mut QueueSetup)) {
    if let Some(queue) = driver.settable() {
        change(queue);
    }
}

/// Replaces 32 bits of `field` from bit `shift` on.
fn set_half(field: &mut u64, shift: u32, value: u64) {
    let mask = 0xffff_ffff << shift;
    *field = (*field & !mask) | ((value << shift) & mask);
}
