//! Moving a live disk to another image while the guest uses it.
//!
//! # Which copy is authoritative
//!
//! Exactly one is, at each instant, and the inventory's binding of the disk says which:
//!
//! ```text
//!   Preparing, Copying     the source. Every request goes to it. The destination is scratch.
//!   Suspended              the source. The gate is closed: it does not change any more. If that
//!                          lasts too long the gate opens, and this was one more pass.
//!   AwaitingCommit         whichever the inventory names. Both are the same, both are flushed as
//!                          far as the guest flushed, neither changes: the gate stays closed until
//!                          the daemon has said what its transaction decided. Nobody else may
//!                          decide, so there is no time limit here.
//!   decided: committed     the destination. The image is replaced, then the gate opens.
//!   decided: refused       the source. The gate opens.
//!   Failed, Cancelled      the source.
//! ```
//!
//! A crash at any instant leaves the inventory's answer valid: before the transaction the source
//! is whole; after it the destination is whole *and durable*, since it is flushed before the daemon
//! is asked. The journal beside the destination only says whose it is. From its `suspended` record
//! on the daemon may have been asked, so whoever cleans up looks at the binding first. That record
//! is durable before the gate closes; the later ones need not be, and so cost the guest no pause.
//!
//! # Threads
//!
//! One thread per job runs `job.rs` from top to bottom; a second one, its guard, ends a pause that
//! lasts too long (`pause.rs`). Others touch it only through [`Control`]: `cancel` and `decide` set
//! a word under its lock and wake both.
//!
//! * `cover`: a snapshot, a switch-over without a copy.
//! * `passes`, `mirroring`, `snapshot`: the methods; `choice`: when the first gives way to another;
//!   `switch`: the switch-over; `overlay`: what `snapshot` and consolidations ask of an image's format.
//! * `kept`: what a later run needs to go on.
//! * `plan`: what a pass copies; `copier`: copying it; `pace`: how fast; `neighbour`: how much at once
//!   beside the guest; `pause`: the scope in which the guest waits; `control`: what the threads share;
//!   `journal`: the file.

mod choice;
mod control;
mod copier;
mod cover;
mod job;
pub mod journal;
mod kept;
mod mirroring;
mod neighbour;
mod overlay;
mod pace;
mod passes;
mod pause;
mod plan;
mod snapshot;
mod switch;

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use strake_api::job::{
    JobId, LimitsChange, Method, MigrationLimits, MigrationStatus, Phase, Stage,
};
use strake_api::spec::MAX_DISK;
use strake_observe::{Because, Observation, OsContext, Result};

use self::control::Control;
pub use self::cover::{Covered, MakeCover};
use self::job::Job;
use self::journal::{Journal, Record};
pub use self::overlay::{Delta, Has, Overlay};
use crate::{
    Access, AlreadyMigrating, CancelTooLate, DestinationTooSmall, DiskTooLarge, Event, Image,
    LiveDisk, MigrationFailed, NoOverlay, PauseTooLate, ReadOnlyDisk,
};

/// What a migration asks of the machine and of the daemon. Called in the migration's own threads,
/// one call at a time; none of the calls may wait for the migration itself.
pub trait SwitchHooks: Send + Sync {
    /// Pauses the vCPUs. Called only with [`Suspend::Vm`](strake_api::job::Suspend::Vm). The disk's
    /// workers keep running: the requests inside are waited for afterwards. It takes no longer than
    /// `limit`: a guest of which some vCPUs stand already is waiting.
    ///
    /// # Errors
    /// When the VM cannot be paused in time. It runs on then, and the migration tries again, a few
    /// times.
    fn suspend_vm(&self, limit: Duration) -> Result<()>;

    /// Lets the vCPUs run again, after a `suspend_vm` that succeeded, however the switch ended.
    fn resume_vm(&self);

    /// Whether a daemon is there to be asked. Without one a pause neither begins nor comes to the
    /// question, from which on only the answer ends it. Says what is so now, and does not wait for anything.
    fn can_ask(&self) -> bool;

    /// All is at the destination; asks the daemon whether it commits. Returns at once; the answer
    /// comes by [`Migration::decide`] (which may be called from in here).
    fn await_commit(&self, job: &JobId);

    /// The same with what the record is to name then; the answer comes by
    /// [`Migration::decide_stage`]. Whoever starts jobs with an overlay has this.
    fn await_stage(&self, job: &JobId, stage: Stage) {
        debug_assert_eq!(
            stage,
            Stage::Destination,
            "a question that nobody understands"
        );
        self.await_commit(job);
    }

    /// The job reached a final phase.
    fn ended(&self, status: &MigrationStatus);
}

/// Whether a job can be taken up again should its process die.
#[derive(Debug)]
pub enum Keep {
    /// It cannot.
    Nothing,
    /// In this empty file, which should lie beside the source: the guest waits for it now and then.
    In(File),
    /// An earlier run has left this file.
    Again(File),
}

/// What a job has to do with.
struct To {
    destination: Arc<dyn Image>,
    /// Of a consolidation.
    overlay: Option<Arc<dyn Overlay>>,
    /// For method `snapshot`.
    delta: Option<Arc<dyn Delta>>,
    journal: Option<File>,
    keep: Keep,
}

/// A migration.
#[derive(Debug)]
pub struct Migration {
    control: Arc<Control>,
}

impl Migration {
    /// Starts moving `disk` to `destination` in a thread of its own. `journal` is an empty file
    /// beside the destination.
    ///
    /// # Errors
    /// When the destination cannot take the disk, or the disk is already being migrated. Nothing
    /// was changed then. All that waits for a store, the journal's first record too, is done in the
    /// job's thread, and ends the job if it fails.
    pub fn start(
        disk: Arc<LiveDisk>,
        destination: Arc<dyn Image>,
        journal: File,
        job: JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        Self::start_kept(
            disk,
            destination,
            journal,
            Keep::Nothing,
            job,
            limits,
            hooks,
        )
    }

    /// The same for a job that can be taken up again should this process or its host die: `keep` says
    /// where that is kept, and whether an earlier run has left something there. What it left is believed:
    /// the disk's image must be the source of that run, unchanged since, `destination` and `journal`
    /// its files, and the guest must not have begun.
    ///
    /// # Errors
    /// As [`start`](Self::start), and when what was left cannot be used.
    pub fn start_kept(
        disk: Arc<LiveDisk>,
        destination: Arc<dyn Image>,
        journal: File,
        keep: Keep,
        job: JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        let to = To {
            destination,
            overlay: None,
            delta: None,
            journal: Some(journal),
            keep,
        };
        Self::claim(&disk, to, job, limits, hooks)
    }

    /// As [`start`](Self::start), with an overlay at hand: method `snapshot` puts the disk on it, and
    /// `auto` does if that is better than mirroring. See `snapshot.rs` for what the daemon is asked
    /// then, and what it finds if the job ends in the middle.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with_overlay(
        disk: Arc<LiveDisk>,
        (destination, delta): (Arc<dyn Image>, Arc<dyn Delta>),
        journal: File,
        job: JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        let to = To {
            destination,
            overlay: None,
            delta: Some(delta),
            journal: Some(journal),
            keep: Keep::Nothing,
        };
        Self::claim(&disk, to, job, limits, hooks)
    }

    /// Starts moving what `overlay`, the uppermost layer of the disk's image, has into `base`, the
    /// image below that layer. It is a migration to `base`: with the same methods, limits, question
    /// and cancellation, and the disk is on `base` afterwards. Before that everything that `disk` has
    /// is in the layer and below it, as ever; so there is no journal, and whoever begins again
    /// after a crash loses time only.
    ///
    /// `base` is in use whatever becomes of the job: nobody may remove it.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn consolidate(
        disk: Arc<LiveDisk>,
        base: Arc<dyn Image>,
        overlay: Arc<dyn Overlay>,
        job: JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        let to = To {
            destination: base,
            overlay: Some(overlay),
            delta: None,
            journal: None,
            keep: Keep::Nothing,
        };
        Self::claim(&disk, to, job, limits, hooks)
    }

    fn claim(
        disk: &Arc<LiveDisk>,
        to: To,
        job: JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        if !disk.claim() {
            return Err(AlreadyMigrating {
                disk: disk.name().to_owned(),
            }
            .into());
        }
        let started = Self::start_claimed(disk, to, job, limits, hooks);
        if started.is_err() {
            disk.release();
        }
        started
    }

    fn start_claimed(
        disk: &Arc<LiveDisk>,
        to: To,
        job: JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        let source = disk.image();
        let To {
            destination,
            overlay,
            delta,
            journal,
            keep,
        } = to;
        let failed = || MigrationFailed {
            job: job.to_string(),
            disk: disk.name().to_owned(),
            source: source.path().to_owned(),
            destination: destination.path().to_owned(),
        };
        fits(disk, destination.as_ref()).because_of(failed)?;
        if limits.method == Method::Snapshot && delta.is_none() {
            return Err(Observation::from(NoOverlay {
                job: job.to_string(),
            }))
            .because_of(failed);
        }
        let record = Record {
            job: job.clone(),
            disk: disk.name().to_owned(),
            source: source.path().to_owned(),
            destination: destination.path().to_owned(),
            size_bytes: disk.size(),
            phase: Phase::Preparing,
        };
        let journal = Journal::new(journal, record);
        let status = MigrationStatus::new(job.clone(), disk.name().to_owned(), disk.size());
        let event = Arc::new(Event::new().because_of(failed)?);
        let control = Arc::new(Control::new(event, status, limits));
        let mut thread = Job::new(
            Arc::clone(disk),
            Arc::clone(&source),
            Arc::clone(&destination),
            journal,
            hooks,
            Arc::clone(&control),
        )
        .because_of(failed)?;
        (thread.overlay, thread.delta) = (overlay, delta);
        match keep {
            Keep::Nothing => {}
            Keep::In(file) => thread.kept = Some(file),
            Keep::Again(file) => thread.again(file).because_of(failed)?,
        }
        std::thread::Builder::new()
            .name(format!("migrate-{}", disk.name()))
            .spawn(move || thread.run())
            .os("clone", "the migration's thread")
            .because_of(failed)?;
        Ok(Arc::new(Self { control }))
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> &JobId {
        &self.control.job
    }

    /// How it is.
    #[must_use]
    pub fn status(&self) -> MigrationStatus {
        self.control.status()
    }

    /// Ends the job; the disk stays on its source. Without effect on a job that has ended.
    ///
    /// A pause ends at once, whatever the job's thread waits for: the guest goes on. The job itself
    /// starts nothing more, but ends only when the few requests on their way have, since until then
    /// a device may still write to the destination: nobody may remove it or give it to another use.
    /// So while a device hangs, the phase stays what it is, and becomes
    /// [`Cancelled`](Phase::Cancelled) when it answers; [`join`](Self::join) waits for that.
    ///
    /// # Errors
    /// When the daemon was already asked to commit: its decision counts.
    pub fn cancel(&self) -> Result<()> {
        if self.control.cancel() {
            return Ok(());
        }
        Err(CancelTooLate {
            job: self.control.job.to_string(),
        }
        .into())
    }

    /// Ends the job as [`cancel`](Self::cancel) does, but what was kept stays true for as long as this process
    /// lives, so that the next one can take it up again: for a VM that ends. Its phase becomes
    /// [`Interrupted`](Phase::Interrupted), or cancelled if nothing is kept.
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    pub fn interrupt(&self) -> Result<()> {
        if self.control.interrupt() {
            return Ok(());
        }
        Err(CancelTooLate {
            job: self.control.job.to_string(),
        }
        .into())
    }

    /// Lets the job rest until [`resume`](Self::resume): what is on its way arrives, then nothing is
    /// copied, and it does not switch over. What the guest writes is marked and copied later; a
    /// mirroring ends for that time, so that a job that rests costs the guest nothing.
    ///
    /// # Errors
    /// When the daemon was already asked to commit: its decision counts. When the job consolidates
    /// the overlay of method `snapshot`, which grows until that is done.
    pub fn pause(&self) -> Result<()> {
        if self.control.pause() {
            return Ok(());
        }
        Err(PauseTooLate {
            job: self.control.job.to_string(),
        }
        .into())
    }

    /// Lets a paused job go on where it was.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Changes the limits. They count from now on; a pause of the switch-over that has begun keeps
    /// its own.
    pub fn set(&self, change: &LimitsChange) {
        self.control.set(change);
    }

    /// The limits as they are now.
    #[must_use]
    pub fn limits(&self) -> MigrationLimits {
        self.control.limits()
    }

    /// Whether the daemon was asked to commit and has not answered: the gate stays closed until
    /// [`decide`](Self::decide). From the first moment at which the question may have been put
    /// this is true, so whoever finds it may repeat the question.
    #[must_use]
    pub fn awaits_decision(&self) -> bool {
        self.question().is_some()
    }

    /// What the daemon was asked and has not answered, if anything.
    #[must_use]
    pub fn question(&self) -> Option<Stage> {
        self.control.question()
    }

    /// The daemon's answer to [`SwitchHooks::await_commit`]: whether the inventory's binding names
    /// the destination now. Without effect before the question and after the first answer.
    pub fn decide(&self, committed: bool) {
        self.decide_stage(Stage::Destination, committed);
    }

    /// The daemon's answer to [`SwitchHooks::await_stage`]. Without effect unless just that was asked
    /// and not answered.
    pub fn decide_stage(&self, stage: Stage, committed: bool) {
        self.control.decide(stage, committed);
    }

    /// Waits until the job has ended and its last hook has returned.
    #[must_use]
    pub fn join(&self) -> MigrationStatus {
        self.control.ended();
        self.control.status()
    }
}

fn fits(disk: &LiveDisk, destination: &dyn Image) -> Result<()> {
    // Larger ones exist: images that were there before us, sparse ones. Bitmaps are not sparse.
    if disk.size() > MAX_DISK {
        return Err(DiskTooLarge {
            disk: disk.name().to_owned(),
            path: disk.image().path().to_owned(),
            size: disk.size(),
            most: MAX_DISK,
        }
        .into());
    }
    if destination.size() < disk.size() {
        return Err(DestinationTooSmall {
            path: destination.path().to_owned(),
            size: destination.size(),
            needed: disk.size(),
        }
        .into());
    }
    if destination.access() == Access::ReadOnly {
        return Err(ReadOnlyDisk {
            path: destination.path().to_owned(),
            operation: "a migration to it".to_owned(),
        }
        .into());
    }
    Ok(())
}
