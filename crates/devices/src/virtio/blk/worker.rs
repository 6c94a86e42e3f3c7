//! The thread of one virtqueue of a disk.
//!
//! ```text
//!  kick ─▶ pop a batch ─▶ parse ─▶ DiskQueue::submit … push (one system call)
//!  disk event ─▶ reap ─▶ next step, or status byte + used ring ─▶ one interrupt per batch
//! ```
//!
//! A request holds a slot from the moment it is popped until it is completed, and its slot's number
//! is its tag: a guest that makes one head available twice gets two requests, not a mix-up. There
//! are as many slots as the queue has entries; when all are taken, popping waits for a completion.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use strake_block::{DiskQueue, Operation, Request};
use strake_memory::GuestMemory;
use strake_observe::Result;
use vmm_sys_util::eventfd::EventFd;

use super::request::{Parsed, Rules, Status, Step, parse, write_status};
use crate::virtio::guest::as_fd;
use crate::virtio::{ActiveQueue, Chain, Fault, Poller, Progress, Ready, VirtQueue, Work};

/// Chains per step, so that completions and a request to stop are looked at in between.
const BATCH: usize = 64;

const KICK: u64 = 0;
const DISK: u64 = 1;

struct Slot {
    chain: Chain,
    steps: VecDeque<Step>,
    status: Status,
}

/// The work of one virtqueue.
pub(super) struct BlkWork {
    name: String,
    queue: VirtQueue,
    kick: EventFd,
    /// Before `memory`: dropping it waits for what still uses guest memory.
    disk: DiskQueue,
    memory: Arc<GuestMemory>,
    rules: Rules,
    /// Whether the guest keeps the cache on; absent if its driver cannot flush.
    writeback: Option<Arc<AtomicBool>>,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    ended: Vec<(u64, bool)>,
    accepting: bool,
}

impl BlkWork {
    pub(super) fn new(
        name: String,
        active: ActiveQueue,
        disk: DiskQueue,
        memory: Arc<GuestMemory>,
        rules: Rules,
        writeback: Option<Arc<AtomicBool>>,
    ) -> Self {
        let size = usize::from(active.queue.size());
        Self {
            name,
            queue: active.queue,
            kick: active.kick,
            disk,
            memory,
            rules,
            writeback,
            slots: (0..size).map(|_| None).collect(),
            free: (0..size).rev().collect(),
            ended: Vec::with_capacity(size),
            accepting: false,
        }
    }

    /// One batch. Whatever breaks in it, the rest is done all the same: what was submitted is
    /// pushed, or the disk would never end it and a reset would wait for ever; what was completed
    /// is told to the driver. The first fault counts.
    fn step(&mut self) -> Result<Progress, Fault> {
        let reaped = self.reap();
        let progress = match (&reaped, self.accepting) {
            (Ok(()), true) => self.accept(),
            _ => Ok(Progress::Wait),
        };
        let pushed = self
            .disk
            .push()
            .map_err(|cause| Fault::backend(self.queue.index(), cause));
        let notified = self.queue.notify();
        reaped?;
        let progress = progress?;
        pushed?;
        notified?;
        Ok(progress)
    }

    /// Takes all that the disk has ended.
    fn reap(&mut self) -> Result<(), Fault> {
        let mut ended = std::mem::take(&mut self.ended);
        let reaped = self
            .disk
            .reap(&mut |tag, result| ended.push((tag, result.is_ok())));
        let mut outcome = reaped.map_err(|cause| Fault::backend(self.queue.index(), cause));
        for (tag, ok) in ended.drain(..) {
            let index = usize::try_from(tag).unwrap_or(usize::MAX);
            if !ok && let Some(Some(slot)) = self.slots.get_mut(index) {
                // The disk has observed why; a guest only hears that it failed.
                slot.status = Status::Error;
                slot.steps.clear();
            }
            outcome = outcome.and(self.advance(index));
        }
        self.ended = ended;
        outcome
    }

    /// Submits the next step of a request, or completes it.
    fn advance(&mut self, index: usize) -> Result<(), Fault> {
        let Some(place) = self.slots.get_mut(index) else {
            return Ok(());
        };
        if let Some(step) = place.as_mut().and_then(|slot| slot.steps.pop_front()) {
            self.disk.submit(Request {
                tag: index as u64,
                op: step.op,
                offset: step.offset,
                buffers: step.buffers,
            });
            return Ok(());
        }
        let Some(slot) = place.take() else {
            return Ok(());
        };
        self.free.push(index);
        self.finish(&slot.chain, slot.status)
    }

    fn finish(&mut self, chain: &Chain, status: Status) -> Result<(), Fault> {
        // It was in RAM when the request was parsed, and RAM does not change.
        let _ = write_status(chain, &self.memory, status);
        let written = u32::try_from(chain.writable.len()).unwrap_or(u32::MAX);
        self.queue.complete(chain.head, written)
    }

    /// Takes new requests, one batch at most.
    fn accept(&mut self) -> Result<Progress, Fault> {
        self.queue.disable_kicks()?;
        for _ in 0..BATCH {
            if self.free.is_empty() {
                // A completion wakes us; the ring is looked at again then.
                return Ok(Progress::Wait);
            }
            match self.queue.pop()? {
                Some(chain) => self.begin(chain)?,
                None if self.queue.enable_kicks()? => {}
                None => return Ok(Progress::Wait),
            }
        }
        Ok(Progress::More)
    }

    fn begin(&mut self, chain: Chain) -> Result<(), Fault> {
        match parse(&chain, &self.memory, &self.rules) {
            Parsed::Broken(reason) => Err(self.queue.fault(reason)),
            Parsed::Answer(status) => self.finish(&chain, status),
            Parsed::Start(mut steps) => {
                let changes = steps
                    .iter()
                    .any(|step| step.op != Operation::Flush && step.op.changes());
                if changes && self.writes_through() {
                    steps.push_back(Step::flush());
                }
                let Some(index) = self.free.pop() else {
                    return Err(self.queue.fault("more requests than the queue can hold"));
                };
                if let Some(place) = self.slots.get_mut(index) {
                    *place = Some(Slot {
                        chain,
                        steps,
                        status: Status::Ok,
                    });
                }
                self.advance(index)
            }
        }
    }

    fn writes_through(&self) -> bool {
        self.writeback
            .as_ref()
            .is_none_or(|writeback| !writeback.load(Ordering::Acquire))
    }
}

impl Work for BlkWork {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn watch(&self, poller: &Poller) -> Result<()> {
        poller.readable(as_fd(&self.kick), KICK)?;
        poller.readable(self.disk.event(), DISK)
    }

    fn start(&mut self) -> Result<Progress, Fault> {
        self.accepting = true;
        self.disk.hurry(false);
        self.step()
    }

    fn ready(&mut self, why: Ready, _: &Poller) -> Result<Progress, Fault> {
        if why == Ready::Source(KICK) {
            let _ = self.kick.read();
        }
        self.step()
    }

    fn stop(&mut self) {
        self.accepting = false;
        // The machine comes to rest: what is left must not take as long as a limit makes it.
        self.disk.hurry(true);
    }

    fn idle(&self) -> bool {
        self.disk.in_flight() == 0 && self.free.len() == self.slots.len()
    }
}
