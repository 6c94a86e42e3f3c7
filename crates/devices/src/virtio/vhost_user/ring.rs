//! One ring, as a front-end has set it up so far, and who works for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use strake_observe::{State, recorder};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::regions::Regions;
use crate::virtio::worker::Workers;

/// The largest ring.
pub(super) const SIZE_LIMIT: u16 = 1024;

/// A ring.
pub(super) struct Ring {
    pub(super) size: u16,
    /// Descriptor table, available and used ring, at the front-end's own addresses.
    pub(super) addresses: Option<[u64; 3]>,
    /// The available index that is looked at next; that of the running queue comes back here when
    /// it stops.
    pub(super) position: Arc<AtomicU16>,
    pub(super) kick: Option<EventFd>,
    pub(super) enabled: bool,
    workers: Option<Workers>,
}

impl Ring {
    pub(super) fn new() -> Self {
        Self {
            size: 0,
            addresses: None,
            position: Arc::default(),
            kick: None,
            enabled: false,
            workers: None,
        }
    }

    /// Whether the front-end wants it to run.
    pub(super) fn wanted(&self) -> bool {
        self.kick.is_some() && self.enabled && self.size > 0 && self.addresses.is_some()
    }

    pub(super) fn runs(&self) -> bool {
        self.workers.is_some()
    }

    pub(super) fn run(&mut self, workers: Workers) {
        self.workers = Some(workers);
    }

    /// Finishes what is in flight and takes nothing more.
    pub(super) fn stop(&mut self) {
        if let Some(workers) = self.workers.take() {
            let (works, seen) = workers.join();
            // The queue tells its position when it goes.
            drop(works);
            for seen in seen {
                recorder().record(seen, State::Open);
            }
        }
    }

    pub(super) fn position(&self) -> u16 {
        self.position.load(Ordering::Acquire)
    }

    /// The rings in guest memory, as the device will use them.
    pub(super) fn rings(&self, regions: &Regions) -> Result<Queue, String> {
        let [descriptors, available, used] = self.addresses.ok_or("its addresses are missing")?;
        let within = |address: u64, what: &str| {
            regions
                .guest_address(address)
                .ok_or_else(|| format!("its {what} is not in the memory that was shared"))
        };
        let build = || -> Result<Queue, virtio_queue::Error> {
            let mut rings = Queue::new(SIZE_LIMIT)?;
            rings.try_set_size(self.size)?;
            Ok(rings)
        };
        let mut rings = build().map_err(|error| error.to_string())?;
        rings
            .try_set_desc_table_address(within(descriptors, "descriptor table")?)
            .map_err(|error| error.to_string())?;
        rings
            .try_set_avail_ring_address(within(available, "available ring")?)
            .map_err(|error| error.to_string())?;
        rings
            .try_set_used_ring_address(within(used, "used ring")?)
            .map_err(|error| error.to_string())?;
        rings.set_ready(true);
        let memory = regions.memory();
        if !rings.is_valid(&**memory) {
            return Err("it leaves the memory that was shared".to_owned());
        }
        rings.set_next_avail(self.position());
        let used = rings
            .used_idx(&**memory, Ordering::Acquire)
            .map_err(|error| error.to_string())?;
        rings.set_next_used(used.0);
        Ok(rings)
    }
}
