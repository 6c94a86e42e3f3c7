//! A store in memory whose writes are logged, with a volatile cache: what a crash at any moment
//! leaves is made from the log.
#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use strake_block::{Completion, Event, ImageQueue, Operation, Request};
use strake_observe::Result;
use strake_qcow2::Store;

#[derive(Debug, Clone)]
pub enum Logged {
    Write {
        at: u64,
        data: Vec<u8>,
    },
    Zero {
        at: u64,
        len: u64,
    },
    Len(u64),
    /// Everything before it is durable.
    Sync,
}

/// Ticks with every change of every log that has it: one order for all of them.
#[derive(Debug, Clone, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    pub fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

#[derive(Debug, Default)]
pub struct Log {
    pub now: Vec<u8>,
    pub ops: Vec<Logged>,
    /// When each of them was, by a clock that several logs may share.
    pub times: Vec<u64>,
    pub clock: Clock,
    /// What the log began with.
    pub first: Vec<u8>,
    random: u64,
    /// How many of a hundred changes fail.
    pub failing: u64,
}

#[derive(Debug, Clone, Default)]
pub struct LogStore(pub Arc<Mutex<Log>>);

pub fn next(random: &mut u64) -> u64 {
    *random = random
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *random >> 33
}

fn apply(bytes: &mut Vec<u8>, at: u64, data: &[u8]) {
    let at = usize::try_from(at).unwrap();
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

impl Log {
    /// Whether the next change fails.
    fn fails(&mut self) -> Result<()> {
        if self.failing > 0 && next(&mut self.random) % 100 < self.failing {
            return Err(std::io::Error::from_raw_os_error(5).into());
        }
        Ok(())
    }

    fn run(&mut self, op: Logged) {
        match &op {
            Logged::Write { at, data } => apply(&mut self.now, *at, data),
            Logged::Zero { at, len } => {
                let at = usize::try_from(*at).unwrap().min(self.now.len());
                let end = (at + usize::try_from(*len).unwrap()).min(self.now.len());
                self.now[at..end].fill(0);
            }
            Logged::Len(len) => self.now.resize(usize::try_from(*len).unwrap(), 0),
            Logged::Sync => {}
        }
        self.ops.push(op);
        self.times.push(self.clock.tick());
    }

    /// How many operations there had been at that time.
    pub fn position_at(&self, time: u64) -> usize {
        self.times.partition_point(|it| *it <= time)
    }

    /// What is there after a crash at that place of the log: everything up to the last sync, and
    /// of what came later any sectors.
    pub fn crash(&self, at: usize, seed: u64) -> Vec<u8> {
        let mut random = seed;
        let sync = self.ops[..at]
            .iter()
            .rposition(|op| matches!(op, Logged::Sync))
            .map_or(0, |sync| sync + 1);
        let mut bytes = self.first.clone();
        // All, none or some of it.
        let odds = [0, 100, 50, 10, 90][usize::try_from(seed % 5).unwrap()];
        for (number, op) in self.ops[..at].iter().enumerate() {
            let sure = number < sync;
            let mut keep = || sure || next(&mut random) % 100 < odds;
            match op {
                Logged::Write { at, data } => {
                    for (sector, data) in data.chunks(512).enumerate() {
                        if keep() {
                            apply(&mut bytes, at + sector as u64 * 512, data);
                        }
                    }
                }
                Logged::Zero { at, len } => {
                    if keep() {
                        let at = usize::try_from(*at).unwrap().min(bytes.len());
                        let end = (at + usize::try_from(*len).unwrap()).min(bytes.len());
                        bytes[at..end].fill(0);
                    }
                }
                // A length that was not made durable comes with the data or not at all; shorter
                // ones only with a sync, as a journal does it.
                Logged::Len(len) => {
                    let len = usize::try_from(*len).unwrap();
                    if keep() {
                        bytes.resize(len, 0);
                    }
                }
                Logged::Sync => {}
            }
        }
        bytes
    }
}

impl LogStore {
    pub fn holding(bytes: Vec<u8>, random: u64) -> Self {
        Self(Arc::new(Mutex::new(Log {
            now: bytes.clone(),
            first: bytes,
            random,
            ..Log::default()
        })))
    }

    /// The same, by a clock of others.
    pub fn by(self, clock: &Clock) -> Self {
        self.0.lock().unwrap().clock = clock.clone();
        self
    }

    pub fn position(&self) -> usize {
        self.0.lock().unwrap().ops.len()
    }
}

impl Store for LogStore {
    fn path(&self) -> &str {
        "memory"
    }

    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().unwrap().now.len() as u64)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.0.lock().unwrap().run(Logged::Len(len));
        Ok(())
    }

    fn grows(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let log = self.0.lock().unwrap();
        let at = usize::try_from(offset).unwrap().min(log.now.len());
        let there = &log.now[at..(at + data.len()).min(log.now.len())];
        data[..there.len()].copy_from_slice(there);
        data[there.len()..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let data = data.to_vec();
        self.0.lock().unwrap().fails()?;
        self.0
            .lock()
            .unwrap()
            .run(Logged::Write { at: offset, data });
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.0.lock().unwrap().fails()?;
        self.0.lock().unwrap().run(Logged::Sync);
        Ok(())
    }

    fn release(&self, range: Range<u64>) {
        let (at, len) = (range.start, range.end - range.start);
        self.0.lock().unwrap().run(Logged::Zero { at, len });
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((from < len).then_some(from..len))
    }

    fn block_bytes(&self) -> u64 {
        512
    }

    fn open_queue(&self, _depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        Ok(Box::new(LogQueue {
            store: self.clone(),
            event: Arc::clone(event),
            waiting: Vec::new(),
            ended: Vec::new(),
        }))
    }

    fn is_removed(&self) -> Result<bool> {
        Ok(false)
    }
}

/// Runs its requests in any order, and not all at once.
#[derive(Debug)]
struct LogQueue {
    store: LogStore,
    event: Arc<Event>,
    waiting: Vec<Request>,
    ended: Vec<(u64, Result<()>)>,
}

impl LogQueue {
    fn run(&mut self, request: &Request) {
        let mut log = self.store.0.lock().unwrap();
        let mut at = usize::try_from(request.offset).unwrap();
        if let Err(failed) = log.fails() {
            self.ended.push((request.tag, Err(failed)));
            return;
        }
        match request.op {
            Operation::Read => {
                for buffer in &request.buffers {
                    assert!(at + buffer.len() <= log.now.len(), "a read past the end");
                    buffer.copy_from(&log.now[at..at + buffer.len()]);
                    at += buffer.len();
                }
            }
            Operation::Write => {
                let mut data = vec![0; usize::try_from(request.len()).unwrap()];
                let mut rest = &mut data[..];
                for buffer in &request.buffers {
                    let count = buffer.copy_to(rest);
                    rest = &mut rest[count..];
                }
                log.run(Logged::Write {
                    at: request.offset,
                    data,
                });
            }
            Operation::Flush => log.run(Logged::Sync),
            Operation::Discard { len } | Operation::WriteZeroes { len, .. } => {
                log.run(Logged::Zero {
                    at: request.offset,
                    len,
                });
            }
        }
        self.ended.push((request.tag, Ok(())));
    }
}

impl ImageQueue for LogQueue {
    fn submit(&mut self, request: Request) {
        self.waiting.push(request);
    }

    fn push(&mut self) -> Result<()> {
        let mut random = {
            let mut log = self.store.0.lock().unwrap();
            next(&mut log.random);
            log.random
        };
        let mut left = Vec::new();
        while !self.waiting.is_empty() {
            let pick = usize::try_from(next(&mut random)).unwrap() % self.waiting.len();
            let request = self.waiting.swap_remove(pick);
            if next(&mut random).is_multiple_of(3) {
                left.push(request);
            } else {
                self.run(&request);
            }
        }
        self.waiting = left;
        if !self.waiting.is_empty() || !self.ended.is_empty() {
            self.event.signal();
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        for (tag, result) in self.ended.drain(..) {
            done(Completion { tag, result });
        }
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.ended.len()
    }
}

impl Drop for LogQueue {
    fn drop(&mut self) {
        for request in std::mem::take(&mut self.waiting) {
            self.run(&request);
        }
    }
}
