//! The main flow of a migration.
//!
//! ```text
//!  Preparing ─► Copying ─► first pass ─► passes while they shrink what is left
//!                             │
//!                             ├─ never small enough ─────────────────────────► Failed
//!                             ▼
//!               within the allowed pause: flush the destination, open its queues, journal
//!                             │
//!                             ├─ still shrinking: one more pass, one more flush
//!                             ▼
//!               Suspended: gate closed, last blocks, flush ── too late ─► open, back to passes
//!                             ▼
//!               AwaitingCommit ─► committed: replace the image, open ────────► Completed
//!                             └─► refused: open ─────────────────────────────► Failed
//! ```
//!
//! Cancellation and failures leave from every point before AwaitingCommit; [`Pause`] opens the gate
//! and resumes the VM however its scope is left, and its guard does if it is not left in time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::{MigrationLimits, PassReport, Phase};
use strake_observe::{Observation, Result, Task};

use super::SwitchHooks;
use super::control::{Ask, Control};
use super::copier::{Copier, Progress, Room, Run, Stop, Tally};
use super::journal::{Durable, Journal};
use super::pace::{Meter, Pace, Usage, Watch, rate};
use super::pause::{Guard, Opener, Pause};
use super::plan::{DirtyPass, FirstPass, Fresh, Plan, allocated_bytes};
use crate::{
    CommitRefused, DestinationRemoved, DirtyBitmap, Image, LiveDisk, MigrationFailed,
    NotConverging, PauseTooLong,
};

/// A pause that is not worth another pass: below it what remains is the latency of the last few
/// requests.
const GOOD_PAUSE: Duration = Duration::from_millis(4);

/// A pass has shrunk what is left if it is below this share of what it was, in percent.
const SHRUNK_PERCENT: u64 = 90;

/// If a pass leaves more than this share of what it was, in percent, the guest has to give way: the
/// passes would get shorter so slowly that all of them together are a burden for long.
const PRESS_PERCENT: u64 = 60;

/// Passes in a row that may fail to shrink what is left while it is too much for the pause.
const STALLED_PASSES: u32 = 5;

/// How often the switch is tried when the devices turn out too slow for the allowed pause.
const SWITCH_ATTEMPTS: u32 = 5;

/// How often the expected pause is told during a pass: it takes a look at the whole bitmap.
const TELL_PAUSE: Duration = Duration::from_millis(100);

pub(crate) struct Job {
    disk: Arc<LiveDisk>,
    source: Arc<dyn Image>,
    destination: Arc<dyn Image>,
    journal: Journal,
    limits: MigrationLimits,
    hooks: Arc<dyn SwitchHooks>,
    control: Arc<Control>,
    bitmap: Arc<DirtyBitmap>,
    /// What the last pass copied: a block of it that is dirty again is hot.
    recent: DirtyBitmap,
    copier: Copier,
    pace: Pace,
    meter: Meter,
    opener: Opener,
    guard: Guard,
    /// How long the last flush of the destination took.
    flush: Duration,
}

/// How a job ends, other than by moving the disk.
enum End {
    Cancelled,
    Failed(Observation),
}

impl From<Observation> for End {
    fn from(seen: Observation) -> Self {
        Self::Failed(seen)
    }
}

impl From<Stop> for End {
    fn from(stop: Stop) -> Self {
        match stop {
            // Late comes only from a copy with a deadline, whose caller looks for it.
            Stop::Cancelled | Stop::Late => Self::Cancelled,
            Stop::Failed(seen) => Self::Failed(seen),
        }
    }
}

/// Why a switch did not happen, though it may the next time.
struct TooLate {
    took: Duration,
}

enum Switch {
    Done,
    TooLate(TooLate),
}

impl Job {
    pub(crate) fn new(
        disk: Arc<LiveDisk>,
        source: Arc<dyn Image>,
        destination: Arc<dyn Image>,
        journal: Journal,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
        control: Arc<Control>,
    ) -> Result<Self> {
        let copier = Copier::new(
            source.as_ref(),
            destination.as_ref(),
            Arc::clone(&control.event),
        )?;
        let size = disk.size();
        let opener = Opener::new(&disk, &hooks, &control, limits.suspend);
        Ok(Self {
            disk,
            source,
            destination,
            journal,
            pace: Pace::new(limits.bytes_per_second),
            meter: Meter::new(Instant::now()),
            guard: Guard::start(opener.clone())?,
            opener,
            limits,
            hooks,
            control,
            bitmap: Arc::new(DirtyBitmap::new(size)),
            recent: DirtyBitmap::new(size),
            copier,
            flush: Duration::ZERO,
        })
    }

    /// The thread.
    pub(crate) fn run(mut self) {
        self.disk.begin_tracking(Arc::clone(&self.bitmap));
        let end = self.migrate();
        self.disk.end_tracking();
        if end.is_err() {
            self.disk.unprepare();
        }
        let (phase, failure) = match end {
            Ok(()) => (Phase::Completed, None),
            Err(End::Cancelled) => (Phase::Cancelled, None),
            Err(End::Failed(cause)) => {
                let mut task = Task::begin("migrate a disk");
                task.saw(cause);
                let failure = task.fail(MigrationFailed {
                    job: self.control.job.to_string(),
                    disk: self.disk.name().to_owned(),
                    source: self.source.path().to_owned(),
                    destination: self.destination.path().to_owned(),
                });
                (Phase::Failed, Some(failure))
            }
        };
        // The journal only helps whoever cleans up: that it cannot be written ends nothing here.
        if let Err(seen) = self.journal.reach(phase, Durable::Now) {
            let mut task = Task::begin("note a migration's end in its journal");
            task.saw(seen);
            task.succeed();
        }
        let Self {
            disk,
            source,
            destination,
            hooks,
            control,
            copier,
            opener,
            guard,
            ..
        } = self;
        // Everything that holds an image is gone when the job counts as ended.
        drop((copier, source, destination, guard, opener));
        disk.release();
        drop(disk);
        control.update(|status| {
            status.phase = phase;
            status.failure = failure;
            status.expected_pause_ms = None;
        });
        hooks.ended(&control.status());
        control.end();
    }

    fn migrate(&mut self) -> Result<(), End> {
        self.still_there()?;
        // Only what reads as zeroes everywhere may keep holes where the source has them.
        let fresh = match self.destination.allocated(0)? {
            None => Fresh::Yes,
            Some(_) => Fresh::No,
        };
        self.journal.reach(Phase::Copying, Durable::Now)?;
        self.control.update(|status| status.phase = Phase::Copying);
        self.first_pass(fresh)?;

        let mut before = u64::MAX;
        let mut stalled = 0;
        let mut room = Room::BesideGuest;
        let mut attempts = 0;
        let mut prepared = false;
        loop {
            self.go_on()?;
            let mut dirty = self.bitmap.marked_bytes();
            let mut within = self.expected_pause(dirty) <= self.allowed();
            if within {
                if !prepared {
                    self.disk.prepare(&self.destination)?;
                    self.journal.reach(Phase::Suspended, Durable::Now)?;
                    prepared = true;
                }
                self.flush_destination()?;
                // The guest went on writing meanwhile.
                dirty = self.bitmap.marked_bytes();
                within = self.expected_pause(dirty) <= self.allowed();
            }
            let shrunk = dirty < before.saturating_mul(SHRUNK_PERCENT) / 100;
            let last = self.passes() >= self.limits.max_passes;
            let good = self.expected_pause(dirty) <= GOOD_PAUSE + self.flush;
            // Longer than a good pause only if the guest gave way and that did not help.
            if within && (good || last || (!shrunk && room == Room::Pressing)) {
                match self.switch()? {
                    Switch::Done => return Ok(()),
                    Switch::TooLate(late) => {
                        attempts += 1;
                        if attempts >= SWITCH_ATTEMPTS {
                            return Err(self.pause_too_long(attempts, &late).into());
                        }
                        before = u64::MAX;
                    }
                }
            } else {
                if dirty >= before.saturating_mul(PRESS_PERCENT) / 100 {
                    // The guest writes nearly as fast as we copy beside it, or faster.
                    room = Room::Pressing;
                }
                if within || shrunk {
                    stalled = 0;
                    before = dirty;
                } else {
                    stalled += 1;
                }
            }
            if !within && (stalled >= STALLED_PASSES || last) {
                return Err(self.not_converging(dirty).into());
            }
            self.dirty_pass(room)?;
        }
    }

    fn first_pass(&mut self, fresh: Fresh) -> Result<(), End> {
        let size = self.disk.size();
        let planned = allocated_bytes(self.source.as_ref(), size)?;
        let mut plan = FirstPass::new(
            Arc::clone(&self.source),
            Arc::clone(&self.bitmap),
            size,
            fresh,
        );
        self.pass(&mut plan, planned, fresh, Room::BesideGuest, None)?;
        Ok(())
    }

    /// Copies what was marked since, but for the blocks that the guest rewrites all the time:
    /// they are left for the last pass as long as they are few.
    fn dirty_pass(&mut self, room: Room) -> Result<(), End> {
        let bitmap = Arc::clone(&self.bitmap);
        let size = self.disk.size();
        let hot = DirtyBitmap::new(size);
        let mut at = 0;
        while let Some(block) = bitmap.next_marked(at) {
            if self.recent.is_marked(block) {
                hot.mark(block * crate::BLOCK_BYTES, 1);
            }
            at = block + 1;
        }
        let hot_bytes = hot.marked_bytes();
        // Few enough that the pause stays a good one.
        let few = self.expected_pause(hot_bytes) <= GOOD_PAUSE + self.flush;
        let leave = few.then_some(&hot);
        let left = if few { hot_bytes } else { 0 };
        let planned = bitmap.marked_bytes().saturating_sub(left);
        let copied = DirtyBitmap::new(size);
        let mut plan = DirtyPass::new(&bitmap, size, leave, Some(&copied));
        self.pass(&mut plan, planned, Fresh::No, room, None)?;
        if few {
            // What was left stays hot.
            let mut at = 0;
            while let Some(block) = hot.next_marked(at) {
                copied.mark(block * crate::BLOCK_BYTES, 1);
                at = block + 1;
            }
        }
        self.recent = copied;
        Ok(())
    }

    fn pass(
        &mut self,
        plan: &mut dyn Plan,
        planned: u64,
        fresh: Fresh,
        room: Room,
        deadline: Option<Instant>,
    ) -> Result<(), Stop> {
        let control = Arc::clone(&self.control);
        let began = Instant::now();
        control.update(|status| {
            let number = u32::try_from(status.passes.len()).unwrap_or(u32::MAX) + 1;
            status.passes.push(PassReport {
                number,
                planned_bytes: planned,
                ..PassReport::default()
            });
        });
        let elapsed_ms = || u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (bitmap, flush) = (Arc::clone(&self.bitmap), self.flush);
        let meter = &mut self.meter;
        let mut told = None;
        let mut progress = |progress: Progress| {
            let now = Instant::now();
            meter.copied(now, progress.arrived);
            let throughput = meter.rate(now);
            let due = told.is_none_or(|told| now.duration_since(told) >= TELL_PAUSE);
            let expected = (due && room != Room::Alone && progress.speed > 0).then(|| {
                told = Some(now);
                pause_for(bitmap.marked_bytes(), progress.speed, flush)
            });
            control.update(|status| {
                status.throughput = throughput;
                if let Some(expected) = expected {
                    status.expected_pause_ms = Some(expected.as_secs_f64() * 1000.0);
                }
                if let Some(pass) = status.passes.last_mut() {
                    tell(pass, progress.tally);
                    pass.elapsed_ms = elapsed_ms();
                }
            });
        };
        // Inside the pause the limit would only make the guest wait longer.
        let mut unlimited = Pace::new(None);
        let pace = match room {
            Room::Alone => &mut unlimited,
            _ => &mut self.pace,
        };
        let disk = &self.disk;
        let mut watch = Watch::new(began);
        let mut room = |now| match room {
            Room::BesideGuest => match watch.look(now, disk.activity()) {
                Usage::Busy => Room::BesideGuest,
                Usage::Idle => Room::IdleGuest,
                Usage::Starved => Room::StarvedGuest,
            },
            room => room,
        };
        let result = self.copier.run(Run {
            plan,
            fresh,
            room: &mut room,
            pace,
            deadline,
            cancelled: &|| control.is_cancelled(),
            progress: &mut progress,
        });
        let dirty = self.bitmap.marked_bytes();
        let expected = self.expected_pause(dirty);
        control.update(|status| {
            status.expected_pause_ms = Some(expected.as_secs_f64() * 1000.0);
            if let Some(pass) = status.passes.last_mut() {
                if let Ok(tally) = &result {
                    tell(pass, *tally);
                }
                pass.elapsed_ms = elapsed_ms();
                pass.dirty_after_bytes = dirty;
            }
        });
        result.map(|_| ())
    }

    /// Closes the gate, copies what is left, asks the daemon and does what it decides.
    ///
    /// The guard may open the gate at any time before the daemon is asked. What is done here is
    /// right all the same, only in vain: it is noticed at the next look, by the question at last.
    fn switch(&mut self) -> Result<Switch, End> {
        self.still_there()?;
        let pause = Pause::begin(&self.opener, self.allowed())?;
        if !pause.drained() {
            return Ok(self.too_late(&pause));
        }
        let bitmap = Arc::clone(&self.bitmap);
        let planned = bitmap.marked_bytes();
        let mut plan = DirtyPass::new(&bitmap, self.disk.size(), None, None);
        let deadline = Some(pause.deadline());
        match self.pass(&mut plan, planned, Fresh::No, Room::Alone, deadline) {
            Ok(()) => {}
            Err(Stop::Late) => return Ok(self.too_late(&pause)),
            Err(stop) => return Err(stop.into()),
        }
        // With the gate closed and drained every change is marked, and every mark was copied.
        let left = bitmap.marked();
        if !pause.lasts() || left != 0 {
            debug_assert!(!pause.lasts(), "marked while the gate was closed");
            return Ok(self.too_late(&pause));
        }
        self.copier.flush()?;
        self.still_there()?;
        // Before the question, after which nothing may fail. Need not be durable: the record
        // before it already says that the inventory knows.
        self.journal.reach(Phase::AwaitingCommit, Durable::Later)?;
        match self.control.ask() {
            Ask::Asked => {}
            Ask::Cancelled => return Err(End::Cancelled),
            Ask::TooLate => return Ok(self.too_late(&pause)),
        }
        self.control
            .update(|status| status.phase = Phase::AwaitingCommit);
        self.hooks.await_commit(&self.control.job);
        if self.control.decision() {
            self.disk.replace(Arc::clone(&self.destination));
            self.disk.end_tracking();
            drop(pause);
            Ok(Switch::Done)
        } else {
            drop(pause);
            Err(Observation::from(CommitRefused {
                job: self.control.job.to_string(),
            })
            .into())
        }
    }

    fn too_late(&self, pause: &Pause) -> Switch {
        pause.end();
        let took = self.control.status().pause_ms.unwrap_or(0.0) / 1000.0;
        Switch::TooLate(TooLate {
            took: Duration::try_from_secs_f64(took).unwrap_or(Duration::MAX),
        })
    }

    fn flush_destination(&mut self) -> Result<()> {
        let began = Instant::now();
        self.copier.flush()?;
        self.flush = began.elapsed();
        Ok(())
    }

    fn go_on(&self) -> Result<(), End> {
        if self.control.is_cancelled() {
            return Err(End::Cancelled);
        }
        self.still_there()?;
        Ok(())
    }

    fn still_there(&self) -> Result<()> {
        if self.destination.is_removed()? {
            return Err(DestinationRemoved {
                path: self.destination.path().to_owned(),
            }
            .into());
        }
        Ok(())
    }

    fn allowed(&self) -> Duration {
        Duration::from_millis(self.limits.pause_ms)
    }

    /// How long the gate would be closed if `bytes` were left: their copy at the measured speed,
    /// and a flush like the last one.
    fn expected_pause(&self, bytes: u64) -> Duration {
        pause_for(bytes, self.pace.throughput(), self.flush)
    }

    fn passes(&self) -> u32 {
        u32::try_from(self.control.status().passes.len()).unwrap_or(u32::MAX)
    }

    fn not_converging(&self, dirty: u64) -> Observation {
        let status = self.control.status();
        let write_rate = status.passes.last().map_or(0, |pass| {
            rate(
                pass.dirty_after_bytes,
                Duration::from_millis(pass.elapsed_ms.max(1)),
            )
        });
        NotConverging {
            passes: self.passes(),
            write_rate,
            copy_rate: self.pace.throughput(),
            dirty,
            expected_pause_ms: u64::try_from(self.expected_pause(dirty).as_millis())
                .unwrap_or(u64::MAX),
            pause_ms: self.limits.pause_ms,
        }
        .into()
    }

    fn pause_too_long(&self, attempts: u32, late: &TooLate) -> Observation {
        PauseTooLong {
            attempts,
            took_ms: u64::try_from(late.took.as_millis()).unwrap_or(u64::MAX),
            pause_ms: self.limits.pause_ms,
        }
        .into()
    }
}

fn tell(pass: &mut PassReport, tally: Tally) {
    pass.read_bytes = tally.read;
    pass.written_bytes = tally.written;
}

fn pause_for(bytes: u64, throughput: u64, flush: Duration) -> Duration {
    if bytes == 0 || throughput == 0 {
        // Nothing was copied yet, so nothing is known: an empty disk.
        return flush;
    }
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(throughput);
    flush.saturating_add(Duration::from_nanos(
        u64::try_from(nanos).unwrap_or(u64::MAX),
    ))
}
