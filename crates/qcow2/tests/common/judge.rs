//! A guest on files that log their writes by one clock, and what it may find after a crash.
#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use strake_block::{
    Access, Buffer, DiskQueue, Event, Image, ImageQueue, LiveDisk, Operation, Request,
};
use strake_observe::Result;
use strake_qcow2::Store;

use crate::common::read_all;
use crate::log::{Clock, LogStore, next};

pub const SECTORS: u64 = 3000;

pub fn sector(stamp: u32) -> Vec<u8> {
    stamp.to_le_bytes().repeat(128)
}

fn stamp(sector: &[u8]) -> u32 {
    let first = u32::from_le_bytes(sector[..4].try_into().unwrap());
    let same = sector.chunks(4).all(|it| it == first.to_le_bytes());
    assert!(same, "a torn sector");
    first
}

pub fn stamps(image: &dyn Image) -> Vec<u32> {
    read_all(image).chunks(512).map(stamp).collect()
}

/// A raw image in memory.
#[derive(Debug)]
pub struct LogImage(pub LogStore);

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
pub struct Told {
    /// Of each sector: what was written to it, and when that began.
    pub written: Vec<Vec<(u64, u32)>>,
    /// When a flush began, when it had ended, and what every sector was when it began.
    pub flushed: Vec<(u64, u64, Vec<u32>)>,
}

impl Told {
    /// Whether this may be the disk after a crash at that time.
    pub fn judge(&self, time: u64, found: &[u32]) {
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

pub struct Guest {
    queue: DiskQueue,
    clock: Clock,
    pub told: Arc<Mutex<Told>>,
    now: Vec<u32>,
    random: u64,
    last: u32,
}

impl Guest {
    /// One whose disk is what it is, durably.
    pub fn new(disk: &Arc<LiveDisk>, clock: &Clock, seed: u64) -> Self {
        let now = stamps(disk.image().as_ref());
        let told = Told {
            written: vec![Vec::new(); SECTORS as usize],
            flushed: vec![(clock.tick(), clock.tick(), now.clone())],
        };
        Self {
            queue: disk.queue(32).unwrap(),
            clock: clock.clone(),
            told: Arc::new(Mutex::new(told)),
            now,
            random: seed,
            last: 0,
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        next(&mut self.random) % below
    }

    /// Some requests at once, about different sectors.
    pub fn round(&mut self) {
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

    pub fn flush(&mut self) {
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

    pub fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            self.round();
            if self.random(3) == 0 {
                self.flush();
            }
        }
        self.flush();
    }
}
