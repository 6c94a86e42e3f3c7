//! A disk with limits, from its queue.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::control::DiskLimits;
use strake_observe::Result;

use super::{DiskQueue, LiveDisk};
use crate::{Access, Completion, Event, Image, ImageQueue, Operation, Request};

/// Long enough for any machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// An image that does everything at once.
#[derive(Debug)]
struct Instantly;

#[derive(Debug)]
struct InstantQueue {
    ended: Vec<u64>,
    event: Arc<Event>,
}

impl Image for Instantly {
    fn path(&self) -> &str {
        "instant.raw"
    }

    fn size(&self) -> u64 {
        1 << 30
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn open_queue(&self, _depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        Ok(Box::new(InstantQueue {
            ended: Vec::new(),
            event: Arc::clone(event),
        }))
    }

    fn read_at(&self, _offset: u64, _data: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self, _from: u64) -> Result<Option<Range<u64>>> {
        Ok(None)
    }

    fn is_removed(&self) -> Result<bool> {
        Ok(false)
    }
}

impl ImageQueue for InstantQueue {
    fn submit(&mut self, request: Request) {
        self.ended.push(request.tag);
        self.event.signal();
    }

    fn push(&mut self) -> Result<()> {
        Ok(())
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        for tag in self.ended.drain(..) {
            done(Completion {
                tag,
                result: Ok(()),
            });
        }
    }

    fn in_flight(&self) -> usize {
        self.ended.len()
    }
}

fn iops(iops: u64) -> DiskLimits {
    DiskLimits {
        iops: Some(iops),
        bandwidth: None,
    }
}

fn submit(queue: &mut DiskQueue, count: u64) {
    for tag in 0..count {
        queue.submit(Request {
            tag,
            op: Operation::Discard { len: 512 },
            offset: tag * 512,
            buffers: Vec::new(),
        });
    }
    queue.push().unwrap();
}

/// What a worker does, until `count` more have ended.
fn run(queue: &mut DiskQueue, count: usize) {
    let (mut ended, until) = (0, Instant::now() + PATIENCE);
    while ended < count {
        queue
            .reap(&mut |_, result| {
                result.unwrap();
                ended += 1;
            })
            .unwrap();
        if ended < count {
            assert!(Instant::now() < until, "only {ended} of {count} ended");
            let _ = queue.shared_event().wait(Duration::from_secs(1));
        }
    }
}

#[test]
fn a_limited_disk_takes_its_time_and_wakes_its_queue() {
    let disk = LiveDisk::new("root", Arc::new(Instantly));
    disk.set_limits(iops(50)).unwrap();
    let mut queue = disk.queue(64).unwrap();
    let start = Instant::now();
    submit(&mut queue, 25);
    run(&mut queue, 25);
    // A burst of 5 and one more at once, the others 20 ms apart.
    assert!(start.elapsed() >= Duration::from_millis(19 * 20));
    assert_eq!(disk.counters().discards, 25);
}

#[test]
fn other_limits_hold_at_once() {
    let disk = LiveDisk::new("root", Arc::new(Instantly));
    disk.set_limits(iops(10)).unwrap();
    let mut queue = disk.queue(1024).unwrap();
    // At this rate they would take 100 seconds.
    submit(&mut queue, 1000);
    assert!(queue.in_flight() > 900);
    disk.set_limits(DiskLimits::default()).unwrap();
    assert_eq!(disk.limits(), DiskLimits::default());
    run(&mut queue, 1000);
    submit(&mut queue, 1000);
    run(&mut queue, 1000);
}

#[test]
fn who_waits_for_a_limit_holds_up_neither_a_switch_over_nor_the_end() {
    let disk = LiveDisk::new("root", Arc::new(Instantly));
    disk.set_limits(iops(10)).unwrap();
    let mut queue = disk.queue(1024).unwrap();
    submit(&mut queue, 1000);
    queue.reap(&mut |_, _| {}).unwrap();
    let left = queue.in_flight();
    assert!(left > 900);
    disk.close();
    assert!(disk.drained(Duration::from_secs(1)));
    disk.resume();
    queue.hurry(true);
    run(&mut queue, left);
}
