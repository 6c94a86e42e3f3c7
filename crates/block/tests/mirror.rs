//! Method `mirror`, and `auto` on its way to it: what the zones cost nobody, what a destination may
//! do to a guest that writes to it, and that both sides are the same whatever the guest does.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    unsafe_code,
    missing_docs
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Guest, Habit, Job, Random, create, dir, same, two, verify};
use strake_api::job::{Method, MethodReason, MigrationLimits, MigrationStatus, Phase};
use strake_block::{
    Blocking, Buffer, CancelTooLate, CommitRefused, Fault, FaultImage, FaultOn, FlushFailed, Image,
    LiveDisk, MirrorStalled, Operation, Request, WriteFailed,
};
use strake_observe::Kind;

const SIZE: u64 = 16 << 20;

/// A disk full of data, and a destination that can be made to fail.
struct Bench {
    dir: tempfile::TempDir,
    source: Arc<FaultImage>,
    destination: Arc<FaultImage>,
    disk: Arc<LiveDisk>,
}

impl Bench {
    fn new() -> Self {
        let dir = dir();
        let (a, b) = two(&dir);
        let source = FaultImage::new(create(&a, SIZE));
        let destination = FaultImage::new(create(&b, SIZE));
        let mut io = Blocking::new(source.as_ref()).unwrap();
        let mut data = vec![0u8; 1 << 20];
        for at in 0..SIZE >> 20 {
            for (sector, bytes) in data.chunks_mut(512).enumerate() {
                common::stamp((at << 11) + sector as u64, 1, bytes);
            }
            io.write(at << 20, &data).unwrap();
        }
        let disk = LiveDisk::new("root", Arc::clone(&source) as Arc<dyn Image>);
        Self {
            dir,
            source,
            destination,
            disk,
        }
    }

    fn guest(&self, habit: Habit) -> Guest {
        Guest::start(&self.disk, vec![1; (SIZE / 512) as usize], habit)
    }

    fn job(&self, limits: MigrationLimits) -> Job {
        let to = Arc::clone(&self.destination) as Arc<dyn Image>;
        Job::start(&self.disk, &to, limits).unwrap()
    }

    /// A migration without faults works, and nothing is lost.
    fn the_next_attempt_works(&self, guest: Guest) {
        self.destination.clear();
        assert_eq!(self.disk.image().path(), self.source.path());
        let fresh = create(&self.dir.path().join("c.raw"), SIZE);
        let status = Job::start(&self.disk, &fresh, mirror())
            .unwrap()
            .finish(true);
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
        assert!(guest.writes.load(Ordering::Relaxed) > 0);
        verify(fresh.as_ref(), &guest.stop());
    }
}

/// However busy this host is, the last flush gets its time.
fn mirror() -> MigrationLimits {
    MigrationLimits {
        pause_ms: 10_000,
        method: Method::Mirror,
        ..MigrationLimits::default()
    }
}

fn failed_because<K: Kind>(status: &MigrationStatus) {
    assert_eq!(status.phase, Phase::Failed, "{status:?}");
    let failure = status.failure.as_ref().unwrap();
    assert!(failure.find(K::ID).is_some(), "{failure}");
}

/// A guest without manners: its writes overlap, and it changes what it is writing.
fn careless(disk: &Arc<LiveDisk>, seed: u64, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
    let mut queue = disk.queue(16).unwrap();
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        let mut random = Random::new(seed);
        let mut memory = vec![0u8; 256 * 1024];
        let (start, room) = (memory.as_mut_ptr(), memory.len() as u64);
        let mut ended = 0;
        while !stop.load(Ordering::Relaxed) || queue.in_flight() > 0 {
            while !stop.load(Ordering::Relaxed) && queue.in_flight() < 16 {
                // All of them in a few places.
                let sectors = 1 + random.below(160);
                let first = random.below(8) * 2000 + random.below(256);
                let len = sectors * 512;
                let from = random.below((room - len) / 512) * 512;
                // SAFETY: the memory outlives the queue's requests: the loop ends without any.
                let buffer = unsafe { Buffer::new(start.add(from as usize), len as usize) };
                let (op, buffers) = match random.below(10) {
                    0 => (Operation::Discard { len }, Vec::new()),
                    1 => (Operation::WriteZeroes { len, unmap: true }, Vec::new()),
                    _ => (Operation::Write, vec![buffer]),
                };
                queue.submit(Request {
                    tag: 0,
                    op,
                    offset: first * 512,
                    buffers,
                });
            }
            queue.push().unwrap();
            for _ in 0..64 {
                let at = random.below(room) as usize;
                // SAFETY: within the memory; others read it at the same time, which is the point.
                unsafe { start.add(at).write_volatile(random.below(256) as u8) };
            }
            queue
                .reap(&mut |_, result| {
                    result.unwrap();
                    ended += 1;
                })
                .unwrap();
            std::thread::sleep(Duration::from_micros(300));
        }
        drop(queue);
        drop(memory);
        ended
    })
}

#[test]
fn both_sides_are_the_same_though_writes_overlap_and_change_on_their_way() {
    let bench = Bench::new();
    let stop = Arc::new(AtomicBool::new(false));
    let guests: Vec<_> = (0..3)
        .map(|seed| careless(&bench.disk, seed, &stop))
        .collect();
    for number in 0..12 {
        let to = create(&bench.dir.path().join(format!("to-{number}.raw")), SIZE);
        let job = Job::start(&bench.disk, &to, mirror()).unwrap();
        assert!(job.asked(), "{:?}", job.migration.status());
        same(bench.disk.image().as_ref(), to.as_ref(), SIZE);
        job.migration.decide(number % 3 > 0);
        let status = job.migration.join();
        assert!(status.phase.is_final());
    }
    stop.store(true, Ordering::Relaxed);
    for guest in guests {
        assert!(guest.join().unwrap() > 100);
    }
}

#[test]
fn any_request_at_the_destination_may_fail_and_the_guest_does_not_notice() {
    let bench = Bench::new();
    let guest = bench.guest(Habit::MIXED);
    for (number, errno) in [libc::EIO, libc::ENOSPC]
        .into_iter()
        .cycle()
        .take(24)
        .enumerate()
    {
        // The first ones one by one, then here and there.
        let skip = (number * number) as u64;
        bench
            .destination
            .add(Fault::failing(FaultOn::Change, errno).after(skip));
        let job = bench.job(mirror());
        if job.asked() {
            job.migration.decide(false);
            failed_because::<CommitRefused>(&job.migration.join());
        } else {
            let status = job.migration.join();
            failed_because::<WriteFailed>(&status);
            let leaf = status.failure.as_ref().unwrap().find(WriteFailed::ID);
            assert_eq!(leaf.unwrap().datum("errno").unwrap(), errno);
            let path = leaf.unwrap().datum("path").unwrap();
            assert_eq!(path, bench.destination.path());
        }
        bench.destination.clear();
    }
    for skip in 0..3 {
        bench
            .destination
            .add(Fault::failing(FaultOn::Flush, libc::EIO).after(skip));
        let job = bench.job(mirror());
        if job.asked() {
            job.migration.decide(false);
        } else {
            failed_because::<FlushFailed>(&job.migration.join());
        }
        let _ = job.migration.join();
        bench.destination.clear();
    }
    assert_eq!(guest.errors.load(Ordering::Relaxed), 0);
    bench.the_next_attempt_works(guest);
}

#[test]
fn a_failing_write_of_the_guest_is_its_own_and_does_not_end_the_mirroring() {
    let bench = Bench::new();
    let guest = bench.guest(Habit {
        may_fail: true,
        ..Habit::SMALL
    });
    bench
        .source
        .add(Fault::failing(FaultOn::Write, libc::EIO).within(4 << 20..(4 << 20) + 65_536));
    let to = create(&bench.dir.path().join("c.raw"), SIZE);
    let job = Job::start(&bench.disk, &to, mirror()).unwrap();
    assert!(job.asked(), "{:?}", job.migration.status());
    same(bench.source.as_ref(), to.as_ref(), SIZE);
    job.migration.decide(true);
    assert_eq!(job.migration.join().phase, Phase::Completed);
    drop(guest.stop());
}

#[test]
fn a_destination_that_hangs_is_left_behind_and_taken_up_again() {
    let bench = Bench::new();
    let guest = bench.guest(Habit {
        per_second: Some(2000),
        ..Habit::SMALL
    });
    // In the middle of the copy, with the guest's writes.
    bench.destination.add(Fault {
        times: 3,
        ..Fault::delaying(FaultOn::Write, Duration::from_secs(5)).after(12)
    });
    let began = Instant::now();
    let status = bench
        .job(MigrationLimits {
            // In the pause this is what bounds the wait.
            pause_ms: 1000,
            bytes_per_second: Some(8 << 20),
            ..mirror()
        })
        .finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert!(began.elapsed() > Duration::from_secs(2));
    let worst = Duration::from_micros(guest.worst_us.load(Ordering::Relaxed));
    assert!(
        worst < Duration::from_millis(2500),
        "a request of the guest took {worst:?}"
    );
    verify(bench.destination.as_ref(), &guest.stop());
}

#[test]
fn a_destination_that_hangs_again_and_again_fails_the_job() {
    let bench = Bench::new();
    let guest = bench.guest(Habit {
        per_second: Some(500),
        ..Habit::SMALL
    });
    bench
        .destination
        .add(Fault::delaying(FaultOn::Write, Duration::from_millis(1500)));
    let status = bench.job(mirror()).finish(true);
    failed_because::<MirrorStalled>(&status);
    let worst = Duration::from_micros(guest.worst_us.load(Ordering::Relaxed));
    assert!(worst < Duration::from_millis(2500), "{worst:?}");
    bench.the_next_attempt_works(guest);
}

#[test]
fn a_cancellation_lets_the_guest_go_though_the_destination_hangs() {
    let bench = Bench::new();
    let guest = bench.guest(Habit::SMALL);
    bench
        .destination
        .add(Fault::delaying(FaultOn::Write, Duration::from_secs(4)).after(8));
    let job = bench.job(mirror());
    std::thread::sleep(Duration::from_millis(200));
    job.migration.cancel().unwrap();
    let status = job.migration.join();
    assert_eq!(status.phase, Phase::Cancelled, "{status:?}");
    let worst = Duration::from_micros(guest.worst_us.load(Ordering::Relaxed));
    assert!(worst < Duration::from_millis(2500), "{worst:?}");
    bench.the_next_attempt_works(guest);
}

#[test]
fn without_a_daemon_a_mirrored_guest_goes_on_and_with_one_its_disk_moves() {
    let bench = Bench::new();
    let guest = bench.guest(Habit {
        per_second: Some(2000),
        ..Habit::SMALL
    });
    let (hooks, asked) = common::Hooks::new();
    hooks.no_daemon.store(true, Ordering::Relaxed);
    let to = Arc::clone(&bench.destination) as Arc<dyn Image>;
    let journal = tempfile::tempfile().unwrap();
    let with = (Arc::clone(&hooks), asked);
    let job = Job::start_with(&bench.disk, &to, mirror(), with, journal).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let status = job.migration.status();
    assert_eq!(status.phase, Phase::Copying, "{status:?}");
    let before = guest.writes.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(500));
    assert!(guest.writes.load(Ordering::Relaxed) > before);
    assert!(job.asked.try_recv().is_err());
    hooks.no_daemon.store(false, Ordering::Relaxed);
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    verify(bench.destination.as_ref(), &guest.stop());
}

#[test]
fn queues_come_and_go_while_the_disk_is_mirrored() {
    let bench = Bench::new();
    // The last MiB is for the queues that come and go.
    let expected = vec![1; ((SIZE - (1 << 20)) / 512) as usize];
    let habit = Habit {
        per_second: Some(4000),
        ..Habit::SMALL
    };
    let guest = Guest::start(&bench.disk, expected, habit);
    let stop = Arc::new(AtomicBool::new(false));
    let others = {
        let (disk, stop) = (Arc::clone(&bench.disk), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut memory = vec![7u8; 64 * 1024];
            let mut count = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let mut queue = disk.queue(8).unwrap();
                for tag in 0..8 {
                    // SAFETY: dropping the queue waits for what is in flight.
                    let buffer = unsafe { Buffer::new(memory.as_mut_ptr(), 64 * 1024) };
                    queue.submit(Request {
                        tag,
                        op: Operation::Write,
                        offset: SIZE - (1 + tag) * 64 * 1024,
                        buffers: vec![buffer],
                    });
                }
                queue.push().unwrap();
                // With requests on their way on both sides.
                drop(queue);
                count += 1;
            }
            count
        })
    };
    for number in 0..10 {
        let to = create(&bench.dir.path().join(format!("to-{number}.raw")), SIZE);
        let job = Job::start(&bench.disk, &to, mirror()).unwrap();
        assert!(job.asked(), "{:?}", job.migration.status());
        same(bench.disk.image().as_ref(), to.as_ref(), SIZE);
        job.migration.decide(true);
        assert_eq!(job.migration.join().phase, Phase::Completed);
    }
    stop.store(true, Ordering::Relaxed);
    let count = others.join().unwrap();
    assert!(count > 10);
    verify(bench.disk.image().as_ref(), &guest.stop());
}

/// How many starts: ten thousand where the build is optimised, fewer where the whole suite runs.
const STARTS: u32 = if cfg!(debug_assertions) { 300 } else { 10_000 };

#[test]
fn starts_and_cancels_under_load_end_without_a_hang() {
    let bench = Bench::new();
    let guest = bench.guest(Habit::MIXED);
    let mut random = Random::new(7);
    let (mut cancelled, mut slowest, mut starts) = (0, Duration::ZERO, Duration::ZERO);
    for number in 0..STARTS {
        let began = Instant::now();
        let job = bench.job(MigrationLimits {
            bytes_per_second: Some(400 << 20),
            method: if number % 2 == 0 {
                Method::Mirror
            } else {
                Method::Auto
            },
            ..MigrationLimits::default()
        });
        starts = starts.max(began.elapsed());
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        let began = Instant::now();
        match job.migration.cancel() {
            Ok(()) => {
                let status = job.migration.join();
                slowest = slowest.max(began.elapsed());
                assert_eq!(status.phase, Phase::Cancelled, "{status:?}");
                cancelled += 1;
            }
            Err(seen) => {
                assert!(seen.is::<CancelTooLate>());
                job.migration.decide(false);
                failed_because::<CommitRefused>(&job.migration.join());
            }
        }
    }
    let worst = Duration::from_micros(guest.worst_us.load(Ordering::Relaxed));
    println!(
        "{cancelled} of {STARTS} cancelled, the slowest in {slowest:?}; the slowest start took {starts:?}, the slowest request {worst:?}"
    );
    assert!(cancelled > STARTS / 2);
    bench.the_next_attempt_works(guest);
}

#[test]
fn a_guest_that_writes_too_fast_for_passes_is_mirrored_and_told_so() {
    let bench = Bench::new();
    let guest = bench.guest(Habit::SMALL);
    let fast = MigrationLimits {
        bytes_per_second: Some(16 << 20),
        ..MigrationLimits::default()
    };
    let status = bench
        .job(MigrationLimits {
            pause_ms: 10_000,
            ..fast
        })
        .finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    let used = status.method.clone().unwrap();
    assert_eq!(used.method, Method::Mirror);
    assert!(
        matches!(used.why, MethodReason::WritesTooFast { write_rate, copy_rate } if write_rate > copy_rate / 4),
        "{used:?}"
    );
    assert!(used.mirrored_bytes > 0, "{used:?}");
    // Not much more than one pass.
    let read: u64 = status.passes.iter().map(|pass| pass.read_bytes).sum();
    assert!(read < SIZE * 3 / 2, "{status:?}");
    verify(bench.destination.as_ref(), &guest.stop());
}

#[test]
fn a_guest_that_writes_little_is_not_mirrored() {
    let bench = Bench::new();
    let guest = bench.guest(Habit {
        per_second: Some(50),
        ..Habit::SMALL
    });
    let status = bench
        .job(MigrationLimits {
            pause_ms: 10_000,
            bytes_per_second: Some(16 << 20),
            ..MigrationLimits::default()
        })
        .finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    let used = status.method.unwrap();
    assert_eq!(used.method, Method::Dirty);
    assert_eq!(used.why, MethodReason::PassesKeepUp);
    verify(bench.destination.as_ref(), &guest.stop());
}

#[test]
fn a_mirror_leaves_holes_and_clears_what_a_used_destination_held() {
    let dir = dir();
    let (a, b) = two(&dir);
    let source = create(&a, SIZE);
    let mut io = Blocking::new(source.as_ref()).unwrap();
    let mut data = vec![0u8; 1 << 20];
    for (sector, bytes) in data.chunks_mut(512).enumerate() {
        common::stamp((3 << 11) + sector as u64, 1, bytes);
    }
    io.write(3 << 20, &data).unwrap();
    let mut expected = vec![0; (SIZE / 512) as usize];
    expected[3 << 11..4 << 11].fill(1);
    let disk = LiveDisk::new("root", source);
    for used in [false, true] {
        let destination = create(&b, SIZE);
        if used {
            let mut io = Blocking::new(destination.as_ref()).unwrap();
            for at in 0..SIZE >> 20 {
                io.write(at << 20, &vec![0xaa; 1 << 20]).unwrap();
            }
        }
        let status = Job::start(&disk, &destination, mirror())
            .unwrap()
            .finish(!used);
        assert!(status.phase.is_final());
        verify(destination.as_ref(), &expected);
        let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&b).unwrap()) * 512;
        assert!(used <= 2 << 20, "{used} bytes are allocated");
        std::fs::rename(&b, dir.path().join("moved.raw")).unwrap();
    }
}
