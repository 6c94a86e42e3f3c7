//! From a device to its driver: queue interrupts, configuration changes, the call for a reset.
//!
//! Shared by the workers, the vCPUs and whoever changes a device from outside. All of it is
//! atomics, each of which stands alone: the vectors are set by the driver while its queues are
//! idle, the ISR is a set of bits, the generation only has to differ when it matters.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use strake_observe::{State, recorder};
use vmm_sys_util::eventfd::EventFd;

use super::super::worker::Fault;
use crate::pci::Msix;
use crate::throttle::Throttle;

/// The vector that means none.
pub(crate) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A device's way to interrupt its driver; clones share it.
#[derive(Clone)]
pub(crate) struct Interrupter(Arc<Shared>);

struct Shared {
    device: String,
    way: Way,
    isr: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    driver_ready: AtomicBool,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    reports: Throttle,
}

/// How interrupts reach the driver.
enum Way {
    /// As messages of a PCI function.
    Msix(Arc<Msix>),
    /// As events of a front-end (vhost-user).
    Calls(Calls),
}

/// The events of each queue. A front-end replaces them at any time; the mutex is the queue's own and
/// held for one write.
struct Calls {
    calls: Vec<Mutex<Option<EventFd>>>,
    errors: Vec<Mutex<Option<EventFd>>>,
}

fn signal(event: Option<&Mutex<Option<EventFd>>>) {
    let event = event.map(|event| event.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(event) = event.as_ref().and_then(|event| event.as_ref()) {
        // A full counter is a signal as well.
        let _ = event.write(1);
    }
}

impl fmt::Debug for Interrupter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Interrupter").field(&self.0.device).finish()
    }
}

impl Interrupter {
    pub(crate) fn new(device: &str, msix: Arc<Msix>, queues: u16) -> Self {
        Self::with(device, Way::Msix(msix), queues)
    }

    /// One for a front-end that names its events later.
    pub(crate) fn with_calls(device: &str, queues: usize) -> Self {
        let none = || (0..queues).map(|_| Mutex::default()).collect();
        let calls = Calls {
            calls: none(),
            errors: none(),
        };
        Self::with(device, Way::Calls(calls), 0)
    }

    fn with(device: &str, way: Way, queues: u16) -> Self {
        let none = || AtomicU16::new(NO_VECTOR);
        Self(Arc::new(Shared {
            device: device.to_owned(),
            way,
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            driver_ready: AtomicBool::new(false),
            config_vector: none(),
            queue_vectors: (0..queues).map(|_| none()).collect(),
            reports: Throttle::default(),
        }))
    }

    /// Chains of the queue were completed.
    pub(crate) fn queue(&self, index: u16) {
        match &self.0.way {
            Way::Msix(msix) => {
                self.0.isr.fetch_or(ISR_QUEUE, Ordering::Relaxed);
                msix.trigger(self.queue_vector(index));
            }
            Way::Calls(events) => signal(events.calls.get(usize::from(index))),
        }
    }

    /// From now on the queue interrupts by this event, or not at all.
    pub(crate) fn set_call(&self, index: usize, event: Option<EventFd>) {
        if let Way::Calls(events) = &self.0.way {
            set(&events.calls, index, event);
        }
    }

    /// From now on the queue says by this event that it cannot go on.
    pub(crate) fn set_error(&self, index: usize, event: Option<EventFd>) {
        if let Way::Calls(events) = &self.0.way {
            set(&events.errors, index, event);
        }
    }

    /// The device's configuration changed.
    pub(crate) fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::Release);
        if self.0.driver_ready.load(Ordering::Acquire)
            && let Way::Msix(msix) = &self.0.way
        {
            self.0.isr.fetch_or(ISR_CONFIG, Ordering::Relaxed);
            let vector = self.0.config_vector.load(Ordering::Acquire);
            msix.trigger(vector);
        }
    }

    /// The device's name.
    pub(crate) fn device(&self) -> &str {
        &self.0.device
    }

    /// The device cannot go on before it is reset. Only the first fault up to then is reported,
    /// and not too often: the guest decides how often it breaks its rings.
    pub(crate) fn fault(&self, fault: Fault) {
        if !self.0.needs_reset.swap(true, Ordering::AcqRel) {
            if self.0.reports.pass() {
                recorder().record(fault.observed(&self.0.device), State::Open);
            }
            self.config_changed();
        }
        if let Way::Calls(events) = &self.0.way {
            for event in &events.errors {
                signal(Some(event));
            }
        }
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn set_driver_ready(&self) {
        self.0.driver_ready.store(true, Ordering::Release);
    }

    pub(super) fn generation(&self) -> u8 {
        self.0.generation.load(Ordering::Acquire)
    }

    pub(super) fn take_isr(&self) -> u8 {
        self.0.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.0.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        self.0
            .queue_vectors
            .get(usize::from(index))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        let vector = self.existing(vector);
        self.0.config_vector.store(vector, Ordering::Release);
    }

    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.0.queue_vectors.get(usize::from(index)) {
            slot.store(self.existing(vector), Ordering::Release);
        }
    }

    /// A vector that does not exist is none, which the driver sees when it reads it back.
    fn existing(&self, vector: u16) -> u16 {
        let vectors = match &self.0.way {
            Way::Msix(msix) => msix.vectors(),
            Way::Calls(_) => 0,
        };
        if vector < vectors { vector } else { NO_VECTOR }
    }

    /// ISR, generation, whether a reset is needed, whether the driver is ready.
    pub(super) fn saved(&self) -> (u8, u8, bool, bool) {
        (
            self.0.isr.load(Ordering::Acquire),
            self.generation(),
            self.needs_reset(),
            self.0.driver_ready.load(Ordering::Acquire),
        )
    }

    /// Undoes [`saved`](Self::saved) in another process. The vectors are set like a driver would.
    pub(super) fn restore(&self, (isr, generation, needs_reset, ready): (u8, u8, bool, bool)) {
        self.0.isr.store(isr, Ordering::Release);
        self.0.generation.store(generation, Ordering::Release);
        self.0.needs_reset.store(needs_reset, Ordering::Release);
        self.0.driver_ready.store(ready, Ordering::Release);
    }

    /// The device is as new. The generation goes on, so that nobody takes old for new.
    pub(super) fn reset(&self) {
        self.0.driver_ready.store(false, Ordering::Release);
        self.0.needs_reset.store(false, Ordering::Release);
        self.0.isr.store(0, Ordering::Release);
        self.0.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.0.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }
}

fn set(events: &[Mutex<Option<EventFd>>], index: usize, event: Option<EventFd>) {
    if let Some(place) = events.get(index) {
        *place.lock().unwrap_or_else(PoisonError::into_inner) = event;
    }
}

/// A device's way to say that its configuration changed from outside.
#[derive(Debug, Clone)]
pub struct ConfigSignal(Interrupter);

impl ConfigSignal {
    pub(super) fn new(interrupter: Interrupter) -> Self {
        Self(interrupter)
    }

    /// The configuration changed: the generation grows and a ready driver is interrupted.
    pub fn changed(&self) {
        self.0.config_changed();
    }
}
