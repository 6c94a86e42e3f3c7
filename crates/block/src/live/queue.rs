//! A worker's side of a live disk.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use strake_observe::{Observation, Result};

use super::LiveDisk;
use super::claims::{Begin, Claims};
use super::disk::{QueueShared, lock};
use super::mirror::{Half, Mirror};
use super::zones::{Ticket, Turn, Zone};
use crate::raw::Aligned;
use crate::{
    BadRequest, Completion, Event, ImageQueue, Operation, ReadOnlyDisk, Request, SECTOR_BYTES,
};

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
    /// Whether the disk's limits do not count: what is left is to come to its end.
    hurries: bool,
    /// Failed before they got anywhere; handed out by the next `reap`.
    refused: VecDeque<(u64, Operation, Observation)>,
    /// What is inside the gate, by the tag that the image's queue knows it by.
    inside: Vec<Option<Inside>>,
    free: Vec<usize>,
    /// Inside the gate, waiting until what they change is no longer claimed (see `claims.rs`).
    claimed: VecDeque<(usize, Request)>,
    /// Inside the gate, waiting for their turn or for memory (see `zones.rs`).
    held: VecDeque<(usize, Request)>,
    /// How many have a half at the destination's queue.
    halves: usize,
    /// Counts requests, for those that are measured.
    started: u32,
}

#[derive(Debug)]
struct Inside {
    tag: u64,
    op: Operation,
    offset: u64,
    len: u64,
    /// When it began, if it is measured.
    began: Option<Instant>,
    counted: Counted,
    /// How it is being mirrored, if it is.
    zoned: Option<Zoned>,
}

/// Where a change on its way is counted.
#[derive(Debug)]
enum Counted {
    /// Nowhere: it is none, or it has not begun.
    Not,
    /// There were no claims when it began.
    Plain,
    By(Arc<Claims<Event>>),
}

/// A change by the zones of a mirror.
#[derive(Debug)]
struct Zoned {
    mirror: Arc<Mirror>,
    ticket: Ticket,
    there: There,
    /// How its half at the source ended.
    here: Option<Result<()>>,
    /// Held for the source's device, which reads it.
    _bounce: Option<Arc<Aligned>>,
}

/// The destination's half of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    /// There is none.
    None,
    Flying,
    Arrived,
    /// It failed, or nobody knows.
    Lost,
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
            hurries: false,
            refused: VecDeque::new(),
            inside: Vec::new(),
            free: Vec::new(),
            claimed: VecDeque::new(),
            held: VecDeque::new(),
            halves: 0,
            started: 0,
        }
    }

    /// Readable when [`reap`](Self::reap) has something to do. It stays the same descriptor for
    /// the life of the queue.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    #[cfg(test)]
    pub(super) fn shared_event(&self) -> &crate::Event {
        &self.shared.event
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

    /// Whether the disk's limits count for what this queue still has. A worker that is about to end
    /// does not wait for them.
    pub fn hurry(&mut self, hurries: bool) {
        self.hurries = hurries;
        if hurries {
            self.shared.event.signal();
        }
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
        let shared = Arc::clone(&self.shared);
        let mut half = lock(&shared.half);
        self.go_on(half.as_mut());
        while !self.waiting.is_empty() && self.disk.gate.enter() {
            if let Err(seen) = self.follow() {
                self.disk.gate.leave();
                return Err(seen);
            }
            let admitted = self.waiting.pop_front_if(|request| {
                self.hurries
                    || self
                        .disk
                        .rate
                        .admits(request.op, request.len(), &self.shared)
            });
            let Some(request) = admitted else {
                self.disk.gate.leave();
                break;
            };
            self.start(request, half.as_mut());
        }
        if let Some(half) = half.as_mut() {
            half.push();
        }
        drop(half);
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
        if self.halves > 0 {
            self.reap_halves(done);
        }
        let Self {
            disk,
            shared,
            image,
            inside,
            free,
            ..
        } = self;
        image.reap(&mut |completion| {
            let slot = usize::try_from(completion.tag).unwrap_or(usize::MAX);
            let Some(place) = inside.get_mut(slot) else {
                debug_assert!(false, "a completion without its request");
                return;
            };
            let zoned = place.as_mut().and_then(|was| was.zoned.as_mut());
            if let Some(zoned) = zoned.filter(|zoned| zoned.there == There::Flying) {
                zoned.here = Some(completion.result);
                return;
            }
            let Some(was) = place.take() else {
                debug_assert!(false, "a completion without its request");
                return;
            };
            free.push(slot);
            ended((disk, shared), was, completion.result, done);
        });
        self.push()
    }

    /// Takes what has ended at the destination.
    fn reap_halves(&mut self, done: &mut dyn FnMut(u64, Result<()>)) {
        let mut told = Vec::new();
        {
            let mut half = lock(&self.shared.half);
            if let Some(half) = half.as_mut() {
                half.reap(&mut |slot, arrived| {
                    let there = if arrived { There::Arrived } else { There::Lost };
                    told.push((slot, there));
                });
            }
            // Somebody ended the mirroring and took the halves away.
            let mirror = half.as_ref().map(Half::mirror);
            let lost = self.inside.iter().enumerate().filter(|(_, inside)| {
                let zoned = inside.as_ref().and_then(|inside| inside.zoned.as_ref());
                zoned.is_some_and(|zoned| {
                    zoned.there == There::Flying
                        && !mirror.is_some_and(|mirror| Arc::ptr_eq(mirror, &zoned.mirror))
                })
            });
            told.extend(lost.map(|(slot, _)| (slot, There::Lost)));
        }
        for (slot, there) in told {
            self.halves = self.halves.saturating_sub(1);
            let Some(place) = self.inside.get_mut(slot) else {
                continue;
            };
            let Some(zoned) = place.as_mut().and_then(|was| was.zoned.as_mut()) else {
                debug_assert!(false, "a half without its request");
                continue;
            };
            zoned.there = there;
            // Else the source's half ends later.
            if let Some(result) = zoned.here.take()
                && let Some(was) = place.take()
            {
                self.free.push(slot);
                ended((&self.disk, &self.shared), was, result, done);
            }
        }
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

    /// Starts a request that has entered the gate.
    fn start(&mut self, request: Request, half: Option<&mut Half>) {
        self.started = self.started.wrapping_add(1);
        let measured = self.disk.latency.wants(self.started);
        let inside = Inside {
            began: measured.then(Instant::now),
            tag: request.tag,
            op: request.op,
            offset: request.offset,
            len: request.len(),
            counted: Counted::Not,
            zoned: None,
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
        self.begin(slot, request, half);
    }

    /// Starts a request that is inside, if it may begin.
    fn begin(&mut self, slot: usize, request: Request, half: Option<&mut Half>) {
        if !request.op.changes() {
            self.send(slot, request);
            return;
        }
        if !self.may_begin(slot, &request) {
            self.claimed.push_back((slot, request));
            return;
        }
        let Some(half) = half else {
            self.send(slot, request);
            return;
        };
        let (offset, len) = (request.offset, request.len());
        let mirror = Arc::clone(half.mirror());
        let turn = mirror.zones.enter(offset, len, &self.shared.event);
        let (ticket, now) = match turn {
            Turn::Off => {
                self.send(slot, request);
                return;
            }
            Turn::Now(ticket) => (ticket, true),
            Turn::Later(ticket) => (ticket, false),
        };
        if let Some(inside) = self.inside.get_mut(slot).and_then(Option::as_mut) {
            inside.zoned = Some(Zoned {
                mirror,
                ticket,
                there: There::None,
                here: None,
                _bounce: None,
            });
        }
        if now {
            self.change(slot, request, half);
        } else {
            self.held.push_back((slot, request));
        }
    }

    /// Whether nobody relies on what a change is about to change.
    fn may_begin(&mut self, slot: usize, request: &Request) -> bool {
        let plain = &self.shared.plain;
        // Before it looks for claims: see `LiveDisk::has_plain_changes`.
        plain.fetch_add(1, Ordering::SeqCst);
        let counted = match self.disk.claims() {
            None => Counted::Plain,
            Some(claims) => {
                plain.fetch_sub(1, Ordering::SeqCst);
                let event = &self.shared.event;
                match claims.begin(request.offset, request.len(), event) {
                    Begin::Now => Counted::By(claims),
                    Begin::Later => return false,
                }
            }
        };
        if let Some(inside) = self.inside.get_mut(slot).and_then(Option::as_mut) {
            inside.counted = counted;
        }
        true
    }

    /// Starts what had to wait, as far as it can.
    fn go_on(&mut self, mut half: Option<&mut Half>) {
        for _ in 0..self.claimed.len() {
            let Some((slot, request)) = self.claimed.pop_front() else {
                break;
            };
            self.begin(slot, request, half.as_deref_mut());
        }
        for _ in 0..self.held.len() {
            let Some((slot, request)) = self.held.pop_front() else {
                return;
            };
            let inside = self.inside.get_mut(slot).and_then(Option::as_mut);
            let turn = match (inside.and_then(|it| it.zoned.as_ref()), &half) {
                (Some(zoned), Some(half)) if Arc::ptr_eq(half.mirror(), &zoned.mirror) => {
                    zoned.mirror.zones.again(zoned.ticket)
                }
                _ => Turn::Off,
            };
            match (turn, half.as_mut()) {
                (Turn::Now(_), Some(half)) => self.change(slot, request, half),
                (Turn::Later(_), _) => self.held.push_back((slot, request)),
                _ => {
                    if let Some(inside) = self.inside.get_mut(slot).and_then(Option::as_mut) {
                        inside.zoned = None;
                    }
                    self.send(slot, request);
                }
            }
        }
    }

    /// Starts a change whose turn it is: at the source only or on both sides.
    fn change(&mut self, slot: usize, request: Request, half: &mut Half) {
        let len = request.len();
        let mut buffers = None;
        if half.mirror().zones.zone(request.offset, len) == Zone::Both {
            if !half.has_room(len) {
                self.held.push_back((slot, request));
                return;
            }
            let bounce = half.submit(slot, &request);
            self.halves += 1;
            buffers = bounce
                .as_ref()
                .map(|it| vec![it.buffer(usize::try_from(len).unwrap_or(0))]);
            let inside = self.inside.get_mut(slot).and_then(Option::as_mut);
            if let Some(zoned) = inside.and_then(|inside| inside.zoned.as_mut()) {
                zoned.there = There::Flying;
                zoned._bounce = bounce;
            }
        }
        let buffers = buffers.unwrap_or(request.buffers);
        self.send(slot, Request { buffers, ..request });
    }

    /// Gives a request to the image's queue.
    fn send(&mut self, slot: usize, mut request: Request) {
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
        self.disk.keep_half(&self.shared);
        for was in self.inside.drain(..).flatten() {
            if was.op.changes() {
                self.disk.changed(was.offset, was.len);
            }
            if let Some(zoned) = &was.zoned {
                zoned.mirror.zones.leave(zoned.ticket);
            }
            uncount(&self.shared, &was);
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

/// A request has ended.
fn ended(
    (disk, shared): (&LiveDisk, &QueueShared),
    was: Inside,
    result: Result<()>,
    done: &mut dyn FnMut(u64, Result<()>),
) {
    // The order matters: the change is marked before its range is let go (whoever has it next
    // relies on the zone), before the request leaves the gate (a closed and drained gate means that
    // the bitmap is complete) and before the guest hears of it (what the guest knows to be written
    // is either at the destination or marked).
    match &was.zoned {
        Some(zoned) if zoned.there == There::Arrived && result.is_ok() => {
            // If the mirroring was ended meanwhile, another copy may have begun before the half at
            // the source had ended.
            if !zoned.mirror.zones.leave(zoned.ticket) {
                disk.changed(was.offset, was.len);
            }
        }
        zoned => {
            if was.op.changes() {
                disk.changed(was.offset, was.len);
            }
            if let Some(zoned) = zoned {
                zoned.mirror.zones.leave(zoned.ticket);
            }
        }
    }
    // After it is marked: a claim relies on the marks of all that has ended.
    uncount(shared, &was);
    count(disk, &was);
    if let Err(seen) = &result {
        disk.observe_failure(was.op, seen);
    }
    disk.gate.leave();
    done(was.tag, result);
}

fn uncount(shared: &QueueShared, was: &Inside) {
    match &was.counted {
        Counted::Not => {}
        Counted::Plain => {
            shared.plain.fetch_sub(1, Ordering::SeqCst);
        }
        Counted::By(claims) => claims.end(was.offset, was.len),
    }
}

fn count(disk: &LiveDisk, was: &Inside) {
    let counters = &disk.counters;
    if let Some(began) = was.began
        && matches!(was.op, Operation::Read | Operation::Write)
    {
        disk.latency.took(began.elapsed());
    }
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
