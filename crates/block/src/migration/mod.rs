//! Moving a live disk to another image while the guest uses it: method `dirty`.
//!
//! # Which copy is authoritative
//!
//! Exactly one is, at each instant, and the inventory's binding of the disk says which:
//!
//! ```text
//!   Preparing, Copying     the source. Every request goes to it. The destination is scratch.
//!   Suspended              the source. The gate is closed: it does not change any more.
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
//! One thread per job runs `job.rs` from top to bottom. Others touch it only through [`Control`]:
//! `cancel` and `decide` set a word under its lock and wake the thread. The lock is a leaf: nothing
//! is called while it is held.
//!
//! * `plan`: what a pass copies; `copier`: copying it; `pace`: how fast; `pause`: the scope in
//!   which the guest waits; `journal`: the file.

mod copier;
mod job;
pub mod journal;
mod pace;
mod pause;
mod plan;

use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use strake_api::job::{JobId, MigrationLimits, MigrationStatus, Phase};
use strake_observe::{Because, OsContext, Result};

use self::job::Job;
use self::journal::{Journal, Record};
use crate::{
    Access, AlreadyMigrating, CancelTooLate, DestinationTooSmall, Event, Image, LiveDisk,
    MigrationFailed, ReadOnlyDisk,
};

/// What a migration asks of the machine and of the daemon. Called in the migration's own thread;
/// none of the calls may wait for the migration itself.
pub trait SwitchHooks: Send + Sync {
    /// Pauses the vCPUs. Called only with [`Suspend::Vm`](strake_api::job::Suspend::Vm). The disk's
    /// workers keep running: the requests inside are waited for afterwards.
    ///
    /// # Errors
    /// When the VM cannot be paused; the migration then fails and the disk stays on its source.
    fn suspend_vm(&self) -> Result<()>;

    /// Lets the vCPUs run again, after a `suspend_vm` that succeeded, however the switch ended.
    fn resume_vm(&self);

    /// All is at the destination; asks the daemon whether it commits. Returns at once; the answer
    /// comes by [`Migration::decide`] (which may be called from in here).
    fn await_commit(&self, job: &JobId);

    /// The job reached a final phase.
    fn ended(&self, status: &MigrationStatus);
}

/// A migration with method `dirty`.
#[derive(Debug)]
pub struct Migration {
    control: Arc<Control>,
}

/// What the job's thread shares with everyone else.
#[derive(Debug)]
pub(crate) struct Control {
    /// Wakes the job's thread wherever it waits for I/O.
    pub(crate) event: Arc<Event>,
    job: JobId,
    state: Mutex<State>,
    changed: Condvar,
    status: Mutex<MigrationStatus>,
    began: Instant,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    /// The daemon was asked; from now on only its answer counts.
    asked: bool,
    decision: Option<bool>,
    ended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Migration {
    /// Starts moving `disk` to `destination` in a thread of its own. `journal` is an empty file
    /// beside the destination.
    ///
    /// # Errors
    /// When the destination cannot take the disk, the disk is already being migrated, or the
    /// journal cannot be written. Nothing was changed then.
    pub fn start(
        disk: Arc<LiveDisk>,
        destination: Arc<dyn Image>,
        journal: File,
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
        let started = Self::start_claimed(&disk, destination, journal, job, limits, hooks);
        if started.is_err() {
            disk.release();
        }
        started
    }

    fn start_claimed(
        disk: &Arc<LiveDisk>,
        destination: Arc<dyn Image>,
        journal: File,
        job: JobId,
        limits: MigrationLimits,
        hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        let source = disk.image();
        let failed = || MigrationFailed {
            job: job.to_string(),
            disk: disk.name().to_owned(),
            source: source.path().to_owned(),
            destination: destination.path().to_owned(),
        };
        fits(disk, destination.as_ref()).because_of(failed)?;
        let record = Record {
            job: job.clone(),
            disk: disk.name().to_owned(),
            source: source.path().to_owned(),
            destination: destination.path().to_owned(),
            size_bytes: disk.size(),
            phase: Phase::Preparing,
        };
        let journal = Journal::begin(journal, record).because_of(failed)?;
        let control = Arc::new(Control {
            event: Arc::new(Event::new().because_of(failed)?),
            job: job.clone(),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            status: Mutex::new(MigrationStatus {
                job: job.clone(),
                disk: disk.name().to_owned(),
                phase: Phase::Preparing,
                size_bytes: disk.size(),
                passes: Vec::new(),
                throughput: 0,
                expected_pause_ms: None,
                pause_ms: None,
                elapsed_ms: 0,
                failure: None,
            }),
            began: Instant::now(),
        });
        let thread = Job::new(
            Arc::clone(disk),
            Arc::clone(&source),
            Arc::clone(&destination),
            journal,
            limits,
            hooks,
            Arc::clone(&control),
        )
        .because_of(failed)?;
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

    /// Ends the job; the disk stays on its source. It ends as soon as the few chunks on their way
    /// have; [`join`](Self::join) waits for it. Without effect on a job that has ended.
    ///
    /// # Errors
    /// When the daemon was already asked to commit: its decision counts.
    pub fn cancel(&self) -> Result<()> {
        {
            let mut state = lock(&self.control.state);
            if state.asked && !state.ended {
                return Err(CancelTooLate {
                    job: self.control.job.to_string(),
                }
                .into());
            }
            state.cancelled = true;
        }
        self.control.event.signal();
        Ok(())
    }

    /// The daemon's answer to [`SwitchHooks::await_commit`]: whether the inventory's binding names
    /// the destination now. Without effect before the question and after the first answer.
    pub fn decide(&self, committed: bool) {
        let mut state = lock(&self.control.state);
        if state.asked && state.decision.is_none() {
            state.decision = Some(committed);
            self.control.changed.notify_all();
        }
    }

    /// Waits until the job has ended and its last hook has returned.
    #[must_use]
    pub fn join(&self) -> MigrationStatus {
        let mut state = lock(&self.control.state);
        while !state.ended {
            state = self
                .control
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.control.status()
    }
}

impl Control {
    fn status(&self) -> MigrationStatus {
        let mut status = lock(&self.status).clone();
        if !status.phase.is_final() {
            status.elapsed_ms = self.elapsed_ms();
        }
        status
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut MigrationStatus)) {
        let mut status = lock(&self.status);
        change(&mut status);
        status.elapsed_ms = self.elapsed_ms();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        lock(&self.state).cancelled
    }

    /// From now on only the daemon decides; false if the job was cancelled before.
    pub(crate) fn ask(&self) -> bool {
        let mut state = lock(&self.state);
        state.asked = !state.cancelled;
        state.asked
    }

    /// Waits for the daemon's answer.
    pub(crate) fn decision(&self) -> bool {
        let mut state = lock(&self.state);
        loop {
            if let Some(committed) = state.decision {
                return committed;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }
}

fn fits(disk: &LiveDisk, destination: &dyn Image) -> Result<()> {
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
