//! The fault thread: gives the guest the pages that it waits for.
//!
//! One thread, never waiting for the store: reads are under way on its ring while it answers other
//! faults, so any number of vCPUs and device threads fault at once. A fault that cannot be answered
//! yet is kept by its page's number in one of three sets:
//!
//! * *parked*: somebody works on the page; looked at again whenever something has ended;
//! * *starved*: the limit leaves no room; looked at again when the evictor has made some;
//! * *ill*: its content cannot be had; tried again from time to time. The watcher is told that the
//!   guest stands, and when it goes on.
//!
//! The kernel keeps who waits: mapping the page wakes them all, and to wake one too often does no
//! harm, it faults again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use strake_observe::{Observation, OsCallFailed, OsContext, Result};

use super::ahead::Ahead;
use super::shared::{Shared, count, lock, runs};
use super::table::{Backing, Fault, State};
use crate::observations::{
    DiskCopyLost, PageLost, PagerBroken, SwapChecksum, SwapReadFailed, TierBroken,
};
use crate::swap::ring::{Piece, Ring};
use crate::swap::slots::checksum;
use crate::swap::{SwapFile, Transfer};
use crate::uffd::Protection;
use crate::window::Page;

/// How often a page that could not be had is tried again, and parked ones if nobody signals.
const RETRY: Duration = Duration::from_millis(250);
const PARKED: Duration = Duration::from_millis(2);

/// Zero pages that one fault brings while there is plenty of room.
const ZERO_AROUND: usize = 16;

/// A read that is under way.
#[derive(Debug, Clone, Copy)]
struct Flight {
    piece: Piece,
    slot: u32,
    /// The page that was faulted at.
    wanted: usize,
}

/// Pages that a disk's image gave, or not.
type FromDisk = (usize, Result<Box<Page>>);

/// A thread that reads images, because that may take as long as it likes.
struct ImageReader {
    ask: Sender<usize>,
    done: Receiver<FromDisk>,
    thread: JoinHandle<()>,
}

pub(crate) struct Handler {
    shared: Arc<Shared>,
    ring: Option<Ring>,
    flights: Vec<Option<Flight>>,
    image: Option<ImageReader>,
    from_disk: usize,
    parked: BTreeSet<usize>,
    starved: BTreeSet<usize>,
    ill: BTreeMap<usize, Instant>,
    /// To be read without neighbours, one of which may be why a read failed.
    alone: BTreeSet<usize>,
    why: Option<Observation>,
    ahead: Ahead,
    untouched: u64,
}

impl Handler {
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Self> {
        let ring = match &shared.swap {
            Some(swap) => {
                let ring = Ring::new(&shared.window, swap.fd())?;
                ring.notify(&shared.event)?;
                Some(ring)
            }
            None => None,
        };
        let image = match &shared.disks {
            Some(disks) => {
                let disks = Arc::clone(disks);
                let (ask, asked) = channel::<usize>();
                let (answer, done) = channel();
                let theirs = Arc::clone(&shared);
                let thread = std::thread::Builder::new()
                    .name("pager-image".to_owned())
                    .spawn(move || {
                        for page in asked {
                            let mut content = Box::new([0; 4096]);
                            let read = disks.fetch(page, &mut content);
                            if answer.send((page, read.map(|()| content))).is_err() {
                                return;
                            }
                            theirs.event.signal();
                        }
                    })
                    .os("spawn a thread", "pager-image")?;
                Some(ImageReader { ask, done, thread })
            }
            None => None,
        };
        Ok(Self {
            shared,
            ring,
            flights: Vec::new(),
            image,
            from_disk: 0,
            parked: BTreeSet::new(),
            starved: BTreeSet::new(),
            ill: BTreeMap::new(),
            alone: BTreeSet::new(),
            why: None,
            ahead: Ahead::new(),
            untouched: 0,
        })
    }

    pub(crate) fn run(mut self) {
        let mut faults = Vec::new();
        loop {
            let stopping = self.shared.stop_handler.load(Ordering::SeqCst);
            if stopping && self.in_flight() == 0 {
                break;
            }
            self.sleep();
            self.shared.event.clear();
            self.reap();
            if stopping {
                continue;
            }
            self.learn();
            self.retry();
            loop {
                let more = self.shared.uffd.faults(&mut faults);
                for address in faults.drain(..) {
                    if let Some(page) = self.shared.window.page_at(address) {
                        self.fault(page);
                    }
                }
                match more {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(cause) => {
                        self.broken(0, cause);
                        std::thread::sleep(RETRY);
                        break;
                    }
                }
            }
            self.submit();
            self.tell();
        }
        if let Some(image) = self.image.take() {
            drop(image.ask);
            let _ = image.thread.join();
        }
    }

    fn in_flight(&self) -> usize {
        self.flights.iter().flatten().count() + self.from_disk
    }

    fn sleep(&self) {
        let timeout = if !self.parked.is_empty() {
            Some(PARKED)
        } else if self.ill.is_empty() && self.starved.is_empty() {
            None
        } else {
            Some(RETRY)
        };
        let timeout = timeout.and_then(|limit| Timespec::try_from(limit).ok());
        let uffd = self.shared.uffd.as_fd();
        let mut fds = [
            PollFd::new(&uffd, PollFlags::IN),
            PollFd::new(&self.shared.event, PollFlags::IN),
        ];
        // Interrupted or not: everything is looked at.
        let _ = poll(&mut fds, timeout.as_ref());
    }

    fn submit(&mut self) {
        if let Some(Err(cause)) = self.ring.as_mut().map(Ring::submit) {
            self.broken(0, cause);
        }
    }

    /// What was brought along and evicted untouched counts against bringing along.
    fn learn(&mut self) {
        let untouched = self.shared.counters.untouched.load(Ordering::Relaxed);
        let new = untouched.saturating_sub(self.untouched);
        if new > 0 {
            self.untouched = untouched;
            self.ahead.useless(new);
        }
    }

    fn retry(&mut self) {
        for page in std::mem::take(&mut self.parked) {
            self.fault(page);
        }
        for page in std::mem::take(&mut self.starved) {
            self.fault(page);
        }
        let now = Instant::now();
        let due: Vec<usize> = self
            .ill
            .iter()
            .filter(|(_, due)| **due <= now)
            .map(|(page, _)| *page)
            .collect();
        for page in due {
            // It stays in the set, with a new date, until it was had.
            self.ill.insert(page, now + RETRY);
            self.fault(page);
        }
    }

    /// Tells the watcher whether the guest can have its memory.
    fn tell(&mut self) {
        let shared = &self.shared;
        let mut health = lock(&shared.health);
        let cause = if !self.ill.is_empty() {
            self.why.clone()
        } else if self.starved.is_empty() {
            None
        } else {
            health.write_trouble.clone()
        };
        match (cause, health.stalled) {
            (Some(cause), false) => {
                health.stalled = true;
                drop(health);
                shared.watcher.stalled(cause);
            }
            (None, true) if self.ill.is_empty() && self.starved.is_empty() => {
                health.stalled = false;
                drop(health);
                shared.watcher.recovered();
            }
            _ => {}
        }
    }

    fn room(&self) -> u64 {
        if self.shared.stuck.load(Ordering::SeqCst) {
            return 1;
        }
        self.shared.limit().saturating_sub(self.shared.resident())
    }

    fn came(&self, pages: usize) {
        self.shared
            .resident
            .fetch_add(pages as u64, Ordering::SeqCst);
        self.shared.ask_for_room();
    }

    fn went(&self, pages: usize) {
        self.shared
            .resident
            .fetch_sub(pages as u64, Ordering::SeqCst);
    }

    /// Somebody waits for a page.
    fn fault(&mut self, page: usize) {
        match self.shared.table.begin_fault(page) {
            Fault::Busy => {
                self.parked.insert(page);
            }
            Fault::Map(state, backing) => self.map(page, state, backing),
            Fault::Zero | Fault::Fill(_) if self.room() == 0 => {
                let (_, backing) = self.shared.table.look(page);
                let state = if backing == Backing::None {
                    State::Empty
                } else {
                    State::Out
                };
                self.shared.table.settle(page, state, backing);
                self.starved.insert(page);
                self.shared.ask_for_room();
            }
            Fault::Zero => self.zero(page),
            Fault::Fill(Backing::Slot(slot)) => self.read_slots(page, slot),
            Fault::Fill(Backing::Tier(entry)) => self.unpack(page, entry),
            Fault::Fill(Backing::Disk) => self.read_disk(page),
            Fault::Fill(Backing::None) => {
                let lost = PageLost { page: page as u64 };
                self.fall_ill(page, Backing::None, lost.into());
            }
        }
    }

    fn map(&mut self, page: usize, state: State, backing: Backing) {
        let protection = match (state, backing) {
            (State::Fresh, _) => {
                self.ahead.useful();
                Protection::Clean
            }
            (_, Backing::None) => Protection::Written,
            _ if self.shared.clean(page, 1).first() == Some(&true) => Protection::Clean,
            _ => Protection::Written,
        };
        count(&self.shared.counters.cached_faults, 1);
        let span = self.shared.window.span(page, 1);
        match self.shared.uffd.map_cached(span, protection) {
            Ok(()) => {
                self.shared.table.settle(page, State::Mapped, backing);
                self.ill.remove(&page);
            }
            Err(error) => {
                // Unmapped as it was; what the mark says of it still holds.
                let state = if state == State::Fresh {
                    State::Fresh
                } else {
                    State::Staged
                };
                self.shared.table.settle(page, state, backing);
                let cause = OsCallFailed::new("UFFDIO_CONTINUE", page, &error);
                self.broken(page, cause.into());
            }
        }
    }

    /// Zero pages, the neighbours too while there is plenty of room.
    fn zero(&mut self, page: usize) {
        let shared = Arc::clone(&self.shared);
        let mut first = page;
        let mut end = page + 1;
        let plenty =
            shared.resident() + shared.headroom() + ZERO_AROUND as u64 <= shared.limit() / 4 * 3;
        if plenty {
            let begin = page - page % ZERO_AROUND;
            let none = |backing| backing == Backing::None;
            while end < begin + ZERO_AROUND && shared.table.claim(end, State::Empty, none).is_some()
            {
                end += 1;
            }
            while first > begin && shared.table.claim(first - 1, State::Empty, none).is_some() {
                first -= 1;
            }
        }
        let pages = end - first;
        self.came(pages);
        count(&shared.counters.zero_faults, 1);
        match shared.uffd.map_zero(shared.window.span(first, pages)) {
            Ok(()) => {
                for page in first..end {
                    shared.table.settle(page, State::Mapped, Backing::None);
                }
                self.ill.remove(&page);
            }
            Err(error) => {
                // Some may be there. They are all zero: take them out again.
                let _ = shared.window.punch(first, pages);
                self.went(pages);
                for page in first..end {
                    shared.table.settle(page, State::Empty, Backing::None);
                }
                let cause = OsCallFailed::new("UFFDIO_ZEROPAGE", page, &error);
                self.broken(page, cause.into());
            }
        }
    }

    /// Begins to read a page from its slot, with neighbours whose slots are neighbours.
    fn read_slots(&mut self, page: usize, slot: u32) {
        let shared = Arc::clone(&self.shared);
        count(&shared.counters.read_faults, 1);
        let beside = |page: usize| {
            let (state, backing) = shared.table.look(page);
            state == State::Mapped && matches!(backing, Backing::Slot(_))
        };
        if self.ahead.width() == 1 && (beside(page + 1) || page > 0 && beside(page - 1)) {
            self.ahead.useful();
        }
        let alone = self.alone.remove(&page) || self.ill.contains_key(&page);
        let width = if alone { 1 } else { self.ahead.width() };
        let most = self.room();
        let begin = page - page % width;
        let (mut first, mut end) = (page, page + 1);
        let (mut first_slot, mut end_slot) = (slot, slot + 1);
        while end < begin + width
            && ((end - first) as u64) < most
            && shared
                .table
                .claim(end, State::Out, |backing| {
                    backing == Backing::Slot(end_slot)
                })
                .is_some()
        {
            end += 1;
            end_slot += 1;
        }
        while first > begin
            && first_slot > 0
            && ((end - first) as u64) < most
            && shared
                .table
                .claim(first - 1, State::Out, |backing| {
                    backing == Backing::Slot(first_slot - 1)
                })
                .is_some()
        {
            first -= 1;
            first_slot -= 1;
        }
        let pages = end - first;
        self.came(pages);
        let piece = SwapFile::piece(first, first_slot, u32::try_from(pages).unwrap_or(1));
        let flight = Flight {
            piece,
            slot: first_slot,
            wanted: page,
        };
        let token = match self.flights.iter().position(Option::is_none) {
            Some(token) => token,
            None => {
                self.flights.push(None);
                self.flights.len() - 1
            }
        };
        let started = self
            .ring
            .as_mut()
            .is_some_and(|ring| ring.read(token as u64, piece));
        if started {
            if let Some(place) = self.flights.get_mut(token) {
                *place = Some(flight);
            }
        } else {
            // The ring is full: when something has ended.
            self.went(pages);
            for (page, slot) in (first..end).zip(first_slot..) {
                shared.table.settle(page, State::Out, Backing::Slot(slot));
            }
            self.parked.insert(page);
        }
    }

    fn reap(&mut self) {
        while let Some((token, result)) = self.ring.as_mut().and_then(Ring::next) {
            let token = usize::try_from(token).unwrap_or(usize::MAX);
            if let Some(flight) = self.flights.get_mut(token).and_then(Option::take) {
                self.landed(flight, result);
            }
        }
        let done: Vec<FromDisk> = self
            .image
            .iter()
            .flat_map(|image| image.done.try_iter())
            .collect();
        for (page, read) in done {
            self.from_disk = self.from_disk.saturating_sub(1);
            self.landed_from_disk(page, read);
        }
    }

    /// A read has ended: what is right is mapped, the rest is out again.
    fn landed(&mut self, flight: Flight, result: i32) {
        let shared = Arc::clone(&self.shared);
        let Some(swap) = &shared.swap else {
            return;
        };
        let (first, len) = (flight.piece.page, flight.piece.count as usize);
        if let Err(error) = swap.judge(Transfer::Read, flight.piece, result) {
            count(&shared.counters.read_errors, 1);
            self.take_back(first, len, flight.slot);
            if len > 1 {
                // One of the others may be the cause: this one alone.
                self.alone.insert(flight.wanted);
                self.fault(flight.wanted);
                return;
            }
            let cause = read_failed(swap, flight, &error);
            self.fall_ill_out(flight.wanted, cause);
            return;
        }
        count(&shared.counters.read_pages, len);
        let mut content = [0; 4096];
        let mut good = Vec::with_capacity(len);
        for (page, slot) in (first..first + len).zip(flight.slot..) {
            shared.window.read(page, &mut content);
            if swap.slots().sum(slot) == Some(checksum(slot, &content)) {
                good.push(page);
                continue;
            }
            count(&shared.counters.read_errors, 1);
            self.take_back(page, 1, slot);
            if page == flight.wanted {
                let cause = SwapChecksum {
                    path: swap.path().to_owned(),
                    offset: SwapFile::piece(page, slot, 1).offset,
                };
                self.fall_ill_out(page, cause.into());
            }
        }
        // The last one is the probe.
        let probe = good
            .last()
            .copied()
            .filter(|last| len > 1 && *last != flight.wanted && *last == first + len - 1);
        if let Some(probe) = probe {
            good.pop();
            let slot = flight.slot + u32::try_from(probe - first).unwrap_or(0);
            shared
                .table
                .settle(probe, State::Fresh, Backing::Slot(slot));
        }
        for (start, pages) in runs(&good) {
            let span = shared.window.span(start, pages);
            let mapped = shared.uffd.map_cached(span, Protection::Clean);
            for page in start..start + pages {
                let slot = flight.slot + u32::try_from(page - first).unwrap_or(0);
                // If that failed some may be mapped, clean: a fault finds out.
                shared
                    .table
                    .settle(page, State::Mapped, Backing::Slot(slot));
                if mapped.is_ok() {
                    self.ill.remove(&page);
                }
            }
            if let Err(error) = mapped {
                let cause = OsCallFailed::new("UFFDIO_CONTINUE", start, &error);
                self.broken(flight.wanted, cause.into());
            }
        }
    }

    /// Pages that were being read are out again, as if nothing had happened.
    fn take_back(&mut self, first: usize, len: usize, slot: u32) {
        // What was read is not to be seen by anyone. If it cannot be punched out it is read over.
        let _ = self.shared.window.punch(first, len);
        self.went(len);
        for (page, slot) in (first..first + len).zip(slot..) {
            self.shared
                .table
                .settle(page, State::Out, Backing::Slot(slot));
        }
    }

    fn unpack(&mut self, page: usize, entry: u32) {
        let shared = Arc::clone(&self.shared);
        count(&shared.counters.read_faults, 1);
        let mut content = [0; 4096];
        let loaded = shared.tier().load(entry, &mut content);
        if loaded.is_err() {
            let cause = TierBroken { page: page as u64 };
            self.fall_ill(page, Backing::Tier(entry), cause.into());
            return;
        }
        self.came(1);
        if self.give(page, Backing::Tier(entry), Backing::None, &content) {
            shared.tier().free(entry);
        }
    }

    /// Puts content into a page that is *Coming*, and maps it. Says whether it did; if not, the page
    /// is out again.
    fn give(&mut self, page: usize, old: Backing, new: Backing, content: &Page) -> bool {
        let shared = Arc::clone(&self.shared);
        let protection = if new == Backing::None {
            Protection::Written
        } else {
            Protection::Clean
        };
        let span = shared.window.span(page, 1);
        let copied = match shared.uffd.copy(span.start, content, protection) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                // Left there by a punch that failed.
                shared.window.write(page, content);
                shared.uffd.map_cached(span, protection)
            }
            outcome => outcome,
        };
        match copied {
            Ok(()) => {
                shared.table.settle(page, State::Mapped, new);
                self.ill.remove(&page);
                true
            }
            Err(error) => {
                let _ = shared.window.punch(page, 1);
                self.went(1);
                shared.table.settle(page, State::Out, old);
                let cause = OsCallFailed::new("UFFDIO_COPY", page, &error);
                self.broken(page, cause.into());
                false
            }
        }
    }

    /// Asks for a page that a disk's block holds.
    fn read_disk(&mut self, page: usize) {
        count(&self.shared.counters.read_faults, 1);
        self.came(1);
        if let Some(image) = &self.image
            && image.ask.send(page).is_ok()
        {
            self.from_disk += 1;
            return;
        }
        self.went(1);
        let cause = DiskCopyLost { page: page as u64 };
        self.fall_ill(page, Backing::Disk, cause.into());
    }

    fn landed_from_disk(&mut self, page: usize, read: Result<Box<Page>>) {
        match read {
            Ok(content) => {
                count(&self.shared.counters.read_pages, 1);
                if self.give(page, Backing::Disk, Backing::Disk, &content)
                    && let Some(disks) = &self.shared.disks
                {
                    disks.release(page);
                }
            }
            Err(cause) => {
                self.went(1);
                count(&self.shared.counters.read_errors, 1);
                self.fall_ill(page, Backing::Disk, cause);
            }
        }
    }

    /// A page that is *Coming* cannot be had.
    fn fall_ill(&mut self, page: usize, backing: Backing, cause: Observation) {
        self.shared.table.settle(page, State::Out, backing);
        self.fall_ill_out(page, cause);
    }

    fn fall_ill_out(&mut self, page: usize, cause: Observation) {
        self.ill.insert(page, Instant::now() + RETRY);
        self.why = Some(cause);
    }

    /// What cannot happen unless the kernel lacks memory, or we are wrong.
    fn broken(&mut self, page: usize, cause: Observation) {
        let seen = Observation::from(PagerBroken { page: page as u64 }).because(cause);
        self.fall_ill_out(page, seen);
    }
}

fn read_failed(swap: &SwapFile, flight: Flight, error: &std::io::Error) -> Observation {
    Observation::from(SwapReadFailed {
        path: swap.path().to_owned(),
        offset: flight.piece.offset,
    })
    .because(OsCallFailed::new("read", swap.path(), error))
}
