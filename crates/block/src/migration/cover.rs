//! A snapshot of a live disk: a new, empty image over the one of now takes its place.
//!
//! It is a migration without a copy. The new image reads as the old one does, since that is below
//! it, so all there is to do is the switch: what was written is flushed, the gate closes, what came
//! in between is flushed, the daemon is asked.
//!
//! # Which image is authoritative
//!
//! Until the daemon has committed, the old one: nothing was ever written to the new one. From the
//! commit on, the new one, which needs the old one below it, durable and never written again: it was
//! flushed with the gate closed, before the daemon was asked. A crash at any instant leaves the
//! inventory's answer valid, as with every migration.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::{JobId, MigrationLimits, MigrationStatus, Phase, Stage};
use strake_observe::{Because, Observation, OsContext, Result, Task};

use super::control::{Ask, Control};
use super::pause::{Guard, Opener, Pause};
use super::switch::LOOK_FOR_DAEMON;
use super::{Migration, SwitchHooks};
use crate::{
    Access, AlreadyMigrating, CommitRefused, CoverFailed, DestinationTooSmall, Event, Image,
    LiveDisk, PauseTooLong, ReadOnlyDisk,
};

/// How often the switch is tried when the device turns out too slow for the allowed pause.
const ATTEMPTS: u32 = 5;

/// Makes the image that is to cover the one it is given. It shares what that one knows: it must read
/// right while the other is still written, and after.
pub type MakeCover = Box<dyn FnOnce(&Arc<dyn Image>) -> Result<Arc<dyn Image>> + Send>;

/// What is called once the old image is only below the new one.
pub type Covered = Box<dyn FnOnce() + Send>;

/// The job.
struct Cover {
    disk: Arc<LiveDisk>,
    source: Arc<dyn Image>,
    make: Option<MakeCover>,
    covered: Option<Covered>,
    limits: MigrationLimits,
    hooks: Arc<dyn SwitchHooks>,
    control: Arc<Control>,
    opener: Opener,
    guard: Guard,
}

/// How it ends, other than well.
enum End {
    Cancelled,
    Failed(Observation),
}

impl From<Observation> for End {
    fn from(seen: Observation) -> Self {
        Self::Failed(seen)
    }
}

impl Migration {
    /// Puts an image that `make` makes over the one of `disk`, in a thread of its own: a snapshot.
    /// From the daemon's commit on only the new one is written; then `covered` is called.
    ///
    /// # Errors
    /// When the disk may not be written or is being migrated. Nothing was changed then.
    pub fn cover(
        disk: Arc<LiveDisk>,
        make: MakeCover,
        covered: Covered,
        job: JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        let source = disk.image();
        let failed = || CoverFailed {
            job: job.to_string(),
            disk: disk.name().to_owned(),
            source: source.path().to_owned(),
        };
        if disk.read_only() {
            return Err(ReadOnlyDisk {
                path: source.path().to_owned(),
                operation: "a snapshot of it".to_owned(),
            })
            .because_of(failed);
        }
        if !disk.claim() {
            return Err(AlreadyMigrating {
                disk: disk.name().to_owned(),
            }
            .into());
        }
        let claimed = Arc::clone(&disk);
        let started = Self::cover_claimed(&disk, make, covered, &job, limits, hooks);
        if started.is_err() {
            claimed.release();
        }
        started.because_of(failed)
    }

    fn cover_claimed(
        disk: &Arc<LiveDisk>,
        make: MakeCover,
        covered: Covered,
        job: &JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        let status = MigrationStatus::new(job.clone(), disk.name().to_owned(), disk.size());
        let control = Arc::new(Control::new(
            Arc::new(Event::new()?),
            status,
            limits.clone(),
        ));
        let opener = Opener::new(disk, &hooks, &control, limits.suspend);
        let cover = Cover {
            source: disk.image(),
            disk: Arc::clone(disk),
            make: Some(make),
            covered: Some(covered),
            limits,
            hooks,
            control: Arc::clone(&control),
            guard: Guard::start(opener.clone())?,
            opener,
        };
        std::thread::Builder::new()
            .name(format!("snapshot-{}", disk.name()))
            .spawn(move || cover.run())
            .os("clone", "the snapshot's thread")?;
        Ok(Arc::new(Self { control }))
    }
}

impl Cover {
    /// The thread.
    fn run(mut self) {
        let end = self.cover();
        if end.is_err() {
            self.disk.unprepare();
        }
        let (phase, failure) = match end {
            Ok(()) => (Phase::Completed, None),
            Err(End::Cancelled) => (Phase::Cancelled, None),
            Err(End::Failed(cause)) => {
                let mut task = Task::begin("take a snapshot of a disk");
                task.saw(cause);
                let failure = task.fail(CoverFailed {
                    job: self.control.job.to_string(),
                    disk: self.disk.name().to_owned(),
                    source: self.source.path().to_owned(),
                });
                (Phase::Failed, Some(failure))
            }
        };
        let Self {
            disk,
            source,
            make,
            hooks,
            control,
            opener,
            guard,
            ..
        } = self;
        // Everything that holds an image is gone when the job counts as ended.
        drop((source, make, guard, opener));
        disk.release();
        drop(disk);
        control.update(|status| {
            status.phase = phase;
            status.failure = failure;
        });
        hooks.ended(&control.status());
        control.end();
    }

    fn cover(&mut self) -> Result<(), End> {
        // Most of what there is to flush, while the guest goes on.
        self.source.flush()?;
        let Some(make) = self.make.take() else {
            return Ok(());
        };
        let image = make(&self.source)?;
        if image.size() < self.disk.size() || image.access() == Access::ReadOnly {
            return Err(Observation::from(DestinationTooSmall {
                path: image.path().to_owned(),
                size: image.size(),
                needed: self.disk.size(),
            })
            .into());
        }
        self.disk.prepare(&image)?;
        self.control.update(|status| status.phase = Phase::Copying);
        let mut attempts = 0;
        loop {
            if self.control.is_cancelled() {
                return Err(End::Cancelled);
            }
            if self.control.is_paused() {
                self.control.stay();
                continue;
            }
            // The guest does not wait for a daemon that is not there.
            if !self.hooks.can_ask() {
                self.control.rest(LOOK_FOR_DAEMON);
                continue;
            }
            if self.switch(&image)? {
                return Ok(());
            }
            attempts += u32::from(!self.control.is_paused());
            if attempts >= ATTEMPTS {
                let took = self.control.status().pause_ms.unwrap_or(0.0) / 1000.0;
                let took = Duration::try_from_secs_f64(took).unwrap_or(Duration::MAX);
                return Err(Observation::from(PauseTooLong {
                    attempts,
                    took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                    pause_ms: self.limits.pause_ms,
                })
                .into());
            }
            // What the last attempt left to be flushed must not be in the next one's pause.
            self.source.flush()?;
        }
    }

    /// True if it is done, false if it took too long and may be tried again.
    fn switch(&mut self, image: &Arc<dyn Image>) -> Result<bool, End> {
        let allowed = Duration::from_millis(self.limits.pause_ms);
        let pause = Pause::begin(&self.opener, allowed)?;
        if !pause.drained() {
            pause.end();
            return Ok(false);
        }
        self.source.flush()?;
        if Instant::now() > pause.deadline() || !pause.lasts() || !self.hooks.can_ask() {
            pause.end();
            return Ok(false);
        }
        match self.control.ask(Stage::Destination) {
            Ask::Asked => {}
            Ask::Cancelled => return Err(End::Cancelled),
            Ask::TooLate | Ask::Paused => {
                pause.end();
                return Ok(false);
            }
        }
        self.control
            .update(|status| status.phase = Phase::AwaitingCommit);
        self.hooks.await_commit(&self.control.job);
        if !self.control.decision() {
            drop(pause);
            return Err(Observation::from(CommitRefused {
                job: self.control.job.to_string(),
            })
            .into());
        }
        self.disk.replace(Arc::clone(image));
        drop(pause);
        if let Some(covered) = self.covered.take() {
            covered();
        }
        Ok(true)
    }
}
