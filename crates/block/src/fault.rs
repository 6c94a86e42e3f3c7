//! An image that fails or delays requests on purpose.

use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use strake_observe::Result;

use crate::raw::{Failure, failed};
use crate::{Access, Completion, Event, Image, ImageQueue, Operation, Request};

/// Which requests a [`Fault`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultOn {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards and write-zeroes.
    Discard,
    /// Writes, discards and write-zeroes.
    Change,
    /// All of them.
    Any,
}

impl FaultOn {
    fn matches(self, op: Operation) -> bool {
        let discard = matches!(
            op,
            Operation::Discard { .. } | Operation::WriteZeroes { .. }
        );
        match self {
            Self::Read => op == Operation::Read,
            Self::Write => op == Operation::Write,
            Self::Flush => op == Operation::Flush,
            Self::Discard => discard,
            Self::Change => op.changes(),
            Self::Any => true,
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone)]
pub struct Fault {
    /// For which requests.
    pub on: FaultOn,
    /// Only for those that touch this range, if any.
    pub range: Option<Range<u64>>,
    /// So many of them pass unharmed first.
    pub skip: u64,
    /// So many of them are met then; `u64::MAX` for all.
    pub times: u64,
    /// The error number that they fail with; none lets them succeed, after the delay.
    pub errno: Option<i32>,
    /// How long they are held back.
    pub delay: Duration,
}

impl Fault {
    /// Every request of this sort fails with `errno`.
    #[must_use]
    pub fn failing(on: FaultOn, errno: i32) -> Self {
        Self {
            on,
            range: None,
            skip: 0,
            times: u64::MAX,
            errno: Some(errno),
            delay: Duration::ZERO,
        }
    }

    /// Every request of this sort takes `delay` longer.
    #[must_use]
    pub fn delaying(on: FaultOn, delay: Duration) -> Self {
        Self {
            errno: None,
            delay,
            ..Self::failing(on, 0)
        }
    }

    /// The same, after the first `skip` of them.
    #[must_use]
    pub fn after(self, skip: u64) -> Self {
        Self { skip, ..self }
    }

    /// The same, only for requests that touch `range`.
    #[must_use]
    pub fn within(self, range: Range<u64>) -> Self {
        Self {
            range: Some(range),
            ..self
        }
    }
}

/// An image with faults.
#[derive(Debug)]
pub struct FaultImage {
    inner: Arc<dyn Image>,
    plan: Arc<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    faults: Mutex<Vec<Fault>>,
    removed: AtomicBool,
}

/// What a fault does to one request.
struct Verdict {
    errno: Option<i32>,
    delay: Duration,
}

impl Plan {
    fn judge(&self, request: &Request) -> Option<Verdict> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let end = request.offset.saturating_add(request.len());
        for fault in faults.iter_mut() {
            let within = fault
                .range
                .as_ref()
                .is_none_or(|range| range.start < end && request.offset < range.end);
            if !within || !fault.on.matches(request.op) || fault.times == 0 {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            if fault.times != u64::MAX {
                fault.times -= 1;
            }
            return Some(Verdict {
                errno: fault.errno,
                delay: fault.delay,
            });
        }
        None
    }
}

impl FaultImage {
    /// `inner`, without faults as yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Image>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            plan: Arc::new(Plan::default()),
        })
    }

    /// One more fault; the first that matches a request counts.
    pub fn add(&self, fault: Fault) {
        let mut faults = self
            .plan
            .faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        faults.push(fault);
    }

    /// No more faults.
    pub fn clear(&self) {
        let mut faults = self
            .plan
            .faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        faults.clear();
    }

    /// From now on it says that its file was removed.
    pub fn remove(&self) {
        self.plan.removed.store(true, Ordering::Release);
    }
}

impl Image for FaultImage {
    fn path(&self) -> &str {
        self.inner.path()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn access(&self) -> Access {
        self.inner.access()
    }

    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        Ok(Box::new(FaultQueue {
            inner: self.inner.open_queue(depth, event)?,
            plan: Arc::clone(&self.plan),
            path: self.inner.path().to_owned(),
            event: Arc::clone(event),
            held: Vec::new(),
            ended: Vec::new(),
        }))
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, data)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.inner.allocated(from)
    }

    fn is_removed(&self) -> Result<bool> {
        Ok(self.plan.removed.load(Ordering::Acquire) || self.inner.is_removed()?)
    }

    fn as_any(&self) -> Option<&dyn Any> {
        self.inner.as_any()
    }
}

#[derive(Debug)]
struct FaultQueue {
    inner: Box<dyn ImageQueue>,
    plan: Arc<Plan>,
    path: String,
    event: Arc<Event>,
    held: Vec<(Instant, Option<i32>, Request)>,
    ended: Vec<Completion>,
}

impl FaultQueue {
    fn fail(&mut self, request: &Request, errno: i32) {
        self.ended.push(Completion {
            tag: request.tag,
            result: Err(failed(
                request.op,
                &self.path,
                request.offset,
                request.len(),
                Failure::usual(request.op, errno),
            )),
        });
        self.event.signal();
    }

    fn go_on(&mut self, errno: Option<i32>, request: Request) {
        match errno {
            Some(errno) => self.fail(&request, errno),
            None => self.inner.submit(request),
        }
    }
}

impl ImageQueue for FaultQueue {
    fn submit(&mut self, request: Request) {
        let Some(verdict) = self.plan.judge(&request) else {
            self.inner.submit(request);
            return;
        };
        if verdict.delay.is_zero() {
            self.go_on(verdict.errno, request);
            return;
        }
        self.held
            .push((Instant::now() + verdict.delay, verdict.errno, request));
        let event = Arc::clone(&self.event);
        std::thread::spawn(move || {
            std::thread::sleep(verdict.delay);
            event.signal();
        });
    }

    fn push(&mut self) -> Result<()> {
        let now = Instant::now();
        let (due, held) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(|(at, ..)| *at <= now);
        self.held = held;
        for (_, errno, request) in due {
            self.go_on(errno, request);
        }
        self.inner.push()
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        for completion in self.ended.drain(..) {
            done(completion);
        }
        self.inner.reap(done);
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len() + self.ended.len()
    }
}
