//! The end of jobs that no monitor runs any more, and what is cleared up at the end of any job.
//!
//! The inventory says how a job has ended (see `commit`); here its files go and its end is
//! recorded. Files may take long to go: they are locked for a moment, or their store hangs. So no
//! guest and no start of the daemon waits for it longer than a moment.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use strake_api::control::ExitReason;
use strake_api::job::{JobKind, MigrationStatus, Phase};
use strake_observe::{Because, Observation, OsContext, Result};

use super::commit::{journal_path, unnamed_path};
use super::interrupted::kept_path;
use super::{Host, guard, note};
use crate::config::show;
use crate::crash;
use crate::inventory::{JobFiles, JobRecord, JobState};
use crate::observations::{JobWithoutMonitor, LayerJobFailed, MigrationFailed, NotRemoved};
use crate::storage::image;
use crate::storage::removal::{self, Claim};

/// How long whoever settles jobs may take until it is its turn.
const TURN_PATIENCE: Duration = Duration::from_secs(1);

impl Host {
    /// The monitor is gone: every job of the VM ends as the inventory says.
    ///
    /// That none of them is committed any more is made sure at once. Their files go in a thread of
    /// its own, which is waited for only as long as `patience`: a store that hangs keeps neither
    /// the daemon from coming up nor the VM from running on its healthy image. `before` is the
    /// thread that followed the jobs of the monitor: what was said of them counts first.
    pub(super) fn settle_jobs(
        self: &Arc<Self>,
        vm: &str,
        why: &ExitReason,
        before: Option<JoinHandle<()>>,
        patience: Duration,
    ) {
        // Only these: by the time the thread has its turn, the VM may run and have others.
        let active = match self.inventory.active_jobs(vm) {
            Ok(active) => active,
            Err(seen) => {
                note(seen); // `check_jobs` comes back to them.
                Vec::new()
            }
        };
        for job in active.iter().filter(|job| job.state == JobState::Running) {
            if !self.interrupt(job) {
                self.refuse_for_ever(job);
            }
        }
        if active.is_empty() && before.is_none() {
            return;
        }
        let (host, name, why) = (Arc::clone(self), vm.to_owned(), why.clone());
        let (tell, told) = channel();
        let work = move || {
            if before.is_some_and(|before| before.join().is_err()) {
                tracing::error!(vm = %name, "the thread for jobs has failed");
            }
            let cell = host.existing_cell(&name);
            let _jobs = cell.as_ref().map(|cell| guard(&cell.jobs));
            let _ = tell.send(());
            for job in active {
                match host.inventory.job(&job.id) {
                    Ok(job) if job.state == JobState::Ended => {}
                    // The VM runs by now, and has taken it up again.
                    Ok(job) if job.state == JobState::Running && keeps(&job) => {}
                    Ok(job) => host.settle_without_monitor(&job, &why),
                    Err(seen) => note(seen),
                }
            }
        };
        let spawned = std::thread::Builder::new()
            .name(format!("settle-{vm}"))
            .spawn(work)
            .os("clone", "a thread that settles jobs");
        match spawned {
            Ok(_) => {
                // That it has the lock, so that nobody settles them for another reason; then
                // that it is done.
                let _ = told.recv_timeout(TURN_PATIENCE);
                let _ = told.recv_timeout(patience);
            }
            Err(seen) => note(seen), // `check_jobs` comes back to them.
        }
    }

    /// The caller holds the VM's lock of jobs.
    fn settle_all(&self, vm: &str, why: &ExitReason) {
        let active = match self.inventory.active_jobs(vm) {
            Ok(active) => active,
            Err(seen) => return note(seen),
        };
        for mut job in active {
            if self.interrupt(&job) {
                job.state = JobState::Interrupted;
            }
            self.settle_without_monitor(&job, why);
        }
    }

    fn settle_without_monitor(&self, job: &JobRecord, why: &ExitReason) {
        let reason = match why {
            ExitReason::GuestPowerOff => "the guest powered off",
            ExitReason::GuestReset => "the guest was reset",
            ExitReason::Stopped => "the VM was stopped",
            ExitReason::Failed(_) => "the monitor died",
        };
        let seen = Observation::from(JobWithoutMonitor {
            job: job.id.to_string(),
            reason: reason.to_owned(),
        });
        let seen = match why {
            ExitReason::Failed(death) => seen.because(death.clone()),
            _ => seen,
        };
        if job.state == JobState::Interrupted && (job.stamp.is_some() || self.stamp(job, &seen)) {
            return; // The next start takes it up again.
        }
        self.settle(job, seen);
    }

    /// Ends a job that no monitor runs, by what the inventory says.
    pub(super) fn settle(&self, job: &JobRecord, why: Observation) {
        let mut status = job.status.clone();
        if job.state == JobState::Committed {
            status.phase = Phase::Completed;
            self.finish_committed(job, &status);
        } else {
            status.phase = Phase::Failed;
            status.failure = Some(why);
            self.finish_on_source(job, &status);
        }
    }

    pub(super) fn finish_committed(&self, job: &JobRecord, status: &MigrationStatus) {
        let mut left = Vec::new();
        left.extend(remove_journal(job).err());
        left.extend(remove_kept(job).err());
        if job.kind == JobKind::Consolidate {
            crash::point("after-merge-committed");
        }
        if job.remove_source {
            crash::point("before-source-removal");
            let _placing = guard(&self.placing);
            let shared = self.inventory.users_of_image(&job.source.location);
            let below = self.is_below_others(&job.source);
            match (shared, below) {
                (Ok(users), Ok(false)) if users.is_empty() => {
                    left.extend(remove_source(job).err());
                }
                (Ok(_), Ok(_)) => {}
                (Err(seen), _) | (_, Err(seen)) => left.push(seen),
            }
            crash::point("after-source-removal");
        }
        let mut status = status.clone();
        status.phase = Phase::Completed;
        status.failure = None;
        self.record_end(job, &status);
        left.into_iter().for_each(note);
        self.drop_unneeded(&job.vm);
    }

    pub(super) fn finish_on_source(&self, job: &JobRecord, status: &MigrationStatus) {
        if !self.refuse_for_ever(job) {
            return; // `check_jobs` comes back to it.
        }
        crash::point("before-destination-removal");
        // Why this daemon or one before decided against the commit, then what the monitor saw.
        let mut causes: Vec<Observation> = job.status.failure.clone().into_iter().collect();
        causes.extend(status.failure.clone());
        causes.extend(remove_files(job));
        crash::point("after-destination-removal");
        let mut status = status.clone();
        status.failure = match status.phase {
            Phase::Cancelled if causes.is_empty() => None,
            _ => Some(failed(job).because_all(causes)),
        };
        if status.phase == Phase::Failed
            && let Some(seen) = &status.failure
        {
            note(seen.clone());
        }
        self.record_end(job, &status);
    }

    /// If that fails, the job is finished once more later: see [`Host::check_jobs`].
    fn record_end(&self, job: &JobRecord, status: &MigrationStatus) {
        tracing::info!(job = %job.id, phase = ?status.phase, "job ended");
        match self.inventory.end_job(&job.id, status) {
            Ok(()) => self.verdicts.forget(&job.id),
            Err(seen) => note(seen),
        }
    }

    /// Looks for jobs whose end could not be recorded, or was not heard of.
    pub(super) fn check_jobs(&self) {
        let Ok(jobs) = self.inventory.unfinished_jobs() else {
            return; // Whoever works with the inventory tells.
        };
        for job in jobs {
            let Ok(cell) = self.cell(&job.vm) else {
                continue;
            };
            let monitor = cell.live().monitor.clone();
            if let Some(monitor) = monitor {
                self.reconcile_jobs(&cell, &monitor);
                continue;
            }
            // No job begins while this lock is held, so one that is active belongs to no monitor.
            // Whoever holds it works on them, and may need long.
            let Ok(_jobs) = cell.jobs.try_lock() else {
                continue;
            };
            if cell.live().at_rest() {
                self.settle_all(&job.vm, &ExitReason::Stopped);
            }
        }
    }
}

fn failed(job: &JobRecord) -> Observation {
    if job.kind != JobKind::Migrate {
        return LayerJobFailed {
            job: job.id.to_string(),
            kind: job.kind.name().to_owned(),
            vm: job.vm.clone(),
            disk: job.disk.clone(),
            source: job.source.to_string(),
        }
        .into();
    }
    MigrationFailed {
        job: job.id.to_string(),
        vm: job.vm.clone(),
        disk: job.disk.clone(),
        source: job.source.to_string(),
    }
    .into()
}

fn remove_source(job: &JobRecord) -> Result<()> {
    let what = match job.kind {
        JobKind::Migrate => "the source of a migrated disk",
        JobKind::Snapshot | JobKind::Revert => "what a disk was before it went back",
        JobKind::Consolidate => "an image that was consolidated",
    };
    match &job.source_file {
        Some(file) => image::remove(job.source.file()?, Some(file), what),
        None => Err(NotRemoved {
            path: job.source.to_string(),
            what: format!("{what}, of which it was never recorded which file it is"),
        }
        .into()),
    }
}

fn keeps(job: &JobRecord) -> bool {
    job.files.as_ref().is_some_and(|files| files.kept.is_some())
}

fn remove_kept(job: &JobRecord) -> Result<()> {
    let path = kept_path(job.source.file()?, &job.id);
    let removed = match &job.files {
        Some(JobFiles { kept: None, .. }) => return Ok(()),
        Some(JobFiles {
            kept: Some(kept), ..
        }) => removal::remove(&path, kept, Claim::Ours).map(drop),
        None => removal::remove_stale(&path),
    };
    removed.because_of(|| NotRemoved {
        path: show(&path),
        what: "the kept progress of a migration".to_owned(),
    })
}

fn remove_journal(job: &JobRecord) -> Result<()> {
    if job.kind != JobKind::Migrate {
        return Ok(());
    }
    let path = journal_path(job.destination.file()?);
    let journal = job.files.as_ref().and_then(|files| files.journal.as_ref());
    let removed = match journal {
        Some(journal) => removal::remove(&path, journal, Claim::Ours).map(drop),
        None => removal::remove_stale(&path),
    };
    removed.because_of(|| NotRemoved {
        path: show(&path),
        what: "the journal of a migration".to_owned(),
    })
}

/// Removes what was made for a job that came to nothing; tells what stays.
///
/// Until it is recorded which files they are, they have names that nobody else gives; under its own
/// name the destination is removed only if it is that file.
fn remove_files(job: &JobRecord) -> Vec<Observation> {
    let not_removed = |path: &Path| NotRemoved {
        path: show(path),
        what: "the destination of a migration that did not complete".to_owned(),
    };
    let mut left = Vec::new();
    // What a consolidation writes to is below the disk and stays, whatever becomes of the job.
    if job.kind == JobKind::Consolidate {
        return left;
    }
    let destination = match job.destination.file() {
        Ok(path) => path,
        Err(seen) => return vec![seen.into()],
    };
    let unnamed = unnamed_path(destination);
    match &job.files {
        Some(files) => {
            for path in [destination, &unnamed] {
                let removed = removal::remove(path, &files.destination, Claim::Unused);
                left.extend(removed.because_of(|| not_removed(path)).err());
            }
        }
        None => {
            let removed = removal::remove_stale(&unnamed);
            left.extend(removed.because_of(|| not_removed(&unnamed)).err());
        }
    }
    left.extend(remove_journal(job).err());
    left.extend(remove_kept(job).err());
    left
}
