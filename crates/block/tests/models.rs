//! The three protocols that many threads run at once, under random interleavings: the same source
//! files as in the crate, compiled against shuttle's primitives.
#![allow(
    unreachable_pub,
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod sync {
    pub(crate) use shuttle::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    pub(crate) use shuttle::sync::{Condvar, Mutex};
}

#[path = "../src/bitmap.rs"]
mod bitmap;
#[path = "../src/live/gate.rs"]
mod gate;
#[path = "../src/live/zones.rs"]
mod zones;

use std::time::Duration;

use bitmap::{BLOCK_BYTES, DirtyBitmap};
use gate::Gate;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::sync::{Arc, Condvar, Mutex, RwLock};
use shuttle::thread;
// What the files above find in their crate.
use strake_block::NoBitmap;
use zones::{Ticket, Turn, Wake, Zone, Zones};

const BLOCKS: usize = 3;
const ITERATIONS: usize = 3000;

/// A disk of a few blocks, one number each: a device whose reads and writes are atomic.
struct Device([AtomicU64; BLOCKS]);

impl Device {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    fn write(&self, block: usize, value: u64) {
        self.0[block].store(value, Ordering::SeqCst);
    }

    fn read(&self, block: usize) -> u64 {
        self.0[block].load(Ordering::SeqCst)
    }

    fn content(&self) -> Vec<u64> {
        (0..BLOCKS).map(|block| self.read(block)).collect()
    }
}

/// A live disk as far as the protocol goes: gate, image, tracker.
struct Model {
    gate: Gate,
    images: [Device; 2],
    /// Which image, changed only behind the closed gate.
    on: AtomicU64,
    tracker: RwLock<Option<Arc<DirtyBitmap>>>,
    /// What each writer has been told is written.
    told: Mutex<[u64; BLOCKS]>,
    /// The queues' events: signalled when the gate opens.
    opened: (Mutex<u64>, Condvar),
}

impl Model {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            gate: Gate::new(),
            images: [Device::new(), Device::new()],
            on: AtomicU64::new(0),
            tracker: RwLock::new(None),
            told: Mutex::new([0; BLOCKS]),
            opened: (Mutex::new(0), Condvar::new()),
        })
    }

    /// `DiskQueue`: enter, or wait for the event and try again.
    fn enter(&self) {
        loop {
            // Clearing the event comes before trying.
            let seen = *self.opened.0.lock().unwrap();
            if self.gate.enter() {
                return;
            }
            let mut signals = self.opened.0.lock().unwrap();
            while *signals == seen {
                signals = self.opened.1.wait(signals).unwrap();
            }
        }
    }

    fn write(&self, block: usize, value: u64) {
        self.enter();
        let image = &self.images[self.on.load(Ordering::SeqCst) as usize];
        thread::yield_now();
        image.write(block, value);
        thread::yield_now();
        if let Some(bitmap) = &*self.tracker.read().unwrap() {
            bitmap.mark(block as u64 * BLOCK_BYTES, BLOCK_BYTES);
        }
        thread::yield_now();
        self.told.lock().unwrap()[block] = value;
        self.gate.leave();
    }

    fn open(&self) {
        self.gate.open();
        *self.opened.0.lock().unwrap() += 1;
        self.opened.1.notify_all();
    }

    fn copy(&self, bitmap: &DirtyBitmap, from: usize, to: usize) {
        let mut at = 0;
        while let Some(block) = bitmap.next_marked(at) {
            if bitmap.take(block) {
                let value = self.images[from].read(block as usize);
                thread::yield_now();
                self.images[to].write(block as usize, value);
            }
            at = block + 1;
        }
    }

    fn migrate(&self) {
        let from = self.on.load(Ordering::SeqCst) as usize;
        let to = 1 - from;
        let bitmap = Arc::new(DirtyBitmap::new(BLOCKS as u64 * BLOCK_BYTES).unwrap());
        *self.tracker.write().unwrap() = Some(Arc::clone(&bitmap));
        // The first pass: everything, clearing before reading.
        for block in 0..BLOCKS {
            let _ = bitmap.take(block as u64);
            let value = self.images[from].read(block);
            thread::yield_now();
            self.images[to].write(block, value);
        }
        for _ in 0..thread_rng().gen_range(0..2) {
            self.copy(&bitmap, from, to);
        }
        self.gate.close();
        assert!(self.gate.drained(Duration::from_secs(3600)));
        self.copy(&bitmap, from, to);
        assert_eq!(bitmap.marked(), 0);
        assert_eq!(self.images[from].content(), self.images[to].content());
        assert_eq!(
            self.images[to].content(),
            self.told.lock().unwrap().to_vec()
        );
        self.on.store(to as u64, Ordering::SeqCst);
        *self.tracker.write().unwrap() = None;
        self.open();
    }
}

#[test]
fn no_write_is_lost_however_it_meets_the_migration() {
    shuttle::check_random(
        || {
            let model = Model::new();
            let writers: Vec<_> = (0..2u64)
                .map(|writer| {
                    let model = Arc::clone(&model);
                    thread::spawn(move || {
                        for number in 1..=3u64 {
                            // Two writers share block 1 only in turn: `told` follows the order in
                            // which the device saw them only if they do not overlap.
                            let block = if writer == 0 { number % 2 } else { 2 };
                            model.write(block as usize, writer * 100 + number);
                        }
                    })
                })
                .collect();
            model.migrate();
            model.migrate();
            for writer in writers {
                writer.join().unwrap();
            }
            let on = model.on.load(Ordering::SeqCst) as usize;
            assert_eq!(
                model.images[on].content(),
                model.told.lock().unwrap().to_vec()
            );
        },
        ITERATIONS,
    );
}

#[test]
fn tracking_switched_on_in_the_middle_of_writes_misses_none() {
    shuttle::check_random(
        || {
            let model = Model::new();
            let writer = {
                let model = Arc::clone(&model);
                thread::spawn(move || model.write(0, 7))
            };
            let bitmap = Arc::new(DirtyBitmap::new(BLOCKS as u64 * BLOCK_BYTES).unwrap());
            *model.tracker.write().unwrap() = Some(Arc::clone(&bitmap));
            let copied = model.images[0].read(0);
            writer.join().unwrap();
            assert!(
                copied == 7 || bitmap.is_marked(0),
                "the write is neither in the copy nor marked"
            );
        },
        ITERATIONS,
    );
}

#[test]
fn marks_and_clears_of_one_word_do_not_disturb_each_other() {
    shuttle::check_random(
        || {
            let bitmap = Arc::new(DirtyBitmap::new(64 * BLOCK_BYTES).unwrap());
            bitmap.mark(0, 8 * BLOCK_BYTES);
            let marker = {
                let bitmap = Arc::clone(&bitmap);
                thread::spawn(move || {
                    bitmap.mark(8 * BLOCK_BYTES, 8 * BLOCK_BYTES);
                    bitmap.mark(0, 1);
                })
            };
            let mut taken = 0;
            for block in 1..8 {
                taken += u32::from(bitmap.take(block));
            }
            marker.join().unwrap();
            assert_eq!(taken, 7);
            assert_eq!(bitmap.marked(), 9);
        },
        ITERATIONS,
    );
}

#[test]
fn a_closed_gate_empties_and_an_open_one_lets_everyone_in() {
    shuttle::check_random(
        || {
            let model = Model::new();
            let inside = Arc::new(AtomicU64::new(0));
            let alone = Arc::new(AtomicBool::new(false));
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    let model = Arc::clone(&model);
                    let inside = Arc::clone(&inside);
                    let alone = Arc::clone(&alone);
                    thread::spawn(move || {
                        for _ in 0..2 {
                            model.enter();
                            inside.fetch_add(1, Ordering::SeqCst);
                            assert!(!alone.load(Ordering::SeqCst), "inside a closed gate");
                            thread::yield_now();
                            inside.fetch_sub(1, Ordering::SeqCst);
                            model.gate.leave();
                        }
                    })
                })
                .collect();
            for _ in 0..2 {
                model.gate.close();
                assert!(model.gate.drained(Duration::from_secs(3600)));
                alone.store(true, Ordering::SeqCst);
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                thread::yield_now();
                alone.store(false, Ordering::SeqCst);
                model.open();
            }
            for thread in threads {
                thread.join().unwrap();
            }
            assert_eq!(model.gate.inside(), 0);
        },
        ITERATIONS,
    );
}

/// A waker: counts how often it was woken.
#[derive(Default)]
struct Bell {
    rung: Mutex<u64>,
    changed: Condvar,
}

impl Wake for Bell {
    fn wake(&self) {
        *self.rung.lock().unwrap() += 1;
        self.changed.notify_all();
    }
}

impl Bell {
    fn seen(&self) -> u64 {
        *self.rung.lock().unwrap()
    }

    /// Waits for more than was seen. Without a limit: a wake-up that is lost is a deadlock.
    fn wait(&self, seen: u64) {
        let mut rung = self.rung.lock().unwrap();
        while *rung == seen {
            rung = self.changed.wait(rung).unwrap();
        }
    }
}

/// Cells of a block: the unit of the model's writes, smaller than what is copied at once.
const CELLS: u64 = 2;
const CELL_BYTES: u64 = BLOCK_BYTES / CELLS;
const ALL_CELLS: usize = BLOCKS * CELLS as usize;

/// A device of cells. Writes of several cells are not atomic.
struct Cells([AtomicU64; ALL_CELLS]);

impl Cells {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    fn write(&self, cells: std::ops::Range<usize>, value: u64) {
        for cell in cells {
            self.0[cell].store(value, Ordering::SeqCst);
            thread::yield_now();
        }
    }

    fn content(&self) -> Vec<u64> {
        self.0
            .iter()
            .map(|cell| cell.load(Ordering::SeqCst))
            .collect()
    }
}

/// A disk that is being mirrored, as far as the zones go.
struct Mirrored {
    gate: Gate,
    source: Cells,
    destination: Cells,
    bitmap: Arc<DirtyBitmap>,
    /// What the queues find when they start a change, like their `half`.
    zones: Mutex<Option<Arc<Zones<Bell>>>>,
    opened: Bell,
    /// Writes whose half at the destination the queue does not wait for any more.
    flying: Mutex<Vec<thread::JoinHandle<()>>>,
    /// The half at the destination fails from now on.
    broken: AtomicBool,
}

impl Mirrored {
    fn new() -> Arc<Self> {
        let bitmap = Arc::new(DirtyBitmap::new(BLOCKS as u64 * BLOCK_BYTES).unwrap());
        Arc::new(Self {
            gate: Gate::new(),
            source: Cells::new(),
            destination: Cells::new(),
            bitmap,
            zones: Mutex::new(None),
            opened: Bell::default(),
            flying: Mutex::new(Vec::new()),
            broken: AtomicBool::new(false),
        })
    }

    fn is_on(&self, zones: &Arc<Zones<Bell>>) -> bool {
        let now = self.zones.lock().unwrap();
        now.as_ref().is_some_and(|now| Arc::ptr_eq(now, zones))
    }

    /// `DiskQueue`: what it does with one change.
    fn write(self: &Arc<Self>, cells: std::ops::Range<usize>, value: u64) {
        loop {
            let seen = self.opened.seen();
            if self.gate.enter() {
                break;
            }
            self.opened.wait(seen);
        }
        let offset = cells.start as u64 * CELL_BYTES;
        let len = cells.len() as u64 * CELL_BYTES;
        let zones = self.zones.lock().unwrap().clone();
        let mut done = false;
        if let Some(zones) = zones {
            let bell = Arc::new(Bell::default());
            let mut turn = zones.enter(offset, len, &bell);
            while let Turn::Later(ticket) = turn {
                let seen = bell.seen();
                turn = zones.again(ticket);
                if turn == Turn::Later(ticket) {
                    bell.wait(seen);
                }
            }
            if let Turn::Now(ticket) = turn {
                self.change(&zones, ticket, cells.clone(), value);
                done = true;
            }
        }
        if !done {
            self.source.write(cells, value);
            self.bitmap.mark(offset, len);
        }
        self.gate.leave();
    }

    fn change(
        self: &Arc<Self>,
        zones: &Arc<Zones<Bell>>,
        ticket: Ticket,
        cells: std::ops::Range<usize>,
        value: u64,
    ) {
        let offset = cells.start as u64 * CELL_BYTES;
        let len = cells.len() as u64 * CELL_BYTES;
        let mut arrived = false;
        // The half is sent under the same lock under which it is taken away.
        let half = {
            let now = self.zones.lock().unwrap();
            let on = now.as_ref().is_some_and(|now| Arc::ptr_eq(now, zones));
            (on && zones.zone(offset, len) == Zone::Both).then(|| {
                let this = Arc::clone(self);
                let cells = cells.clone();
                let ended = Arc::new(AtomicU64::new(0));
                let told = Arc::clone(&ended);
                let thread = thread::spawn(move || {
                    if this.broken.load(Ordering::SeqCst) {
                        told.store(2, Ordering::SeqCst);
                        return;
                    }
                    this.destination.write(cells, value);
                    told.store(1, Ordering::SeqCst);
                });
                self.flying.lock().unwrap().push(thread);
                ended
            })
        };
        self.source.write(cells, value);
        if let Some(ended) = half {
            // Until it has ended or is nobody's.
            while ended.load(Ordering::SeqCst) == 0 && self.is_on(zones) {
                thread::yield_now();
            }
            arrived = ended.load(Ordering::SeqCst) == 1;
            if ended.load(Ordering::SeqCst) == 2 {
                zones.off();
            }
        }
        if arrived {
            if !zones.leave(ticket) {
                self.bitmap.mark(offset, len);
            }
        } else {
            self.bitmap.mark(offset, len);
            zones.leave(ticket);
        }
    }

    fn begin(&self) -> Arc<Zones<Bell>> {
        let zones = Arc::new(Zones::new(Arc::clone(&self.bitmap)));
        *self.zones.lock().unwrap() = Some(Arc::clone(&zones));
        zones
    }

    /// `LiveDisk::end_mirror` and `Mirror::settle`.
    fn end(&self, zones: &Zones<Bell>) {
        zones.off();
        *self.zones.lock().unwrap() = None;
        let flying = std::mem::take(&mut *self.flying.lock().unwrap());
        for half in flying {
            half.join().unwrap();
        }
    }

    /// The copier: one pass over what is marked. False if the mirroring was ended.
    fn sweep(&self, zones: &Zones<Bell>) -> bool {
        let mut at = 0;
        while let Some(block) = self.bitmap.next_marked(at) {
            let bell = Arc::new(Bell::default());
            let (offset, len) = (block * BLOCK_BYTES, BLOCK_BYTES);
            let mut turn = zones.enter(offset, len, &bell);
            let ticket = loop {
                match turn {
                    Turn::Off => return false,
                    Turn::Now(ticket) => break ticket,
                    Turn::Later(ticket) => {
                        let seen = bell.seen();
                        turn = zones.again(ticket);
                        if turn == Turn::Later(ticket) {
                            bell.wait(seen);
                        }
                    }
                }
            };
            zones.copies(offset, len);
            for cell in 0..CELLS {
                let cell = (block * CELLS + cell) as usize;
                let value = self.source.0[cell].load(Ordering::SeqCst);
                thread::yield_now();
                self.destination.0[cell].store(value, Ordering::SeqCst);
            }
            zones.leave(ticket);
            at = block + 1;
        }
        true
    }

    /// Closes the gate and looks whether both sides are the same where nothing is marked.
    fn compare(&self) -> bool {
        self.gate.close();
        assert!(self.gate.drained(Duration::from_secs(3600)));
        let clean = self.bitmap.marked() == 0;
        let (source, destination) = (self.source.content(), self.destination.content());
        for cell in 0..ALL_CELLS {
            if !self.bitmap.is_marked(cell as u64 / CELLS) {
                assert_eq!(source[cell], destination[cell], "cell {cell}");
            }
        }
        self.gate.open();
        self.opened.wake();
        clean
    }
}

/// Writers of overlapping ranges within a block and across two, all at once.
fn writers(disk: &Arc<Mirrored>, writes: u64) -> Vec<thread::JoinHandle<()>> {
    (0..3u64)
        .map(|writer| {
            let disk = Arc::clone(disk);
            thread::spawn(move || {
                for number in 1..=writes {
                    let first = thread_rng().gen_range(0..ALL_CELLS);
                    let end = (first + thread_rng().gen_range(1..=3)).min(ALL_CELLS);
                    disk.write(first..end, writer * 100 + number);
                }
            })
        })
        .collect()
}

#[test]
fn a_mirror_is_the_same_as_its_source_however_writes_meet_the_copy() {
    shuttle::check_random(
        || {
            let disk = Mirrored::new();
            disk.bitmap.mark(0, BLOCKS as u64 * BLOCK_BYTES);
            // Some are on their way before anything is mirrored.
            let writers = writers(&disk, 2);
            let zones = disk.begin();
            let mut sweeps = 0;
            loop {
                assert!(disk.sweep(&zones));
                sweeps += 1;
                if disk.compare() {
                    break;
                }
                // Only what was on its way when it began can be left.
                assert!(sweeps <= 4, "the mirroring does not converge");
            }
            for writer in writers {
                writer.join().unwrap();
            }
            assert!(disk.compare(), "a write was not mirrored");
            disk.end(&zones);
        },
        ITERATIONS,
    );
}

#[test]
fn a_mirroring_that_is_ended_at_any_instant_and_begun_again_loses_nothing() {
    shuttle::check_random(
        || {
            let disk = Mirrored::new();
            disk.bitmap.mark(0, BLOCKS as u64 * BLOCK_BYTES);
            let writers = writers(&disk, 2);
            for _ in 0..2 {
                let zones = disk.begin();
                // The guard, a cancellation: somebody else ends it in the middle.
                let other = {
                    let disk = Arc::clone(&disk);
                    let zones = Arc::clone(&zones);
                    thread::spawn(move || {
                        zones.off();
                        *disk.zones.lock().unwrap() = None;
                    })
                };
                disk.sweep(&zones);
                other.join().unwrap();
                disk.end(&zones);
                disk.compare();
            }
            let zones = disk.begin();
            while !disk.compare() {
                assert!(disk.sweep(&zones));
            }
            for writer in writers {
                writer.join().unwrap();
            }
            assert!(disk.compare());
            disk.end(&zones);
        },
        ITERATIONS,
    );
}

#[test]
fn one_pass_is_enough_for_a_mirroring_that_was_there_before_the_writes() {
    shuttle::check_random(
        || {
            let disk = Mirrored::new();
            disk.bitmap.mark(0, BLOCKS as u64 * BLOCK_BYTES);
            let zones = disk.begin();
            let writers = writers(&disk, 2);
            assert!(disk.sweep(&zones));
            assert!(disk.compare(), "something is dirty again");
            for writer in writers {
                writer.join().unwrap();
            }
            assert!(disk.compare());
            disk.end(&zones);
        },
        ITERATIONS,
    );
}

#[test]
fn a_half_that_arrived_before_the_end_does_not_hide_one_that_had_not() {
    // One thread has to stand still for long, which takes more than chance.
    shuttle::check_pct(
        || {
            // All is copied: both writes are mirrored, or marked once nothing is any more.
            let disk = Mirrored::new();
            let zones = disk.begin();
            let writers: Vec<_> = (0..2usize)
                .map(|cell| {
                    let disk = Arc::clone(&disk);
                    thread::spawn(move || disk.write(cell..cell + 1, 7))
                })
                .collect();
            thread::yield_now();
            disk.end(&zones);
            let zones = disk.begin();
            while disk.bitmap.marked() > 0 {
                assert!(disk.sweep(&zones));
            }
            for writer in writers {
                writer.join().unwrap();
            }
            disk.compare();
            disk.end(&zones);
        },
        2 * ITERATIONS,
        3,
    );
}

#[test]
fn a_destination_that_fails_ends_the_mirroring_and_every_write_goes_on() {
    shuttle::check_random(
        || {
            let disk = Mirrored::new();
            disk.bitmap.mark(0, BLOCKS as u64 * BLOCK_BYTES);
            let zones = disk.begin();
            let writers = writers(&disk, 2);
            disk.sweep(&zones);
            disk.broken.store(true, Ordering::SeqCst);
            for writer in writers {
                writer.join().unwrap();
            }
            disk.end(&zones);
            disk.compare();
        },
        ITERATIONS,
    );
}

#[test]
fn turns_are_in_the_order_of_asking_and_none_is_lost() {
    shuttle::check_random(
        || {
            let bitmap = Arc::new(DirtyBitmap::new(BLOCKS as u64 * BLOCK_BYTES).unwrap());
            let zones = Arc::new(Zones::new(bitmap));
            let holder: Arc<[AtomicU64; 4]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
            let threads: Vec<_> = (1..=3u64)
                .map(|me| {
                    let (zones, holder) = (Arc::clone(&zones), Arc::clone(&holder));
                    thread::spawn(move || {
                        let bell = Arc::new(Bell::default());
                        let start = thread_rng().gen_range(0..3u64);
                        let end = (start + 2).min(4);
                        let mut turn = zones.enter(start, end - start, &bell);
                        while let Turn::Later(ticket) = turn {
                            let seen = bell.seen();
                            turn = zones.again(ticket);
                            if turn == Turn::Later(ticket) {
                                bell.wait(seen);
                            }
                        }
                        let Turn::Now(ticket) = turn else {
                            panic!("nobody ended it");
                        };
                        for at in start..end {
                            let before = holder[at as usize].swap(me, Ordering::SeqCst);
                            assert_eq!(before, 0, "two have the same range");
                        }
                        thread::yield_now();
                        for at in start..end {
                            holder[at as usize].store(0, Ordering::SeqCst);
                        }
                        assert!(zones.leave(ticket));
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            assert!(zones.waits_since().is_none() && zones.is_on());
        },
        ITERATIONS,
    );
}
