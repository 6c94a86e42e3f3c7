//! A queue on a raw image: requests as jobs, jobs as steps for the ring.
//!
//! `job.rs` plans the steps; here they find a place in the ring, a range to themselves where the
//! device's blocks are large, and their end.

use std::collections::VecDeque;
use std::sync::Arc;

use strake_observe::{Observation, Result};

use super::aligned::Aligned;
use super::failures::{Call, Failure};
use super::job::{BOUNCE_BYTES, Job, Next, Planned};
use super::locks::Hold;
use super::{RawFile, failed};
use crate::uring::{Ended, Ring};
use crate::{
    Access, Completion, Event, ImageQueue, Operation, ReadOnlyDisk, Request, SECTOR_BYTES,
};

/// The bounce memory of one queue at most, whatever a guest misaligns: jobs over it wait until
/// others have ended. It covers the latency of any device at the speed of copying memory.
pub(super) const BOUNCE_BUDGET: u64 = 16 * BOUNCE_BYTES;

#[derive(Debug)]
pub(super) struct RawQueue {
    file: Arc<RawFile>,
    ring: Ring,
    event: Arc<Event>,
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs whose next step can be started.
    ready: VecDeque<usize>,
    /// Jobs that wait for a range.
    blocked: VecDeque<usize>,
    /// Jobs that wait for bounce memory.
    starved: VecDeque<usize>,
    /// Bounce memory of the steps in flight.
    bounced: u64,
    ended: VecDeque<Completion>,
    zeroes: Arc<Aligned>,
}

impl RawQueue {
    pub(super) fn new(file: &Arc<RawFile>, depth: u32, event: &Arc<Event>) -> Result<Self> {
        Ok(Self {
            file: Arc::clone(file),
            ring: Ring::new(Arc::clone(&file.fd), &file.path, depth, event)?,
            event: Arc::clone(event),
            jobs: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            blocked: VecDeque::new(),
            starved: VecDeque::new(),
            bounced: 0,
            ended: VecDeque::new(),
            zeroes: RawFile::zeroes(),
        })
    }

    fn check(&self, request: &Request) -> Result<()> {
        let len = request.len();
        if request.op.changes() && self.file.access == Access::ReadOnly {
            return Err(ReadOnlyDisk {
                path: self.file.path.clone(),
                operation: request.op.name().to_owned(),
            }
            .into());
        }
        let sectors =
            request.offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        if request.op != Operation::Flush && !(sectors && self.file.contains(request.offset, len)) {
            return Err(self
                .file
                .bad_request(request.op, request.offset, len)
                .into());
        }
        Ok(())
    }

    /// Starts the next step of a job, or ends it.
    fn step(&mut self, index: usize) {
        let Some(job) = self.jobs.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        if job.left == 0 && job.op != Operation::Flush {
            self.finish_at_once(index, Ok(()));
            return;
        }
        if job.range.is_none() && job.op.changes() && self.file.alignment.offset > SECTOR_BYTES {
            let align = self.file.alignment.offset;
            let whole = job.asked.0 % align == 0 && job.asked.1 % align == 0;
            let hold = if whole { Hold::Shared } else { Hold::Alone };
            let start = job.asked.0 - job.asked.0 % align;
            let end = (job.asked.0 + job.asked.1).next_multiple_of(align);
            job.range = self.file.locks.take(start, end, hold, &self.event);
            if job.range.is_none() {
                self.blocked.push_back(index);
                return;
            }
        }
        let room = BOUNCE_BUDGET.saturating_sub(self.bounced);
        match job.plan(&self.file, &self.zeroes, room) {
            Ok(Planned::Step(step)) => {
                self.bounced += job.bounced;
                if self.ring.start(index, step).is_err() {
                    // No room after all; the caller checks, so this is the ring's own trouble.
                    self.finish_at_once(index, Err(Failure::new(Call::Submit, libc::EIO)));
                }
            }
            Ok(Planned::Nothing) => self.finish_at_once(index, Ok(())),
            // Whatever holds the memory is in flight and wakes the owner when it ends.
            Ok(Planned::NoRoom) => self.starved.push_back(index),
            Err(failure) => self.finish_at_once(index, Err(failure)),
        }
    }

    fn finish(&mut self, index: usize, result: std::result::Result<(), Failure>) {
        let Some(job) = self.jobs.get_mut(index).and_then(Option::take) else {
            return;
        };
        self.free.push(index);
        self.bounced = self.bounced.saturating_sub(job.bounced);
        if let Some(range) = job.range {
            self.file.locks.release(range);
        }
        let (offset, len) = job.asked;
        self.ended.push_back(Completion {
            tag: job.tag,
            result: result.map_err(|failure| failed(job.op, &self.file.path, offset, len, failure)),
        });
    }

    /// Ends a job for which the kernel has nothing to do, so nothing else wakes the owner.
    fn finish_at_once(&mut self, index: usize, result: std::result::Result<(), Failure>) {
        self.finish(index, result);
        self.event.signal();
    }

    fn after(&mut self, ended: Ended) {
        let Ended {
            token,
            step,
            result,
        } = ended;
        let Some(job) = self.jobs.get_mut(token).and_then(Option::as_mut) else {
            return;
        };
        match job.after(step, result, &self.file) {
            Next::Done => self.finish(token, Ok(())),
            Next::Failed(failure) => self.finish(token, Err(failure)),
            Next::Step => {
                self.bounced = self
                    .bounced
                    .saturating_sub(std::mem::take(&mut job.bounced));
                self.ready.push_back(token);
            }
            Next::AtOnce(step) => {
                // The next part of a read-change-write. It takes the place in the ring that the
                // part before has just left.
                if self.ring.start(token, step).is_err() {
                    self.finish(token, Err(Failure::new(Call::Submit, libc::EIO)));
                }
            }
        }
    }
}

impl ImageQueue for RawQueue {
    fn submit(&mut self, request: Request) {
        if let Err(seen) = self.check(&request) {
            self.refuse(request.tag, seen);
            return;
        }
        let job = Job::new(request);
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.jobs.push(None);
                self.jobs.len() - 1
            }
        };
        if let Some(place) = self.jobs.get_mut(index) {
            *place = Some(job);
        }
        self.ready.push_back(index);
    }

    fn push(&mut self) -> Result<()> {
        self.ready.extend(self.blocked.drain(..));
        while self.ring.has_room() {
            let fed = BOUNCE_BUDGET.saturating_sub(self.bounced) >= BOUNCE_BYTES;
            let starved = if fed { self.starved.pop_front() } else { None };
            let Some(index) = starved.or_else(|| self.ready.pop_front()) else {
                break;
            };
            self.step(index);
        }
        self.ring.enter()
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        while let Some(ended) = self.ring.next_ended() {
            self.after(ended);
        }
        while let Some(completion) = self.ended.pop_front() {
            done(completion);
        }
    }

    fn in_flight(&self) -> usize {
        self.jobs.len() - self.free.len() + self.ended.len()
    }
}

impl RawQueue {
    /// Bounce memory in use.
    #[cfg(test)]
    pub(super) fn bounced(&self) -> u64 {
        self.bounced
    }

    fn refuse(&mut self, tag: u64, seen: Observation) {
        self.ended.push_back(Completion {
            tag,
            result: Err(seen),
        });
        self.event.signal();
    }
}

impl Drop for RawQueue {
    fn drop(&mut self) {
        // The ring's own drop waits for what is in flight; the ranges must not stay held. A job
        // in flight still changes its range until then, so wait first.
        while let Some(ended) = self.ring.wait_ended() {
            drop(ended);
        }
        for range in self.jobs.iter().flatten().filter_map(|job| job.range) {
            self.file.locks.release(range);
        }
    }
}
