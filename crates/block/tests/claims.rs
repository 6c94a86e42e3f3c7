//! What a job keeps for the time after a crash, under random interleavings: the same source file as in
//! the crate, compiled against shuttle's primitives.
//!
//! The devices of the model have volatile caches: what was written and not flushed may or may not be there after
//! a crash. So at every instant, of each region that the file claims, cache and device of the source and
//! the device of the destination must be the same.
#![allow(
    unreachable_pub,
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod sync {
    pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard};
}

mod zones {
    pub(crate) trait Wake {
        fn wake(&self);
    }
}

#[path = "../src/live/claims.rs"]
mod claims;

use std::collections::HashSet;

use claims::{Begin, Claims, LEAST_REGION, region_bytes};
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::thread;
use zones::Wake;

const REGIONS: usize = 3;
/// Two in each region.
const CELLS: usize = 2 * REGIONS;
const CELL: u64 = LEAST_REGION / 2;
const SIZE: u64 = REGIONS as u64 * LEAST_REGION;

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

    /// Without a limit: a wake-up that is lost is a deadlock.
    fn wait(&self, seen: u64) {
        let mut rung = self.rung.lock().unwrap();
        while *rung == seen {
            rung = self.changed.wait(rung).unwrap();
        }
    }
}

#[derive(Default)]
struct State {
    source_cache: [u64; CELLS],
    source_device: [u64; CELLS],
    there_cache: [u64; CELLS],
    there_device: [u64; CELLS],
    dirty: HashSet<usize>,
    flying: Option<usize>,
    file: Vec<u8>,
    ever_claimed: bool,
}

/// Not shuttle's lock: what happens under it happens at one instant.
struct World(std::sync::Mutex<State>);

impl World {
    fn change<T>(&self, how: impl FnOnce(&mut State) -> T) -> T {
        let value = {
            let mut state = self.0.lock().unwrap();
            let value = how(&mut state);
            for region in 0..REGIONS {
                if state
                    .file
                    .first()
                    .is_some_and(|byte| byte >> region & 1 == 1)
                {
                    state.ever_claimed = true;
                    for cell in [2 * region, 2 * region + 1] {
                        let here = state.source_cache[cell];
                        assert_eq!(here, state.source_device[cell], "not durable at the source");
                        assert_eq!(here, state.there_device[cell], "not the same");
                    }
                }
            }
            value
        };
        thread::yield_now();
        value
    }

    fn write(&self, cells: std::ops::Range<usize>, value: u64) {
        for cell in cells.clone() {
            self.change(|state| {
                state.source_cache[cell] = value;
                // A cache may be written back at any time.
                if thread_rng().gen_range(0..3u64) == 0 {
                    state.source_device[cell] = value;
                }
            });
        }
        for cell in cells {
            self.change(|state| state.dirty.insert(cell));
        }
    }

    /// Takes the first dirty block.
    fn take(&self) -> bool {
        self.change(|state| {
            let first = state.dirty.iter().min().copied();
            if let Some(cell) = first {
                state.dirty.remove(&cell);
                state.flying = Some(cell);
            }
            first.is_some()
        })
    }

    fn copy(&self) {
        let read = self.change(|state| state.flying.map(|cell| (cell, state.source_cache[cell])));
        if let Some((cell, value)) = read {
            self.change(|state| {
                state.there_cache[cell] = value;
                if thread_rng().gen_range(0..3u64) == 0 {
                    state.there_device[cell] = value;
                }
            });
            self.change(|state| state.flying = None);
        }
    }
}

fn writer(world: &Arc<World>, claims: &Arc<Claims<Bell>>, me: u64) -> thread::JoinHandle<()> {
    let (world, claims) = (Arc::clone(world), Arc::clone(claims));
    thread::spawn(move || {
        let bell = Arc::new(Bell::default());
        for number in 0..2u64 {
            let first = thread_rng().gen_range(0..CELLS as u64) as usize;
            let end = CELLS.min(first + 1 + thread_rng().gen_range(0..2u64) as usize);
            let (offset, len) = (first as u64 * CELL, (end - first) as u64 * CELL);
            loop {
                let seen = bell.seen();
                match claims.begin(offset, len, &bell) {
                    Begin::Now => break,
                    Begin::Later => bell.wait(seen),
                }
            }
            world.write(first..end, me * 100 + number);
            claims.end(offset, len);
        }
    })
}

fn run(known: Vec<u8>) -> bool {
    let claims = Arc::new(Claims::<Bell>::new(SIZE, &known));
    let world = Arc::new(World(std::sync::Mutex::new(State {
        file: known,
        ..State::default()
    })));
    let writers = [writer(&world, &claims, 1), writer(&world, &claims, 2)];
    let file = {
        let (world, claims) = (Arc::clone(&world), Arc::clone(&claims));
        thread::spawn(move || {
            while let Some(work) = claims.work() {
                thread::yield_now();
                world.change(|state| state.file.clone_from(&work.map));
                claims.written(work);
            }
        })
    };
    for _ in 0..3 {
        let taken = world.take();
        // One block is on its way while it looks.
        let mut complete = |range: std::ops::Range<u64>| {
            let cells = (range.start / CELL) as usize..range.end.div_ceil(CELL) as usize;
            let state = world.0.lock().unwrap();
            !cells
                .clone()
                .any(|cell| state.dirty.contains(&cell) || state.flying == Some(cell))
        };
        let flusher = claims.look(&mut complete).then(|| {
            let (world, claims) = (Arc::clone(&world), Arc::clone(&claims));
            thread::spawn(move || {
                world.change(|state| state.source_device = state.source_cache);
                world.change(|state| state.there_device = state.there_cache);
                claims.claim();
            })
        });
        if taken {
            world.copy();
        }
        while world.take() {
            world.copy();
        }
        if let Some(flusher) = flusher {
            flusher.join().unwrap();
        }
    }
    for writer in writers {
        writer.join().unwrap();
    }
    claims.off();
    file.join().unwrap();
    let state = world.0.lock().unwrap();
    state.ever_claimed
}

#[test]
fn what_the_file_claims_is_durable_and_the_same_at_every_instant() {
    let claimed = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = std::sync::Arc::clone(&claimed);
    shuttle::check_random(
        move || {
            count.fetch_add(
                u64::from(run(Vec::new())),
                std::sync::atomic::Ordering::Relaxed,
            );
        },
        3000,
    );
    assert!(claimed.load(std::sync::atomic::Ordering::Relaxed) > 100);
    shuttle::check_pct(
        || {
            run(Vec::new());
        },
        3000,
        4,
    );
}

#[test]
fn what_an_earlier_run_has_claimed_is_released_before_it_changes() {
    shuttle::check_random(
        || {
            run(vec![0b111]);
        },
        3000,
    );
}

#[test]
fn regions_are_at_least_a_mebibyte_and_not_too_many() {
    assert_eq!(region_bytes(1), LEAST_REGION);
    assert_eq!(region_bytes(64 << 30), LEAST_REGION);
    assert_eq!(region_bytes((64 << 30) + 1), 2 * LEAST_REGION);
    assert_eq!(region_bytes(1 << 40), 16 << 20);
}
