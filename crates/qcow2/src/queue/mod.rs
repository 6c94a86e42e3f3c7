//! Requests on their way: each is cut into parts, each part goes to the queue of a layer's file.
//!
//! A part is planned under the lock of the layer that it changes (`plan`), and from then on is the
//! business of this queue alone. A request whose next part must wait for somebody else's (a cluster
//! that is being allocated, a flush) is parked; the event brings its owner back.
//!
//! A write to clusters that the image does not have for itself yet is a *move* (`moves`).

mod moves;
mod slab;

use std::collections::VecDeque;
use std::sync::Arc;

use strake_block::{
    Access, BadRequest, Buffer, Completion, Event, ImageQueue, Operation, ReadOnlyDisk, Request,
    SECTOR_BYTES,
};
use strake_observe::{Observation, Result};

use self::moves::Move;
use self::slab::Slab;
use crate::flush::{FlushRun, Next};
use crate::image::Shared;
use crate::layer::{Layer, Place, is_zero, read_place, resolve};
use crate::memory::{Memory, clear, fill, part};
use crate::num::us;
use crate::plan::{WritePlan, ZeroPlan};
use crate::state::Epoch;

/// Steps of one request before the others have their turn: a discard of a whole disk is many.
const MAX_STEPS: u32 = 64;

/// Requests at the kernel at once, at least: one of the guest may be several.
const LEAST_DEPTH: u32 = 8;

/// A queue on a chain.
#[derive(Debug)]
pub(crate) struct Queue {
    /// Dropped first: it waits for what is in flight, which uses everything else.
    links: Vec<Link>,
    shared: Arc<Shared>,
    event: Arc<Event>,
    depth: u32,
    jobs: Slab<Job>,
    parts: Slab<Part>,
    moves: Slab<Move>,
    ready: VecDeque<usize>,
    parked: VecDeque<usize>,
    ended: VecDeque<Completion>,
    /// The compressed cluster that was read last.
    unpacked: Option<(Layer, u64, Vec<u8>)>,
}

#[derive(Debug)]
struct Link {
    layer: Layer,
    queue: Box<dyn ImageQueue>,
}

#[derive(Debug)]
struct Job {
    request: Request,
    len: u64,
    /// What is planned.
    cursor: u64,
    /// Parts in flight.
    flying: usize,
    failed: Option<Observation>,
    flush: Option<FlushRun>,
    planned: bool,
}

/// What a request to a layer's queue is for.
#[derive(Debug)]
enum Part {
    /// A part of a job that needs nothing afterwards. The epoch and the memory are only kept.
    Straight {
        job: usize,
        _epoch: Epoch,
        _memory: Option<Memory>,
    },
    /// What is around a move's data.
    Around {
        of: usize,
        _epoch: Epoch,
    },
    /// The content of a move.
    Content {
        of: usize,
    },
    Sync {
        job: usize,
    },
}

/// What a step of a job came to.
enum Step {
    On,
    Wait,
    Planned,
}

/// What a write takes its bytes from.
enum Source {
    Guest,
    Zeroes,
}

impl Queue {
    pub(crate) fn new(shared: &Arc<Shared>, depth: u32, event: &Arc<Event>) -> Result<Self> {
        let mut queue = Self {
            links: Vec::new(),
            shared: Arc::clone(shared),
            event: Arc::clone(event),
            depth: depth.saturating_mul(2).max(LEAST_DEPTH),
            jobs: Slab::default(),
            parts: Slab::default(),
            moves: Slab::default(),
            ready: VecDeque::new(),
            parked: VecDeque::new(),
            ended: VecDeque::new(),
            unpacked: None,
        };
        // The one that every queue needs: its failure is told here and not to a guest.
        let top = Layer::Qcow(Arc::clone(&shared.top));
        queue.link(&top)?;
        Ok(queue)
    }

    fn link(&mut self, layer: &Layer) -> Result<&mut Box<dyn ImageQueue>> {
        let known = self.links.iter().position(|link| link.layer.same(layer));
        let at = match known {
            Some(at) => at,
            None => {
                let queue = layer.store().open_queue(self.depth, &self.event)?;
                let layer = layer.clone();
                self.links.push(Link { layer, queue });
                self.links.len() - 1
            }
        };
        match self.links.get_mut(at) {
            Some(link) => Ok(&mut link.queue),
            None => unreachable!("it was just found or pushed"),
        }
    }

    fn check(&self, request: &Request) -> Result<()> {
        let len = request.len();
        if request.op.changes() && self.shared.top.access == Access::ReadOnly {
            return Err(ReadOnlyDisk {
                path: self.shared.path.clone(),
                operation: request.op.name().to_owned(),
            }
            .into());
        }
        let size = self.shared.top.size();
        let sectors =
            request.offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
        let inside = request
            .offset
            .checked_add(len)
            .is_some_and(|end| end <= size);
        if request.op != Operation::Flush && !(sectors && inside) {
            return Err(BadRequest {
                path: self.shared.path.clone(),
                operation: request.op.name().to_owned(),
                offset: request.offset,
                length: len,
                size,
            }
            .into());
        }
        Ok(())
    }

    /// Hands a request to the queue of a layer's file.
    fn hand(
        &mut self,
        layer: &Layer,
        what: Part,
        op: Operation,
        (offset, buffers): (u64, Vec<Buffer>),
    ) -> Result<()> {
        self.link(layer)?;
        let tag = self.parts.insert(what) as u64;
        self.link(layer)?.submit(Request {
            tag,
            op,
            offset,
            buffers,
        });
        Ok(())
    }

    /// Plans a job as far as it goes.
    fn advance(&mut self, index: usize) {
        let Some(mut job) = self.jobs.take(index) else {
            return;
        };
        let mut steps = 0;
        while !job.planned {
            match self.step(index, &mut job) {
                Ok(Step::On) => {}
                Ok(Step::Planned) => job.planned = true,
                Ok(Step::Wait) => {
                    self.parked.push_back(index);
                    break;
                }
                Err(seen) => {
                    job.failed.get_or_insert(seen);
                    job.flush = None;
                    job.planned = true;
                }
            }
            steps += 1;
            if steps >= MAX_STEPS && !job.planned {
                self.parked.push_back(index);
                self.event.signal();
                break;
            }
        }
        self.jobs.put_back(index, job);
        self.finish_if_ended(index);
    }

    fn finish_if_ended(&mut self, index: usize) {
        let ended = self
            .jobs
            .get(index)
            .is_some_and(|job| job.planned && job.flying == 0);
        if !ended {
            return;
        }
        if let Some(job) = self.jobs.remove(index) {
            self.ended.push_back(Completion {
                tag: job.request.tag,
                result: match job.failed {
                    Some(seen) => Err(seen),
                    None => Ok(()),
                },
            });
        }
    }

    fn step(&mut self, index: usize, job: &mut Job) -> Result<Step> {
        if job.request.op == Operation::Flush {
            return self.step_flush(index, job);
        }
        if job.cursor >= job.len {
            return Ok(Step::Planned);
        }
        if job.request.op.changes() {
            let top = Arc::clone(&self.shared.top);
            let mut state = top.lock();
            if state.is_crowded() {
                if state.flushing {
                    state.wait_for(&self.event);
                    return Ok(Step::Wait);
                }
                drop(state);
                top.flush()?;
            }
        }
        match job.request.op {
            Operation::Read => self.step_read(index, job),
            Operation::Write => {
                let len = job.len - job.cursor;
                self.step_write(index, job, len, Source::Guest)
            }
            Operation::Discard { .. } => self.step_zero(index, job, true, true),
            Operation::WriteZeroes { unmap, .. } => self.step_zero(index, job, unmap, false),
            Operation::Flush => Ok(Step::Planned),
        }
    }

    fn step_flush(&mut self, index: usize, job: &mut Job) -> Result<Step> {
        let top = Arc::clone(&self.shared.top);
        if top.access == Access::ReadOnly || job.failed.is_some() {
            return Ok(Step::Planned);
        }
        if job.flying > 0 {
            return Ok(Step::Wait);
        }
        if job.flush.is_none() {
            job.flush = FlushRun::begin(&top)?;
        }
        let Some(run) = job.flush.as_mut() else {
            let mut state = top.lock();
            // It may have ended just now.
            if !state.flushing {
                return Ok(Step::On);
            }
            state.wait_for(&self.event);
            return Ok(Step::Wait);
        };
        if run.step()? == Next::Done {
            return Ok(Step::Planned);
        }
        let layer = Layer::Qcow(top);
        let what = Part::Sync { job: index };
        self.hand(&layer, what, Operation::Flush, (0, Vec::new()))?;
        job.flying += 1;
        // Not parked: the end of the sync brings it back.
        Ok(Step::Wait)
    }

    fn step_read(&mut self, index: usize, job: &mut Job) -> Result<Step> {
        let layers = self.shared.layers();
        let offset = job.request.offset + job.cursor;
        let (place, len) = resolve(&layers, 0, offset, job.len - job.cursor)?;
        let buffers = part(&job.request.buffers, job.cursor, len);
        match place {
            Place::Zero => clear(&buffers),
            Place::Data { layer, host, epoch } => {
                if let Some(layer) = layers.get(layer) {
                    let what = Part::Straight {
                        job: index,
                        _epoch: epoch,
                        _memory: None,
                    };
                    self.hand(layer, what, Operation::Read, (host, buffers))?;
                    job.flying += 1;
                }
            }
            other => fill(&buffers, &self.read_slowly(&layers, &other, len)?),
        }
        job.cursor += len;
        Ok(Step::On)
    }

    /// What no queue can read: compressed clusters and the odd ends of files.
    fn read_slowly(&mut self, layers: &[Layer], place: &Place, len: u64) -> Result<Vec<u8>> {
        let Place::Packed {
            layer,
            host,
            bytes,
            within,
            ..
        } = place
        else {
            let mut data = vec![0; us(len)];
            read_place(layers, place, &mut data)?;
            return Ok(data);
        };
        let Some(Layer::Qcow(qcow)) = layers.get(*layer) else {
            return Ok(vec![0; us(len)]);
        };
        let this = Layer::Qcow(Arc::clone(qcow));
        // A layer that is written may put something else at that place.
        let known = self
            .unpacked
            .as_ref()
            .filter(|_| qcow.access == Access::ReadOnly)
            .filter(|(layer, at, _)| layer.same(&this) && at == host);
        if known.is_none() {
            let cluster = qcow.unpack(*host, *bytes)?;
            self.unpacked = Some((this, *host, cluster));
        }
        let cluster = self.unpacked.as_ref().map(|(.., cluster)| cluster);
        let range = us(*within)..us(*within + len);
        Ok(cluster
            .and_then(|cluster| cluster.get(range))
            .unwrap_or_default()
            .to_vec())
    }

    fn step_write(
        &mut self,
        index: usize,
        job: &mut Job,
        len: u64,
        source: Source,
    ) -> Result<Step> {
        let top = Arc::clone(&self.shared.top);
        let offset = job.request.offset + job.cursor;
        match top.plan_write(offset, len, &self.event)? {
            WritePlan::Wait => return Ok(Step::Wait),
            WritePlan::InPlace { host, len, epoch } => {
                let (memory, buffers) = bytes_of(job, len, source);
                let what = Part::Straight {
                    job: index,
                    _epoch: epoch,
                    _memory: memory,
                };
                let layer = Layer::Qcow(top);
                self.hand(&layer, what, Operation::Write, (host, buffers))?;
                job.cursor += len;
            }
            WritePlan::New(reserved) => {
                let bits = top.cluster_bits;
                let end = (reserved.first + reserved.run.count) << bits;
                let len = len.min(end - offset);
                self.begin_move(index, job, reserved, (len, source))?;
                job.cursor += len;
            }
        }
        job.flying += 1;
        Ok(Step::On)
    }

    fn step_zero(
        &mut self,
        index: usize,
        job: &mut Job,
        give_back: bool,
        hint: bool,
    ) -> Result<Step> {
        let top = Arc::clone(&self.shared.top);
        let layers = self.shared.layers();
        let offset = job.request.offset + job.cursor;
        let len = job.len - job.cursor;
        let below = layers.len() > 1;
        match top.plan_zero((offset, len), (below, give_back, hint), &self.event)? {
            ZeroPlan::Wait => return Ok(Step::Wait),
            ZeroPlan::Done(len) => job.cursor += len,
            ZeroPlan::InPlace { host, len, epoch } => {
                let what = Part::Straight {
                    job: index,
                    _epoch: epoch,
                    _memory: None,
                };
                let op = if hint {
                    // The file system has finer blocks than clusters.
                    Operation::Discard { len }
                } else {
                    Operation::WriteZeroes {
                        len,
                        unmap: give_back,
                    }
                };
                self.hand(&Layer::Qcow(top), what, op, (host, Vec::new()))?;
                job.cursor += len;
                job.flying += 1;
            }
            ZeroPlan::Write(len) => {
                if !is_zero(&layers, 0, offset, len)? {
                    return self.step_write(index, job, len, Source::Zeroes);
                }
                job.cursor += len;
            }
        }
        Ok(Step::On)
    }

    /// A part has ended.
    fn after(&mut self, tag: u64, result: Result<()>) {
        let Some(what) = self.parts.remove(us(tag)) else {
            return;
        };
        match what {
            Part::Straight { job, .. } => self.part_ended(job, result),
            Part::Sync { job } => {
                self.part_ended(job, result);
                self.ready.push_back(job);
            }
            Part::Around { of, .. } => {
                let Some(the_move) = self.moves.get_mut(of) else {
                    return;
                };
                if let Err(seen) = result {
                    the_move.failed.get_or_insert(seen);
                }
                the_move.flying = the_move.flying.saturating_sub(1);
                if the_move.flying == 0
                    && let Some(seen) = self.write_move(of)
                {
                    self.move_ended(of, Err(seen));
                }
            }
            Part::Content { of } => self.move_ended(of, result),
        }
    }

    fn part_ended(&mut self, index: usize, result: Result<()>) {
        if let Some(job) = self.jobs.get_mut(index) {
            job.flying = job.flying.saturating_sub(1);
            if let Err(seen) = result {
                job.failed.get_or_insert(seen);
                job.flush = None;
                job.planned = true;
            }
        }
        self.finish_if_ended(index);
    }
}

/// What a write of `len` bytes takes its bytes from, and the memory if it is not the guest's.
fn bytes_of(job: &Job, len: u64, source: Source) -> (Option<Memory>, Vec<Buffer>) {
    match source {
        Source::Guest => (None, part(&job.request.buffers, job.cursor, len)),
        Source::Zeroes => {
            let memory = Memory::new(us(len));
            let buffer = memory.buffer();
            (Some(memory), vec![buffer])
        }
    }
}

impl ImageQueue for Queue {
    fn submit(&mut self, request: Request) {
        if let Err(seen) = self.check(&request) {
            self.ended.push_back(Completion {
                tag: request.tag,
                result: Err(seen),
            });
            self.event.signal();
            return;
        }
        let len = request.len();
        let index = self.jobs.insert(Job {
            request,
            len,
            cursor: 0,
            flying: 0,
            failed: None,
            flush: None,
            planned: false,
        });
        self.ready.push_back(index);
    }

    fn push(&mut self) -> Result<()> {
        self.ready.extend(self.parked.drain(..));
        while let Some(index) = self.ready.pop_front() {
            self.advance(index);
        }
        if !self.ended.is_empty() {
            // Nothing of theirs was for the kernel to do, so nothing else wakes the owner.
            self.event.signal();
        }
        for link in &mut self.links {
            link.queue.push()?;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        let mut ended = Vec::new();
        for link in &mut self.links {
            link.queue.reap(&mut |completion| ended.push(completion));
        }
        for completion in ended {
            self.after(completion.tag, completion.result);
        }
        while let Some(completion) = self.ended.pop_front() {
            done(completion);
        }
        if self.jobs.is_empty() && self.links.len() > self.shared.layers().len() {
            // Layers that the chain has no longer.
            let layers = self.shared.layers();
            self.links
                .retain(|link| layers.iter().any(|layer| layer.same(&link.layer)));
        }
    }

    fn in_flight(&self) -> usize {
        self.jobs.len() + self.ended.len()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // Each waits for what it has in flight.
        self.links.clear();
        for the_move in self.moves.drain() {
            self.shared.top.unlink(&the_move.reserved);
        }
    }
}
