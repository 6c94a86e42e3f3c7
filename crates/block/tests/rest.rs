//! Jobs that are paused, resumed, limited and cancelled while a guest writes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{Guest, Habit, Job, create, dir, two, verify};
use strake_api::job::{
    Ceiling, Latency, LimitsChange, Method, MigrationLimits, MigrationStatus, Phase, Progress,
    Space, Suspend,
};
use strake_block::{Blocking, Fault, FaultImage, FaultOn, Image, LiveDisk};

const SIZE: u64 = 16 << 20;

/// As long as a loaded machine may need for anything.
const LONG: Duration = Duration::from_secs(60);

struct Bench {
    _dir: tempfile::TempDir,
    destination: Arc<FaultImage>,
    disk: Arc<LiveDisk>,
    guest: Guest,
}

impl Bench {
    fn new(habit: Habit) -> Self {
        let dir = dir();
        let (a, b) = two(&dir);
        let source = create(&a, SIZE);
        let destination = FaultImage::new(create(&b, SIZE));
        let mut io = Blocking::new(source.as_ref()).unwrap();
        let mut data = vec![0u8; 1 << 20];
        for at in 0..SIZE >> 20 {
            for (sector, bytes) in data.chunks_mut(512).enumerate() {
                common::stamp((at << 11) + sector as u64, 1, bytes);
            }
            io.write(at << 20, &data).unwrap();
        }
        let disk = LiveDisk::new("root", source);
        let guest = Guest::start(&disk, vec![1; (SIZE / 512) as usize], habit);
        Self {
            _dir: dir,
            destination,
            disk,
            guest,
        }
    }

    fn job(&self, limits: MigrationLimits) -> Job {
        let to = Arc::clone(&self.destination) as Arc<dyn Image>;
        Job::start(&self.disk, &to, limits).unwrap()
    }

    /// The guest goes on.
    fn goes_on(&self) {
        let before = self.guest.writes.load(Ordering::Relaxed);
        until(|| self.guest.writes.load(Ordering::Relaxed) > before + 100);
    }
}

fn until(mut met: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !met() {
        assert!(Instant::now() < end, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read(status: &MigrationStatus) -> u64 {
    status.passes.iter().map(|pass| pass.read_bytes).sum()
}

/// Slow enough to be met on the way.
fn slow(method: Method) -> MigrationLimits {
    MigrationLimits {
        pause_ms: 10_000,
        bytes_per_second: Some(8 << 20),
        method,
        ..MigrationLimits::default()
    }
}

fn fast() -> LimitsChange {
    LimitsChange {
        bytes_per_second: Some(Ceiling::Unlimited),
        latency: Some(Latency::Any),
        ..LimitsChange::default()
    }
}

/// Nothing is on its way any more.
fn rests(job: &Job) -> u64 {
    let mut before = u64::MAX;
    until(|| {
        std::thread::sleep(Duration::from_millis(100));
        let now = read(&job.migration.status());
        std::mem::replace(&mut before, now) == now
    });
    before
}

#[test]
fn a_job_that_is_paused_copies_nothing_and_goes_on_where_it_was() {
    for method in [Method::Dirty, Method::Mirror, Method::Auto] {
        let bench = Bench::new(Habit {
            per_second: Some(1000),
            ..Habit::MIXED
        });
        let job = bench.job(slow(method));
        until(|| read(&job.migration.status()) >= 4 << 20);
        for _ in 0..2 {
            job.migration.pause().unwrap();
            assert_eq!(job.migration.status().progress, Progress::Paused);
            let at = rests(&job);
            assert!(at < SIZE, "{method:?} came to its end before: {at}");
            // A destination that does not answer is nothing to the guest now.
            bench
                .destination
                .add(Fault::delaying(FaultOn::Change, Duration::from_secs(30)));
            bench.goes_on();
            bench.destination.clear();
            assert_eq!(read(&job.migration.status()), at, "{method:?}");
            job.migration.resume();
            until(|| read(&job.migration.status()) > at);
        }
        assert_eq!(job.migration.status().progress, Progress::On);
        job.migration.set(&fast());
        assert_eq!(job.migration.limits().bytes_per_second, None);
        let status = job.finish(true);
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
        verify(bench.disk.image().as_ref(), &bench.guest.stop());
    }
}

#[test]
fn a_paused_job_is_cancelled_at_once() {
    for method in [Method::Dirty, Method::Mirror] {
        let bench = Bench::new(Habit::SMALL);
        let job = bench.job(slow(method));
        until(|| read(&job.migration.status()) > 0);
        job.migration.pause().unwrap();
        rests(&job);
        job.migration.cancel().unwrap();
        let status = job.migration.join();
        assert_eq!(status.phase, Phase::Cancelled, "{method:?}");
        // Too late for everything, and harmless.
        job.migration.resume();
        job.migration.pause().unwrap();
        assert_eq!(job.migration.status().phase, Phase::Cancelled);
        assert_eq!(job.migration.status().progress, Progress::On);
    }
}

#[test]
fn a_paused_job_does_not_switch_over() {
    for method in [Method::Dirty, Method::Mirror] {
        let bench = Bench::new(Habit {
            per_second: Some(500),
            ..Habit::SMALL
        });
        let job = bench.job(MigrationLimits {
            pause_ms: 10_000,
            method,
            ..MigrationLimits::default()
        });
        // Nobody can be asked until it rests.
        job.hooks.no_daemon.store(true, Ordering::Relaxed);
        until(|| read(&job.migration.status()) >= SIZE || job.asked.try_recv().is_ok());
        if job.migration.pause().is_ok() {
            job.hooks.no_daemon.store(false, Ordering::Relaxed);
            bench.goes_on();
            let asked = job.asked.recv_timeout(Duration::from_millis(300));
            assert!(asked.is_err(), "{method:?}");
            job.migration.resume();
            assert!(job.asked());
        }
        // From the question on it is the daemon's.
        let seen = job.migration.pause().unwrap_err();
        assert!(seen.is::<strake_block::PauseTooLate>(), "{seen}");
        job.migration.decide(true);
        assert_eq!(job.migration.join().phase, Phase::Completed);
        verify(bench.disk.image().as_ref(), &bench.guest.stop());
    }
}

#[test]
fn limits_that_would_take_days_are_lifted_at_once() {
    for limits in [
        MigrationLimits {
            bytes_per_second: Some(1),
            ..slow(Method::Dirty)
        },
        MigrationLimits {
            iops: Some(1),
            bytes_per_second: None,
            ..slow(Method::Mirror)
        },
    ] {
        let bench = Bench::new(Habit {
            per_second: Some(200),
            ..Habit::SMALL
        });
        let job = bench.job(limits);
        until(|| read(&job.migration.status()) > 0);
        job.migration.set(&LimitsChange {
            iops: Some(Ceiling::Unlimited),
            ..fast()
        });
        let status = job.finish(true);
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
        verify(bench.disk.image().as_ref(), &bench.guest.stop());
    }
}

#[test]
fn requests_are_limited_too() {
    let bench = Bench::new(Habit {
        per_second: Some(100),
        ..Habit::SMALL
    });
    let began = Instant::now();
    // 16 chunks of two requests each.
    let job = bench.job(MigrationLimits {
        iops: Some(32),
        bytes_per_second: None,
        ..slow(Method::Mirror)
    });
    until(|| read(&job.migration.status()) >= SIZE);
    let took = began.elapsed();
    assert!(took > Duration::from_millis(700), "{took:?}");
    job.migration.set(&LimitsChange {
        iops: Some(Ceiling::Unlimited),
        ..fast()
    });
    assert_eq!(job.finish(true).phase, Phase::Completed);
}

#[test]
fn what_the_guest_gets_is_told() {
    let bench = Bench::new(Habit::SMALL);
    bench.goes_on();
    let job = bench.job(slow(Method::Dirty));
    until(|| job.migration.status().latency.is_some());
    let seen = job.migration.status().latency.unwrap();
    assert!(seen.now_us > 0 && seen.before_us > 0, "{seen:?}");
    let target = Duration::from_micros(seen.target_us.unwrap());
    assert!(target >= Duration::from_millis(2), "{seen:?}");
    job.migration.cancel().unwrap();
    assert_eq!(job.migration.join().phase, Phase::Cancelled);
}

#[test]
fn vcpus_that_do_not_stand_in_time_are_asked_again() {
    let bench = Bench::new(Habit {
        per_second: Some(200),
        ..Habit::SMALL
    });
    let job = bench.job(MigrationLimits {
        suspend: Suspend::Vm,
        ..slow(Method::Dirty)
    });
    job.hooks.refuse_suspend.store(true, Ordering::Relaxed);
    let hooks = Arc::clone(&job.hooks);
    *job.hooks.at_refusal.lock().unwrap() = Some(Box::new(move || {
        hooks.refuse_suspend.store(false, Ordering::Relaxed);
    }));
    job.migration.set(&fast());
    let hooks = Arc::clone(&job.hooks);
    assert_eq!(job.finish(true).phase, Phase::Completed);
    assert!(
        !hooks.refuse_suspend.load(Ordering::Relaxed),
        "it was never refused"
    );
    verify(bench.disk.image().as_ref(), &bench.guest.stop());
}

#[test]
fn a_thick_destination_keeps_its_space_where_zeroes_come() {
    use std::os::unix::fs::MetadataExt;
    for (space, method) in [
        (Space::Thick, Method::Dirty),
        (Space::Thick, Method::Mirror),
        (Space::Thin, Method::Dirty),
    ] {
        let dir = dir();
        let (a, b) = two(&dir);
        let source = create(&a, SIZE);
        Blocking::new(source.as_ref())
            .unwrap()
            .write(4 << 20, &[7; 4096])
            .unwrap();
        // Something that is to become zeroes.
        std::fs::write(&b, vec![1; SIZE as usize]).unwrap();
        let disk = LiveDisk::new("root", Arc::clone(&source));
        let limits = MigrationLimits {
            space,
            bytes_per_second: None,
            ..slow(method)
        };
        let to = common::open(&b);
        let job = Job::start(&disk, &to, limits).unwrap();
        assert_eq!(job.finish(true).phase, Phase::Completed);
        common::same(source.as_ref(), to.as_ref(), SIZE);
        let taken = std::fs::metadata(&b).unwrap().blocks() * 512;
        assert_eq!(taken >= SIZE, space == Space::Thick, "{space:?}: {taken}");
    }
}
