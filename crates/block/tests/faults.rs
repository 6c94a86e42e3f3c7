//! What goes wrong in a migration, under load: the guest sees none of it, its disk stays on the
//! source, the observation says what happened, and the next attempt works.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Guest, Habit, Job, Random, create, dir, two, verify};
use strake_api::job::{Method, MigrationLimits, MigrationStatus, Phase, Suspend};
use strake_api::spec::MAX_DISK;
use strake_block::{
    Access, AlreadyMigrating, Blocking, CancelTooLate, CommitRefused, DestinationRemoved,
    DestinationTooSmall, DiskTooLarge, Event, Fault, FaultImage, FaultOn, Image, ImageQueue,
    LiveDisk, MigrationFailed, NotConverging, Operation, PauseTooLong, ReadFailed, ReadOnlyDisk,
    WriteFailed,
};
use strake_observe::{Kind, Result};

const SIZE: u64 = 16 << 20;

/// A disk with a guest that writes, and a destination that can be made to fail.
struct Bench {
    dir: tempfile::TempDir,
    source: Arc<FaultImage>,
    destination: Arc<FaultImage>,
    disk: Arc<LiveDisk>,
    guest: Option<Guest>,
}

impl Bench {
    fn new(habit: Habit) -> Self {
        let dir = dir();
        let (a, b) = two(&dir);
        let source = FaultImage::new(create(&a, SIZE));
        let destination = FaultImage::new(create(&b, SIZE));
        let disk = LiveDisk::new("root", Arc::clone(&source) as Arc<dyn Image>);
        // Something to copy in the first pass.
        let mut io = Blocking::new(source.as_ref()).unwrap();
        let mut data = vec![0u8; 1 << 20];
        for at in 0..SIZE >> 20 {
            for (sector, bytes) in data.chunks_mut(512).enumerate() {
                common::stamp((at << 11) + sector as u64, 1, bytes);
            }
            io.write(at << 20, &data).unwrap();
        }
        let expected = vec![1u64; (SIZE / 512) as usize];
        let guest = Some(Guest::start(&disk, expected, habit));
        Self {
            dir,
            source,
            destination,
            disk,
            guest,
        }
    }

    fn to(&self) -> Arc<dyn Image> {
        Arc::clone(&self.destination) as Arc<dyn Image>
    }

    fn job(&self, limits: MigrationLimits) -> Job {
        Job::start(&self.disk, &self.to(), limits).unwrap()
    }

    /// The guest still runs on its source; a migration without faults works; nothing is lost.
    fn the_next_attempt_works(mut self) {
        self.source.clear();
        self.destination.clear();
        let fresh = create(&self.dir.path().join("c.raw"), SIZE);
        assert_eq!(self.disk.image().path(), self.source.path());
        let job = Job::start(&self.disk, &fresh, MigrationLimits::default()).unwrap();
        let status = job.finish(true);
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
        let guest = self.guest.take().unwrap();
        assert!(guest.writes.load(Ordering::Relaxed) > 0);
        verify(fresh.as_ref(), &guest.stop());
    }
}

fn failed_because<K: Kind>(status: &MigrationStatus) {
    assert_eq!(status.phase, Phase::Failed, "{status:?}");
    let failure = status.failure.as_ref().unwrap();
    assert!(failure.is::<MigrationFailed>());
    assert!(failure.find(K::ID).is_some(), "{}", failure);
}

#[test]
fn the_destination_fails_in_the_middle() {
    for (errno, skip) in [(libc::EIO, 0), (libc::EIO, 7), (libc::ENOSPC, 11)] {
        let bench = Bench::new(Habit::SMALL);
        bench
            .destination
            .add(Fault::failing(FaultOn::Change, errno).after(skip));
        let status = bench.job(MigrationLimits::default()).finish(true);
        failed_because::<WriteFailed>(&status);
        let leaf = status
            .failure
            .as_ref()
            .unwrap()
            .find(WriteFailed::ID)
            .unwrap();
        assert_eq!(leaf.datum("errno").unwrap(), errno);
        assert_eq!(leaf.datum("path").unwrap(), bench.destination.path());
        assert!(!leaf.remedy().is_empty());
        bench.the_next_attempt_works();
    }
}

#[test]
fn the_destination_cannot_be_flushed() {
    let bench = Bench::new(Habit::SMALL);
    // The first flush is the one before the pause, the second the one inside it.
    for skip in [0, 1] {
        bench.destination.clear();
        bench
            .destination
            .add(Fault::failing(FaultOn::Flush, libc::EIO).after(skip));
        let status = bench.job(MigrationLimits::default()).finish(true);
        failed_because::<strake_block::FlushFailed>(&status);
    }
    bench.the_next_attempt_works();
}

#[test]
fn the_source_cannot_be_read() {
    let bench = Bench::new(Habit {
        may_fail: true,
        ..Habit::SMALL
    });
    // The guest reads sectors one 4 KiB piece at a time; fail where it rarely is.
    bench
        .source
        .add(Fault::failing(FaultOn::Read, libc::EIO).within(8 << 20..(8 << 20) + 512));
    let status = bench.job(MigrationLimits::default()).finish(true);
    failed_because::<ReadFailed>(&status);
    let leaf = status
        .failure
        .as_ref()
        .unwrap()
        .find(ReadFailed::ID)
        .unwrap();
    assert_eq!(leaf.datum("path").unwrap(), bench.source.path());
    bench.the_next_attempt_works();
}

#[test]
fn the_destination_is_removed_in_the_middle() {
    let bench = Bench::new(Habit::SMALL);
    let job = bench.job(MigrationLimits {
        bytes_per_second: Some(64 << 20),
        ..MigrationLimits::default()
    });
    std::thread::sleep(Duration::from_millis(50));
    std::fs::remove_file(bench.dir.path().join("b.raw")).unwrap();
    failed_because::<DestinationRemoved>(&job.finish(true));
    bench.the_next_attempt_works();
}

#[test]
fn a_failing_write_of_the_guest_reaches_the_guest_and_is_observed() {
    let bench = Bench::new(Habit {
        may_fail: true,
        ..Habit::SMALL
    });
    let seen = Arc::new(Mutex::new(Vec::new()));
    {
        let seen = Arc::clone(&seen);
        bench.disk.set_observer(Arc::new(move |observation| {
            seen.lock().unwrap().push(observation)
        }));
    }
    bench
        .source
        .add(Fault::failing(FaultOn::Write, libc::EIO).within(4 << 20..5 << 20));
    let guest = bench.guest.as_ref().unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while guest.errors.load(Ordering::Relaxed) < 50 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let errors = guest.errors.load(Ordering::Relaxed);
    assert!(errors >= 50);
    assert!(bench.disk.counters().errors >= errors);
    let seen = seen.lock().unwrap().clone();
    assert!(
        !seen.is_empty() && (seen.len() as u64) < errors,
        "{}",
        seen.len()
    );
    let first = &seen[0];
    assert!(first.is::<WriteFailed>());
    assert_eq!(first.datum("errno").unwrap(), libc::EIO);
    let offset = first.datum("offset").unwrap().as_u64().unwrap();
    assert!((4 << 20..5 << 20).contains(&offset));
    // The disk can still be moved away from the failing device.
    bench.the_next_attempt_works();
}

#[test]
fn hundreds_of_starts_and_cancels_under_load() {
    let bench = Bench::new(Habit::MIXED);
    let mut random = Random::new(42);
    let mut cancelled = 0;
    let mut slowest = Duration::ZERO;
    for _ in 0..300 {
        let job = bench.job(MigrationLimits {
            // Slow enough that most are met in the middle of a pass.
            bytes_per_second: Some(200 << 20),
            ..MigrationLimits::default()
        });
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
        let began = Instant::now();
        match job.migration.cancel() {
            Ok(()) => {
                let status = job.migration.join();
                slowest = slowest.max(began.elapsed());
                assert!(matches!(status.phase, Phase::Cancelled), "{status:?}");
                cancelled += 1;
            }
            Err(seen) => {
                assert!(seen.is::<CancelTooLate>());
                job.migration.decide(false);
                let status = job.migration.join();
                failed_because::<CommitRefused>(&status);
            }
        }
        assert_eq!(job.hooks.ended.lock().unwrap().len(), 1);
    }
    println!("{cancelled} of 300 cancelled, the slowest in {slowest:?}");
    assert!(cancelled > 200);
    bench.the_next_attempt_works();
}

#[test]
fn a_cancellation_is_heard_inside_a_long_wait() {
    let bench = Bench::new(Habit::SMALL);
    let job = bench.job(MigrationLimits {
        bytes_per_second: Some(1000),
        ..MigrationLimits::default()
    });
    std::thread::sleep(Duration::from_millis(300));
    let began = Instant::now();
    job.migration.cancel().unwrap();
    assert_eq!(job.migration.join().phase, Phase::Cancelled);
    assert!(
        began.elapsed() < Duration::from_millis(1000),
        "{:?}",
        began.elapsed()
    );
    bench.the_next_attempt_works();
}

#[test]
fn a_guest_that_writes_faster_than_the_copy_is_told_so() {
    let bench = Bench::new(Habit::SMALL);
    let status = bench
        .job(MigrationLimits {
            pause_ms: 1,
            bytes_per_second: Some(32 << 20),
            max_passes: 6,
            method: Method::Dirty,
            ..MigrationLimits::default()
        })
        .finish(true);
    failed_because::<NotConverging>(&status);
    let leaf = status
        .failure
        .as_ref()
        .unwrap()
        .find(NotConverging::ID)
        .unwrap();
    assert!(leaf.datum("write_rate").unwrap().as_u64().unwrap() > 0);
    assert!(leaf.datum("copy_rate").unwrap().as_u64().unwrap() > 0);
    assert!(status.passes.len() > 1);
    bench.the_next_attempt_works();
}

#[test]
fn devices_too_slow_for_the_pause_give_up_and_say_so() {
    let bench = Bench::new(Habit {
        per_second: Some(200),
        ..Habit::SMALL
    });
    let limits = MigrationLimits {
        pause_ms: 40,
        ..MigrationLimits::default()
    };
    // Requests inside the gate do not end in time.
    bench
        .source
        .add(Fault::delaying(FaultOn::Write, Duration::from_millis(150)));
    let status = bench.job(limits).finish(true);
    failed_because::<PauseTooLong>(&status);
    assert!(status.pause_ms.is_some());
    bench.the_next_attempt_works();
}

#[test]
fn the_vm_is_suspended_only_if_asked_and_always_resumed() {
    let bench = Bench::new(Habit::SMALL);
    let vm = MigrationLimits {
        suspend: Suspend::Vm,
        ..MigrationLimits::default()
    };
    // Refused by the machine.
    let job = bench.job(vm.clone());
    job.hooks.refuse_suspend.store(true, Ordering::Relaxed);
    let hooks = Arc::clone(&job.hooks);
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Failed);
    assert_eq!(hooks.resumed.load(Ordering::Relaxed), 0);
    // Refused by the inventory.
    let job = bench.job(vm);
    let hooks = Arc::clone(&job.hooks);
    failed_because::<CommitRefused>(&job.finish(false));
    let suspended = hooks.suspended.load(Ordering::Relaxed);
    assert!(suspended >= 1);
    assert_eq!(hooks.resumed.load(Ordering::Relaxed), suspended);
    let job = bench.job(MigrationLimits::default());
    let hooks = Arc::clone(&job.hooks);
    failed_because::<CommitRefused>(&job.finish(false));
    assert_eq!(hooks.suspended.load(Ordering::Relaxed), 0);
    bench.the_next_attempt_works();
}

#[test]
fn while_the_daemon_decides_the_guest_waits_and_nobody_else_decides() {
    let mut bench = Bench::new(Habit::SMALL);
    let job = bench.job(MigrationLimits::default());
    job.migration.decide(true); // before the question: without effect
    assert!(job.asked());
    assert_eq!(job.migration.status().phase, Phase::AwaitingCommit);
    let before = bench.guest.as_ref().unwrap().writes.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(100));
    let after = bench.guest.as_ref().unwrap().writes.load(Ordering::Relaxed);
    assert_eq!(before, after);
    assert!(job.migration.cancel().unwrap_err().is::<CancelTooLate>());
    // Another one is refused meanwhile.
    let other = create(&bench.dir.path().join("d.raw"), SIZE);
    let seen = Job::start(&bench.disk, &other, MigrationLimits::default())
        .err()
        .unwrap();
    assert!(seen.is::<AlreadyMigrating>());
    job.migration.decide(true);
    job.migration.decide(false); // after the first answer: without effect
    let status = job.migration.join();
    assert_eq!(status.phase, Phase::Completed);
    assert!(status.pause_ms.unwrap() >= 100.0);
    assert!(job.migration.cancel().is_ok());
    let guest = bench.guest.take().unwrap();
    verify(bench.destination.as_ref(), &guest.stop());
}

#[test]
fn a_destination_that_cannot_take_the_disk_is_refused_before_anything_happens() {
    let bench = Bench::new(Habit::SMALL);
    let small = create(&bench.dir.path().join("small.raw"), SIZE - 512);
    let seen = Job::start(&bench.disk, &small, MigrationLimits::default())
        .err()
        .unwrap();
    assert!(seen.find(DestinationTooSmall::ID).is_some(), "{seen}");
    let path = bench.dir.path().join("b.raw");
    let file = std::fs::File::open(&path).unwrap();
    let read_only: Arc<dyn Image> = Arc::new(
        strake_block::RawImage::from_fd(file.into(), "b.raw", strake_block::Access::ReadOnly)
            .unwrap(),
    );
    let seen = Job::start(&bench.disk, &read_only, MigrationLimits::default())
        .err()
        .unwrap();
    assert!(seen.find(ReadOnlyDisk::ID).is_some(), "{seen}");
    bench.the_next_attempt_works();
}

/// An image with the size that somebody claims.
#[derive(Debug)]
struct Claimed(Arc<dyn Image>, u64);

impl Image for Claimed {
    fn path(&self) -> &str {
        self.0.path()
    }

    fn size(&self) -> u64 {
        self.1
    }

    fn access(&self) -> Access {
        self.0.access()
    }

    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        self.0.open_queue(depth, event)
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, data)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.0.allocated(from)
    }

    fn is_removed(&self) -> Result<bool> {
        self.0.is_removed()
    }
}

#[test]
fn a_disk_too_large_to_be_followed_is_refused_and_the_monitor_lives() {
    let dir = dir();
    let (a, b) = two(&dir);
    let sizes = [MAX_DISK + 512, i64::MAX.cast_unsigned() / 512 * 512];
    for size in sizes {
        let disk = LiveDisk::new("root", Arc::new(Claimed(create(&a, SIZE), size)));
        let to: Arc<dyn Image> = Arc::new(Claimed(create(&b, SIZE), size));
        let seen = Job::start(&disk, &to, MigrationLimits::default())
            .err()
            .unwrap();
        let leaf = seen.find(DiskTooLarge::ID).unwrap();
        assert_eq!(leaf.datum("size").unwrap(), size);
        assert_eq!(leaf.datum("most").unwrap(), MAX_DISK);
        // Refused is not migrating.
        let seen = Job::start(&disk, &to, MigrationLimits::default())
            .err()
            .unwrap();
        assert!(seen.find(DiskTooLarge::ID).is_some(), "{seen}");
    }
}

#[test]
fn holes_and_zeroes_stay_unallocated_and_what_became_zero_is_zeroed() {
    let dir = dir();
    let (a, b) = two(&dir);
    let size = 64u64 << 20;
    let source = create(&a, size);
    let mut io = Blocking::new(source.as_ref()).unwrap();
    let mut data = vec![0u8; 1 << 20];
    let mut expected = vec![0u64; (size / 512) as usize];
    for at in [3u64, 4, 40] {
        for (sector, bytes) in data.chunks_mut(512).enumerate() {
            common::stamp((at << 11) + sector as u64, 1, bytes);
        }
        io.write(at << 20, &data).unwrap();
        expected[(at << 11) as usize..((at + 1) << 11) as usize].fill(1);
    }
    // Allocated, but zero.
    data.fill(0);
    io.write(20 << 20, &data).unwrap();

    let destination = create(&b, size);
    let slow = FaultImage::new(Arc::clone(&destination));
    slow.add(Fault::delaying(FaultOn::Write, Duration::from_millis(100)));
    let to: Arc<dyn Image> = Arc::clone(&slow) as Arc<dyn Image>;
    let disk = LiveDisk::new("root", source);
    let job = Job::start(&disk, &to, MigrationLimits::default()).unwrap();
    // A guest discards what has been copied, while the rest is still being copied.
    std::thread::sleep(Duration::from_millis(120));
    let mut queue = disk.queue(4).unwrap();
    queue.submit(strake_block::Request {
        tag: 1,
        op: Operation::Discard { len: 1 << 20 },
        offset: 3 << 20,
        buffers: Vec::new(),
    });
    queue.push().unwrap();
    while queue.in_flight() > 0 {
        queue.reap(&mut |_, result| result.unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    expected[3 << 11..4 << 11].fill(0);
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert!(status.passes[0].planned_bytes <= 5 << 20, "{status:?}");
    assert!(status.passes[0].written_bytes <= 3 << 20, "{status:?}");
    verify(destination.as_ref(), &expected);
    let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&b).unwrap()) * 512;
    assert!(
        used <= 3 << 20,
        "{used} bytes are allocated at the destination"
    );
}

#[test]
fn what_a_used_destination_held_before_is_gone() {
    let dir = dir();
    let (a, b) = two(&dir);
    let (source, destination) = (create(&a, SIZE), create(&b, SIZE));
    let mut io = Blocking::new(destination.as_ref()).unwrap();
    for at in 0..SIZE >> 20 {
        io.write(at << 20, &vec![0xaa; 1 << 20]).unwrap();
    }
    let disk = LiveDisk::new("root", source);
    let status = Job::start(&disk, &destination, MigrationLimits::default())
        .unwrap()
        .finish(true);
    assert_eq!(status.phase, Phase::Completed);
    verify(destination.as_ref(), &vec![0; (SIZE / 512) as usize]);
}
