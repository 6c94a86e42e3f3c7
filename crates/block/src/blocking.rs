//! One request at a time, waited for. For tests, tools and set-up; never for a guest.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use strake_observe::Result;

use crate::{Buffer, Event, Image, ImageQueue, Operation, Request, RingBroken};

/// How long one wait for a completion lasts before the queue is looked at again. The event tells
/// of each completion; this only bounds the harm of one that got lost.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// A queue on an image whose calls return when the request has ended.
#[derive(Debug)]
pub struct Blocking {
    /// None once the engine broke: dropping it waited for what was in flight, so no memory of a
    /// caller is touched afterwards.
    queue: Option<Box<dyn ImageQueue>>,
    path: String,
    event: Arc<Event>,
}

impl Blocking {
    /// On `image`.
    ///
    /// # Errors
    /// When the host's I/O engine cannot be set up.
    pub fn new(image: &dyn Image) -> Result<Self> {
        let event = Arc::new(Event::new()?);
        let queue = image.open_queue(1, &event)?;
        Ok(Self {
            queue: Some(queue),
            path: image.path().to_owned(),
            event,
        })
    }

    /// Reads `data.len()` bytes from `offset`.
    ///
    /// # Errors
    /// When the range is not within the image or the device fails.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<()> {
        // SAFETY: `data` is borrowed until the request has ended.
        let buffer = unsafe { Buffer::new(data.as_mut_ptr(), data.len()) };
        self.run(Operation::Read, offset, vec![buffer])
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// When the range is not within the image or the device fails.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        // SAFETY: `data` is borrowed until the request has ended, and a write only reads it.
        let buffer = unsafe { Buffer::new(data.as_ptr().cast_mut(), data.len()) };
        self.run(Operation::Write, offset, vec![buffer])
    }

    /// Any request without buffers.
    ///
    /// # Errors
    /// When the range is not within the image or the device fails.
    pub fn operate(&mut self, op: Operation, offset: u64) -> Result<()> {
        self.run(op, offset, Vec::new())
    }

    fn run(&mut self, op: Operation, offset: u64, buffers: Vec<Buffer>) -> Result<()> {
        let Some(queue) = self.queue.as_mut() else {
            return Err(RingBroken {
                path: self.path.clone(),
            }
            .into());
        };
        queue.submit(Request {
            tag: 0,
            op,
            offset,
            buffers,
        });
        let mut ended = None;
        loop {
            // What was submitted, and what the last reap left to be gone on with.
            if let Err(seen) = queue.push() {
                self.queue = None;
                return Err(seen);
            }
            let _ = self.event.wait(LOOK_AGAIN);
            self.event.clear();
            queue.reap(&mut |completion| ended = Some(completion.result));
            if let Some(result) = ended {
                return result;
            }
        }
    }
}
