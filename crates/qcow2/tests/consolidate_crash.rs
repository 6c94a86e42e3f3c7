//! Crashes at any instant of a live consolidation. Both files log their writes by one clock and lose
//! any sectors that were not synced. Until the daemon's transaction the layer over the image below
//! has everything that the guest flushed, and from the question on the image below has it alone; all
//! files pass `qemu-img check`; and whoever finds the two can do it again.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod common;
#[path = "../../block/tests/common/mod.rs"]
mod guest;
#[path = "common/log.rs"]
mod log;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{check_after_crash, dir, peers, read_all};
use guest::Hooks;
use log::{Clock, LogStore, next};
use strake_api::job::{JobId, Method, MigrationLimits, Phase};
use strake_block::{
    Access, Blocking, Buffer, DiskQueue, Event, Image, ImageQueue, LiveDisk, Migration, Operation,
    Request, SwitchHooks,
};
use strake_observe::Result;
use strake_qcow2::{
    Below, ChainPart, Consolidation, CreateOptions, Format, Qcow2Image, Store, create, open_chain,
};

const SECTORS: u64 = 3000;

fn sector(stamp: u32) -> Vec<u8> {
    stamp.to_le_bytes().repeat(128)
}

fn stamp(sector: &[u8]) -> u32 {
    let first = u32::from_le_bytes(sector[..4].try_into().unwrap());
    let same = sector.chunks(4).all(|it| it == first.to_le_bytes());
    assert!(same, "a torn sector");
    first
}

fn stamps(image: &dyn Image) -> Vec<u32> {
    read_all(image).chunks(512).map(stamp).collect()
}

/// A raw image in memory.
#[derive(Debug)]
struct LogImage(LogStore);

impl Image for LogImage {
    fn path(&self) -> &str {
        "raw memory"
    }

    fn size(&self) -> u64 {
        SECTORS * 512
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        self.0.open_queue(depth, event)
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, data)
    }

    fn flush(&self) -> Result<()> {
        self.0.sync()
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.0.allocated(from)
    }

    fn is_removed(&self) -> Result<bool> {
        Ok(false)
    }
}

/// What the guest did and what it was told, by the same clock.
#[derive(Debug)]
struct Told {
    /// Of each sector: what was written to it, and when that began.
    written: Vec<Vec<(u64, u32)>>,
    /// When a flush began, when it had ended, and what every sector was when it began.
    flushed: Vec<(u64, u64, Vec<u32>)>,
}

impl Told {
    /// Whether this may be the disk after a crash at that time.
    fn judge(&self, time: u64, found: &[u32]) {
        let (began, _, then) = self
            .flushed
            .iter()
            .rfind(|(_, ended, _)| *ended <= time)
            .unwrap();
        for (number, found) in found.iter().enumerate() {
            let since = self.written[number]
                .iter()
                .any(|(at, value)| at > began && *at <= time && value == found);
            assert!(
                *found == then[number] || since,
                "sector {number} is {found} after a crash at {time}, not {}",
                then[number]
            );
        }
    }
}

struct Guest {
    queue: DiskQueue,
    clock: Clock,
    told: Arc<Mutex<Told>>,
    now: Vec<u32>,
    random: u64,
    last: u32,
}

impl Guest {
    fn random(&mut self, below: u64) -> u64 {
        next(&mut self.random) % below
    }

    /// Some requests at once, about different sectors.
    fn round(&mut self) {
        let mut memory: Vec<Vec<u8>> = Vec::new();
        let mut at = self.random(1500);
        while at < SECTORS {
            let len = [1, 8, 40, 130][self.random(4) as usize].min(SECTORS - at);
            self.last += 1;
            let zeroes = self.random(5) == 0;
            let value = if zeroes { 0 } else { self.last };
            {
                let mut told = self.told.lock().unwrap();
                let time = self.clock.tick();
                for sector in at..at + len {
                    told.written[sector as usize].push((time, value));
                    self.now[sector as usize] = value;
                }
            }
            let mut buffers = Vec::new();
            let op = if zeroes {
                let unmap = self.random(2) == 0;
                Operation::WriteZeroes {
                    len: len * 512,
                    unmap,
                }
            } else {
                memory.push(sector(value).repeat(len as usize));
                let data = memory.last_mut().unwrap();
                // SAFETY: the memory stays in `memory` until all requests have ended.
                #[allow(unsafe_code)]
                buffers.push(unsafe { Buffer::new(data.as_mut_ptr(), data.len()) });
                Operation::Write
            };
            self.queue.submit(Request {
                tag: 0,
                op,
                offset: at * 512,
                buffers,
            });
            at += len + self.random(1500);
        }
        self.drain();
    }

    fn flush(&mut self) {
        let began = self.clock.tick();
        self.queue.submit(Request {
            tag: 0,
            op: Operation::Flush,
            offset: 0,
            buffers: Vec::new(),
        });
        self.drain();
        let ended = self.clock.tick();
        let now = self.now.clone();
        self.told.lock().unwrap().flushed.push((began, ended, now));
    }

    fn drain(&mut self) {
        self.queue.push().unwrap();
        while self.queue.in_flight() > 0 {
            let event = self.queue.event();
            let mut poll = [rustix::event::PollFd::new(
                &event,
                rustix::event::PollFlags::IN,
            )];
            let limit = rustix::event::Timespec {
                tv_sec: 20,
                tv_nsec: 0,
            };
            let ready = rustix::event::poll(&mut poll, Some(&limit)).unwrap();
            assert_eq!(ready, 1, "nobody wakes the guest: {:?}", self.queue);
            self.queue.reap(&mut |_, result| result.unwrap()).unwrap();
        }
    }

    fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            self.round();
            if self.random(3) == 0 {
                self.flush();
            }
        }
        self.flush();
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    /// Clusters of the layer, and of the image below unless that is raw.
    bits: u32,
    base: Option<u32>,
    method: Method,
}

fn part(store: &LogStore, format: Format, access: Access) -> ChainPart {
    ChainPart {
        store: Arc::new(store.clone()),
        format,
        access,
    }
}

impl Case {
    fn format(self) -> Format {
        match self.base {
            None => Format::Raw,
            Some(_) => Format::Qcow2,
        }
    }

    fn chain(self, top: &LogStore, base: &LogStore) -> Arc<Qcow2Image> {
        open_chain(vec![
            part(top, Format::Qcow2, Access::ReadWrite),
            part(base, self.format(), Access::ReadOnly),
        ])
        .unwrap()
    }

    fn alone(self, base: &LogStore) -> Arc<dyn Image> {
        match self.base {
            None => Arc::new(LogImage(base.clone())),
            Some(_) => open_chain(vec![part(base, Format::Qcow2, Access::ReadWrite)]).unwrap(),
        }
    }

    fn below(self, base: &LogStore) -> Below {
        match self.base {
            None => Below::Raw(Arc::new(LogImage(base.clone()))),
            Some(_) => Below::Qcow2(Arc::new(base.clone())),
        }
    }

    /// The two files, the one below full.
    fn files(self, seed: u64, clock: &Clock) -> (LogStore, LogStore) {
        let content: Vec<u8> = (0..SECTORS)
            .flat_map(|number| sector(100_000 + number as u32))
            .collect();
        let made = |options: &CreateOptions, content: &[u8]| {
            let store = LogStore::holding(Vec::new(), seed);
            create(&store, options).unwrap();
            if !content.is_empty() {
                let parts = vec![part(&store, Format::Qcow2, Access::ReadWrite)];
                let image = open_chain(parts).unwrap();
                Blocking::new(&*image).unwrap().write(0, content).unwrap();
                image.flush().unwrap();
            }
            let now = store.0.lock().unwrap().now.clone();
            LogStore::holding(now, seed).by(clock)
        };
        let options = |bits| CreateOptions::new(SECTORS * 512).cluster_bits(bits);
        let top = made(&options(self.bits).backing("base", self.format()), &[]);
        let base = match self.base {
            None => LogStore::holding(content, seed).by(clock),
            Some(bits) => made(&options(bits), &content),
        };
        (top, base)
    }
}

fn start(disk: &Arc<LiveDisk>, below: Below, method: Method) -> (guest::Job, Arc<dyn Image>) {
    let image = disk.image();
    let chain = image
        .as_any()
        .unwrap()
        .downcast_ref::<Qcow2Image>()
        .unwrap();
    let consolidation = Arc::new(Consolidation::new(chain, below).unwrap());
    let base = consolidation.base();
    let (hooks, asked) = Hooks::new();
    let limits = MigrationLimits {
        pause_ms: 10_000,
        method,
        ..MigrationLimits::default()
    };
    let migration = Migration::consolidate(
        Arc::clone(disk),
        Arc::clone(&base),
        consolidation,
        JobId("job-1".into()),
        limits,
        Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
    )
    .unwrap();
    let job = guest::Job {
        migration,
        hooks,
        asked,
    };
    (job, base)
}

/// What is on the disk of the host after a crash.
struct Left {
    top: Vec<u8>,
    base: Vec<u8>,
}

fn run(case: Case, seed: u64) {
    let clock = Clock::default();
    let (top, base) = case.files(seed, &clock);
    let disk = LiveDisk::new("root", case.chain(&top, &base) as Arc<dyn Image>);
    let now = stamps(disk.image().as_ref());
    let told = Arc::new(Mutex::new(Told {
        written: vec![Vec::new(); SECTORS as usize],
        flushed: vec![(clock.tick(), clock.tick(), now.clone())],
    }));
    let mut guest = Guest {
        queue: disk.queue(32).unwrap(),
        clock: clock.clone(),
        told: Arc::clone(&told),
        now,
        random: seed,
        last: 0,
    };
    for _ in 0..3 {
        guest.round();
    }
    guest.flush();
    let stop = AtomicBool::new(false);
    let (asked, decided) = std::thread::scope(|scope| {
        let running = scope.spawn(|| guest.run(&stop));
        std::thread::sleep(Duration::from_millis(5));
        let (job, below) = start(&disk, case.below(&base), case.method);
        assert!(job.asked(), "{:?}", job.migration.status());
        let asked = clock.tick();
        guest::same(disk.image().as_ref(), below.as_ref(), SECTORS * 512);
        let decided = clock.tick();
        job.migration.decide(true);
        assert_eq!(job.migration.join().phase, Phase::Completed);
        std::thread::sleep(Duration::from_millis(5));
        stop.store(true, Ordering::Relaxed);
        running.join().unwrap();
        (asked, decided)
    });
    let end = clock.tick();
    drop(disk);
    let told = told.lock().unwrap();
    let all = std::env::var_os("STRAKE_CRASH_ALL").is_some();
    let mut random = seed ^ 0x5eed;
    let mut times: Vec<u64> = vec![asked, decided - 1, decided, end];
    let few = if all { end - 2 } else { 25 };
    times.extend((0..few).map(|number| {
        2 + if all {
            number
        } else {
            next(&mut random) % (end - 2)
        }
    }));
    let scratch = dir();
    for (number, time) in times.into_iter().enumerate() {
        let crash = |store: &LogStore, seed| {
            let log = store.0.lock().unwrap();
            log.crash(log.position_at(time), seed)
        };
        let left = Left {
            top: crash(&top, next(&mut random)),
            base: crash(&base, next(&mut random)),
        };
        let restored = |bytes: &[u8]| LogStore::holding(bytes.to_vec(), seed);
        if time < decided {
            let image = case.chain(&restored(&left.top), &restored(&left.base));
            told.judge(time, &stamps(image.as_ref()));
        }
        if time >= asked {
            told.judge(time, &stamps(case.alone(&restored(&left.base)).as_ref()));
        }
        if number % 6 != 0 {
            continue;
        }
        // The layer's check opens what is below it.
        for (name, bytes) in [("base", &left.base), ("top", &left.top)] {
            let path = scratch.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            if name == "top" || case.base.is_some() {
                check_after_crash(&path);
            }
        }
        if time < decided {
            again(case, &restored(&left.top), &restored(&left.base));
        }
    }
}

/// Whoever finds the two after a crash consolidates them.
fn again(case: Case, top: &LogStore, base: &LogStore) {
    let disk = LiveDisk::new("root", case.chain(top, base) as Arc<dyn Image>);
    let before = stamps(disk.image().as_ref());
    let (job, below) = start(&disk, case.below(base), case.method);
    assert_eq!(job.finish(true).phase, Phase::Completed);
    assert!(stamps(below.as_ref()) == before);
}

#[test]
fn a_crash_at_any_instant_leaves_one_disk_with_all_that_was_flushed() {
    if !peers() {
        return;
    }
    let runs: u64 = std::env::var("STRAKE_CRASH_RUNS").map_or(1, |runs| runs.parse().unwrap());
    for seed in 0..runs {
        for method in [Method::Dirty, Method::Mirror] {
            for (bits, base) in [
                (12, None),
                (16, None),
                (12, Some(16)),
                (16, Some(12)),
                (12, Some(14)),
            ] {
                let case = Case { bits, base, method };
                eprintln!("{case:?}, seed {seed}");
                run(case, seed);
            }
        }
    }
}
