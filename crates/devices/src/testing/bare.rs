//! A device's workers in the caller's thread.
//!
//! No transport, no threads: what a fuzzer does to the rings is seen at once and in the same order
//! each time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_memory::GuestMemory;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::Driver;
use super::host::Lines;
use super::ring::Ring;
use crate::pci::Msix;
use crate::virtio::{
    Activation, ActiveQueue, EVENT_IDX, Fault, Poller, Progress, Ready, VirtQueue, VirtioDevice,
    Work, bare_interrupter,
};

/// Steps that a worker may take before it must have nothing more to do: far more than the queue
/// sizes and batches of any device need.
const STEPS: usize = 100_000;

/// A device's workers with their queues.
pub struct Bare {
    works: Vec<Box<dyn Work>>,
    poller: Poller,
    pub rings: Vec<Ring>,
    pub faults: Vec<Fault>,
}

impl std::fmt::Debug for Bare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bare")
    }
}

impl Bare {
    /// Activates `device` with queues of `size` and these features.
    pub fn new(
        device: &dyn VirtioDevice,
        memory: &Arc<GuestMemory>,
        features: u64,
        size: u16,
    ) -> Self {
        Self::activate(device, memory, features, size, None)
    }

    /// The same with all used rings at `used`, which need not be in RAM.
    pub fn with_used_ring_at(
        device: &dyn VirtioDevice,
        memory: &Arc<GuestMemory>,
        features: u64,
        size: u16,
        used: u64,
    ) -> Self {
        Self::activate(device, memory, features, size, Some(used))
    }

    fn activate(
        device: &dyn VirtioDevice,
        memory: &Arc<GuestMemory>,
        features: u64,
        size: u16,
        used: Option<u64>,
    ) -> Self {
        let limits = device.queue_sizes();
        let count = u16::try_from(limits.len()).unwrap();
        let msix = Msix::new(device.name(), count + 1, &Lines::default()).unwrap();
        let interrupter = bare_interrupter(device.name(), Arc::new(msix), count);
        let mut rings = Vec::new();
        let mut queues = Vec::new();
        for (index, limit) in (0..).zip(limits) {
            let event_idx = features & EVENT_IDX != 0;
            let ring = Ring::new(
                Arc::clone(memory),
                Driver::ring_base(index),
                size,
                event_idx,
            );
            let mut queue = Queue::new(limit).unwrap();
            queue.try_set_size(size).unwrap();
            queue
                .try_set_desc_table_address(GuestAddress(ring.descriptors()))
                .unwrap();
            queue
                .try_set_avail_ring_address(GuestAddress(ring.avail()))
                .unwrap();
            queue
                .try_set_used_ring_address(GuestAddress(used.unwrap_or(ring.used())))
                .unwrap();
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            rings.push(ring);
            queues.push(Some(ActiveQueue {
                queue: VirtQueue::new(index, queue, Arc::clone(memory), interrupter.clone()),
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            }));
        }
        let works = device
            .activate(Activation {
                features,
                memory: Arc::clone(memory),
                queues,
            })
            .unwrap();
        let poller = Poller::new().unwrap();
        for work in &works {
            work.watch(&poller).unwrap();
        }
        Self {
            works,
            poller,
            rings,
            faults: Vec::new(),
        }
    }

    /// Lets all workers look at everything until they have nothing more to do. A worker that met a
    /// fault is stopped, as its thread would do, and looked at no more.
    pub fn run(&mut self) {
        let works = std::mem::take(&mut self.works);
        for mut work in works {
            match Self::settle(&mut *work, &self.poller) {
                Ok(()) => self.works.push(work),
                Err(fault) => {
                    work.stop();
                    Self::drain(&mut *work, &self.poller);
                    self.faults.push(fault);
                }
            }
        }
    }

    fn settle(work: &mut dyn Work, poller: &Poller) -> Result<(), Fault> {
        let mut progress = work.start()?;
        for _ in 0..STEPS {
            progress = match progress {
                Progress::More => work.ready(Ready::Again, poller)?,
                Progress::Wait if work.idle() => return Ok(()),
                Progress::Wait => {
                    std::thread::yield_now();
                    work.ready(Ready::Source(1), poller)?
                }
            };
            if progress == Progress::Wait && !Self::has_backend(work) {
                return Ok(());
            }
        }
        panic!("a worker does not come to rest");
    }

    /// Only a work with requests at its backend is waited for.
    fn has_backend(work: &dyn Work) -> bool {
        !work.idle()
    }

    fn drain(work: &mut dyn Work, poller: &Poller) {
        let until = Instant::now() + Duration::from_secs(10);
        while !work.idle() {
            assert!(Instant::now() < until, "a worker does not drain");
            let _ = work.ready(Ready::Source(1), poller);
        }
    }

    /// Stops what is left.
    pub fn stop(mut self) -> Vec<Fault> {
        for work in &mut self.works {
            work.stop();
            Self::drain(&mut **work, &self.poller);
        }
        self.faults
    }
}
