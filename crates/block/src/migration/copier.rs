//! Moves chunks from the source to the destination.
//!
//! A few chunks are on their way at once, so that reading overlaps with writing; together they
//! never have more than [`Room`] bytes outstanding, so that a guest's requests do not queue behind
//! the copy. One thread, one event for both rings and for a cancellation.
//!
//! Where the time goes inside the pause is here too: then nothing else uses the devices, and the
//! chunks are small and scattered, so more of them are on their way.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::Space;
use strake_observe::{Observation, Result};

use super::pace::Pace;
use super::plan::{CHUNK_BYTES, Chunk, Fresh, Plan};
use crate::live::{Ticket, Turn, Zones};
use crate::raw::Aligned;
use crate::{Event, Image, ImageQueue, Operation, Request};

/// Chunks on their way at once, at most. Scattered blocks make small chunks, whose latencies
/// overlap this way.
const SLOTS: usize = 64;

/// The unit in which zeroes are told from data. A smaller one would cut a chunk into many requests.
const ZERO_BYTES: u64 = 64 * 1024;

/// How long one wait lasts at most before the copier looks around again. Completions and
/// cancellations wake it; this bounds the harm of a wake-up that got lost.
const LOOK_AROUND: Duration = Duration::from_millis(50);

/// How often the copier looks around while it gives way to the guest, whose requests do not wake it.
const STANDING: Duration = Duration::from_millis(1);

/// Whom a copy has to consider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// The guest, as `neighbour.rs` says.
    BesideGuest,
    /// The guest writes faster than we copy: now it has to give way, but goes on.
    Pressing,
    /// The guest waits for us.
    Alone,
}

/// What may be on its way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allowance {
    /// Bytes. None means that nothing is started.
    pub(crate) bytes: u64,
    /// Chunks.
    pub(crate) slots: usize,
    /// Bytes of one chunk.
    pub(crate) chunk: u64,
}

impl Allowance {
    /// Nothing starts: the guest comes first, or the job rests.
    pub(crate) const NOTHING: Self = Self {
        bytes: 0,
        slots: 0,
        chunk: CHUNK_BYTES,
    };

    /// What a copy has that need not consider the guest.
    pub(crate) fn regardless(room: Room) -> Self {
        let chunks = match room {
            Room::BesideGuest | Room::Pressing => 6,
            Room::Alone => 16,
        };
        Self {
            bytes: chunks * CHUNK_BYTES,
            slots: SLOTS,
            chunk: CHUNK_BYTES,
        }
    }

    fn stands(&self) -> bool {
        self.bytes == 0
    }
}

/// Why a copy stopped before its plan was complete.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It was told to.
    Cancelled,
    /// The time it was given is up; what is not copied is still marked.
    Late,
    /// The mirroring that it was a part of has ended; what is not copied is still marked.
    Unmirrored,
    /// There is a better way to copy the rest of the plan.
    Enough,
    /// The job was paused and the rest of the plan is made anew afterwards.
    Paused,
    /// A device failed.
    Failed(Observation),
}

impl From<Observation> for Stop {
    fn from(seen: Observation) -> Self {
        Self::Failed(seen)
    }
}

/// See [`Run::keep`].
pub(crate) type Settled<'a> = &'a dyn Fn(&Range<u64>) -> bool;

/// How to run one copy.
pub(crate) struct Run<'a> {
    pub(crate) plan: &'a mut dyn Plan,
    /// Whether zeroes need not be written because the destination has them.
    pub(crate) fresh: Fresh,
    /// Whether zeroes that are written free what they take.
    pub(crate) space: Space,
    pub(crate) room: &'a mut dyn FnMut(Instant) -> Allowance,
    pub(crate) pace: &'a mut Pace,
    /// Sets the pace anew if somebody has changed the limits.
    pub(crate) tune: &'a mut dyn FnMut(&mut Pace),
    /// No chunk is started after this.
    pub(crate) deadline: Option<Instant>,
    /// The zones of the mirror that it is a part of: each chunk waits for its turn there.
    pub(crate) zones: Option<&'a Zones<Event>>,
    /// Whether the job rests: then nobody but whoever lets it go on has to be looked for.
    pub(crate) rests: &'a dyn Fn() -> bool,
    /// Called again and again while nothing has failed, with a look at what is settled: of the range
    /// nothing is on its way, and nothing that is to be copied has not been planned, but for what the
    /// bitmap marks.
    pub(crate) keep: &'a mut dyn FnMut(Instant, Settled<'_>),
    /// Why to start nothing more, if there is a reason.
    pub(crate) interrupt: &'a mut dyn FnMut(Tally) -> Option<Stop>,
    /// Called again and again, several times a second at least.
    pub(crate) progress: &'a mut dyn FnMut(Progress),
}

/// How far one copy is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    pub(crate) tally: Tally,
    /// Bytes that arrived since the last time.
    pub(crate) arrived: u64,
    /// Bytes per second that the devices copy when they are let.
    pub(crate) speed: u64,
}

/// What one copy did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) read: u64,
    pub(crate) written: u64,
}

/// See the module. The queues come first: dropping them waits for what is in flight, and only then
/// is the memory of the slots given back.
#[derive(Debug)]
pub(crate) struct Copier {
    source: Box<dyn ImageQueue>,
    destination: Box<dyn ImageQueue>,
    event: Arc<Event>,
    slots: Vec<Slot>,
    zeroes: Aligned,
}

#[derive(Debug)]
struct Slot {
    /// Grows to the largest chunk that was here. The first slots are taken first, so those that
    /// only scattered blocks need stay small.
    memory: Aligned,
    doing: Doing,
    offset: u64,
    len: u64,
    /// Of the disk: more than `len` where nothing is read.
    covers: u64,
    /// How much of it had to be copied.
    wanted: u64,
    /// Requests at the destination that have not ended.
    pending: u32,
    /// Its place in the zones of a mirror.
    ticket: Option<Ticket>,
}

/// What is no longer on its way.
#[derive(Debug, Clone, Copy, Default)]
struct Finished {
    bytes: u64,
    wanted: u64,
    /// Requests that ended or began beyond the two of each chunk.
    extra: u64,
}

impl Finished {
    fn add(&mut self, slot: &mut Slot, zones: Option<&Zones<Event>>) {
        slot.end(zones);
        self.bytes += slot.len;
        self.wanted += slot.wanted;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    /// For its turn.
    Waiting,
    Reading,
    Writing,
}

impl Slot {
    fn touches(&self, range: &Range<u64>) -> bool {
        self.doing != Doing::Nothing
            && self.offset < range.end
            && range.start < self.offset + self.covers
    }

    fn end(&mut self, zones: Option<&Zones<Event>>) {
        self.doing = Doing::Nothing;
        if let (Some(ticket), Some(zones)) = (self.ticket.take(), zones) {
            zones.leave(ticket);
        }
    }

    /// Reads, now that nothing changes its range.
    fn read(&mut self, tag: u64, source: &mut dyn ImageQueue) {
        self.doing = Doing::Reading;
        let room = usize::try_from(self.len).unwrap_or(0);
        if self.memory.bytes().len() < room {
            self.memory = Aligned::new(room);
        }
        source.submit(Request {
            tag,
            op: Operation::Read,
            offset: self.offset,
            buffers: vec![self.memory.buffer(room)],
        });
    }
}

impl Copier {
    /// `event` wakes it; whoever cancels signals it.
    pub(crate) fn new(
        source: &dyn Image,
        destination: &dyn Image,
        event: Arc<Event>,
    ) -> Result<Self> {
        let depth = u32::try_from(SLOTS).unwrap_or(1);
        // A chunk of alternating zeroes and data makes a request per block.
        let writes = depth * 4;
        Ok(Self {
            source: source.open_queue(depth, &event)?,
            destination: destination.open_queue(writes, &event)?,
            event,
            slots: (0..SLOTS)
                .map(|_| Slot {
                    memory: Aligned::new(0),
                    doing: Doing::Nothing,
                    offset: 0,
                    len: 0,
                    covers: 0,
                    wanted: 0,
                    pending: 0,
                    ticket: None,
                })
                .collect(),
            zeroes: Aligned::new(usize::try_from(ZERO_BYTES).unwrap_or(0)),
        })
    }

    /// Copies what the plan says.
    pub(crate) fn run(&mut self, run: Run<'_>) -> std::result::Result<Tally, Stop> {
        let mut tally = Tally::default();
        let mut stop = None;
        let mut complete = false;
        let mut outstanding = 0u64;
        let mut last = Instant::now();
        loop {
            let now = Instant::now();
            if stop.is_none() {
                stop = (run.interrupt)(tally);
            }
            outstanding -= self.turns(run.zones, &mut stop);
            if stop.is_none() {
                let frontier = run.plan.frontier();
                (run.keep)(now, &|range| {
                    range.end <= frontier && !self.slots.iter().any(|slot| slot.touches(range))
                });
            }
            let mut held_back = None;
            (run.tune)(run.pace);
            let room = (run.room)(now);
            while stop.is_none() && !complete && outstanding < room.bytes {
                let mut slots = self.slots.iter().take(room.slots);
                let Some(slot) = slots.position(|it| it.doing == Doing::Nothing) else {
                    break;
                };
                if run.deadline.is_some_and(|deadline| now > deadline) {
                    stop = Some(Stop::Late);
                    break;
                }
                held_back = run.pace.wait(now);
                if held_back.is_some() {
                    break;
                }
                match run.plan.next(room.chunk) {
                    Ok(Some(chunk)) => {
                        run.pace.start(now, chunk.len());
                        run.pace.request(now, 2);
                        match self.start(slot, chunk, run.zones, run.space) {
                            Some(started) => outstanding += started,
                            None => stop = Some(Stop::Unmirrored),
                        }
                    }
                    Ok(None) => complete = true,
                    Err(seen) => stop = Some(Stop::Failed(seen)),
                }
            }
            let idle = self.slots.iter().all(|it| it.doing == Doing::Nothing);
            if idle && (complete || stop.is_some()) {
                break;
            }
            if let Err(seen) = self.source.push().and_then(|()| self.destination.push()) {
                // A broken ring: what is in flight may never come back. Dropping us waits for it.
                return Err(Stop::Failed(seen));
            }
            let wait = match room.stands() {
                true if (run.rests)() => LOOK_AROUND,
                true => STANDING,
                false => held_back.unwrap_or(LOOK_AROUND).min(LOOK_AROUND),
            };
            let _ = self.event.wait(wait);
            self.event.clear();
            let ended = self.reap((run.fresh, run.space), run.zones, &mut tally, &mut stop);
            outstanding -= ended.bytes;
            let now = Instant::now();
            if ended.bytes > 0 {
                run.pace.copied(now - last, ended.wanted);
            }
            if ended.extra > 0 {
                run.pace.request(now, ended.extra);
            }
            (run.progress)(Progress {
                tally,
                arrived: ended.bytes,
                speed: run.pace.throughput(),
            });
            // Time in which the rate limit or the guest let nothing happen is not copying time.
            let standing = held_back.is_some() || room.stands();
            if ended.bytes > 0 || (standing && outstanding == 0) {
                last = now;
            }
        }
        match stop {
            None => Ok(tally),
            Some(stop) => Err(stop),
        }
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.destination.submit(Request {
            tag: 0,
            op: Operation::Flush,
            offset: 0,
            buffers: Vec::new(),
        });
        let mut ended = None;
        loop {
            self.destination.push()?;
            let _ = self.event.wait(LOOK_AROUND);
            self.event.clear();
            self.destination
                .reap(&mut |completion| ended = Some(completion.result));
            if let Some(result) = ended {
                // The wake-up of a cancellation may have been cleared here: those who look for
                // one do so by its flag.
                return result;
            }
        }
    }

    /// Starts a chunk and says how much is on its way by that; none if there is no mirroring any
    /// more that it could be a part of.
    fn start(
        &mut self,
        index: usize,
        chunk: Chunk,
        zones: Option<&Zones<Event>>,
        space: Space,
    ) -> Option<u64> {
        let slot = self.slots.get_mut(index)?;
        let tag = index as u64;
        match chunk {
            Chunk::Copy {
                offset,
                len,
                wanted,
            } => {
                let len = len.min(CHUNK_BYTES);
                (slot.offset, slot.len, slot.wanted) = (offset, len, wanted);
                slot.covers = len;
                match zones.map(|zones| (zones, zones.enter(offset, len, &self.event))) {
                    None => slot.read(tag, self.source.as_mut()),
                    Some((zones, Turn::Now(ticket))) => {
                        slot.ticket = Some(ticket);
                        zones.copies(offset, len);
                        slot.read(tag, self.source.as_mut());
                    }
                    Some((_, Turn::Later(ticket))) => {
                        slot.ticket = Some(ticket);
                        slot.doing = Doing::Waiting;
                    }
                    Some((_, Turn::Off)) => return None,
                }
                Some(len)
            }
            Chunk::Zero { offset, len } => {
                slot.doing = Doing::Writing;
                slot.pending = 1;
                // It moves no data, so it takes no room.
                (slot.offset, slot.len, slot.wanted) = (offset, 0, 0);
                slot.covers = len;
                self.destination.submit(Request {
                    tag,
                    op: zeroes(len, space),
                    offset,
                    buffers: Vec::new(),
                });
                Some(0)
            }
        }
    }

    /// Starts those whose turn it is by now; lets those go that never will have one. Returns how
    /// much is no longer on its way.
    fn turns(&mut self, zones: Option<&Zones<Event>>, stop: &mut Option<Stop>) -> u64 {
        let Some(zones) = zones else {
            return 0;
        };
        let mut left = 0;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(ticket) = slot.ticket.filter(|_| slot.doing == Doing::Waiting) else {
                continue;
            };
            match zones.again(ticket) {
                Turn::Now(_) if stop.is_none() => {
                    zones.copies(slot.offset, slot.len);
                    slot.read(index as u64, self.source.as_mut());
                }
                Turn::Later(_) if stop.is_none() => {}
                turn => {
                    slot.end(Some(zones));
                    left += slot.len;
                    if turn == Turn::Off && stop.is_none() {
                        *stop = Some(Stop::Unmirrored);
                    }
                }
            }
        }
        left
    }

    /// Takes what has ended, on both sides; says how much is no longer on its way.
    fn reap(
        &mut self,
        how: (Fresh, Space),
        zones: Option<&Zones<Event>>,
        tally: &mut Tally,
        stop: &mut Option<Stop>,
    ) -> Finished {
        let mut finished = Finished::default();
        let Self {
            source,
            destination,
            slots,
            zeroes,
            ..
        } = self;
        let mut fail = |seen: Observation| {
            if !matches!(stop, Some(Stop::Failed(_))) {
                *stop = Some(Stop::Failed(seen));
            }
        };
        source.reap(&mut |completion| {
            let slot = usize::try_from(completion.tag).ok();
            let Some(slot) = slot.and_then(|slot| slots.get_mut(slot)) else {
                return;
            };
            match completion.result {
                Ok(()) => {
                    tally.read += slot.len;
                    tally.written += write(slot, completion.tag, destination.as_mut(), zeroes, how);
                }
                Err(seen) => fail(seen),
            }
            finished.extra += u64::from(slot.pending.saturating_sub(1));
            if slot.pending == 0 {
                finished.add(slot, zones);
            } else {
                slot.doing = Doing::Writing;
            }
        });
        destination.reap(&mut |completion| {
            let slot = usize::try_from(completion.tag).ok();
            let Some(slot) = slot.and_then(|slot| slots.get_mut(slot)) else {
                return;
            };
            if let Err(seen) = completion.result {
                fail(seen);
            }
            slot.pending = slot.pending.saturating_sub(1);
            if slot.pending == 0 {
                finished.add(slot, zones);
            }
        });
        finished
    }
}

/// Writes what was read: runs of blocks with data as they are, runs of zeroes as zeroes or, on a
/// fresh destination, not at all. Returns the bytes of data.
fn write(
    slot: &mut Slot,
    tag: u64,
    destination: &mut dyn ImageQueue,
    zeroes: &Aligned,
    (fresh, space): (Fresh, Space),
) -> u64 {
    let mut data = 0;
    let mut at = 0;
    while at < slot.len {
        let zero = is_zero(slot, at, zeroes);
        let mut end = (at + ZERO_BYTES).min(slot.len);
        while end < slot.len && is_zero(slot, end, zeroes) == zero {
            end = (end + ZERO_BYTES).min(slot.len);
        }
        let offset = slot.offset + at;
        let len = end - at;
        if !zero {
            data += len;
            slot.pending += 1;
            let whole = slot.memory.buffer(usize::try_from(end).unwrap_or(0));
            destination.submit(Request {
                tag,
                op: Operation::Write,
                offset,
                buffers: vec![whole.part(usize::try_from(at).unwrap_or(0), usize::MAX)],
            });
        } else if fresh == Fresh::No {
            slot.pending += 1;
            destination.submit(Request {
                tag,
                op: self::zeroes(len, space),
                offset,
                buffers: Vec::new(),
            });
        }
        at = end;
    }
    data
}

fn zeroes(len: u64, space: Space) -> Operation {
    let unmap = space == Space::Thin;
    Operation::WriteZeroes { len, unmap }
}

/// Whether the block of a chunk at `at` is zero. One comparison of memory, which is the fastest way
/// there is, optimised build or not.
fn is_zero(slot: &Slot, at: u64, zeroes: &Aligned) -> bool {
    let from = usize::try_from(at).unwrap_or(0);
    let to = usize::try_from((at + ZERO_BYTES).min(slot.len)).unwrap_or(0);
    match (
        slot.memory.bytes().get(from..to),
        zeroes.bytes().get(..to - from),
    ) {
        (Some(block), Some(zeroes)) => block == zeroes,
        _ => false,
    }
}
