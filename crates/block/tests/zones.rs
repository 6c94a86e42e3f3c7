//! The zones against a model, step by step: any order of the steps of writes and copies, on devices
//! that are arrays, leaves both sides the same. What shuttle does with threads (`models.rs`) is done
//! here with every step drawn by itself, so that a failure shrinks to a few.
#![allow(
    unreachable_pub,
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing
)]

mod sync {
    pub(crate) use std::sync::Mutex;
    pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
}

#[path = "../src/bitmap.rs"]
mod bitmap;
#[path = "../src/live/zones.rs"]
mod zones;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bitmap::{BLOCK_BYTES, DirtyBitmap};
use proptest::prelude::*;
// What the files above find in their crate.
use strake_block::NoBitmap;
use zones::{Ticket, Turn, Wake, Zone, Zones};

/// Cells of a block.
const CELLS: usize = 4;
const BLOCKS: usize = 4;
const ALL: usize = CELLS * BLOCKS;
const CELL_BYTES: u64 = BLOCK_BYTES / CELLS as u64;

#[derive(Debug, Default)]
struct Bell(AtomicBool);

impl Wake for Bell {
    fn wake(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What is done next. The numbers choose among what is possible.
#[derive(Debug, Clone)]
enum Step {
    /// A write begins.
    Write { first: usize, cells: usize },
    /// One of the writes goes one step on.
    Go(usize),
    /// The copier claims a block, or goes one step on with one of its claims.
    Copy(usize),
    /// The mirroring is ended and begun again.
    Restart,
    /// One write's half at the destination is lost, and the mirroring with it.
    Lose(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..ALL, 1..=6usize).prop_map(|(first, cells)| Step::Write { first, cells }),
        12 => any::<prop::sample::Index>().prop_map(|at| Step::Go(at.index(64))),
        8 => any::<prop::sample::Index>().prop_map(|at| Step::Copy(at.index(64))),
        1 => Just(Step::Restart),
        1 => any::<prop::sample::Index>().prop_map(|at| Step::Lose(at.index(64))),
    ]
}

#[derive(Debug)]
struct Write {
    first: usize,
    end: usize,
    value: u64,
    zones: Arc<Zones<Bell>>,
    bell: Arc<Bell>,
    ticket: Option<Ticket>,
    state: State,
    /// What is yet to be done on each side.
    here: Option<usize>,
    there: Option<usize>,
    arrived: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Going,
    Done,
}

#[derive(Debug)]
struct Claim {
    block: usize,
    bell: Arc<Bell>,
    ticket: Ticket,
    granted: bool,
    read: Vec<u64>,
    written: usize,
}

struct Disk {
    source: [u64; ALL],
    destination: [u64; ALL],
    bitmap: Arc<DirtyBitmap>,
    zones: Arc<Zones<Bell>>,
    writes: Vec<Write>,
    claims: Vec<Claim>,
    number: u64,
}

impl Disk {
    fn new() -> Self {
        let bitmap = Arc::new(DirtyBitmap::new(BLOCKS as u64 * BLOCK_BYTES).unwrap());
        bitmap.mark(0, BLOCKS as u64 * BLOCK_BYTES);
        Self {
            source: std::array::from_fn(|cell| cell as u64 + 1),
            destination: [0; ALL],
            zones: Arc::new(Zones::new(Arc::clone(&bitmap))),
            bitmap,
            writes: Vec::new(),
            claims: Vec::new(),
            number: 1000,
        }
    }

    fn bytes(first: usize, end: usize) -> (u64, u64) {
        (first as u64 * CELL_BYTES, (end - first) as u64 * CELL_BYTES)
    }

    fn begin(&mut self, first: usize, cells: usize) {
        let end = (first + cells).min(ALL);
        self.number += 1;
        let bell = Arc::new(Bell::default());
        let (offset, len) = Self::bytes(first, end);
        let turn = self.zones.enter(offset, len, &bell);
        let mut write = Write {
            first,
            end,
            value: self.number,
            zones: Arc::clone(&self.zones),
            bell,
            ticket: None,
            state: State::Waiting,
            here: None,
            there: None,
            arrived: false,
        };
        match turn {
            Turn::Now(ticket) => {
                write.ticket = Some(ticket);
                self.granted(&mut write);
            }
            Turn::Later(ticket) => write.ticket = Some(ticket),
            Turn::Off => panic!("it is on"),
        }
        self.writes.push(write);
    }

    fn granted(&self, write: &mut Write) {
        // Alone: no other holds a cell of it.
        for other in self.writes.iter().filter(|it| it.state == State::Going) {
            let overlaps = other.first < write.end && write.first < other.end;
            let same = Arc::ptr_eq(&other.zones, &write.zones) && other.ticket.is_some();
            assert!(
                !overlaps || !same || !write.zones.is_on(),
                "two have one range"
            );
        }
        let (offset, len) = Self::bytes(write.first, write.end);
        write.state = State::Going;
        write.here = Some(write.first);
        if write.zones.zone(offset, len) == Zone::Both {
            write.there = Some(write.first);
        }
    }

    fn go(&mut self, index: usize) {
        if self.writes.is_empty() {
            return;
        }
        let index = index % self.writes.len();
        let mut write = self.writes.swap_remove(index);
        match (write.state, write.ticket) {
            (State::Waiting, Some(ticket)) => match write.zones.again(ticket) {
                Turn::Now(_) => self.granted(&mut write),
                Turn::Later(_) => {}
                Turn::Off => {
                    write.ticket = None;
                    write.state = State::Going;
                    write.here = Some(write.first);
                }
            },
            _ => self.advance(&mut write),
        }
        if write.state != State::Done {
            self.writes.push(write);
        }
    }

    /// One cell at one side, turn about; or the end.
    fn advance(&mut self, write: &mut Write) {
        let there_first = write.value.is_multiple_of(2);
        let there = write.there.filter(|_| there_first || write.here.is_none());
        if let Some(cell) = there {
            self.destination[cell] = write.value;
            write.there = Some(cell + 1).filter(|cell| *cell < write.end);
            write.arrived = write.there.is_none();
            return;
        }
        if let Some(cell) = write.here {
            self.source[cell] = write.value;
            write.here = Some(cell + 1).filter(|cell| *cell < write.end);
            return;
        }
        write.state = State::Done;
        let (offset, len) = Self::bytes(write.first, write.end);
        match write.ticket {
            Some(ticket) if write.arrived => {
                if !write.zones.leave(ticket) {
                    self.bitmap.mark(offset, len);
                }
            }
            ticket => {
                self.bitmap.mark(offset, len);
                if let Some(ticket) = ticket {
                    write.zones.leave(ticket);
                }
            }
        }
    }

    fn copy(&mut self, index: usize) {
        let wanted = self.claims.len() < 2;
        if wanted && (index.is_multiple_of(3) || self.claims.is_empty()) {
            let taken = |block: u64| self.claims.iter().any(|it| it.block as u64 == block);
            let mut at = 0;
            while let Some(block) = self.bitmap.next_marked(at) {
                at = block + 1;
                if taken(block) {
                    continue;
                }
                let bell = Arc::new(Bell::default());
                let turn = self.zones.enter(block * BLOCK_BYTES, BLOCK_BYTES, &bell);
                let (ticket, granted) = match turn {
                    Turn::Now(ticket) => (ticket, true),
                    Turn::Later(ticket) => (ticket, false),
                    Turn::Off => panic!("it is on"),
                };
                if granted {
                    self.zones.copies(block * BLOCK_BYTES, BLOCK_BYTES);
                }
                self.claims.push(Claim {
                    block: block as usize,
                    bell,
                    ticket,
                    granted,
                    read: Vec::new(),
                    written: 0,
                });
                return;
            }
        }
        if self.claims.is_empty() {
            return;
        }
        let index = index % self.claims.len();
        let claim = &mut self.claims[index];
        let first = claim.block * CELLS;
        if !claim.granted {
            if self.zones.again(claim.ticket) == Turn::Now(claim.ticket) {
                claim.granted = true;
                let at = claim.block as u64 * BLOCK_BYTES;
                self.zones.copies(at, BLOCK_BYTES);
            }
        } else if claim.read.len() < CELLS {
            claim.read.push(self.source[first + claim.read.len()]);
        } else if claim.written < CELLS {
            self.destination[first + claim.written] = claim.read[claim.written];
            claim.written += 1;
        } else {
            assert!(self.zones.leave(claim.ticket));
            self.claims.swap_remove(index);
        }
    }

    /// Ends the mirroring; the halves that are on their way arrive before it begins again, and the
    /// copier's chunks too, but nobody relies on that.
    fn restart(&mut self) {
        self.zones.off();
        for claim in std::mem::take(&mut self.claims) {
            if claim.granted {
                let first = claim.block * CELLS;
                for cell in claim.written..CELLS {
                    let read = claim.read.get(cell).copied();
                    self.destination[first + cell] = read.unwrap_or(self.source[first + cell]);
                }
            }
        }
        for write in &mut self.writes {
            if let Some(from) = write.there.take() {
                self.destination[from..write.end].fill(write.value);
            }
        }
        self.zones = Arc::new(Zones::new(Arc::clone(&self.bitmap)));
    }

    fn lose(&mut self, index: usize) {
        let flying: Vec<_> = (0..self.writes.len())
            .filter(|at| self.writes[*at].there.is_some())
            .collect();
        if let Some(at) = flying.get(index % flying.len().max(1)) {
            // Some of it may have arrived.
            self.writes[*at].there = None;
            self.restart();
        }
    }

    /// Lets everything end: writes first, then copies; nobody may be stuck.
    fn end(&mut self) {
        for round in 0.. {
            assert!(round < 10_000, "stuck: {:?} {:?}", self.writes, self.claims);
            if self.writes.is_empty() && self.claims.is_empty() && self.bitmap.marked() == 0 {
                break;
            }
            self.go(round);
            self.copy(round);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn both_sides_end_the_same_whatever_the_order(steps in prop::collection::vec(step(), 1..120)) {
        let mut disk = Disk::new();
        for step in steps {
            match step {
                Step::Write { first, cells } => disk.begin(first, cells),
                Step::Go(index) => disk.go(index),
                Step::Copy(index) => disk.copy(index),
                Step::Restart => disk.restart(),
                Step::Lose(index) => disk.lose(index),
            }
        }
        disk.end();
        prop_assert_eq!(disk.source, disk.destination);
        prop_assert!(disk.zones.waits_since().is_none());
    }

    #[test]
    fn a_range_is_marked_if_each_of_its_blocks_is(marks in prop::collection::vec((0..70u64, 1..70u64), 0..4), at in 0..70 * BLOCK_BYTES, len in 1..70 * BLOCK_BYTES) {
        // The last block is not a whole one.
        let size = 70 * BLOCK_BYTES - 512;
        let bitmap = DirtyBitmap::new(size).unwrap();
        for (first, blocks) in marks {
            bitmap.mark(first * BLOCK_BYTES, blocks * BLOCK_BYTES);
        }
        let at = at.min(size - 512);
        let len = len.min(size - at);
        let each = (at / BLOCK_BYTES..=(at + len - 1) / BLOCK_BYTES).all(|block| bitmap.is_marked(block));
        prop_assert_eq!(bitmap.all_marked(at, len), each);
    }

    #[test]
    fn who_waits_is_woken_when_the_way_is_free(ranges in prop::collection::vec((0..20u64, 1..8u64), 2..12), order in any::<u64>()) {
        let zones = Zones::new(Arc::new(DirtyBitmap::new(BLOCK_BYTES).unwrap()));
        let mut held: Vec<(Ticket, Arc<Bell>, bool)> = Vec::new();
        for (start, len) in ranges {
            let bell = Arc::new(Bell::default());
            match zones.enter(start, len, &bell) {
                Turn::Now(ticket) => held.push((ticket, bell, true)),
                Turn::Later(ticket) => held.push((ticket, bell, false)),
                Turn::Off => panic!("it is on"),
            }
        }
        let mut order = order;
        while !held.is_empty() {
            let granted: Vec<_> = (0..held.len()).filter(|at| held[*at].2).collect();
            prop_assert!(!granted.is_empty(), "nobody can go on");
            order = order.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (ticket, ..) = held.remove(granted[(order >> 33) as usize % granted.len()]);
            prop_assert!(zones.leave(ticket));
            for (ticket, bell, granted) in &mut held {
                let woken = bell.0.swap(false, Ordering::SeqCst);
                let now = zones.again(*ticket) == Turn::Now(*ticket);
                prop_assert!(!now || woken || *granted, "it is free and nobody said so");
                prop_assert!(now || !*granted, "what was granted is taken away");
                *granted = now;
            }
        }
    }
}
