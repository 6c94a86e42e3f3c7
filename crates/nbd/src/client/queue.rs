//! A disk's queue on an export.
//!
//! A request that is larger than the server takes at once goes in parts; it has ended when all of
//! them have.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::{
    Access, BadRequest, Buffer, Completion, Event, FlushFailed, ImageQueue, Operation, ReadFailed,
    ReadOnlyDisk, Request, SECTOR_BYTES, WriteFailed,
};
use strake_observe::{Observation, Result};

use super::asks::{Ask, Failure, Mailbox, To};
use super::link::Link;
use crate::memory::Scattered;
use crate::protocol::transmission::{command, command_flag};

/// The most data of one request to a server: larger ones gain nothing and let others wait.
const DATA_PART: u64 = 4 * 1024 * 1024;

/// The most bytes that are discarded or zeroed by one request to a server.
const RANGE_PART: u64 = 256 * 1024 * 1024;

/// How long the drop of a queue waits for the server before it gives the connection up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What zeroes are written from where a server cannot write zeroes itself.
static ZEROES: [u8; 256 * 1024] = [0; 256 * 1024];

/// How a server makes writes durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flushing {
    /// By FLUSH.
    Flush,
    /// Each write by itself (FUA): it has no FLUSH.
    EachWrite,
    /// There is nothing to flush: the export is only read.
    Never,
}

/// What the server does; the same for all queues.
#[derive(Debug, Clone)]
pub(super) struct Export {
    pub(super) path: String,
    pub(super) size: u64,
    pub(super) access: Access,
    /// The largest payload of the server.
    pub(super) maximum: u32,
    pub(super) flushing: Flushing,
    pub(super) trims: bool,
    pub(super) zeroes: bool,
}

impl Export {
    pub(super) fn bad_request(&self, op: Operation, offset: u64, length: u64) -> Observation {
        BadRequest {
            path: self.path.clone(),
            operation: op.name().to_owned(),
            offset,
            length,
            size: self.size,
        }
        .into()
    }

    fn check(&self, request: &Request) -> Result<()> {
        let (offset, len) = (request.offset, request.len());
        let within = offset.checked_add(len).is_some_and(|end| end <= self.size);
        let sectors = offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        if request.op != Operation::Flush && !(within && sectors) {
            return Err(self.bad_request(request.op, offset, len));
        }
        if request.op.changes() && self.access == Access::ReadOnly {
            return Err(ReadOnlyDisk {
                path: self.path.clone(),
                operation: request.op.name().to_owned(),
            }
            .into());
        }
        Ok(())
    }

    /// The most bytes of one part.
    fn part(&self, op: Operation) -> u64 {
        let payload = u64::from(self.maximum).min(DATA_PART);
        let payload = (payload - payload % SECTOR_BYTES).max(SECTOR_BYTES);
        match op {
            Operation::Read | Operation::Write => payload,
            Operation::WriteZeroes { .. } if !self.zeroes => payload.min(ZEROES.len() as u64),
            Operation::Flush | Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
                RANGE_PART
            }
        }
    }

    /// Whether there is nothing to ask the server for.
    fn is_void(&self, request: &Request) -> bool {
        match request.op {
            Operation::Flush => self.flushing != Flushing::Flush,
            // A hint that the server does not take.
            Operation::Discard { .. } if !self.trims => true,
            _ => request.is_empty(),
        }
    }

    fn failed(&self, job: &Job, failure: Failure) -> Observation {
        let (path, offset, length, errno) =
            (self.path.clone(), job.offset, job.length, failure.errno);
        let advice = match errno {
            28 => "free space on the server's storage, or make its export larger",
            1 => "let the server export it for writing",
            _ => "do what the cause below asks for",
        };
        let advice = advice.to_owned();
        let own: Observation = match job.op {
            Operation::Read => ReadFailed {
                path,
                offset,
                length,
                errno,
                advice,
            }
            .into(),
            Operation::Flush => FlushFailed {
                path,
                errno,
                advice,
            }
            .into(),
            op => WriteFailed {
                path,
                operation: op.name().to_owned(),
                offset,
                length,
                errno,
                advice,
            }
            .into(),
        };
        own.because(failure.seen)
    }
}

/// A disk's request.
#[derive(Debug)]
struct Job {
    tag: u64,
    op: Operation,
    offset: u64,
    length: u64,
    memory: Scattered,
    /// How much of it was asked for, and whether all of it was.
    asked: u64,
    all_asked: bool,
    /// How many parts are at the server.
    parts: usize,
    failure: Option<Failure>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct NbdQueue {
    export: Arc<Export>,
    link: Arc<Link>,
    mailbox: Arc<Mailbox>,
    depth: usize,
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs with parts to be asked for, in the order in which they came.
    ready: VecDeque<usize>,
    /// Parts at the server.
    at_server: usize,
    ended: VecDeque<Completion>,
    asks: Vec<Ask>,
}

impl NbdQueue {
    pub(super) fn new(
        export: &Arc<Export>,
        link: &Arc<Link>,
        depth: u32,
        event: &Arc<Event>,
    ) -> Self {
        Self {
            export: Arc::clone(export),
            link: Arc::clone(link),
            mailbox: Mailbox::new(event),
            depth: usize::try_from(depth).unwrap_or(1).max(1),
            jobs: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            at_server: 0,
            ended: VecDeque::new(),
            asks: Vec::new(),
        }
    }

    fn end(&mut self, tag: u64, result: Result<()>) {
        self.ended.push_back(Completion { tag, result });
    }

    /// The next part of a job.
    fn ask(&mut self, index: usize) {
        let Some(job) = self.jobs.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        let length = (job.length - job.asked).min(self.export.part(job.op));
        let skip = usize::try_from(job.asked).unwrap_or(usize::MAX);
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        let durable = match self.export.flushing {
            Flushing::EachWrite => command_flag::FUA,
            Flushing::Flush | Flushing::Never => 0,
        };
        let none = Scattered::default();
        let (command, flags, memory) = match job.op {
            Operation::Read => (command::READ, 0, job.memory.part(skip, count)),
            Operation::Write => (command::WRITE, durable, job.memory.part(skip, count)),
            Operation::Flush => (command::FLUSH, 0, none),
            Operation::Discard { .. } => (command::TRIM, 0, none),
            Operation::WriteZeroes { unmap, .. } if self.export.zeroes => {
                let hole = if unmap { 0 } else { command_flag::NO_HOLE };
                (command::WRITE_ZEROES, durable | hole, none)
            }
            Operation::WriteZeroes { .. } => {
                let start = ZEROES.as_ptr().cast_mut();
                // SAFETY: the memory is there for ever, and a write only reads it; a part is never
                // longer than it.
                let zeroes = unsafe { Buffer::new(start, count.min(ZEROES.len())) };
                (command::WRITE, durable, Scattered::new(vec![zeroes]))
            }
        };
        self.asks.push(Ask {
            command,
            flags,
            offset: match job.op {
                Operation::Flush => 0,
                _ => job.offset + job.asked,
            },
            length: u32::try_from(length).unwrap_or(0),
            memory,
            to: To::Queue(Arc::clone(&self.mailbox), index),
        });
        job.asked += length;
        job.all_asked = job.asked == job.length;
        job.parts += 1;
        self.at_server += 1;
    }

    /// A part has ended.
    fn part_ended(&mut self, index: usize, result: std::result::Result<(), Failure>) {
        self.at_server = self.at_server.saturating_sub(1);
        let Some(place) = self.jobs.get_mut(index) else {
            return;
        };
        let Some(job) = place.as_mut() else {
            return;
        };
        job.parts = job.parts.saturating_sub(1);
        if let Err(failure) = result {
            job.failure.get_or_insert(failure);
            // The rest would be for nothing.
            job.all_asked = true;
        }
        if job.parts > 0 || !job.all_asked {
            return;
        }
        if let Some(mut job) = place.take() {
            self.free.push(index);
            self.ready.retain(|waiting| *waiting != index);
            let result = match job.failure.take() {
                Some(failure) => Err(self.export.failed(&job, failure)),
                None => Ok(()),
            };
            self.end(job.tag, result);
        }
    }

    fn collect(&mut self) {
        for (index, result) in self.mailbox.take() {
            self.part_ended(index, result);
        }
    }
}

impl ImageQueue for NbdQueue {
    fn submit(&mut self, request: Request) {
        let checked = self.export.check(&request);
        if checked.is_err() || self.export.is_void(&request) {
            self.end(request.tag, checked);
            self.mailbox.event().signal();
            return;
        }
        let length = request.len();
        let job = Job {
            tag: request.tag,
            op: request.op,
            offset: request.offset,
            length,
            memory: Scattered::new(request.buffers),
            asked: 0,
            all_asked: false,
            parts: 0,
            failure: None,
        };
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.jobs.push(None);
                self.jobs.len() - 1
            }
        };
        if let Some(place) = self.jobs.get_mut(index) {
            *place = Some(job);
        }
        self.ready.push_back(index);
    }

    fn push(&mut self) -> Result<()> {
        while self.at_server < self.depth {
            let Some(index) = self.ready.front().copied() else {
                break;
            };
            let job = self.jobs.get(index).and_then(Option::as_ref);
            if job.is_none_or(|job| job.all_asked) {
                self.ready.pop_front();
                continue;
            }
            self.ask(index);
        }
        if !self.asks.is_empty() {
            self.link.send(&mut self.asks);
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        self.collect();
        while let Some(completion) = self.ended.pop_front() {
            done(completion);
        }
    }

    fn in_flight(&self) -> usize {
        self.jobs.len() - self.free.len() + self.ended.len()
    }
}

impl Drop for NbdQueue {
    /// Waits for what is at the server, whose replies would be written to the disk's memory.
    fn drop(&mut self) {
        let began = Instant::now();
        let mut gave_up = false;
        self.collect();
        while self.at_server > 0 {
            if !gave_up && began.elapsed() > PATIENCE {
                self.link.give_up("the server does not answer");
                gave_up = true;
            }
            let _ = self.mailbox.event().wait(Duration::from_millis(50));
            self.mailbox.event().clear();
            self.collect();
        }
    }
}
