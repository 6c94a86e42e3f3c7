//! Crashes at any instant of a migration with method `snapshot`. Three files log their writes by one
//! clock and lose any sectors that were not synced. What the daemon's record names at that instant, and
//! below an overlay what its header names, has everything that the guest flushed; and what is left can
//! be consolidated.
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
use strake_api::job::{JobId, Method, MigrationLimits, Phase, Stage};
use strake_block::{Access, Blocking, Image, LiveDisk, Migration, SwitchHooks};
use strake_qcow2::{
    Backing, Below, ChainPart, Consolidation, CreateOptions, Format, Header, NewOverlay,
    Qcow2Image, create, open_chain,
};

/// Raw, or qcow2 with clusters of that many bits.
type Kept = Option<u32>;

#[derive(Debug, Clone, Copy)]
struct Case {
    from: Kept,
    to: Kept,
    bits: u32,
    /// It turns back before the copy is complete.
    back: bool,
}

fn format(kept: Kept) -> Format {
    kept.map_or(Format::Raw, |_| Format::Qcow2)
}

fn part(store: &LogStore, format: Format, access: Access) -> ChainPart {
    ChainPart {
        store: Arc::new(store.clone()),
        format,
        access,
    }
}

fn alone(kept: Kept, store: &LogStore) -> Arc<dyn Image> {
    match kept {
        None => Arc::new(LogImage(store.clone())),
        Some(_) => open_chain(vec![part(store, Format::Qcow2, Access::ReadWrite)]).unwrap(),
    }
}

/// A file as it was made, with what is in it.
fn made(
    kept: Kept,
    content: &[u8],
    backing: Option<Format>,
    (seed, clock): (u64, &Clock),
) -> LogStore {
    let Some(bits) = kept else {
        return LogStore::holding(content.to_vec(), seed).by(clock);
    };
    let store = LogStore::holding(Vec::new(), seed);
    let mut options = CreateOptions::new(SECTORS * 512).cluster_bits(bits);
    if let Some(format) = backing {
        options = options.backing("source", format);
    }
    create(&store, &options).unwrap();
    if backing.is_none() && content.iter().any(|byte| *byte != 0) {
        let image = alone(kept, &store);
        Blocking::new(&*image).unwrap().write(0, content).unwrap();
        image.flush().unwrap();
    }
    let now = store.0.lock().unwrap().now.clone();
    LogStore::holding(now, seed).by(clock)
}

/// The three files, or what a crash left of them.
struct Files {
    source: LogStore,
    overlay: LogStore,
    copy: LogStore,
}

impl Files {
    fn after_crash(&self, time: u64, random: &mut u64) -> Self {
        let mut crash = |store: &LogStore| {
            let log = store.0.lock().unwrap();
            LogStore::holding(log.crash(log.position_at(time), next(random)), *random)
        };
        Self {
            source: crash(&self.source),
            overlay: crash(&self.overlay),
            copy: crash(&self.copy),
        }
    }

    /// What the overlay's header names below it.
    fn below(&self, case: Case) -> (&LogStore, Kept) {
        let header = Header::read(&self.overlay).unwrap();
        match header.backing().unwrap().path.as_str() {
            "source" => (&self.source, case.from),
            "copy" => (&self.copy, case.to),
            other => panic!("{other} is below the overlay"),
        }
    }

    fn disk(&self, case: Case) -> Arc<Qcow2Image> {
        let (below, kept) = self.below(case);
        open_chain(vec![
            part(&self.overlay, Format::Qcow2, Access::ReadWrite),
            part(below, format(kept), Access::ReadOnly),
        ])
        .unwrap()
    }

    /// Whoever finds the disk on its overlay consolidates it.
    fn consolidated(&self, case: Case) {
        let chain = self.disk(case);
        let before = stamps(chain.as_ref());
        let (below, kept) = self.below(case);
        let below = match kept {
            None => Below::Raw(Arc::new(LogImage(below.clone()))),
            Some(_) => Below::Qcow2(Arc::new(below.clone())),
        };
        let consolidation = Arc::new(Consolidation::new(&chain, below).unwrap());
        let base = consolidation.base();
        let (hooks, asked) = Hooks::new();
        let migration = Migration::consolidate(
            LiveDisk::new("root", chain),
            Arc::clone(&base),
            consolidation,
            JobId("job-2".into()),
            limits(Method::Auto),
            Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
        )
        .unwrap();
        let job = guest::Job {
            migration,
            hooks,
            asked,
        };
        assert_eq!(job.finish(true).phase, Phase::Completed);
        assert!(stamps(base.as_ref()) == before);
    }

    fn check(&self, case: Case) {
        let scratch = dir();
        let files = [
            ("source", &self.source, case.from),
            ("copy", &self.copy, case.to),
            ("overlay", &self.overlay, Some(0)),
        ];
        for (name, store, kept) in files {
            let path = scratch.path().join(name);
            std::fs::write(&path, &store.0.lock().unwrap().now).unwrap();
            if kept.is_some() {
                check_after_crash(&path);
            }
        }
    }
}

fn limits(method: Method) -> MigrationLimits {
    MigrationLimits {
        pause_ms: 10_000,
        method,
        ..MigrationLimits::default()
    }
}

fn run(case: Case, seed: u64) {
    let clock = Clock::default();
    let content: Vec<u8> = (0..SECTORS)
        .flat_map(|number| sector(100_000 + number as u32))
        .collect();
    let empty = vec![0; content.len()];
    let by = (seed, &clock);
    let files = Files {
        source: made(case.from, &content, None, by),
        overlay: made(Some(case.bits), &[], Some(format(case.from)), by),
        copy: made(case.to, &empty, None, by),
    };
    let disk = LiveDisk::new("root", alone(case.from, &files.source));
    let mut guest = Guest::new(&disk, &clock, seed);
    let told = Arc::clone(&guest.told);
    for _ in 0..2 {
        guest.round();
    }
    guest.flush();
    let delta = NewOverlay::new(
        Arc::new(files.overlay.clone()),
        Backing {
            path: "copy".to_owned(),
            format: Some(format(case.to).name().to_owned()),
        },
    );
    let (hooks, asked) = Hooks::new();
    let stop = AtomicBool::new(false);
    // When it asked, and when it was answered, twice.
    let mut times = Vec::new();
    let destination = alone(case.to, &files.copy);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| guest.run(&stop));
        std::thread::sleep(Duration::from_millis(5));
        if case.back {
            files.copy.0.lock().unwrap().failing = 50;
        }
        let migration = Migration::start_with_overlay(
            Arc::clone(&disk),
            (destination, Arc::new(delta)),
            tempfile::tempfile().unwrap(),
            JobId("job-1".into()),
            limits(Method::Snapshot),
            Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
        )
        .unwrap();
        let job = guest::Job {
            migration,
            hooks,
            asked,
        };
        let second = match case.back {
            true => Stage::Source,
            false => Stage::Destination,
        };
        for stage in [Stage::Overlay, second] {
            assert!(job.asked(), "{:?}", job.migration.status());
            times.push(clock.tick());
            times.push(clock.tick());
            assert_eq!(job.migration.question(), Some(stage));
            job.migration.decide_stage(stage, true);
        }
        let phase = job.migration.join().phase;
        assert_eq!(phase == Phase::Completed, !case.back);
        std::thread::sleep(Duration::from_millis(5));
        stop.store(true, Ordering::Relaxed);
        running.join().unwrap();
    });
    let end = clock.tick();
    drop(disk);
    let &[first_asked, on_overlay, last_asked, decided] = &times[..] else {
        panic!("two questions")
    };
    let told = told.lock().unwrap();
    let mut random = seed ^ 0x5eed;
    let all = std::env::var_os("STRAKE_CRASH_ALL").is_some();
    let mut times = vec![
        first_asked,
        on_overlay - 1,
        on_overlay,
        last_asked,
        decided - 1,
        decided,
        end,
    ];
    let few = if all { end - 2 } else { 30 };
    times.extend((0..few).map(|number| {
        let any = next(&mut random) % (end - 2);
        2 + if all { number } else { any }
    }));
    let last = |left: &Files| match case.back {
        true => alone(case.from, &left.source),
        false => alone(case.to, &left.copy),
    };
    for (number, time) in times.into_iter().enumerate() {
        let left = files.after_crash(time, &mut random);
        if time < on_overlay {
            told.judge(time, &stamps(alone(case.from, &left.source).as_ref()));
        }
        if (first_asked..decided).contains(&time) {
            told.judge(time, &stamps(left.disk(case).as_ref()));
        }
        if time >= last_asked {
            told.judge(time, &stamps(last(&left).as_ref()));
        }
        if number % 6 == 0 {
            left.check(case);
            if (on_overlay..decided).contains(&time) {
                left.consolidated(case);
            }
        }
    }
}

#[test]
fn a_crash_at_any_instant_leaves_one_disk_with_all_that_was_flushed() {
    if !peers() {
        return;
    }
    let runs: u64 = std::env::var("STRAKE_CRASH_RUNS").map_or(1, |runs| runs.parse().unwrap());
    for seed in 0..runs {
        for (from, to, bits, back) in [
            (None, None, 16, false),
            (None, Some(12), 12, false),
            (Some(16), None, 12, false),
            (Some(12), Some(14), 16, false),
            (None, None, 12, true),
            (Some(14), None, 16, true),
        ] {
            let case = Case {
                from,
                to,
                bits,
                back,
            };
            eprintln!("{case:?}, seed {seed}");
            run(case, seed);
        }
    }
}
