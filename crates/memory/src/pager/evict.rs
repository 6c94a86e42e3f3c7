//! The evictor: keeps the pages in memory below the limit.
//!
//! A clock with two hands that go over the memory in chunks of 2 MiB. The first hand unmaps what
//! the guest has mapped; whatever the guest still uses comes back with one cheap fault. The second
//! hand, a quarter of the limit behind, evicts what has not come back. What lies between them is
//! the staging list.
//!
//! One chunk is evicted at a time:
//!
//! 1. its staged pages become *Leaving*;
//! 2. one PAGEMAP_SCAN says which of them are as they were when they were read: those whose backing
//!    still has them need no write;
//! 3. zero pages need none either; the others are compressed into the tier or written to slots;
//! 4. when the writes have ended, those that nobody took back and no transfer uses become *Going*,
//!    are punched out run by run, and are *Out*.
//!
//! At each instant the page's content is whole in the memfd until step 4, and in its new home
//! before. What fails in step 3 stays in memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use strake_observe::{Observation, OsCallFailed, Result};

use super::shared::{Shared, count, is_zero, lock, runs};
use super::table::{Backing, State};
use crate::observations::{NoSwap, SwapWriteFailed};
use crate::swap::ring::Ring;
use crate::swap::slots::checksum;
use crate::swap::tier::Refused;
use crate::swap::{SwapFile, Transfer};

/// Pages of a chunk.
pub(crate) const CHUNK: usize = 512;

/// Pages of one transfer: 256 KiB, eight of which make a chunk.
const PIECE: u32 = 64;

/// How long the evictor stands back when everything is under transfer, and when the store fails.
const PINNED_PAUSE: Duration = Duration::from_millis(5);
const TROUBLE_PAUSE: Duration = Duration::from_millis(100);

/// How often it looks whether it is needed without being asked.
const IDLE: Duration = Duration::from_secs(1);

pub(crate) struct Evictor {
    pub(crate) shared: Arc<Shared>,
    pub(crate) ring: Option<Ring>,
    /// Where the first hand stands: a chunk.
    hand: usize,
    /// Chunks between the hands.
    staged: VecDeque<(usize, usize)>,
    staged_pages: usize,
}

/// A page that is leaving.
#[derive(Debug, Clone, Copy)]
struct Leaver {
    page: usize,
    old: Backing,
    fresh: bool,
    /// Where its content will be.
    new: Option<Backing>,
}

impl Evictor {
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Self> {
        let ring = match &shared.swap {
            Some(swap) => Some(Ring::new(&shared.window, swap.fd())?),
            None => None,
        };
        Ok(Self {
            shared,
            ring,
            hand: 0,
            staged: VecDeque::new(),
            staged_pages: 0,
        })
    }

    pub(crate) fn run(mut self) {
        let mut barren = 0;
        while !self.stopping() {
            let compact = {
                let mut ask = self.shared.wait_asked(IDLE);
                ask.room = false;
                ask.compact
            };
            if compact {
                let moved = self.compact();
                let mut ask = lock(&self.shared.ask);
                ask.compact = false;
                ask.compacted += 1;
                ask.moved += moved;
                self.shared.asked.notify_all();
            }
            while self.over() && !self.stopping() {
                let freed = self.step();
                if freed > 0 {
                    barren = 0;
                    self.shared.stuck.store(false, Ordering::SeqCst);
                    continue;
                }
                barren += 1;
                let trouble = lock(&self.shared.health).write_trouble.is_some();
                if trouble || barren > 2 * self.chunks() {
                    barren = 0;
                    self.shared.stuck.store(!trouble, Ordering::SeqCst);
                    self.shared.event.signal();
                    let pause = if trouble { TROUBLE_PAUSE } else { PINNED_PAUSE };
                    drop(self.shared.wait_asked(pause));
                    lock(&self.shared.ask).room = false;
                }
            }
            self.shared.stuck.store(false, Ordering::SeqCst);
        }
    }

    fn stopping(&self) -> bool {
        self.shared.stop_evictor.load(Ordering::SeqCst)
    }

    fn over(&self) -> bool {
        self.shared.resident() + self.shared.headroom() > self.shared.limit()
    }

    fn chunks(&self) -> usize {
        self.shared.table.len().div_ceil(CHUNK)
    }

    /// Moves the hands by one chunk. Says how many pages were freed.
    fn step(&mut self) -> usize {
        let goal = usize::try_from(self.shared.limit() / 4).unwrap_or(usize::MAX);
        for _ in 0..self.chunks() {
            if self.staged_pages >= goal {
                break;
            }
            self.stage_next();
        }
        let Some((chunk, staged)) = self.staged.pop_front() else {
            return 0;
        };
        self.staged_pages -= staged;
        let want =
            (self.shared.resident() + self.shared.headroom()).saturating_sub(self.shared.limit());
        let want = usize::try_from(want).unwrap_or(usize::MAX);
        self.shared.set_evicting(Some(chunk));
        let (freed, more) = self.evict(chunk, want);
        self.shared.set_evicting(None);
        if more {
            let rest = staged.saturating_sub(freed);
            self.staged.push_front((chunk, rest));
            self.staged_pages += rest;
        }
        // Faults that wait for room, or for a page that has gone.
        self.shared.event.signal();
        freed
    }

    fn pages_of(&self, chunk: usize) -> std::ops::Range<usize> {
        let first = chunk * CHUNK;
        first..self.shared.table.len().min(first + CHUNK)
    }

    /// The first hand: unmaps a chunk.
    fn stage_next(&mut self) {
        let chunk = self.hand;
        self.hand = (self.hand + 1) % self.chunks().max(1);
        if self.staged.iter().any(|(other, _)| *other == chunk) {
            return;
        }
        let mut pages = Vec::new();
        let mut others = 0;
        for page in self.pages_of(chunk) {
            if self.shared.table.stage(page) {
                pages.push(page);
            } else if matches!(self.shared.table.look(page).0, State::Staged | State::Fresh) {
                others += 1;
            }
        }
        if let (Some(first), Some(last)) = (pages.first(), pages.last())
            && self.shared.window.zap(*first, last + 1 - first).is_err()
        {
            // They are mapped: staged pages must not be.
            for page in pages {
                if let Some(backing) = self.shared.table.claim(page, State::Staged, |_| true) {
                    self.shared.table.settle(page, State::Mapped, backing);
                }
            }
            return;
        }
        let count = pages.len() + others;
        if count > 0 {
            self.staged.push_back((chunk, count));
            self.staged_pages += count;
        }
    }

    /// The second hand: evicts at most `want` pages of a chunk. Says how many went, and whether
    /// there may be more.
    fn evict(&mut self, chunk: usize, want: usize) -> (usize, bool) {
        let pages = self.pages_of(chunk);
        let first = pages.start;
        let mut leavers = Vec::new();
        let mut more = false;
        for page in pages.clone() {
            if leavers.len() >= want {
                more = true;
                break;
            }
            if let Some((state, old)) = self.shared.table.leave(page) {
                leavers.push(Leaver {
                    page,
                    old,
                    fresh: state == State::Fresh,
                    new: None,
                });
            } else if self.shared.table.in_transfer(page) {
                count(&self.shared.counters.kept_for_transfer, 1);
            }
        }
        if leavers.is_empty() {
            return (0, false);
        }
        let clean = self.shared.clean(first, pages.len());
        let outcome = self.find_homes(&mut leavers, first, &clean);
        let failed = outcome.is_err();
        self.note(outcome);
        (self.let_go(&leavers), more && !failed)
    }

    /// Gives each leaver its new home, as far as it finds one.
    fn find_homes(&mut self, leavers: &mut [Leaver], first: usize, clean: &[bool]) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let mut to_write = Vec::new();
        let mut content = [0; 4096];
        for (index, leaver) in leavers.iter_mut().enumerate() {
            let unwritten =
                leaver.fresh || clean.get(leaver.page - first).copied().unwrap_or(false);
            match leaver.old {
                Backing::Slot(_) if unwritten => {
                    leaver.new = Some(leaver.old);
                    continue;
                }
                Backing::Disk
                    if unwritten
                        && shared
                            .disks
                            .as_ref()
                            .is_some_and(|disks| disks.rely(leaver.page)) =>
                {
                    leaver.new = Some(leaver.old);
                    continue;
                }
                _ => {}
            }
            shared.window.read(leaver.page, &mut content);
            if is_zero(&content) {
                leaver.new = Some(Backing::None);
                continue;
            }
            match shared.tier().store(&content) {
                Ok(entry) => {
                    count(&shared.counters.compressed_pages, 1);
                    leaver.new = Some(Backing::Tier(entry));
                }
                Err(Refused::Full | Refused::Incompressible) => to_write.push(index),
            }
        }
        self.write(leavers, &to_write)
    }

    /// Writes the leavers of these indexes to slots.
    fn write(&mut self, leavers: &mut [Leaver], indexes: &[usize]) -> Result<()> {
        if indexes.is_empty() {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let (Some(swap), Some(ring)) = (&shared.swap, &mut self.ring) else {
            return Err(NoSwap {
                pages: indexes.len() as u64,
            }
            .into());
        };
        let mut pieces: Vec<(u32, Vec<usize>)> = Vec::new();
        let mut outcome = Ok(());
        let mut rest = indexes;
        while !rest.is_empty() && outcome.is_ok() {
            let most = u32::try_from(rest.len()).unwrap_or(PIECE);
            let run = match swap.take(most) {
                Ok(run) => run,
                Err(full) => {
                    if reclaim(&shared) == 0 {
                        outcome = Err(full);
                        break;
                    }
                    continue;
                }
            };
            let (now, later) = rest
                .split_at_checked(run.len as usize)
                .unwrap_or((rest, &[]));
            rest = later;
            // Pieces of consecutive pages in consecutive slots.
            for (slot, index) in (run.first..).zip(now) {
                let page = leavers.get(*index).map_or(0, |leaver| leaver.page);
                let follows = |(first, pages): &(u32, Vec<usize>)| {
                    let len = u32::try_from(pages.len()).unwrap_or(PIECE);
                    let last = pages.last().and_then(|last| leavers.get(*last));
                    first + len == slot
                        && len < PIECE
                        && last.is_some_and(|last| last.page + 1 == page)
                };
                match pieces.last_mut() {
                    Some(piece) if follows(piece) => piece.1.push(*index),
                    _ => pieces.push((slot, vec![*index])),
                }
            }
        }
        // The sums before the writes: a page that changes meanwhile was taken back, and what was
        // made of it is dropped.
        let mut content = [0; 4096];
        let mut sums = Vec::with_capacity(indexes.len());
        for (first, members) in &pieces {
            for (slot, index) in (*first..).zip(members) {
                if let Some(leaver) = leavers.get(*index) {
                    shared.window.read(leaver.page, &mut content);
                    sums.push((slot, checksum(slot, &content)));
                }
            }
        }
        {
            let mut slots = swap.slots();
            for (slot, sum) in sums {
                slots.set_sum(slot, sum);
            }
        }
        let mut ended: Vec<(usize, i32)> = Vec::with_capacity(pieces.len());
        for (token, (slot, members)) in pieces.iter().enumerate() {
            let page = members
                .first()
                .and_then(|index| leavers.get(*index))
                .map_or(0, |leaver| leaver.page);
            let len = u32::try_from(members.len()).unwrap_or(0);
            while !ring.has_room() {
                if let Some((token, result)) = ring.wait() {
                    ended.push((usize::try_from(token).unwrap_or(usize::MAX), result));
                }
            }
            if !ring.write(token as u64, SwapFile::piece(page, *slot, len)) {
                ended.push((token, -libc::EIO));
            }
            if let Err(seen) = ring.submit() {
                outcome = Err(seen);
            }
        }
        while let Some((token, result)) = ring.wait() {
            ended.push((usize::try_from(token).unwrap_or(usize::MAX), result));
        }
        for (token, result) in ended {
            let Some((slot, members)) = pieces.get(token) else {
                continue;
            };
            let page = members
                .first()
                .and_then(|index| leavers.get(*index))
                .map_or(0, |leaver| leaver.page);
            let len = u32::try_from(members.len()).unwrap_or(0);
            let piece = SwapFile::piece(page, *slot, len);
            match swap.judge(Transfer::Write, piece, result) {
                Ok(()) => {
                    count(&shared.counters.written_pages, members.len());
                    for (slot, index) in (*slot..).zip(members) {
                        if let Some(leaver) = leavers.get_mut(*index) {
                            leaver.new = Some(Backing::Slot(slot));
                        }
                    }
                }
                Err(error) => {
                    count(&shared.counters.write_errors, 1);
                    let mut slots = swap.slots();
                    for slot in *slot..*slot + len {
                        slots.free(slot);
                    }
                    outcome = Err(Observation::from(SwapWriteFailed {
                        path: swap.path().to_owned(),
                        offset: piece.offset,
                    })
                    .because(OsCallFailed::new("write", swap.path(), &error)));
                }
            }
        }
        outcome
    }

    /// Punches out who has a home and may go. Says how many.
    fn let_go(&self, leavers: &[Leaver]) -> usize {
        let shared = &self.shared;
        let mut going = Vec::with_capacity(leavers.len());
        for leaver in leavers {
            let Some(new) = leaver.new else {
                shared.table.stay(leaver.page, leaver.old);
                continue;
            };
            if shared.table.go(leaver.page, leaver.old) {
                going.push((leaver, new));
            } else {
                // It was taken back, or is under transfer: its new home is not wanted.
                count(&shared.counters.rescued, 1);
                if new != leaver.old {
                    shared.release(leaver.page, State::Leaving, new);
                } else if new == Backing::Disk
                    && let Some(disks) = &shared.disks
                {
                    disks.release(leaver.page);
                }
            }
        }
        let pages: Vec<usize> = going.iter().map(|(leaver, _)| leaver.page).collect();
        let mut stays = Vec::new();
        for (first, len) in runs(&pages) {
            if shared.window.punch(first, len).is_err() {
                stays.extend(first..first + len);
            }
        }
        let mut freed = 0;
        for (leaver, new) in going {
            if new != leaver.old {
                shared.release(leaver.page, State::Leaving, leaver.old);
            }
            if stays.binary_search(&leaver.page).is_ok() {
                // Refused as a whole: it is still in the memfd, and nobody has written to it.
                shared.table.settle(leaver.page, State::Staged, new);
                if new == Backing::Disk
                    && let Some(disks) = &shared.disks
                {
                    disks.release(leaver.page);
                }
                continue;
            }
            let counters = &shared.counters;
            count(&counters.evicted, 1);
            if leaver.fresh {
                count(&counters.untouched, 1);
            }
            match new {
                Backing::None => count(&counters.evicted_zero, 1),
                Backing::Disk => count(&counters.evicted_to_disk_copy, 1),
                _ if new == leaver.old => count(&counters.evicted_unwritten, 1),
                _ => {}
            }
            // Before the word: who brings the page back counts it again.
            shared.resident.fetch_sub(1, Ordering::SeqCst);
            freed += 1;
            let state = if new == Backing::None {
                State::Empty
            } else {
                State::Out
            };
            shared.table.settle(leaver.page, state, new);
        }
        freed
    }

    /// Keeps in mind whether writing works, for who waits for room.
    fn note(&self, outcome: Result<()>) {
        lock(&self.shared.health).write_trouble = outcome.err();
    }

    /// Empties segments that hold little, so that their room can be given back. Says how many slots
    /// were moved.
    fn compact(&mut self) -> u64 {
        let shared = Arc::clone(&self.shared);
        let Some(swap) = &shared.swap else {
            return 0;
        };
        let sparse = swap.slots().sparse(crate::swap::SEGMENT_SLOTS / 2);
        let mut moved = 0;
        for page in 0..shared.table.len() {
            let in_sparse = |backing| {
                matches!(backing, Backing::Slot(slot)
                    if sparse.contains(&(slot / crate::swap::SEGMENT_SLOTS)))
            };
            let (state, backing) = shared.table.look(page);
            if !in_sparse(backing) {
                continue;
            }
            if state.resident() {
                // Memory has it: a copy in the file is worth less than the room.
                if let Some(Backing::Slot(slot)) = shared.table.set_backing(page, Backing::None) {
                    swap.slots().free(slot);
                    moved += 1;
                }
                continue;
            }
            let Some(Backing::Slot(slot)) = shared.table.claim(page, State::Out, in_sparse) else {
                continue;
            };
            let to = self.move_slot(swap, page, slot, &sparse);
            match to {
                Some(to) => {
                    shared.table.settle(page, State::Out, Backing::Slot(to));
                    swap.slots().free(slot);
                    moved += 1;
                }
                None => shared.table.settle(page, State::Out, Backing::Slot(slot)),
            }
            shared.event.signal();
        }
        swap.release_empty();
        moved
    }

    /// Copies a slot to one outside of `avoid`, through the page's place in the memfd, which is
    /// empty again afterwards. The page is *Coming*.
    fn move_slot(&mut self, swap: &SwapFile, page: usize, slot: u32, avoid: &[u32]) -> Option<u32> {
        let ring = self.ring.as_mut()?;
        let mut content = [0; 4096];
        let read = SwapFile::piece(page, slot, 1);
        let mut go = |transfer, piece| {
            let started = match transfer {
                Transfer::Write => ring.write(0, piece),
                _ => ring.read(0, piece),
            };
            if !started || ring.submit().is_err() {
                return false;
            }
            ring.wait()
                .is_some_and(|(_, result)| swap.judge(transfer, piece, result).is_ok())
        };
        let mut moved = None;
        if go(Transfer::Read, read) {
            self.shared.window.read(page, &mut content);
            let sum = swap.slots().sum(slot);
            if sum == Some(checksum(slot, &content)) {
                let here = {
                    let mut slots = swap.slots();
                    slots.turn_from(avoid)
                };
                if here && let Ok(run) = swap.take(1) {
                    let to = run.first;
                    let fits = !avoid.contains(&(to / crate::swap::SEGMENT_SLOTS));
                    swap.slots().set_sum(to, checksum(to, &content));
                    if fits && go(Transfer::Write, SwapFile::piece(page, to, 1)) {
                        moved = Some(to);
                    } else {
                        swap.slots().free(to);
                    }
                }
            }
        }
        if self.shared.window.punch(page, 1).is_err() {
            // What is there is what the slot holds; the next fill overwrites it.
            count(&self.shared.counters.write_errors, 1);
        }
        moved
    }
}

/// Gives up the slots of pages that are in memory as well. Says how many.
fn reclaim(shared: &Shared) -> usize {
    let Some(swap) = &shared.swap else {
        return 0;
    };
    let mut freed = 0;
    for page in 0..shared.table.len() {
        if let (State::Mapped, Backing::Slot(_)) = shared.table.look(page)
            && let Some(Backing::Slot(slot)) = shared.table.set_backing(page, Backing::None)
        {
            swap.slots().free(slot);
            freed += 1;
        }
    }
    freed
}
