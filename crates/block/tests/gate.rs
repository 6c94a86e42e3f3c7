//! Requests of many queues while the gate closes and opens, without a migration's copy in between.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Guest, Habit, Job, create, dir, two, verify};
use strake_api::job::{MigrationLimits, Phase};
use strake_block::{BadRequest, Fault, FaultImage, FaultOn, Image, LiveDisk, Operation, Request};

/// A queue that is full until it is told to stop; says how many requests ended.
fn keep_full(disk: &Arc<LiveDisk>, stop: &AtomicBool) -> u64 {
    let mut queue = disk.queue(64).unwrap();
    let mut ended = 0u64;
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        while !stopping && queue.in_flight() < 64 {
            queue.submit(Request {
                tag: 0,
                op: Operation::Discard { len: 0 },
                offset: 0,
                buffers: Vec::new(),
            });
        }
        queue.push().unwrap();
        queue
            .reap(&mut |_, result| {
                result.unwrap();
                ended += 1;
            })
            .unwrap();
        if stopping && queue.in_flight() == 0 {
            return ended;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn four_full_queues_follow_every_switch() {
    let dir = dir();
    let (a, b) = two(&dir);
    // Small, so that the time goes into switching and not into copying.
    let size = 1u64 << 20;
    let images = [create(&a, size), create(&b, size)];
    let disk = LiveDisk::new("root", Arc::clone(&images[0]));
    // One queue writes and verifies; three more are always full of requests that change nothing.
    let habit = Habit {
        depth: 64,
        ..Habit::SMALL
    };
    let writer = Guest::start(&disk, vec![0u64; (size / 512) as usize], habit);
    let stop = Arc::new(AtomicBool::new(false));
    let others: Vec<_> = (0..3)
        .map(|_| {
            let disk = Arc::clone(&disk);
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || keep_full(&disk, &stop))
        })
        .collect();
    let mut on = 0;
    let began = Instant::now();
    let mut switches = 0;
    while switches < 100 && began.elapsed() < Duration::from_secs(20) {
        let job = Job::start(&disk, &images[1 - on], MigrationLimits::default()).unwrap();
        let status = job.finish(true);
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
        on = 1 - on;
        switches += 1;
    }
    stop.store(true, Ordering::Relaxed);
    for other in others {
        assert!(other.join().unwrap() > 0);
    }
    verify(images[on].as_ref(), &writer.stop());
    println!("{switches} switches in {:?}", began.elapsed());
    assert!(switches > 20);
}

#[test]
fn an_idle_queue_lets_the_old_image_go() {
    let dir = dir();
    let (a, b) = two(&dir);
    let source = create(&a, 1 << 20);
    let destination = create(&b, 1 << 20);
    let disk = LiveDisk::new("root", Arc::clone(&source));
    let mut queue = disk.queue(8).unwrap();
    assert_eq!(
        Job::start(&disk, &destination, MigrationLimits::default())
            .unwrap()
            .finish(true)
            .phase,
        Phase::Completed
    );
    // The gate's opening woke it, though it had nothing to do.
    let mut poll = libc::pollfd {
        fd: std::os::fd::AsRawFd::as_raw_fd(&queue.event()),
        events: libc::POLLIN,
        revents: 0,
    };
    #[allow(unsafe_code)]
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&mut poll, 1, 1000) };
    assert_eq!(ready, 1);
    queue
        .reap(&mut |_, _| panic!("nothing was submitted"))
        .unwrap();
    assert_eq!(
        Arc::strong_count(&source),
        1,
        "something still holds the source"
    );
    let descriptors: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .collect();
    let held =
        |path: &std::path::Path| descriptors.iter().filter(|it| it.as_path() == path).count();
    assert_eq!(held(&a), 1, "only our own");
    drop(source);
}

#[test]
fn a_queue_dropped_with_requests_inside_leaves_the_gate() {
    let dir = dir();
    let (a, b) = two(&dir);
    let slow = FaultImage::new(create(&a, 1 << 20));
    slow.add(Fault::delaying(FaultOn::Any, Duration::from_millis(100)));
    let disk = LiveDisk::new("root", Arc::clone(&slow) as Arc<dyn Image>);
    let mut queue = disk.queue(8).unwrap();
    for tag in 0..4 {
        queue.submit(Request {
            tag,
            op: Operation::Flush,
            offset: 0,
            buffers: Vec::new(),
        });
    }
    queue.push().unwrap();
    assert_eq!(queue.in_flight(), 4);
    drop(queue);
    slow.clear();
    let destination = create(&b, 1 << 20);
    let status = Job::start(&disk, &destination, MigrationLimits::default())
        .unwrap()
        .finish(true);
    assert_eq!(status.phase, Phase::Completed);
}

#[test]
fn what_no_disk_can_do_comes_back_failed_and_unreported() {
    let dir = dir();
    let (a, _) = two(&dir);
    let disk = LiveDisk::new("root", create(&a, 1 << 20));
    disk.set_observer(Arc::new(|seen| panic!("reported: {seen}")));
    let mut queue = disk.queue(8).unwrap();
    for (offset, len) in [(1 << 20, 512), (u64::MAX, 512), (0, 1), (513, 512)] {
        queue.submit(Request {
            tag: 5,
            op: Operation::Discard { len },
            offset,
            buffers: Vec::new(),
        });
    }
    queue.push().unwrap();
    let mut failed = 0;
    while queue.in_flight() > 0 {
        queue
            .reap(&mut |tag, result| {
                assert_eq!(tag, 5);
                assert!(result.unwrap_err().is::<BadRequest>());
                failed += 1;
            })
            .unwrap();
    }
    assert_eq!(failed, 4);
    assert_eq!(disk.counters().errors, 4);
}
