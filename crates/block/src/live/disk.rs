//! The shared side of a live disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use strake_api::control::{DiskCounters, DiskLimits};
use strake_observe::{Observation, Result};

use super::claims::Claims;
use super::latency::Meter;
use super::mirror::{Half, Mirror};
use super::rate::Rate;
use super::{DiskQueue, Gate};
use crate::{Access, DirtyBitmap, Event, Image, ImageQueue, Operation};

/// How many observations of failed requests a disk reports per second. A broken device fails every
/// request; the first few say all there is to say, the counter tells how many there were.
const OBSERVED_PER_SECOND: u32 = 8;

/// What is called with every failed guest request (see [`LiveDisk::set_observer`]).
pub type Observer = Arc<dyn Fn(Observation) + Send + Sync>;

/// What a guest's disk talks to: the image of the moment behind a gate.
pub struct LiveDisk {
    name: String,
    size: u64,
    access: Access,
    pub(super) gate: Gate,
    image: RwLock<Arc<dyn Image>>,
    /// Grows with each replacement of the image. A queue that finds another number than its own
    /// changes over before it starts a request.
    generation: AtomicU64,
    /// Marks what is written while a migration runs. It is looked up when a request has *ended*,
    /// see [`LiveDisk::begin_tracking`].
    tracker: RwLock<Option<Arc<DirtyBitmap>>>,
    /// What a crash may rely on, while a job keeps such claims.
    claims: RwLock<Option<Arc<Claims<Event>>>>,
    /// While changes go to a destination as well.
    mirror: Mutex<Option<Arc<Mirror>>>,
    queues: Mutex<Vec<Weak<QueueShared>>>,
    observer: Mutex<Option<Observer>>,
    observed: Mutex<(Option<Instant>, u32)>,
    /// Whether a migration has the disk; there is one at a time.
    migrating: Mutex<bool>,
    pub(super) counters: Counters,
    pub(super) rate: Rate,
    pub(super) latency: Meter,
}

/// What a queue shares with whoever replaces the image.
#[derive(Debug)]
pub(super) struct QueueShared {
    pub(super) event: Arc<Event>,
    pub(super) depth: u32,
    /// The queue on the next image and the generation that it is for, opened ahead so that a
    /// switch-over cannot fail half way.
    pub(super) prepared: Mutex<Option<(u64, Box<dyn ImageQueue>)>>,
    /// The destination's side, while the disk is being mirrored.
    pub(super) half: Mutex<Option<Half>>,
    /// Changes on their way that began when there were no claims. Changed by the queue's worker alone.
    pub(super) plain: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) write_bytes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) discards: AtomicU64,
    pub(super) errors: AtomicU64,
}

impl std::fmt::Debug for LiveDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveDisk")
            .field("name", &self.name)
            .field("image", &self.image())
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

/// Nothing under these locks can panic half way through a change, so a poisoned one is good.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LiveDisk {
    /// A disk named `name` on `image`. Its size stays that of this image for ever.
    #[must_use]
    pub fn new(name: impl Into<String>, image: Arc<dyn Image>) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            size: image.size(),
            access: image.access(),
            gate: Gate::new(),
            image: RwLock::new(image),
            generation: AtomicU64::new(0),
            tracker: RwLock::new(None),
            claims: RwLock::new(None),
            mirror: Mutex::new(None),
            queues: Mutex::new(Vec::new()),
            observer: Mutex::new(None),
            observed: Mutex::new((None, 0)),
            migrating: Mutex::new(false),
            counters: Counters::default(),
            rate: Rate::default(),
            latency: Meter::default(),
        })
    }

    /// Its name in the VM's spec.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the guest may write.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    /// The image of the moment.
    #[must_use]
    pub fn image(&self) -> Arc<dyn Image> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&image)
    }

    /// Requests and bytes since the start.
    #[must_use]
    pub fn counters(&self) -> DiskCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskCounters {
            reads: get(&self.counters.reads),
            read_bytes: get(&self.counters.read_bytes),
            writes: get(&self.counters.writes),
            write_bytes: get(&self.counters.write_bytes),
            flushes: get(&self.counters.flushes),
            discards: get(&self.counters.discards),
            errors: get(&self.counters.errors),
        }
    }

    /// A queue of its own for one worker thread, with at most `depth` requests at the kernel.
    ///
    /// # Errors
    /// When the host's I/O engine cannot be set up.
    pub fn queue(self: &Arc<Self>, depth: u32) -> Result<DiskQueue> {
        let event = Arc::new(Event::new()?);
        // Under the lock of the list: an image that is replaced meanwhile is replaced either
        // before (we open the new one) or after (we are in the list and get a prepared queue).
        let mut queues = lock(&self.queues);
        let inner = self.image().open_queue(depth, &event)?;
        let shared = Arc::new(QueueShared {
            event,
            depth,
            prepared: Mutex::new(None),
            half: Mutex::new(None),
            plain: AtomicU64::new(0),
        });
        if let Some(mirror) = &*lock(&self.mirror) {
            // The guest's queue comes first: what cannot be mirrored fails the mirroring.
            match Half::open(mirror, depth, &shared.event) {
                Ok(half) => *lock(&shared.half) = Some(half),
                Err(seen) => mirror.fail(seen),
            }
        }
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(&shared));
        let generation = self.generation();
        drop(queues);
        Ok(DiskQueue::new(Arc::clone(self), shared, inner, generation))
    }

    /// Sets what is told about each request of the guest that failed: its file, offset, length,
    /// error number and remedy. At most a few per second; called in the worker's thread, so it
    /// must not block.
    pub fn set_observer(&self, observer: Observer) {
        *lock(&self.observer) = Some(observer);
    }

    /// Sets how fast its guest gets requests through, from now on.
    ///
    /// # Errors
    /// When the host has no thread for it; the limits are then those of before.
    pub fn set_limits(&self, limits: DiskLimits) -> Result<()> {
        self.rate.set(&self.name, limits)
    }

    /// How fast its guest gets requests through.
    #[must_use]
    pub fn limits(&self) -> DiskLimits {
        self.rate.limits()
    }

    /// Makes every completed write durable, in the calling thread.
    ///
    /// # Errors
    /// When the device fails.
    pub fn flush(&self) -> Result<()> {
        self.image().flush()
    }

    /// Grows with every request of the guest that ends; and how many are at the device.
    pub(crate) fn activity(&self) -> (u64, u32) {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        let ended = of(&counters.reads)
            .wrapping_add(of(&counters.writes))
            .wrapping_add(of(&counters.flushes))
            .wrapping_add(of(&counters.discards));
        (ended, self.gate.inside())
    }

    /// How long the guest's reads and writes took in the mean until now, if there were any.
    pub(crate) fn latency(&self) -> Option<Duration> {
        self.latency.mean()
    }

    /// How long all measured ones took, in nanoseconds, and how many they are; both wrap.
    pub(crate) fn measured(&self) -> (u64, u64) {
        self.latency.measured()
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// A request has ended, well or not: marks what it may have changed. Called before the guest
    /// is told and before the request leaves the gate.
    pub(super) fn changed(&self, offset: u64, len: u64) {
        let tracker = self.tracker.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(bitmap) = &*tracker {
            bitmap.mark(offset, len);
        }
    }

    pub(super) fn observe_failure(&self, op: Operation, seen: &Observation) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
        let _ = op;
        // A request that no disk could do is the guest's own doing: counted, not reported.
        if seen.is::<crate::BadRequest>() || seen.is::<crate::ReadOnlyDisk>() {
            return;
        }
        {
            let mut observed = lock(&self.observed);
            let now = Instant::now();
            match observed.0 {
                Some(since) if now.duration_since(since) < Duration::from_secs(1) => {
                    if observed.1 >= OBSERVED_PER_SECOND {
                        return;
                    }
                    observed.1 += 1;
                }
                _ => *observed = (Some(now), 1),
            }
        }
        let observer = lock(&self.observer).clone();
        if let Some(observer) = observer {
            observer(seen.clone());
        }
    }

    /// Takes the disk for a migration; false if another one has it.
    #[must_use]
    pub(crate) fn claim(&self) -> bool {
        !std::mem::replace(&mut *lock(&self.migrating), true)
    }

    /// Gives it back.
    pub(crate) fn release(&self) {
        *lock(&self.migrating) = false;
    }

    /// From now on every change is marked in `bitmap`.
    ///
    /// No change is missed, without closing the gate and without counting epochs, because the
    /// bitmap is looked up when a request has *ended* and not when it starts: a write in flight
    /// now finds the bitmap when it ends; a write that ended before this call and found none had
    /// reached the image by then, so whoever reads the image after this call reads it.
    pub(crate) fn begin_tracking(&self, bitmap: Arc<DirtyBitmap>) {
        self.latency.all(true);
        *self.tracker.write().unwrap_or_else(PoisonError::into_inner) = Some(bitmap);
    }

    /// Changes are no longer marked.
    pub(crate) fn end_tracking(&self) {
        self.latency.all(false);
        *self.tracker.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// From now on changes go by `claims`.
    pub(crate) fn begin_claims(&self, claims: Arc<Claims<Event>>) {
        *self.claims.write().unwrap_or_else(PoisonError::into_inner) = Some(claims);
    }

    /// Changes need nobody's leave any more. Those that wait are to be told by whoever has the claims.
    pub(crate) fn end_claims(&self) {
        *self.claims.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn claims(&self) -> Option<Arc<Claims<Event>>> {
        let claims = self.claims.read().unwrap_or_else(PoisonError::into_inner);
        claims.clone()
    }

    /// Whether changes are on their way that began before there were claims. Once false it stays so
    /// until the claims end: a change is counted before it looks for claims, so one that found none
    /// is counted when whoever brought them looks here.
    pub(crate) fn has_plain_changes(&self) -> bool {
        let queues = lock(&self.queues);
        let mut queues = queues.iter().filter_map(Weak::upgrade);
        queues.any(|queue| queue.plain.load(Ordering::SeqCst) > 0)
    }

    /// From now on changes go by the zones of `mirror`. Tracking must have begun: it is what a
    /// change relies on that was on its way before.
    pub(crate) fn begin_mirror(&self, mirror: &Arc<Mirror>) -> Result<()> {
        let queues = lock(&self.queues);
        let mut halves = Vec::new();
        for queue in queues.iter().filter_map(Weak::upgrade) {
            let half = Half::open(mirror, queue.depth, &queue.event)?;
            halves.push((queue, half));
        }
        *lock(&self.mirror) = Some(Arc::clone(mirror));
        for (queue, half) in halves {
            *lock(&queue.half) = Some(half);
        }
        Ok(())
    }

    /// Changes go to the source only again. At any instant, by anyone; nobody waits for the
    /// destination any more when this returns.
    pub(crate) fn end_mirror(&self) {
        let queues = lock(&self.queues);
        let Some(mirror) = lock(&self.mirror).take() else {
            return;
        };
        mirror.zones.off();
        for queue in queues.iter().filter_map(Weak::upgrade) {
            let half = lock(&queue.half).take();
            if let Some(half) = half {
                mirror.keep(half);
            }
            queue.event.signal();
        }
    }

    /// A queue is gone: what it still has on its way to a destination ends with the mirroring.
    pub(super) fn keep_half(&self, queue: &QueueShared) {
        let mirror = lock(&self.mirror);
        let half = lock(&queue.half).take().filter(Half::is_busy);
        if let (Some(mirror), Some(half)) = (&*mirror, half) {
            mirror.keep(half);
        }
    }

    /// Ends the mirroring if a request of the guest waits for longer than `limit` because of the
    /// destination; says whether it did.
    pub(crate) fn end_stalled_mirror(&self, limit: Duration) -> bool {
        let Some(mirror) = lock(&self.mirror).clone() else {
            return false;
        };
        let waits = mirror.zones.waits_since();
        let stalls = waits.is_some_and(|since| since.elapsed() > limit)
            || lock(&self.queues)
                .iter()
                .filter_map(Weak::upgrade)
                .any(|queue| {
                    let half = lock(&queue.half);
                    half.as_ref().is_some_and(|half| half.hangs(limit))
                });
        if stalls && mirror.is_on() {
            self.end_mirror();
            mirror.tell();
        }
        stalls
    }

    /// Closes the gate: no request enters until [`resume`](Self::resume).
    pub(crate) fn close(&self) {
        self.gate.close();
    }

    /// Waits until no request is inside the gate; false if `limit` passed before.
    #[must_use]
    pub(crate) fn drained(&self, limit: Duration) -> bool {
        self.gate.drained(limit)
    }

    /// Opens the gate and wakes the queues.
    pub(crate) fn resume(&self) {
        self.gate.open();
        for queue in lock(&self.queues).iter().filter_map(Weak::upgrade) {
            queue.event.signal();
        }
    }

    /// Opens a queue on `image` for each of the disk's queues, so that [`replace`](Self::replace)
    /// has nothing left to fail.
    pub(crate) fn prepare(&self, image: &Arc<dyn Image>) -> Result<()> {
        for queue in lock(&self.queues).iter().filter_map(Weak::upgrade) {
            let next = image.open_queue(queue.depth, &queue.event)?;
            *lock(&queue.prepared) = Some((self.generation() + 1, next));
        }
        Ok(())
    }

    /// Forgets what was prepared.
    pub(crate) fn unprepare(&self) {
        for queue in lock(&self.queues).iter().filter_map(Weak::upgrade) {
            *lock(&queue.prepared) = None;
        }
    }

    /// Replaces the image. Only while the gate is closed and drained.
    pub(crate) fn replace(&self, image: Arc<dyn Image>) {
        debug_assert!(self.gate.is_closed() && self.gate.inside() == 0);
        let _queues = lock(&self.queues);
        *self.image.write().unwrap_or_else(PoisonError::into_inner) = image;
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}
