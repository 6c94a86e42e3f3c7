//! The main flow of a migration.
//!
//! ```text
//!  Preparing ─► Copying ─► first pass ─► passes while they shrink what is left   (`passes.rs`)
//!                             │     │         │
//!                             │     │         ├─ never small enough ───────────► Failed
//!                             │     │         ├─ method auto: too slow ──┐
//!                             │     └─ method auto: guest too fast ──────┤
//!                             │  method mirror ────────────────────────► mirroring: one pass
//!                             ▼                                          │   (`mirroring.rs`)
//!               rest within the allowed pause ◄──────────────────────────┘
//!                             │  flush the destination, open its queues, journal
//!                             │
//!                             ├─ passes, and still shrinking: one more pass, one more flush
//!                             ├─ no daemon to be asked: passes, or mirroring, until there is one
//!                             ▼
//!               Suspended: gate closed, last blocks, flush ── too late ─► open, back  (`switch.rs`)
//!                             ▼
//!               AwaitingCommit ─► committed: replace the image, open ────────► Completed
//!                             └─► refused: open ─────────────────────────────► Failed
//! ```
//!
//! Cancellation and failures leave from every point before AwaitingCommit; [`Pause`] opens the gate
//! and resumes the VM however its scope is left, and its guard does if it is not left in time.
//!
//! [`Pause`]: super::pause::Pause

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::{
    Kept, Method, MethodReason, MigrationLimits, OverlayStep, PassReport, Phase, Stage,
};
use strake_observe::{Observation, Result, Task};

use super::SwitchHooks;
use super::choice::Judge;
use super::control::Control;
use super::copier::{Allowance, Copier, Progress, Room, Run, Settled, Stop, Tally};
use super::journal::{Durable, Journal};
use super::kept::{self, Keeper, Known};
use super::neighbour::Neighbour;
use super::overlay::{Overlay, covered_bytes};
use super::pace::{Meter, Pace};
use super::passes::Passes;
use super::pause::{Guard, Opener};
use super::plan::{CHUNK_BYTES, FirstPass, Fresh, Of, Plan, allocated_bytes};
use super::snapshot::Cap;
use crate::live::Mirror;
use crate::{
    BLOCK_BYTES, Delta, DestinationRemoved, DirtyBitmap, Image, LeftOnOverlay, LiveDisk,
    MigrationFailed,
};

/// How often the expected pause is told during a pass: it takes a look at the whole bitmap.
const TELL_PAUSE: Duration = Duration::from_millis(100);

/// How often a consolidation looks whether it may begin. What it waits for are reads of the guest.
const LOOK_FOR_READERS: Duration = Duration::from_millis(1);

pub(crate) struct Job {
    pub(super) disk: Arc<LiveDisk>,
    pub(super) source: Arc<dyn Image>,
    pub(super) destination: Arc<dyn Image>,
    /// What they were called at the beginning.
    names: (String, String),
    /// What goes into the image below it, if that is the destination.
    pub(super) overlay: Option<Arc<dyn Overlay>>,
    /// What the guest's writes may go to meanwhile.
    pub(super) delta: Option<Arc<dyn Delta>>,
    /// What the daemon is asked at the switch-over.
    pub(super) stage: Stage,
    pub(super) journal: Journal,
    /// As they were when it last looked; what needs them at once asks `control`.
    pub(super) limits: MigrationLimits,
    pub(super) hooks: Arc<dyn SwitchHooks>,
    pub(super) control: Arc<Control>,
    pub(super) bitmap: Arc<DirtyBitmap>,
    /// What the last pass copied: a block of it that is dirty again is hot.
    pub(super) recent: DirtyBitmap,
    pub(super) copier: Copier,
    pub(super) pace: Pace,
    meter: Meter,
    /// Where to keep that, until it is begun.
    pub(super) kept: Option<File>,
    /// Keeps what is needed to take the job up again, if it is to be.
    pub(super) keeper: Option<Keeper>,
    /// What an earlier run has copied.
    pub(super) known: Known,
    neighbour: Neighbour,
    pub(super) opener: Opener,
    guard: Guard,
    /// How often the limits had changed when it last looked.
    changes: u32,
    /// Whether the switch-over is prepared.
    ready: bool,
    /// How many of the passes do not count towards the limit: all until a daemon was last waited
    /// for.
    pub(super) uncounted: u32,
    /// How long the last flush of the destination took.
    pub(super) flush: Duration,
}

/// How a job ends, other than by moving the disk.
pub(super) enum End {
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
            // The others come only from copies whose caller looks for them.
            Stop::Cancelled | Stop::Late | Stop::Unmirrored | Stop::Enough | Stop::Paused => {
                Self::Cancelled
            }
            Stop::Failed(seen) => Self::Failed(seen),
        }
    }
}

/// How to make a pass.
pub(super) struct How<'a> {
    /// How much it is to copy.
    pub(super) planned: u64,
    pub(super) fresh: Fresh,
    pub(super) room: Room,
    pub(super) deadline: Option<Instant>,
    pub(super) mirror: Option<&'a Arc<Mirror>>,
    /// Watches an overlay, and ends it if that gets too large.
    pub(super) cap: Option<&'a mut Cap>,
    /// Says whether to go on with it, and where to leave why not.
    pub(super) judge: Option<(&'a mut Judge, &'a mut Option<MethodReason>)>,
}

impl How<'_> {
    pub(super) fn usual(planned: u64, room: Room) -> Self {
        Self {
            planned,
            fresh: Fresh::No,
            room,
            deadline: None,
            mirror: None,
            cap: None,
            judge: None,
        }
    }
}

impl Job {
    pub(crate) fn new(
        disk: Arc<LiveDisk>,
        source: Arc<dyn Image>,
        destination: Arc<dyn Image>,
        journal: Journal,
        hooks: Arc<dyn SwitchHooks>,
        control: Arc<Control>,
    ) -> Result<Self> {
        let copier = Copier::new(
            source.as_ref(),
            destination.as_ref(),
            Arc::clone(&control.event),
        )?;
        let size = disk.size();
        let limits = control.limits();
        let now = Instant::now();
        let opener = Opener::new(&disk, &hooks, &control, limits.suspend);
        let bitmap = Arc::new(DirtyBitmap::new(size)?);
        let recent = DirtyBitmap::new(size)?;
        Ok(Self {
            names: (source.path().to_owned(), destination.path().to_owned()),
            source,
            destination,
            overlay: None,
            delta: None,
            stage: Stage::Destination,
            journal,
            pace: Pace::new(limits.bytes_per_second, limits.iops),
            meter: Meter::new(now),
            kept: None,
            keeper: None,
            known: Known::default(),
            neighbour: Neighbour::new(now, limits.latency, disk.latency()),
            guard: Guard::start(opener.clone())?,
            opener,
            limits,
            hooks,
            control,
            bitmap,
            recent,
            copier,
            disk,
            changes: 0,
            ready: false,
            uncounted: 0,
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
        // An overlay that the disk is left on is to be known, however the job ended.
        let left = self.control.status().overlay.map(|overlay| LeftOnOverlay {
            disk: self.disk.name().to_owned(),
            overlay: overlay.path.clone(),
            below: match overlay.step {
                OverlayStep::Consolidate => self.names.1.clone(),
                OverlayStep::Copy | OverlayStep::TurnBack => self.names.0.clone(),
            },
        });
        let (phase, failure) = match end {
            Ok(()) => (Phase::Completed, None),
            Err(End::Cancelled) if self.control.is_interrupted() && self.keeper.is_some() => {
                (Phase::Interrupted, None)
            }
            Err(End::Cancelled) => (Phase::Cancelled, left.map(Observation::from)),
            Err(End::Failed(cause)) => {
                let mut task = Task::begin("migrate a disk");
                task.saw(cause);
                if let Some(left) = left {
                    task.saw(left);
                }
                let failure = task.fail(MigrationFailed {
                    job: self.control.job.to_string(),
                    disk: self.disk.name().to_owned(),
                    source: self.disk.image().path().to_owned(),
                    destination: self.names.1.clone(),
                });
                (Phase::Failed, Some(failure))
            }
        };
        if let Some(mut keeper) = self.keeper.take() {
            match phase {
                Phase::Interrupted => keeper.remain(),
                // Nobody may take it up again once the guest goes on without it.
                _ => keeper.close(),
            }
        }
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
        self.journal.begin()?;
        self.keep();
        self.still_there()?;
        self.journal.reach(Phase::Copying, Durable::Now)?;
        self.control.update(|status| status.phase = Phase::Copying);
        self.live()
    }

    /// Moves the disk, or what is to be moved of it, from the source to the destination.
    pub(super) fn live(&mut self) -> Result<(), End> {
        // Only what reads as zeroes everywhere may keep holes where the source has them.
        let fresh = match &self.overlay {
            None if self.destination.allocated(0)?.is_none() => Fresh::Yes,
            _ => Fresh::No,
        };
        let of = match &self.overlay {
            None => Of::Image(Arc::clone(&self.source), fresh),
            Some(overlay) => {
                let overlay = Arc::clone(overlay);
                while !overlay.is_ready() {
                    self.control.rest(LOOK_FOR_READERS);
                    self.go_on()?;
                }
                Of::Layer(overlay)
            }
        };
        let first = FirstPass::new(of, Arc::clone(&self.bitmap), self.disk.size());
        let mut first = first.without(&self.known);
        let why = match self.limits.method {
            Method::Mirror => MethodReason::Asked,
            Method::Snapshot => return self.by_snapshot(&mut first, fresh, MethodReason::Asked),
            Method::Dirty | Method::Auto => {
                let passes = match self.limits.method {
                    Method::Dirty => MethodReason::Asked,
                    _ => MethodReason::PassesKeepUp,
                };
                self.uses(Method::Dirty, passes);
                match self.first_pass(&mut first, fresh)? {
                    Some(why) => why,
                    None => match self.later_passes()? {
                        Passes::Switched => return Ok(()),
                        Passes::TooSlow(why) => why,
                    },
                }
            }
        };
        if self.limits.method == Method::Auto {
            let left = self
                .planned()?
                .saturating_sub(
                    self.control
                        .status()
                        .passes
                        .first()
                        .map_or(0, |it| it.read_bytes),
                )
                .saturating_add(self.bitmap.marked_bytes());
            if let Some(why) = self.overlay_fits(&why, left) {
                return self.by_snapshot(&mut first, fresh, why);
            }
        }
        // What the first pass has not copied is marked, like all else that is to be copied.
        first.only_mark();
        if fresh == Fresh::No {
            self.pass(&mut first, How::usual(0, Room::BesideGuest))?;
        } else {
            let chunk = first.next(CHUNK_BYTES)?;
            debug_assert!(chunk.is_none(), "a chunk of a pass that only marks");
        }
        self.mirror(why)
    }

    /// From now on a crash loses little of the work, if anything is to be kept. A store that is full is no
    /// reason not to move a disk away from it.
    fn keep(&mut self) {
        let Some(file) = self.kept.take() else {
            return;
        };
        match self.keeper(file) {
            Ok(keeper) => self.keeper = Some(keeper),
            Err(seen) => {
                strake_observe::recorder().record(seen, strake_observe::State::Open);
            }
        }
    }

    fn keeper(&self, file: File) -> Result<Keeper> {
        Keeper::start(
            &self.disk,
            (&self.source, &self.destination),
            file,
            (&self.control.job, &self.known),
            &self.control.event,
        )
    }

    /// Takes up what an earlier run has left in `file`. Before the guest does anything: from then on its
    /// changes go by what the file claims.
    pub(super) fn again(&mut self, file: File) -> Result<()> {
        self.known = kept::read(&file, &self.control.job, self.disk.size())?;
        self.disk.begin_tracking(Arc::clone(&self.bitmap));
        match self.keeper(file) {
            Ok(keeper) => {
                self.keeper = Some(keeper);
                Ok(())
            }
            Err(seen) => {
                self.disk.end_tracking();
                Err(seen)
            }
        }
    }

    /// What was there before is done: the next switch-over is about something else. What it
    /// consolidates is an overlay, by passes or by mirroring, whichever does.
    pub(super) fn begin_again(&mut self, stage: Stage) {
        self.stage = stage;
        self.ready = false;
        self.delta = None;
        self.limits.method = Method::Auto;
        self.uncounted = self.passes();
    }

    /// Does what can be done for the switch-over before it, once.
    pub(super) fn get_ready(&mut self) -> Result<()> {
        if !self.ready {
            self.disk.prepare(&self.destination)?;
            self.journal.reach(Phase::Suspended, Durable::Now)?;
            self.ready = true;
        }
        Ok(())
    }

    pub(super) fn pass(&mut self, plan: &mut dyn Plan, how: How<'_>) -> Result<(), Stop> {
        let How {
            planned,
            fresh,
            room,
            deadline,
            mirror,
            mut cap,
            mut judge,
        } = how;
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
        // Inside the pause of the switch-over the guard and the question look after it.
        let may_rest = room != Room::Alone;
        let rests = || may_rest && control.is_paused();
        let mut rested = false;
        let mut interrupt = |tally: Tally| {
            if control.is_cancelled() {
                return Some(Stop::Cancelled);
            }
            if mirror.is_some_and(|mirror| !mirror.is_on()) {
                return Some(Stop::Unmirrored);
            }
            // Also while it rests: the guest does not.
            if let Some(cap) = cap.as_mut()
                && let Some((bytes, full)) = cap.look(control.status().throughput)
            {
                control.update(|status| {
                    if let Some(overlay) = &mut status.overlay {
                        overlay.bytes = bytes;
                    }
                });
                if full {
                    return Some(Stop::Enough);
                }
            }
            if rests() {
                rested = true;
                // A mirroring ends; other plans stay where they are.
                return mirror.map(|_| Stop::Paused);
            }
            let (judge, why) = judge.as_mut()?;
            if std::mem::take(&mut rested) {
                judge.anew(Instant::now(), tally.read, bitmap.marked_bytes());
            }
            **why = judge.look(Instant::now(), tally.read, bitmap.marked_bytes());
            why.is_some().then_some(Stop::Enough)
        };
        let meter = &mut self.meter;
        let keeper = std::cell::RefCell::new(&mut self.keeper);
        let mut keep = |now, settled: Settled<'_>| {
            if let Some(keeper) = keeper.borrow_mut().as_mut() {
                keeper.look(now, &mut |range: Range<u64>| {
                    let marked = bitmap.next_marked(range.start / BLOCK_BYTES);
                    settled(&range) && marked.is_none_or(|block| block * BLOCK_BYTES >= range.end)
                });
            }
        };
        let neighbour = std::cell::RefCell::new(&mut self.neighbour);
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
            let kept = due.then(|| keeper.borrow().as_ref().map(Keeper::claimed_bytes));
            control.update(|status| {
                if let Some(kept) = kept {
                    status.kept = kept.map(|bytes| Box::new(Kept { bytes }));
                }
                status.throughput = throughput;
                status.latency = neighbour.borrow().seen().map(Box::new);
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
        let mut unlimited = Pace::new(None, None);
        let pace = match room {
            Room::Alone => &mut unlimited,
            _ => &mut self.pace,
        };
        let mut known = control.changes();
        let mut tune = |pace: &mut Pace| {
            if room != Room::Alone && control.changes() != known {
                known = control.changes();
                let limits = control.limits();
                pace.set(limits.bytes_per_second, limits.iops);
                neighbour.borrow_mut().aim(limits.latency);
            }
        };
        let disk = &self.disk;
        neighbour.borrow_mut().begin(began, disk.measured());
        let mut room = |now| {
            if rests() {
                neighbour.borrow_mut().begin(now, disk.measured());
                return Allowance::NOTHING;
            }
            match room {
                Room::BesideGuest => {
                    let mut neighbour = neighbour.borrow_mut();
                    neighbour.look(now, disk.activity(), disk.measured())
                }
                room => Allowance::regardless(room),
            }
        };
        let result = self.copier.run(Run {
            plan,
            fresh,
            space: self.limits.space,
            room: &mut room,
            pace,
            tune: &mut tune,
            rests: &rests,
            keep: &mut keep,
            deadline,
            zones: mirror.map(|mirror| &mirror.zones),
            interrupt: &mut interrupt,
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

    pub(super) fn flush_destination(&mut self) -> Result<()> {
        let began = Instant::now();
        self.copier.flush()?;
        self.flush = began.elapsed();
        Ok(())
    }

    /// How much the first pass has before it.
    pub(super) fn planned(&self) -> Result<u64> {
        let size = self.disk.size();
        match &self.overlay {
            None => allocated_bytes(self.source.as_ref(), size, &self.known),
            Some(overlay) => covered_bytes(overlay.as_ref(), size),
        }
    }

    /// Whether there is a reason to go on; waits for as long as the job is paused.
    pub(super) fn go_on(&mut self) -> Result<(), End> {
        self.control.stay();
        self.look_around()
    }

    /// The same without waiting.
    pub(super) fn look_around(&mut self) -> Result<(), End> {
        if self.control.is_cancelled() {
            return Err(End::Cancelled);
        }
        if let Some(seen) = self.keeper.as_ref().and_then(Keeper::failure) {
            return Err(seen.into());
        }
        self.look_at_limits();
        self.still_there()?;
        Ok(())
    }

    fn look_at_limits(&mut self) {
        if self.control.changes() != self.changes {
            self.changes = self.control.changes();
            // A consolidation has its own method.
            let method = self.limits.method;
            self.limits = MigrationLimits {
                method,
                ..self.control.limits()
            };
            self.pace
                .set(self.limits.bytes_per_second, self.limits.iops);
            self.neighbour.aim(self.limits.latency);
        }
    }

    pub(super) fn still_there(&self) -> Result<()> {
        if self.destination.is_removed()? {
            return Err(DestinationRemoved {
                path: self.destination.path().to_owned(),
            }
            .into());
        }
        Ok(())
    }

    pub(super) fn allowed(&self) -> Duration {
        Duration::from_millis(self.limits.pause_ms)
    }

    /// How long the gate would be closed if `bytes` were left: their copy at the measured speed,
    /// and a flush like the last one.
    pub(super) fn expected_pause(&self, bytes: u64) -> Duration {
        pause_for(bytes, self.pace.throughput(), self.flush)
    }

    pub(super) fn passes(&self) -> u32 {
        u32::try_from(self.control.status().passes.len()).unwrap_or(u32::MAX)
    }

    /// Those that the limit is about.
    pub(super) fn counted_passes(&self) -> u32 {
        self.passes().saturating_sub(self.uncounted)
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
