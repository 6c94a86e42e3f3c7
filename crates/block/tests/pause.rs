//! The pause of a switch-over: how long it lasts when a device hangs in it, what it looks like from
//! outside, and what is said of a job before it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use common::{Guest, Habit, Hooks, Job, create, dir, two, verify};
use strake_api::job::{Method, MigrationLimits, MigrationStatus, Phase, Suspend};
use strake_block::{
    Blocking, Fault, FaultImage, FaultOn, Image, JournalUnwritable, LiveDisk, Migration, Operation,
    Request,
};
use strake_observe::Kind;

const SIZE: u64 = 16 << 20;

/// How long a device hangs: far longer than any pause that is allowed here.
const HANGS: Duration = Duration::from_secs(2);

/// What a guest may wait at most, with all that a busy host adds.
const BOUNDED: Duration = Duration::from_millis(1000);

struct Bench {
    _dir: tempfile::TempDir,
    destination: Arc<FaultImage>,
    disk: Arc<LiveDisk>,
    guest: Guest,
}

impl Bench {
    fn new() -> Self {
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
        // The last MiB is left to the tests.
        let expected = vec![1u64; ((SIZE - (1 << 20)) / 512) as usize];
        let habit = Habit {
            per_second: Some(200),
            ..Habit::SMALL
        };
        let guest = Guest::start(&disk, expected, habit);
        Self {
            _dir: dir,
            destination,
            disk,
            guest,
        }
    }

    fn job(&self, limits: MigrationLimits, hooks: HooksAndQuestions) -> Job {
        let to = Arc::clone(&self.destination) as Arc<dyn Image>;
        Job::start_with(
            &self.disk,
            &to,
            limits,
            hooks,
            tempfile::tempfile().unwrap(),
        )
        .unwrap()
    }

    /// Zeroes a sector of the last MiB, as the guest would.
    fn zero_a_sector(disk: &Arc<LiveDisk>) {
        let mut queue = disk.queue(1).unwrap();
        queue.submit(Request {
            tag: 0,
            op: Operation::WriteZeroes {
                len: 512,
                unmap: false,
            },
            offset: SIZE - 512,
            buffers: Vec::new(),
        });
        queue.push().unwrap();
        while queue.in_flight() > 0 {
            queue.reap(&mut |_, result| result.unwrap()).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The destination, with all that the guest wrote and the sector above.
    fn verify(self, zeroed: bool) {
        let mut expected = self.guest.stop();
        expected.resize((SIZE / 512) as usize, 1);
        if zeroed {
            *expected.last_mut().unwrap() = 0;
        }
        verify(self.destination.as_ref(), &expected);
    }
}

type HooksAndQuestions = (
    Arc<Hooks>,
    std::sync::mpsc::Receiver<strake_api::job::JobId>,
);

/// The first write of the last blocks takes long: there is one, made when the VM was suspended.
fn hang_at_the_last_write(bench: &Bench, hooks: &Hooks) {
    let disk = Arc::clone(&bench.disk);
    let destination = Arc::clone(&bench.destination);
    let mut first = true;
    *hooks.at_suspend.lock().unwrap() = Some(Box::new(move || {
        if std::mem::take(&mut first) {
            Bench::zero_a_sector(&disk);
            destination.add(Fault {
                times: 1,
                ..Fault::delaying(FaultOn::Change, HANGS).within(SIZE - (1 << 20)..SIZE)
            });
        }
    }));
}

/// What the job looked like when the VM was resumed, and whether it awaited a decision.
type Pauses = Arc<Mutex<Vec<(MigrationStatus, bool)>>>;

fn watch(hooks: &Hooks, migration: &Arc<OnceLock<Arc<Migration>>>) -> Pauses {
    let pauses = Pauses::default();
    let migration = Arc::clone(migration);
    let seen = Arc::clone(&pauses);
    *hooks.at_resume.lock().unwrap() = Some(Box::new(move || {
        let migration = migration.wait_for();
        seen.lock()
            .unwrap()
            .push((migration.status(), migration.awaits_decision()));
    }));
    pauses
}

/// The hooks may be called before the test has the migration in its hands.
trait WaitFor<T> {
    fn wait_for(&self) -> &T;
}

impl<T> WaitFor<T> for OnceLock<T> {
    fn wait_for(&self) -> &T {
        loop {
            if let Some(value) = self.get() {
                return value;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn until(what: &str, limit: Duration, met: impl Fn() -> bool) {
    let end = Instant::now() + limit;
    while !met() {
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn limits(pause_ms: u64) -> MigrationLimits {
    MigrationLimits {
        pause_ms,
        suspend: Suspend::Vm,
        ..MigrationLimits::default()
    }
}

#[test]
fn a_write_that_hangs_inside_the_pause_does_not_hold_the_guest() {
    let bench = Bench::new();
    let (hooks, asked) = Hooks::new();
    hang_at_the_last_write(&bench, &hooks);
    let job = bench.job(limits(200), (Arc::clone(&hooks), asked));
    let resumed = || hooks.resumed.load(Ordering::Relaxed);
    until("suspended", Duration::from_secs(20), || {
        hooks.suspended.load(Ordering::Relaxed) == 1
    });
    until("resumed", BOUNDED, || resumed() == 1);
    // The device still hangs: the job waits, the guest does not.
    let status = job.migration.status();
    assert_eq!(status.phase, Phase::Copying, "{status:?}");
    assert!(status.pause_ms.unwrap() >= 200.0, "{status:?}");
    let before = bench.guest.writes.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(300));
    assert!(bench.guest.writes.load(Ordering::Relaxed) > before);
    assert_eq!(resumed(), 1);
    // The next attempt switches over, and nothing of the last one is missing.
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert_eq!(hooks.suspended.load(Ordering::Relaxed), resumed());
    let worst = Duration::from_micros(bench.guest.worst_us.load(Ordering::Relaxed));
    assert!(worst < BOUNDED, "a request of the guest took {worst:?}");
    bench.verify(true);
}

#[test]
fn a_flush_that_hangs_inside_the_pause_does_not_hold_the_guest() {
    let bench = Bench::new();
    let (hooks, asked) = Hooks::new();
    let destination = Arc::clone(&bench.destination);
    let mut first = true;
    *hooks.at_suspend.lock().unwrap() = Some(Box::new(move || {
        if std::mem::take(&mut first) {
            destination.add(Fault {
                times: 1,
                ..Fault::delaying(FaultOn::Flush, HANGS)
            });
        }
    }));
    let job = bench.job(limits(200), (Arc::clone(&hooks), asked));
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert!(hooks.suspended.load(Ordering::Relaxed) >= 2);
    assert_eq!(
        hooks.suspended.load(Ordering::Relaxed),
        hooks.resumed.load(Ordering::Relaxed)
    );
    let worst = Duration::from_micros(bench.guest.worst_us.load(Ordering::Relaxed));
    assert!(worst < BOUNDED, "a request of the guest took {worst:?}");
    bench.verify(false);
}

#[test]
fn a_cancellation_ends_the_pause_though_the_destination_hangs() {
    let bench = Bench::new();
    let (hooks, asked) = Hooks::new();
    hang_at_the_last_write(&bench, &hooks);
    let job = bench.job(limits(60_000), (Arc::clone(&hooks), asked));
    let began = Instant::now();
    until("suspended", Duration::from_secs(20), || {
        job.migration.status().phase == Phase::Suspended
    });
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(hooks.resumed.load(Ordering::Relaxed), 0);
    job.migration.cancel().unwrap();
    until("resumed", Duration::from_millis(500), || {
        hooks.resumed.load(Ordering::Relaxed) == 1
    });
    let before = bench.guest.writes.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(300));
    assert!(bench.guest.writes.load(Ordering::Relaxed) > before);
    // The destination may still be written to, so the job is not over.
    assert!(!job.migration.status().phase.is_final());
    let status = job.migration.join();
    assert_eq!(status.phase, Phase::Cancelled, "{status:?}");
    assert!(began.elapsed() >= HANGS);
    assert_eq!(hooks.resumed.load(Ordering::Relaxed), 1);
    assert!(job.asked.try_recv().is_err());
    // The next attempt works.
    let status = bench.job(limits(60_000), Hooks::new()).finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    bench.verify(true);
}

/// A job that could switch over at once, on a device so slow that what the guest writes meanwhile
/// is soon too much for a good pause.
fn without_a_daemon(bench: &Bench) -> Job {
    bench
        .destination
        .add(Fault::delaying(FaultOn::Write, Duration::from_millis(20)));
    let (hooks, asked) = Hooks::new();
    hooks.no_daemon.store(true, Ordering::Relaxed);
    let limits = MigrationLimits {
        max_passes: 1,
        ..limits(10_000)
    };
    let job = bench.job(limits, (hooks, asked));
    until("a pass after the first", Duration::from_secs(20), || {
        job.migration.status().passes.len() > 1
    });
    // Time for far more passes than are allowed.
    let before = bench.guest.writes.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(bench.guest.writes.load(Ordering::Relaxed) > before);
    let status = job.migration.status();
    assert_eq!(status.phase, Phase::Copying, "{status:?}");
    assert!(status.passes.len() <= 2, "{status:?}");
    assert_eq!(status.pause_ms, None, "{status:?}");
    assert!(!job.migration.awaits_decision());
    assert_eq!(job.hooks.suspended.load(Ordering::Relaxed), 0);
    assert!(job.asked.try_recv().is_err());
    job
}

#[test]
fn without_a_daemon_the_guest_never_waits_and_with_one_its_disk_moves() {
    let bench = Bench::new();
    let job = without_a_daemon(&bench);
    let hooks = Arc::clone(&job.hooks);
    hooks.no_daemon.store(false, Ordering::Relaxed);
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert_eq!(
        hooks.suspended.load(Ordering::Relaxed),
        hooks.resumed.load(Ordering::Relaxed)
    );
    let worst = Duration::from_micros(bench.guest.worst_us.load(Ordering::Relaxed));
    assert!(worst < BOUNDED, "a request of the guest took {worst:?}");
    bench.verify(false);
}

#[test]
fn a_daemon_that_goes_in_the_pause_is_not_asked() {
    let bench = Bench::new();
    let (hooks, asked) = Hooks::new();
    let away = Arc::downgrade(&hooks);
    let mut first = true;
    *hooks.at_suspend.lock().unwrap() = Some(Box::new(move || {
        if std::mem::take(&mut first) {
            let hooks = away.upgrade().unwrap();
            hooks.no_daemon.store(true, Ordering::Relaxed);
        }
    }));
    let job = bench.job(limits(10_000), (Arc::clone(&hooks), asked));
    until("resumed", Duration::from_secs(20), || {
        hooks.resumed.load(Ordering::Relaxed) == 1
    });
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(hooks.suspended.load(Ordering::Relaxed), 1);
    assert!(!job.migration.awaits_decision());
    assert!(job.asked.try_recv().is_err());
    hooks.no_daemon.store(false, Ordering::Relaxed);
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    bench.verify(false);
}

#[test]
fn a_job_that_waits_for_a_daemon_can_be_cancelled() {
    let bench = Bench::new();
    let job = without_a_daemon(&bench);
    let began = Instant::now();
    job.migration.cancel().unwrap();
    let status = job.migration.join();
    assert_eq!(status.phase, Phase::Cancelled, "{status:?}");
    assert!(began.elapsed() < BOUNDED, "{:?}", began.elapsed());
    assert_eq!(job.hooks.suspended.load(Ordering::Relaxed), 0);
    assert!(job.asked.try_recv().is_err());
}

#[test]
fn a_job_that_was_refused_awaits_nothing_when_its_guest_goes_on() {
    let bench = Bench::new();
    let (hooks, asked) = Hooks::new();
    let migration = Arc::new(OnceLock::new());
    let pauses = watch(&hooks, &migration);
    let job = bench.job(limits(10_000), (hooks, asked));
    migration.set(Arc::clone(&job.migration)).unwrap();
    assert!(!job.migration.awaits_decision());
    assert!(job.asked());
    assert!(job.migration.awaits_decision());
    job.migration.decide(false);
    assert_eq!(job.migration.join().phase, Phase::Failed);
    assert!(!job.migration.awaits_decision());
    let pauses = pauses.lock().unwrap();
    let (status, awaits) = pauses.last().unwrap();
    assert_eq!(status.phase, Phase::Copying);
    assert!(!awaits);
    // The other answer.
    let job = bench.job(limits(10_000), Hooks::new());
    assert!(job.asked());
    job.migration.decide(true);
    assert!(!job.migration.awaits_decision());
    assert_eq!(job.migration.join().phase, Phase::Completed);
}

#[test]
fn a_journal_that_fails_inside_the_pause_fails_the_job_before_the_question() {
    let bench = Bench::new();
    let (hooks, asked) = Hooks::new();
    let migration = Arc::new(OnceLock::new());
    let pauses = watch(&hooks, &migration);
    let journal = memory_file();
    let sealed = journal.try_clone().unwrap();
    *hooks.at_suspend.lock().unwrap() = Some(Box::new(move || {
        rustix::fs::fcntl_add_seals(&sealed, rustix::fs::SealFlags::WRITE).unwrap();
    }));
    let to = Arc::clone(&bench.destination) as Arc<dyn Image>;
    let job = Job::start_with(&bench.disk, &to, limits(10_000), (hooks, asked), journal).unwrap();
    migration.set(Arc::clone(&job.migration)).unwrap();
    let status = job.migration.join();
    assert_eq!(status.phase, Phase::Failed, "{status:?}");
    let failure = status.failure.unwrap();
    assert!(failure.find(JournalUnwritable::ID).is_some(), "{failure}");
    assert!(job.asked.try_recv().is_err(), "the daemon was asked");
    for (status, awaits) in pauses.lock().unwrap().iter() {
        assert_eq!(status.phase, Phase::Copying);
        assert!(!awaits);
    }
}

/// Nor does whoever starts a job wait for its journal's store.
#[test]
fn a_journal_that_cannot_be_begun_fails_the_job_with_nothing_copied() {
    let bench = Bench::new();
    let journal = memory_file();
    rustix::fs::fcntl_add_seals(&journal, rustix::fs::SealFlags::WRITE).unwrap();
    let to = Arc::clone(&bench.destination) as Arc<dyn Image>;
    let job = Job::start_with(&bench.disk, &to, limits(10_000), Hooks::new(), journal).unwrap();
    let status = job.migration.join();
    assert_eq!(status.phase, Phase::Failed, "{status:?}");
    assert!(status.passes.is_empty(), "{status:?}");
    let failure = status.failure.unwrap();
    assert!(failure.find(JournalUnwritable::ID).is_some(), "{failure}");
    assert_eq!(bench.destination.allocated(0).unwrap(), None);
    // The next attempt works.
    let status = bench.job(limits(10_000), Hooks::new()).finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    bench.verify(false);
}

fn memory_file() -> File {
    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
    rustix::fs::memfd_create("journal", flags).unwrap().into()
}

#[test]
fn the_throughput_is_what_arrives_and_the_pause_is_told_from_the_first_pass_on() {
    let bench = Bench::new();
    let limit = 8 << 20;
    let job = bench.job(
        MigrationLimits {
            bytes_per_second: Some(limit),
            method: Method::Dirty,
            ..MigrationLimits::default()
        },
        Hooks::new(),
    );
    std::thread::sleep(Duration::from_millis(1400));
    let status = job.migration.status();
    assert_eq!(status.passes.len(), 1, "{status:?}");
    assert!(
        (limit / 2..limit * 3 / 2).contains(&status.throughput),
        "{status:?}"
    );
    assert!(status.expected_pause_ms.unwrap() > 0.0, "{status:?}");
    job.migration.cancel().unwrap();
    assert_eq!(job.migration.join().phase, Phase::Cancelled);
}
