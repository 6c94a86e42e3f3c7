//! A worker's side of a live disk.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use strake_observe::{Observation, Result};

use super::LiveDisk;
use super::disk::{QueueShared, lock};
use crate::{BadRequest, Completion, ImageQueue, Operation, ReadOnlyDisk, Request, SECTOR_BYTES};

/// One worker's way into a [`LiveDisk`]. Owned by one thread.
///
/// The worker's loop: wait for [`event`](Self::event) (and for the guest), then
/// [`reap`](Self::reap), [`submit`](Self::submit) what the guest has, [`push`](Self::push) once.
///
/// Requests that find the gate closed wait in here and go on when it opens, in the order in which
/// they came; the event is signalled for that too. A worker that stops polling while requests are
/// in flight holds up a switch-over: drain before stopping.
pub struct DiskQueue {
    disk: Arc<LiveDisk>,
    shared: Arc<QueueShared>,
    image: Box<dyn ImageQueue>,
    generation: u64,
    /// Submitted, not yet inside the gate.
    waiting: VecDeque<Request>,
    /// Failed before they got anywhere; handed out by the next `reap`.
    refused: VecDeque<(u64, Operation, Observation)>,
    /// What is inside the gate, by the tag that the image's queue knows it by.
    inside: Vec<Option<Inside>>,
    free: Vec<usize>,
}

#[derive(Debug, Clone, Copy)]
struct Inside {
    tag: u64,
    op: Operation,
    offset: u64,
    len: u64,
}

impl std::fmt::Debug for DiskQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskQueue")
            .field("disk", &self.disk.name())
            .field("generation", &self.generation)
            .field("waiting", &self.waiting.len())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl DiskQueue {
    pub(super) fn new(
        disk: Arc<LiveDisk>,
        shared: Arc<QueueShared>,
        image: Box<dyn ImageQueue>,
        generation: u64,
    ) -> Self {
        Self {
            disk,
            shared,
            image,
            generation,
            waiting: VecDeque::new(),
            refused: VecDeque::new(),
            inside: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Readable when [`reap`](Self::reap) has something to do. It stays the same descriptor for
    /// the life of the queue.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// The disk it belongs to.
    #[must_use]
    pub fn disk(&self) -> &Arc<LiveDisk> {
        &self.disk
    }

    /// How many requests were submitted and not yet reaped, parked ones included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.waiting.len() + self.refused.len() + (self.inside.len() - self.free.len())
    }

    /// Takes a request. It starts with the next [`push`](Self::push). One that cannot be done
    /// comes back failed from [`reap`](Self::reap).
    pub fn submit(&mut self, request: Request) {
        match self.check(&request) {
            Ok(()) => self.waiting.push_back(request),
            Err(seen) => {
                self.refused.push_back((request.tag, request.op, seen));
                self.shared.event.signal();
            }
        }
    }

    /// Starts what was submitted, as far as the gate lets it: one system call.
    ///
    /// # Errors
    /// When the host's I/O engine is broken; the disk cannot go on then.
    pub fn push(&mut self) -> Result<()> {
        // Even with nothing to start: the old image is let go, and its file with it.
        if self.generation != self.disk.generation() && self.disk.gate.enter() {
            let followed = self.follow();
            self.disk.gate.leave();
            followed?;
        }
        while !self.waiting.is_empty() && self.disk.gate.enter() {
            if let Err(seen) = self.follow() {
                self.disk.gate.leave();
                return Err(seen);
            }
            let Some(request) = self.waiting.pop_front() else {
                self.disk.gate.leave();
                break;
            };
            self.start(request);
        }
        self.image.push()
    }

    /// Hands out what has ended, each with its tag, and starts what was waiting for the gate.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn reap(&mut self, done: &mut dyn FnMut(u64, Result<()>)) -> Result<()> {
        // Before looking, so that what ends after the look signals again.
        self.shared.event.clear();
        while let Some((tag, op, seen)) = self.refused.pop_front() {
            self.disk.observe_failure(op, &seen);
            done(tag, Err(seen));
        }
        let Self {
            disk,
            image,
            inside,
            free,
            ..
        } = self;
        image.reap(&mut |completion| {
            let slot = usize::try_from(completion.tag).unwrap_or(usize::MAX);
            let Some(was) = inside.get_mut(slot).and_then(Option::take) else {
                debug_assert!(false, "a completion without its request");
                return;
            };
            free.push(slot);
            // The order matters: the change is marked before the request leaves the gate (a
            // closed and drained gate means that the bitmap is complete) and before the guest
            // hears of it (what the guest knows to be written is either copied or marked).
            if was.op.changes() {
                disk.changed(was.offset, was.len);
            }
            count(disk, &was);
            if let Err(seen) = &completion.result {
                disk.observe_failure(was.op, seen);
            }
            disk.gate.leave();
            done(was.tag, completion.result);
        });
        self.push()
    }

    /// Changes over to the disk's image of the moment. Only inside the gate, so that it cannot be
    /// replaced at the same time.
    fn follow(&mut self) -> Result<()> {
        let generation = self.disk.generation();
        if generation == self.generation {
            return Ok(());
        }
        let prepared = lock(&self.shared.prepared).take_if(|(of, _)| *of == generation);
        self.image = match prepared {
            Some((_, prepared)) => prepared,
            // It was opened after the others were prepared.
            None => self
                .disk
                .image()
                .open_queue(self.shared.depth, &self.shared.event)?,
        };
        self.generation = generation;
        Ok(())
    }

    fn start(&mut self, mut request: Request) {
        let inside = Inside {
            tag: request.tag,
            op: request.op,
            offset: request.offset,
            len: request.len(),
        };
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.inside.push(None);
                self.inside.len() - 1
            }
        };
        if let Some(place) = self.inside.get_mut(slot) {
            *place = Some(inside);
        }
        request.tag = slot as u64;
        self.image.submit(request);
    }

    fn check(&self, request: &Request) -> Result<()> {
        let len = request.len();
        let fits = request
            .offset
            .checked_add(len)
            .is_some_and(|end| end <= self.disk.size());
        let sectors =
            request.offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        let path = || self.disk.image().path().to_owned();
        if request.op != Operation::Flush && !(fits && sectors) {
            return Err(BadRequest {
                path: path(),
                operation: request.op.name().to_owned(),
                offset: request.offset,
                length: len,
                size: self.disk.size(),
            }
            .into());
        }
        if request.op.changes() && self.disk.read_only() {
            return Err(ReadOnlyDisk {
                path: path(),
                operation: request.op.name().to_owned(),
            }
            .into());
        }
        Ok(())
    }
}

impl Drop for DiskQueue {
    /// Waits for what is in flight: guest memory must not be written afterwards, and the gate must
    /// not keep counting requests that nobody reaps.
    fn drop(&mut self) {
        self.waiting.clear();
        while self.inside.len() > self.free.len() {
            let before = self.free.len();
            if self.reap(&mut |_, _| {}).is_err() {
                break;
            }
            if self.free.len() == before {
                let _ = self
                    .shared
                    .event
                    .wait(std::time::Duration::from_millis(100));
            }
        }
        // What a broken engine did not give back may still reach the image until its queue is
        // gone. The order is that of `reap`: first it has ended, then it is marked, then it leaves.
        self.image = Box::new(Gone);
        for was in self.inside.drain(..).flatten() {
            if was.op.changes() {
                self.disk.changed(was.offset, was.len);
            }
            self.disk.gate.leave();
        }
    }
}

/// Stands where a queue was.
#[derive(Debug)]
struct Gone;

impl ImageQueue for Gone {
    fn submit(&mut self, _request: Request) {}

    fn push(&mut self) -> Result<()> {
        Ok(())
    }

    fn reap(&mut self, _done: &mut dyn FnMut(Completion)) {}

    fn in_flight(&self) -> usize {
        0
    }
}

fn count(disk: &LiveDisk, was: &Inside) {
    let counters = &disk.counters;
    match was.op {
        Operation::Read => {
            counters.reads.fetch_add(1, Ordering::Relaxed);
            counters.read_bytes.fetch_add(was.len, Ordering::Relaxed);
        }
        Operation::Write => {
            counters.writes.fetch_add(1, Ordering::Relaxed);
            counters.write_bytes.fetch_add(was.len, Ordering::Relaxed);
        }
        Operation::Flush => {
            counters.flushes.fetch_add(1, Ordering::Relaxed);
        }
        Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
            counters.discards.fetch_add(1, Ordering::Relaxed);
        }
    }
}
