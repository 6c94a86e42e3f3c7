//! The destination's side of a disk that is being mirrored.
//!
//! Each queue of the disk has a [`Half`] for the time of the mirroring: a queue on the destination
//! and what is on its way there. It lies behind a lock that the queue's worker takes for a moment,
//! so that whoever ends the mirroring can take it away at any instant, be the worker asleep and the
//! destination hung. A write whose half was taken away is like one whose half failed: its blocks are
//! marked and the guest is told what the source said.
//!
//! What was taken away may still be written to the destination. It is kept in the [`Mirror`] until
//! the job lets it end ([`Mirror::settle`]), before anything else is copied.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use strake_observe::{Observation, Result};

use super::disk::lock;
use super::zones::{Wake, Zones};
use crate::raw::Aligned;
use crate::{DirtyBitmap, Event, Image, ImageQueue, Operation, Request};

/// The data on its way to the destination from one queue at most. Guest memory may change while it
/// is written, and source and destination must get the same, so both are written from a copy of it.
/// A single larger write goes alone.
const BOUNCE_BUDGET: u64 = 8 * 1024 * 1024;

impl Wake for Event {
    fn wake(&self) {
        self.signal();
    }
}

/// One mirroring of a disk, from its beginning until it is ended for whatever reason.
#[derive(Debug)]
pub(crate) struct Mirror {
    pub(crate) zones: Zones<Event>,
    destination: Arc<dyn Image>,
    /// Wakes the job's thread.
    owner: Arc<Event>,
    failure: Mutex<Option<Observation>>,
    /// What was taken away from the queues.
    ended: Mutex<Vec<Half>>,
    /// Bytes that arrived by the guest's own writes.
    arrived: AtomicU64,
}

impl Mirror {
    /// Of a disk whose blocks yet to be copied are those that `bitmap` marks.
    pub(crate) fn new(
        bitmap: Arc<DirtyBitmap>,
        destination: Arc<dyn Image>,
        owner: Arc<Event>,
    ) -> Arc<Self> {
        Arc::new(Self {
            zones: Zones::new(bitmap),
            destination,
            owner,
            failure: Mutex::new(None),
            ended: Mutex::new(Vec::new()),
            arrived: AtomicU64::new(0),
        })
    }

    /// The destination cannot be written: the mirroring ends, the guest notices nothing.
    pub(crate) fn fail(&self, seen: Observation) {
        lock(&self.failure).get_or_insert(seen);
        self.zones.off();
        self.tell();
    }

    /// Why it ended, if the destination failed.
    pub(crate) fn failure(&self) -> Option<Observation> {
        lock(&self.failure).clone()
    }

    /// Tells the job's thread that it has ended.
    pub(super) fn tell(&self) {
        self.owner.signal();
    }

    /// Whether it goes on.
    pub(crate) fn is_on(&self) -> bool {
        self.zones.is_on()
    }

    /// Bytes that arrived by the guest's own writes.
    pub(crate) fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Waits until nothing is on its way to the destination any more. For an ended mirroring.
    pub(crate) fn settle(&self) {
        let ended = std::mem::take(&mut *lock(&self.ended));
        // Dropping a queue waits for what is in flight.
        drop(ended);
    }

    pub(super) fn keep(&self, half: Half) {
        lock(&self.ended).push(half);
    }
}

/// The destination's side of one queue.
#[derive(Debug)]
pub(crate) struct Half {
    // First: dropped before the memory that its requests are about.
    queue: Box<dyn ImageQueue>,
    mirror: Arc<Mirror>,
    /// By the tag that the source's queue knows the request by as well.
    flying: Vec<Option<Flying>>,
    /// Bytes of data on their way.
    bounced: u64,
}

#[derive(Debug)]
struct Flying {
    since: Instant,
    len: u64,
    /// Held for the device, which reads it.
    bounce: Option<Arc<Aligned>>,
}

impl Half {
    pub(super) fn open(mirror: &Arc<Mirror>, depth: u32, event: &Arc<Event>) -> Result<Self> {
        Ok(Self {
            queue: mirror.destination.open_queue(depth, event)?,
            mirror: Arc::clone(mirror),
            flying: Vec::new(),
            bounced: 0,
        })
    }

    pub(super) fn mirror(&self) -> &Arc<Mirror> {
        &self.mirror
    }

    /// Whether the data of a write may be copied now; if not, something is on its way whose end
    /// makes room.
    pub(super) fn has_room(&self, len: u64) -> bool {
        self.bounced == 0 || self.bounced.saturating_add(len) <= BOUNCE_BUDGET
    }

    /// Sends a change on its way; gives back the memory that the source is to be written from.
    pub(super) fn submit(&mut self, slot: usize, request: &Request) -> Option<Arc<Aligned>> {
        let len = request.len();
        let room = usize::try_from(len).unwrap_or(0);
        let bounce = (request.op == Operation::Write).then(|| {
            let mut bounce = Aligned::new(room);
            let mut to = bounce.bytes_mut();
            for buffer in &request.buffers {
                let count = buffer.copy_to(to);
                to = to.get_mut(count..).unwrap_or_default();
            }
            Arc::new(bounce)
        });
        if self.flying.len() <= slot {
            self.flying.resize_with(slot + 1, || None);
        }
        if bounce.is_some() {
            self.bounced = self.bounced.saturating_add(len);
        }
        if let Some(place) = self.flying.get_mut(slot) {
            *place = Some(Flying {
                since: Instant::now(),
                len,
                bounce: bounce.clone(),
            });
        }
        self.queue.submit(Request {
            tag: slot as u64,
            op: request.op,
            offset: request.offset,
            buffers: bounce.iter().map(|it| it.buffer(room)).collect(),
        });
        bounce
    }

    /// Starts what was submitted.
    pub(super) fn push(&mut self) {
        if let Err(seen) = self.queue.push() {
            self.mirror.fail(seen);
        }
    }

    /// Says of each change that ended whether it arrived.
    pub(super) fn reap(&mut self, done: &mut dyn FnMut(usize, bool)) {
        let Self {
            queue,
            mirror,
            flying,
            bounced,
        } = self;
        queue.reap(&mut |completion| {
            let slot = usize::try_from(completion.tag).unwrap_or(usize::MAX);
            let Some(was) = flying.get_mut(slot).and_then(Option::take) else {
                debug_assert!(false, "a completion without its request");
                return;
            };
            if was.bounce.is_some() {
                *bounced = bounced.saturating_sub(was.len);
            }
            match completion.result {
                Ok(()) => {
                    mirror.arrived.fetch_add(was.len, Ordering::Relaxed);
                    done(slot, true);
                }
                Err(seen) => {
                    mirror.fail(seen);
                    done(slot, false);
                }
            }
        });
    }

    /// Whether anything is on its way.
    pub(super) fn is_busy(&self) -> bool {
        self.queue.in_flight() > 0
    }

    /// Whether something is on its way for longer than `limit`.
    pub(super) fn hangs(&self, limit: Duration) -> bool {
        let since = self.flying.iter().flatten().map(|flying| flying.since);
        since.min().is_some_and(|since| since.elapsed() > limit)
    }
}
