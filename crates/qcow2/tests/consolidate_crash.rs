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
#[path = "common/judge.rs"]
mod judge;
#[path = "common/log.rs"]
mod log;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{check_after_crash, dir, peers};
use guest::Hooks;
use judge::{Guest, LogImage, SECTORS, sector, stamps};
use log::{Clock, LogStore, next};
use strake_api::job::{JobId, Method, MigrationLimits, Phase};
use strake_block::{Access, Blocking, Image, LiveDisk, Migration, SwitchHooks};
use strake_qcow2::{
    Below, ChainPart, Consolidation, CreateOptions, Format, Qcow2Image, create, open_chain,
};

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
    let mut guest = Guest::new(&disk, &clock, seed);
    let told = Arc::clone(&guest.told);
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
