//! The two protocols that many threads run at once, under random interleavings: the same source
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

use std::time::Duration;

use bitmap::{BLOCK_BYTES, DirtyBitmap};
use gate::Gate;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::sync::{Arc, Condvar, Mutex, RwLock};
use shuttle::thread;
// What the files above find in their crate.
use strake_block::NoBitmap;

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
