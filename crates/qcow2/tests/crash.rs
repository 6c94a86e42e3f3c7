//! Crashes at any moment: a store with a volatile cache loses any sectors that were not synced.
//! Whatever is left passes `qemu-img check` (lost space is allowed, errors are not), has what was
//! flushed, and can be used again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/log.rs"]
mod log;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use common::{check_after_crash, dir, peers, read_all};
use log::{LogStore, Logged, next};
use strake_block::{Access, Buffer, Event, Image, ImageQueue, Operation, Request};
use strake_qcow2::{
    Backing, ChainPart, CreateOptions, Format, Header, Progress, Qcow2Image, Stream, create,
    open_chain, rebase,
};

const SECTORS: u64 = 3000;

/// A sector that says what it is.
fn sector(stamp: u32) -> Vec<u8> {
    stamp.to_le_bytes().repeat(128)
}

fn stamp(sector: &[u8]) -> u32 {
    let first = u32::from_le_bytes(sector[..4].try_into().unwrap());
    assert!(
        sector.chunks(4).all(|it| it == first.to_le_bytes()),
        "a torn sector"
    );
    first
}

fn base() -> Vec<u8> {
    (0..SECTORS)
        .flat_map(|number| sector(100_000 + u32::try_from(number).unwrap()))
        .collect()
}

fn chain(store: &LogStore, access: Access, below: &LogStore) -> Arc<Qcow2Image> {
    let overlay = ChainPart {
        store: Arc::new(store.clone()),
        format: Format::Qcow2,
        access,
    };
    let header = Header::read(store).unwrap();
    let mut parts = vec![overlay];
    if header.backing().is_some() {
        parts.push(ChainPart {
            store: Arc::new(below.clone()),
            format: Format::Raw,
            access: Access::ReadOnly,
        });
    }
    open_chain(parts).unwrap()
}

/// What a sector may hold after a crash.
struct Sector {
    now: u32,
    /// Where in the log it may have become what.
    history: Vec<(usize, u32)>,
}

struct Driver {
    store: LogStore,
    image: Arc<Qcow2Image>,
    queue: Box<dyn ImageQueue>,
    event: Arc<Event>,
    sectors: Vec<Sector>,
    /// Where in the log a flush ended, and what every sector was then.
    flushes: Vec<(usize, Vec<u32>)>,
    random: u64,
    stamps: u32,
    /// Requests may fail.
    failing: bool,
    failed: u32,
}

impl Driver {
    fn new(store: LogStore, below: &LogStore, seed: u64) -> Self {
        let image = chain(&store, Access::ReadWrite, below);
        let event = Arc::new(Event::new().unwrap());
        let queue = image.open_queue(32, &event).unwrap();
        let now: Vec<u32> = read_all(&*image).chunks(512).map(stamp).collect();
        Self {
            flushes: vec![(0, now.clone())],
            sectors: now
                .iter()
                .map(|now| Sector {
                    now: *now,
                    history: Vec::new(),
                })
                .collect(),
            store,
            image,
            queue,
            event,
            random: seed,
            stamps: 0,
            failing: false,
            failed: 0,
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        next(&mut self.random) % below
    }

    /// Some requests at once, about different sectors, and their ends.
    fn round(&mut self, with_flush: bool) {
        let mut memory = VecDeque::new();
        let mut at = self.random(400);
        let begun = self.store.position();
        let mut tag = 0;
        while at < SECTORS {
            let len = match self.random(4) {
                0 => 1,
                1 => 8,
                2 => 1 + self.random(60),
                _ => 1 + self.random(300),
            }
            .min(SECTORS - at);
            let op = match self.random(6) {
                0 => Operation::WriteZeroes {
                    len: len * 512,
                    unmap: self.random(2) == 0,
                },
                1 => Operation::Discard { len: len * 512 },
                2 => Operation::Read,
                _ => Operation::Write,
            };
            let mut buffers = Vec::new();
            if matches!(op, Operation::Write | Operation::Read) {
                self.stamps += 1;
                memory.push_back(sector(self.stamps).repeat(usize::try_from(len).unwrap()));
                let data = memory.back_mut().unwrap();
                // SAFETY: the memory stays in `memory` until all requests have ended.
                #[allow(unsafe_code)]
                buffers.push(unsafe { Buffer::new(data.as_mut_ptr(), data.len()) });
            }
            let value = match op {
                Operation::Write => Some(self.stamps),
                Operation::Read | Operation::Flush => None,
                _ => Some(0),
            };
            if let Some(value) = value {
                for sector in at..at + len {
                    let sector = &mut self.sectors[usize::try_from(sector).unwrap()];
                    sector.history.push((begun, value));
                    sector.now = value;
                }
            }
            tag += 1;
            self.queue.submit(Request {
                tag,
                op,
                offset: at * 512,
                buffers,
            });
            at += len + self.random(400);
        }
        if with_flush {
            // Beside the others: it promises nothing about them.
            self.queue.submit(Request {
                tag: 0,
                op: Operation::Flush,
                offset: 0,
                buffers: vec![],
            });
        }
        self.drain();
        // A discard may leave what was there.
        let data = read_all(&*self.image);
        for (sector, data) in self.sectors.iter_mut().zip(data.chunks(512)) {
            let now = stamp(data);
            assert!(
                now == sector.now || sector.now == 0 || self.failing,
                "{now}, not {}",
                sector.now
            );
            sector.now = now;
        }
    }

    fn drain(&mut self) {
        let mut rounds = 0;
        self.queue.push().unwrap();
        while self.queue.in_flight() > 0 {
            rounds += 1;
            assert!(rounds < 10_000, "requests do not end: {:?}", self.queue);
            assert!(
                self.event.wait(Duration::from_secs(5)),
                "nobody wakes the owner"
            );
            self.event.clear();
            let (failing, failed) = (self.failing, &mut self.failed);
            self.queue.reap(&mut |done| match done.result {
                Ok(()) => {}
                Err(seen) if failing => {
                    assert!(seen.find("os.call-failed").is_some(), "{seen:?}");
                    *failed += 1;
                }
                Err(seen) => panic!("{seen:?}"),
            });
            self.queue.push().unwrap();
        }
    }

    fn flush(&mut self) {
        let then = self.sectors.iter().map(|sector| sector.now).collect();
        self.queue.submit(Request {
            tag: 0,
            op: Operation::Flush,
            offset: 0,
            buffers: vec![],
        });
        self.drain();
        self.flushes.push((self.store.position(), then));
    }

    /// Whether what a crash at that place of the log left may be.
    fn judge(&self, at: usize, data: &[u8]) {
        let (flushed, then) = self.flushes.iter().rfind(|(end, _)| *end <= at).unwrap();
        for (number, data) in data.chunks(512).enumerate() {
            let found = stamp(data);
            let since = self.sectors[number]
                .history
                .iter()
                .filter(|(begun, _)| (*begun <= at) && !self.settled(*begun, *flushed))
                .any(|(_, value)| *value == found);
            assert!(
                found == then[number] || since,
                "sector {number} is {found} after a crash at {at}, not {}",
                then[number]
            );
        }
    }

    /// Whether a round that began there had ended before the flush that ended there began: rounds
    /// end before the next flush begins.
    fn settled(&self, begun: usize, flushed: usize) -> bool {
        begun < flushed
    }
}

fn overlay(seed: u64, bits: u32) -> (LogStore, LogStore) {
    let below = LogStore::holding(base(), seed);
    let store = LogStore::holding(Vec::new(), seed);
    let options = CreateOptions::new(SECTORS * 512)
        .cluster_bits(bits)
        .backing("base", Format::Raw);
    create(&store, &options).unwrap();
    let made = store.0.lock().unwrap().now.clone();
    (LogStore::holding(made, seed), below)
}

/// Crashes at many places of the log: beside its syncs for the most part. `STRAKE_CRASH_ALL=1`
/// takes all of them.
fn crash_everywhere(driver: &Driver, below: &LogStore, most: usize, seed: u64) -> u32 {
    // Nothing here needs a disk.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| dir());
    std::fs::write(dir.path().join("base"), base()).unwrap();
    let path = dir.path().join("overlay");
    let log = driver.store.0.lock().unwrap();
    let is_sync = |at: usize| matches!(log.ops.get(at), Some(Logged::Sync));
    let mut places: Vec<usize> = (0..=log.ops.len()).collect();
    if std::env::var_os("STRAKE_CRASH_ALL").is_none() {
        let mut random = seed;
        let odds = 100 * most as u64 / places.len() as u64 + 1;
        places.retain(|at| {
            let near = is_sync(*at) || *at > 0 && is_sync(*at - 1);
            next(&mut random) % 100 < if near { 2 * odds } else { odds / 2 }
        });
        places.push(log.ops.len());
    }
    let mut crashes = 0;
    for at in places {
        let bytes = log.crash(at, seed.wrapping_add(at as u64));
        std::fs::write(&path, &bytes).unwrap();
        check_after_crash(&path);
        let again = LogStore::holding(bytes, 1);
        {
            let image = chain(&again, Access::ReadWrite, below);
            driver.judge(at, &read_all(&*image));
            // It goes on where it was.
            let mut queue = strake_block::Blocking::new(&*image).unwrap();
            for number in 0..20u64 {
                queue.write((number * 149) * 512, &sector(7)).unwrap();
            }
        }
        let bytes = again.0.lock().unwrap().now.clone();
        std::fs::write(&path, &bytes).unwrap();
        check_after_crash(&path);
        crashes += 1;
    }
    crashes
}

#[test]
fn a_crash_at_any_moment_loses_nothing_that_was_flushed() {
    if !peers() {
        return;
    }
    let runs = std::env::var("STRAKE_CRASH_RUNS")
        .ok()
        .and_then(|it| it.parse().ok())
        .unwrap_or(3);
    let mut crashes = 0;
    for seed in 1..=runs {
        let (store, below) = overlay(seed, [12, 16, 14][usize::try_from(seed % 3).unwrap()]);
        let mut driver = Driver::new(store, &below, seed);
        for round in 0..8 {
            driver.round(round % 3 == 1);
            if round % 2 == 1 {
                driver.flush();
            }
        }
        crashes += crash_everywhere(&driver, &below, 60, seed);
    }
    eprintln!("{crashes} crashes");
}

#[test]
fn a_crash_while_streaming_leaves_the_same_content() {
    if !peers() {
        return;
    }
    let (store, below) = overlay(5, 13);
    let mut driver = Driver::new(store, &below, 5);
    driver.round(false);
    driver.flush();
    let mut stream = Stream::new(Arc::clone(&driver.image), None, 0).unwrap();
    while stream.step(300_000).unwrap() != Progress::Done {
        driver.round(true);
        driver.flush();
    }
    let now: Vec<u32> = driver.sectors.iter().map(|sector| sector.now).collect();
    assert_eq!(
        read_all(&*driver.image)
            .chunks(512)
            .map(stamp)
            .collect::<Vec<_>>(),
        now
    );
    let header = Header::read(&driver.store).unwrap();
    assert!(header.backing().is_none());
    crash_everywhere(&driver, &below, 50, 5);
}

#[test]
fn a_crash_while_rebasing_leaves_the_old_or_the_new_name() {
    for bits in [12, 16] {
        for first in ["base", &"b".repeat(900)] {
            let options = CreateOptions::new(1 << 20)
                .cluster_bits(bits)
                .backing(first, Format::Qcow2);
            let store = LogStore::default();
            create(&store, &options).unwrap();
            for new in ["other".to_owned(), "o".repeat(1023)] {
                let made = store.0.lock().unwrap().now.clone();
                let store = LogStore::holding(made, 1);
                let backing = Backing {
                    path: new.clone(),
                    format: Some("raw".to_owned()),
                };
                rebase(&store, Some(&backing)).unwrap();
                let log = store.0.lock().unwrap();
                let (mut old, mut changed) = (0, 0);
                for at in 0..=log.ops.len() {
                    for seed in 0..40 {
                        let after = LogStore::holding(log.crash(at, seed), 1);
                        let header = Header::read(&after).unwrap();
                        let found = header.backing().unwrap();
                        if *found == backing {
                            changed += 1;
                        } else {
                            assert_eq!(found.path, first);
                            assert_eq!(found.format.as_deref(), Some("qcow2"));
                            old += 1;
                        }
                    }
                }
                assert!(old > 0 && changed > 0);
            }
        }
    }
}

#[test]
fn a_crash_while_growing_leaves_the_old_or_the_new_size() {
    if !peers() {
        return;
    }
    let dir = dir();
    let path = dir.path().join("a");
    let store = LogStore::default();
    create(&store, &CreateOptions::new(1 << 20).cluster_bits(12)).unwrap();
    let made = store.0.lock().unwrap().now.clone();
    let store = LogStore::holding(made, 1);
    {
        let part = ChainPart {
            store: Arc::new(store.clone()),
            format: Format::Qcow2,
            access: Access::ReadWrite,
        };
        let image = open_chain(vec![part]).unwrap();
        let mut queue = strake_block::Blocking::new(&*image).unwrap();
        queue.write(512, &sector(9)).unwrap();
        image.grow(8 << 30).unwrap();
        queue.write(7 << 30, &sector(10)).unwrap();
    }
    let log = store.0.lock().unwrap();
    for at in 0..=log.ops.len() {
        for seed in 0..5 {
            std::fs::write(&path, log.crash(at, seed)).unwrap();
            check_after_crash(&path);
        }
    }
}

#[test]
fn requests_that_fail_leave_an_image_that_is_whole() {
    if !peers() {
        return;
    }
    for seed in 1..4 {
        let (store, below) = overlay(seed, [12, 16, 14][usize::try_from(seed % 3).unwrap()]);
        let mut driver = Driver::new(store, &below, seed);
        driver.round(false);
        driver.flush();
        driver.failing = true;
        driver.store.0.lock().unwrap().failing = 20;
        for round in 0..12 {
            driver.round(round % 2 == 1);
        }
        driver.store.0.lock().unwrap().failing = 0;
        driver.failing = false;
        assert!(driver.failed > 10, "{} failed", driver.failed);
        driver.flush();
        driver.round(false);
        driver.flush();
        crash_everywhere(&driver, &below, 40, seed);
        // Closed, it has lost no space either.
        let Driver {
            store,
            image,
            queue,
            ..
        } = driver;
        drop((queue, image));
        let dir = dir();
        std::fs::write(dir.path().join("base"), base()).unwrap();
        let path = dir.path().join("overlay");
        std::fs::write(&path, &store.0.lock().unwrap().now).unwrap();
        common::check(&path);
    }
}
