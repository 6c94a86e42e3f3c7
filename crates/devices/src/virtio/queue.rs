//! A split virtqueue as a worker owns it.
//!
//! The rings themselves are read and written by `virtio-queue`. What is added here is what a
//! hostile guest makes necessary: a chain is taken out of the ring as a whole, each descriptor read
//! exactly once; one that does not end properly (it loops, leaves its table, points to nowhere, or
//! is longer than [`CHAIN_LIMIT`]) is told apart from one that ends, and is a [`Fault`]. The number
//! of chains per look is bounded by the ring's size, because an available index that runs ahead of
//! it is a fault too.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use strake_memory::GuestMemory;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Address, Bytes, GuestAddress, GuestRegionMmap};

use super::guest::{Buffers, Part};
use super::transport::Interrupter;
use super::vhost_user::Journal;
use super::worker::Fault;

/// Most descriptors in a chain. The standard's bound is the size of the queue; indirect tables of
/// real drivers keep to it too, and no queue here is larger.
pub const CHAIN_LIMIT: usize = 1024;

const AVAIL_HEADER: u64 = 4;
const AVAIL_ENTRY: u64 = 2;
const USED_HEADER: u64 = 4;
const USED_ENTRY: u64 = 8;

/// Where `chains` puts a ring of its own: above any address that a processor has.
const PRIVATE_RING: u64 = 0xffff_ffff_ffff_0000;
const PRIVATE_BYTES: usize = 0x1000;

/// What a queue keeps for the time after it.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Where the next queue over the same rings goes on: set when this one goes.
    pub(crate) position: Arc<AtomicU16>,
    /// What is in flight, for a process after this one.
    pub(crate) journal: Option<Journal>,
    /// Chains that a queue before took out of the rings and did not complete.
    pub(crate) backlog: VecDeque<Chain>,
}

/// A request: one chain of descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name in the rings.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers,
    /// Where the device may write.
    pub writable: Buffers,
}

/// A virtqueue that a driver enabled.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    rings: Queue,
    memory: Arc<GuestMemory>,
    interrupter: Interrupter,
    /// The used index at the last call of `notify`.
    announced: u16,
    kept: Kept,
}

impl Drop for VirtQueue {
    fn drop(&mut self) {
        let next = self.rings.next_avail();
        self.kept.position.store(next, Ordering::Release);
    }
}

impl VirtQueue {
    /// The queue `index` over `rings`, which were checked to lie in `memory`.
    pub(crate) fn new(
        index: u16,
        rings: Queue,
        memory: Arc<GuestMemory>,
        interrupter: Interrupter,
    ) -> Self {
        Self {
            index,
            announced: rings.next_used(),
            rings,
            memory,
            interrupter,
            kept: Kept::default(),
        }
    }

    /// The same, with something to keep.
    pub(crate) fn keeping(mut self, kept: Kept) -> Self {
        self.kept = kept;
        self
    }

    /// The chains of these heads, which are no longer in the available ring.
    ///
    /// # Errors
    /// One of them is broken.
    pub(crate) fn chains(
        rings: &Queue,
        memory: &Arc<GuestMemory>,
        heads: &[u16],
    ) -> Result<Vec<Chain>, Fault> {
        if heads.is_empty() {
            return Ok(Vec::new());
        }
        // The crate below walks only chains that an available ring names: it gets a ring of our
        // own for them, at an address that no guest has.
        let broken = |reason: String| Fault::ring(0, reason);
        let at = GuestAddress(PRIVATE_RING);
        let region = MmapRegion::new(PRIVATE_BYTES)
            .ok()
            .and_then(|mapping| GuestRegionMmap::new(mapping, at))
            .ok_or_else(|| broken("no memory is left".to_owned()))?;
        let memory = memory
            .insert_region(Arc::new(region))
            .map_err(|error| broken(error.to_string()))?;
        let mut own = Queue::new(rings.max_size()).map_err(|error| broken(error.to_string()))?;
        let prepared = own
            .try_set_size(rings.size())
            .and_then(|()| own.try_set_desc_table_address(GuestAddress(rings.desc_table())))
            .and_then(|()| own.try_set_avail_ring_address(at));
        prepared.map_err(|error| broken(error.to_string()))?;
        own.set_ready(true);
        let count = u16::try_from(heads.len()).unwrap_or(u16::MAX);
        let mut ring = vec![0, count];
        ring.extend(heads);
        let bytes: Vec<u8> = ring.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        memory
            .write_slice(&bytes, at)
            .map_err(|error| broken(error.to_string()))?;
        let mut chains = Vec::new();
        while let Some(chain) = next_chain(&mut own, &memory, 0)? {
            chains.push(chain);
        }
        Ok(chains)
    }

    /// Its number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many chains it can hold.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.rings.size()
    }

    /// A fault of this queue.
    #[must_use]
    pub fn fault(&self, reason: impl Into<String>) -> Fault {
        Fault::ring(self.index, reason)
    }

    /// Takes the next chain that the driver made available.
    ///
    /// # Errors
    /// The ring or the chain is broken.
    pub fn pop(&mut self) -> Result<Option<Chain>, Fault> {
        if let Some(chain) = self.kept.backlog.pop_front() {
            return Ok(Some(chain));
        }
        let chain = next_chain(&mut self.rings, &self.memory, self.index)?;
        if let (Some(journal), Some(chain)) = (&mut self.kept.journal, &chain) {
            journal.begin(chain.head);
        }
        Ok(chain)
    }

    /// Gives back the last `count` chains that were popped and not completed: they are popped
    /// again, in the same order.
    pub fn undo(&mut self, count: u16) {
        let next = self.rings.next_avail().wrapping_sub(count);
        self.rings.set_next_avail(next);
    }

    /// Hands a chain back to the driver, with how many bytes the device wrote into it.
    ///
    /// # Errors
    /// The head is none of this queue.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), Fault> {
        if let Some(journal) = &mut self.kept.journal {
            journal.completing(head);
        }
        self.rings
            .add_used(&*self.memory, head, written)
            .map_err(|error| self.fault(error.to_string()))?;
        let used = self.rings.next_used();
        if let Some(journal) = &mut self.kept.journal {
            journal.completed(head, used);
        }
        Ok(())
    }

    /// Hands several chains back so that the driver sees all of them or none: a packet in several
    /// buffers must not be seen in part.
    ///
    /// # Errors
    /// A head is none of this queue.
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) -> Result<(), Fault> {
        let Some(((last, written), before)) = chains.split_last() else {
            return Ok(());
        };
        let mut position = self.rings.next_used();
        for (head, written) in before {
            if *head >= self.size() {
                return Err(self.fault("a chain has an impossible head"));
            }
            let entry = USED_HEADER + u64::from(position % self.size()) * USED_ENTRY;
            let element = [u32::from(*head).to_le(), written.to_le()];
            let at = GuestAddress(self.rings.used_ring()).unchecked_add(entry);
            self.memory
                .write_obj(element, at)
                .map_err(|error| self.fault(error.to_string()))?;
            position = position.wrapping_add(1);
        }
        self.rings.set_next_used(position);
        // The last one publishes the index, with release ordering, for all.
        self.complete(*last, *written)
    }

    /// Interrupts the driver if it wants to hear of what was completed since the last call.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn notify(&mut self) -> Result<(), Fault> {
        let used = self.rings.next_used();
        let before = std::mem::replace(&mut self.announced, used);
        if used == before {
            return Ok(());
        }
        // The driver publishes its wish and then looks at the used index; we published the used
        // index and now look at its wish. Both need the full fence in between.
        fence(Ordering::SeqCst);
        let wanted = if self.rings.event_idx_enabled() {
            let offset = AVAIL_HEADER + u64::from(self.size()) * AVAIL_ENTRY;
            let event = self.load_avail(offset)?;
            // Whether the event lies among what was completed since, in the ring's arithmetic.
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before)
        } else {
            u32::from(self.load_avail(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupter.queue(self.index);
        }
        Ok(())
    }

    /// A number in the available ring's header or behind its entries. The ring was checked to lie
    /// in guest RAM as a whole.
    fn load_avail(&self, offset: u64) -> Result<u16, Fault> {
        let at = GuestAddress(self.rings.avail_ring()).unchecked_add(offset);
        self.memory
            .load(at, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|error| self.fault(error.to_string()))
    }

    /// Asks for kicks again. Says whether something became available before: then there may be no
    /// kick for it.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn enable_kicks(&mut self) -> Result<bool, Fault> {
        let more = self
            .rings
            .enable_notification(&*self.memory)
            .map_err(|error| self.fault(error.to_string()));
        fence(Ordering::SeqCst);
        more
    }

    /// Asks for no kicks while the worker looks at the ring anyway.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn disable_kicks(&mut self) -> Result<(), Fault> {
        self.rings
            .disable_notification(&*self.memory)
            .map_err(|error| self.fault(error.to_string()))
    }
}

/// Takes the next chain that a driver made available.
fn next_chain(rings: &mut Queue, memory: &GuestMemory, index: u16) -> Result<Option<Chain>, Fault> {
    let broken = |reason: String| Fault::ring(index, reason);
    let mut available = rings
        .iter(memory)
        .map_err(|error| broken(error.to_string()))?;
    let Some(descriptors) = available.next() else {
        return Ok(None);
    };
    let mut chain = Chain {
        head: descriptors.head_index(),
        readable: Buffers::default(),
        writable: Buffers::default(),
    };
    let mut count = 0;
    let mut open = true;
    for descriptor in descriptors {
        open = descriptor.has_next();
        count += 1;
        if count > CHAIN_LIMIT {
            break;
        }
        let part = Part {
            gpa: descriptor.addr().0,
            len: descriptor.len(),
        };
        if descriptor.is_write_only() {
            chain.writable.push(part);
        } else if chain.writable.is_empty() {
            chain.readable.push(part);
        } else {
            return Err(broken(
                "a readable buffer follows a writable one".to_owned(),
            ));
        }
    }
    if count > CHAIN_LIMIT {
        return Err(broken("a chain has too many descriptors".to_owned()));
    }
    // The iterator ends in silence also where it cannot go on: then the last descriptor that
    // it gave still announced another, or it gave none.
    if open {
        return Err(broken(format!(
            "the chain from descriptor {} does not end",
            chain.head
        )));
    }
    Ok(Some(chain))
}
