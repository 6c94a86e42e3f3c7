//! The requests of a session that are at its export, and the memory that they use.
#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;

use strake_block::{Operation, Request};
use strake_observe::Result;

use crate::export::ExportQueue;
use crate::memory::Pages;

/// What the export does for a client's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// The client's range begins `skip` bytes into the sectors that are read.
    Read {
        skip: usize,
        whole: bool,
    },
    Write,
    Flush,
    Trim,
    WriteZeroes {
        unmap: bool,
    },
}

/// When a change is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// Once the export has it.
    Accepted,
    /// Once it was flushed.
    Durable,
}

/// A request on its way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) cookie: u64,
    pub(super) work: Work,
    pub(super) durability: Durability,
    /// Of the sectors.
    pub(super) offset: u64,
    /// Of the client's range.
    pub(super) length: u32,
    /// As many sectors as the work is about, for reads and writes.
    pub(super) pages: Pages,
}

impl Flight {
    fn operation(&self) -> Operation {
        let len = u64::from(self.length);
        match self.work {
            Work::Read { .. } => Operation::Read,
            Work::Write => Operation::Write,
            Work::Flush => Operation::Flush,
            Work::Trim => Operation::Discard { len },
            Work::WriteZeroes { unmap } => Operation::WriteZeroes { len, unmap },
        }
    }
}

/// The queue is dropped before the flights are, and that waits for what is in flight: so their
/// memory outlives every use of it.
#[derive(Debug)]
pub(super) struct Flights {
    queue: Box<dyn ExportQueue>,
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
    ended: Vec<(usize, Result<()>)>,
}

impl Flights {
    pub(super) fn new(queue: Box<dyn ExportQueue>) -> Self {
        Self {
            queue,
            slots: Vec::new(),
            free: Vec::new(),
            ended: Vec::new(),
        }
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.queue.event()
    }

    pub(super) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Submits a request; [`push`](Self::push) starts it.
    pub(super) fn start(&mut self, mut flight: Flight) {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        let buffers = match flight.work {
            // SAFETY: the flight is kept in its slot, untouched, until it was reaped; if it never
            // is, the queue is dropped before the slots (the order of the fields), which waits for
            // what is in flight.
            Work::Read { .. } | Work::Write => vec![unsafe { flight.pages.buffer() }],
            Work::Flush | Work::Trim | Work::WriteZeroes { .. } => Vec::new(),
        };
        let request = Request {
            tag: slot as u64,
            op: flight.operation(),
            offset: flight.offset,
            buffers,
        };
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(flight);
        }
        self.queue.submit(request);
    }

    pub(super) fn push(&mut self) -> Result<()> {
        self.queue.push()
    }

    /// Hands out the requests that have ended.
    pub(super) fn reap(&mut self, done: &mut dyn FnMut(Flight, Result<()>)) -> Result<()> {
        let ended = &mut self.ended;
        let reaped = self.queue.reap(&mut |tag, result| {
            ended.push((usize::try_from(tag).unwrap_or(usize::MAX), result));
        });
        let mut ended = std::mem::take(&mut self.ended);
        for (slot, result) in ended.drain(..) {
            let Some(place) = self.slots.get_mut(slot) else {
                continue;
            };
            match place {
                Some(flight) if flight.durability == Durability::Durable && result.is_ok() => {
                    // The change has ended, so a flush from now on covers it.
                    flight.durability = Durability::Accepted;
                    self.queue.submit(Request {
                        tag: slot as u64,
                        op: Operation::Flush,
                        offset: 0,
                        buffers: Vec::new(),
                    });
                }
                _ => {
                    if let Some(flight) = place.take() {
                        self.free.push(slot);
                        done(flight, result);
                    }
                }
            }
        }
        self.ended = ended;
        reaped?;
        self.queue.push()
    }
}
