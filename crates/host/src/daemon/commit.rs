//! The end of a migration: decision and switch. The clearing up is in `settle`.
//!
//! The binding record decides which image is authoritative, and only a transaction that is known
//! to be durable decides it. What each end leaves behind:
//!
//! | the inventory says | authoritative | removed |
//! | --- | --- | --- |
//! | preparing, running, aborted | source | destination, journal |
//! | committed | destination | journal; the source if asked |
//!
//! Files are removed before the job is recorded as ended, so a daemon that dies in between does it
//! again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use strake_api::control::{Reply, Request};
use strake_api::job::{JobId, MigrationStatus, Phase};
use strake_observe::{Because, Observation, Result};

use super::live::{Cell, Monitor};
use super::verdicts::Verdict;
use super::{Host, guard, note};
use crate::FileIdentity;
use crate::config::show;
use crate::crash;
use crate::inventory::{JobRecord, JobState};
use crate::monitor::connection::QUICK;
use crate::observations::{
    BindingSplit, CommitFailed, ImageRefused, JobForgotten, MonitorGarbled, MonitorKilled,
    MonitorRefused,
};
use crate::storage::removal::{self, Claim};

/// Pause between attempts to write a decision to an inventory that fails.
const DECISION_INTERVAL: Duration = Duration::from_secs(1);

impl Host {
    /// The monitor has everything at the destination and waits: decides and tells it. Asked again
    /// about the same job (on a new connection), it repeats what the inventory already holds.
    pub(super) fn decide(&self, cell: &Cell, monitor: &Monitor, id: &JobId) {
        let committed = self.decision(cell, monitor, id);
        tracing::info!(job = %id, committed, "decided");
        let decision = Request::JobDecision {
            job: id.clone(),
            committed,
        };
        if committed {
            crash::point("after-commit-before-reply");
        }
        let told = monitor
            .connection()
            .call("decide a job", decision, &[], QUICK);
        if let Err(seen) = told {
            // On the next connection the monitor asks again.
            note(seen);
            monitor.connection().close();
        }
        if committed {
            crash::point("after-commit-reply");
        }
    }

    fn decision(&self, cell: &Cell, monitor: &Monitor, id: &JobId) -> bool {
        loop {
            if let Some(committed) = self.decide_once(cell, id) {
                return committed;
            }
            // Nobody waits for the decision of a monitor that is gone: `settle_jobs` comes next.
            if monitor.process.wait(DECISION_INTERVAL) {
                return false;
            }
        }
    }

    /// The answer that was given before, or else one that is given from now on; `None` while
    /// nobody can know.
    fn decide_once(&self, cell: &Cell, id: &JobId) -> Option<bool> {
        let known = match self.inventory.job(id) {
            Ok(job) if job.vm == cell.name => self.verdicts.on(id),
            Ok(_) => return Some(false),
            Err(seen) if seen.is::<crate::observations::NoSuchJob>() => return Some(false),
            Err(seen) => match self.verdicts.known(id) {
                Some(known) => known,
                None => {
                    note(seen);
                    return None;
                }
            },
        };
        let mut verdict = guard(&known);
        match *verdict {
            Some(Verdict::Committed) => return Some(true),
            Some(Verdict::Refused) => return Some(false),
            Some(Verdict::Unclear) | None => {}
        }
        // Read again: until the lock was had, the job may have been cleared up.
        let job = match self.inventory.job(id) {
            Ok(job) => job,
            Err(seen) if seen.is::<crate::observations::NoSuchJob>() => {
                self.verdicts.forget(id);
                return Some(false);
            }
            Err(seen) => {
                note(seen);
                return None;
            }
        };
        let decided = match job.state {
            JobState::Committed => Verdict::Committed,
            JobState::Ended => {
                self.verdicts.forget(id);
                return Some(job.status.phase == Phase::Completed);
            }
            JobState::Preparing | JobState::Interrupted | JobState::Aborted => Verdict::Refused,
            JobState::Running => self.commit(cell, &job),
        };
        *verdict = Some(decided);
        match decided {
            Verdict::Committed => Some(true),
            Verdict::Refused => Some(false),
            Verdict::Unclear => None,
        }
    }

    /// Commits, or decides that the binding stays. Unclear if the transaction may or may not have
    /// reached the disk and the opposite cannot be made durable either: then nobody may be told
    /// anything yet, and the guest's disk waits.
    fn commit(&self, cell: &Cell, job: &JobRecord) -> Verdict {
        let committed = check_destination(job).and_then(|()| {
            crash::point("before-commit");
            self.inventory.commit_job(&job.id)
        });
        let Err(seen) = committed else {
            return Verdict::Committed;
        };
        let undone = seen
            .find("host.inventory-failed")
            .and_then(|failed| failed.datum("undone"))
            .is_none_or(|undone| *undone == true);
        cell.change(|live| live.observe(seen.clone()));
        note(seen.clone());
        match self.inventory.abort_job(&job.id, Some(&seen)) {
            Ok(()) => Verdict::Refused,
            Err(seen) if undone => {
                note(seen);
                // The inventory does not remember the refusal. What no longer exists, no daemon
                // after this one commits.
                if let Some(files) = &job.files
                    && let Ok(path) = job.destination.file()
                    && let Err(seen) = removal::remove(path, &files.destination, Claim::Ours)
                {
                    note(seen);
                }
                Verdict::Refused
            }
            Err(seen) => {
                note(seen);
                Verdict::Unclear
            }
        }
    }

    /// Makes sure that the job is never committed, so that its files may go; tells whether it is.
    pub(super) fn refuse_for_ever(&self, job: &JobRecord) -> bool {
        let known = self.verdicts.on(&job.id);
        let mut verdict = guard(&known);
        let before = *verdict;
        if before == Some(Verdict::Committed) {
            return false;
        }
        if let Err(seen) = self.inventory.abort_job(&job.id, None) {
            // It was committed meanwhile, or the inventory cannot be written. That nothing can be
            // recorded is no reason to keep the files, unless a commit may have got through.
            let state = self.inventory.job(&job.id).map(|job| job.state);
            let decided =
                state.is_ok_and(|state| matches!(state, JobState::Committed | JobState::Ended));
            if decided || before == Some(Verdict::Unclear) {
                note(seen);
                return false;
            }
        }
        *verdict = Some(Verdict::Refused);
        true
    }

    /// The monitor says that a job has ended.
    pub(super) fn job_ended(&self, cell: &Cell, monitor: &Monitor, status: &MigrationStatus) {
        let _jobs = guard(&cell.jobs);
        self.finish(cell, monitor, status);
    }

    /// The caller holds the VM's lock of jobs: no other job can take the place of one that has
    /// just been finished while its files are being removed.
    fn finish(&self, cell: &Cell, monitor: &Monitor, status: &MigrationStatus) {
        let job = match self.inventory.job(&status.job) {
            Ok(job) if job.vm == cell.name && job.state != JobState::Ended => job,
            Ok(_) => return,
            Err(seen) => return note(seen),
        };
        match (status.phase, job.state) {
            (Phase::Completed, JobState::Committed) => self.finish_committed(&job, status),
            (Phase::Failed | Phase::Cancelled, JobState::Committed) | (Phase::Completed, _) => {
                self.split(cell, monitor, &job, status)
            }
            (Phase::Failed | Phase::Cancelled, _) => self.finish_on_source(&job, status),
            _ => {}
        }
    }

    /// The monitor runs the disk on another image than the binding names. What the guest writes
    /// there would be lost, so the guest must not write: the monitor ends now, and its jobs are
    /// settled by what the inventory says.
    fn split(&self, cell: &Cell, monitor: &Monitor, job: &JobRecord, status: &MigrationStatus) {
        let bound = match job.state {
            JobState::Committed => &job.destination,
            _ => &job.source,
        };
        let seen = Observation::from(BindingSplit {
            job: job.id.to_string(),
            bound: bound.to_string(),
            said: format!("the job is {:?}", status.phase),
        })
        .because(MonitorKilled {
            vm: cell.name.clone(),
            pid: monitor.process.pid(),
            reason: "it runs a disk on the wrong image".to_owned(),
        })
        .because_all(status.failure.clone());
        cell.change(|live| live.observe(seen.clone()));
        note(seen);
        monitor.process.kill();
    }

    /// Compares the jobs of the inventory with those that the monitor knows. Both are asked under
    /// the lock: a job that begins in between would look forgotten.
    pub(super) fn reconcile_jobs(&self, cell: &Cell, monitor: &Monitor) {
        let _jobs = guard(&cell.jobs);
        let Some(status) = monitor.status() else {
            return;
        };
        let active = match self.inventory.active_jobs(&cell.name) {
            Ok(active) => active,
            Err(seen) => return note(seen),
        };
        for job in active {
            let known = status.jobs.iter().find(|known| known.job == job.id);
            if known.is_some_and(|known| !known.phase.is_final()) {
                // A job that runs or waits goes on; the monitor itself asks for the decision.
                continue;
            }
            // The list is short: the last that ended, without their passes.
            match self.asked_for(monitor, &job) {
                Ok(status) if !status.phase.is_final() => {}
                Ok(status) => self.finish(cell, monitor, &status),
                Err(seen) if seen.is::<MonitorRefused>() && known.is_none() => {
                    let forgotten = JobForgotten {
                        job: job.id.to_string(),
                    };
                    self.settle(&job, forgotten.into());
                }
                // Asked again on the next connection, or by `check_jobs`.
                Err(seen) => note(seen),
            }
        }
    }

    fn asked_for(&self, monitor: &Monitor, job: &JobRecord) -> Result<MigrationStatus> {
        let request = Request::JobStatus {
            job: job.id.clone(),
        };
        let reply = monitor
            .connection()
            .call("job status", request, &[], QUICK)?;
        match reply {
            Reply::Job(status) if status.job == job.id => Ok(status),
            _ => Err(MonitorGarbled {
                reason: format!("the answer to a question for job {} is none", job.id),
            }
            .into()),
        }
    }
}

/// Before the commit: the destination must still be the file that was copied to. Somebody may have
/// removed its name or its directory; then the copy is good and nobody would ever find it.
fn check_destination(job: &JobRecord) -> Result<()> {
    let failed = || CommitFailed {
        job: job.id.to_string(),
    };
    let path = job.destination.file()?;
    let found = FileIdentity::at(path).because_of(failed)?;
    let reason = match (found, &job.files) {
        (Some(found), Some(files)) if found.is(&files.destination) => return Ok(()),
        (Some(_), _) => "it is no longer the file that was copied to",
        (None, _) => "it was removed while it was copied to",
    };
    Err(ImageRefused {
        path: show(path),
        reason: reason.to_owned(),
        advice: "leave the destination alone while a job runs".to_owned(),
    })
    .because_of(failed)
}

/// The journal of a job: beside its destination.
pub(super) fn journal_path(destination: &Path) -> PathBuf {
    beside(destination, "strake-journal")
}

/// What the destination is called until it is recorded which file it is.
pub(super) fn unnamed_path(destination: &Path) -> PathBuf {
    beside(destination, "strake-new")
}

/// Whether only Strake gives such a name: to a job's files, which it removes whatever they are.
pub(super) fn is_a_jobs(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let ends = [&b".strake-journal"[..], b".strake-new", b".strake-kept"];
    name.starts_with(b".") && ends.iter().any(|end| name.ends_with(end))
}

pub(super) fn beside(destination: &Path, what: &str) -> PathBuf {
    let name = destination
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    destination.with_file_name(format!(".{name}.{what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_a_jobs_files_are_known() {
        let image = Path::new("/fast/root.raw");
        assert!(is_a_jobs(&journal_path(image)) && is_a_jobs(&unnamed_path(image)));
        assert!(!is_a_jobs(image) && !is_a_jobs(Path::new("/fast/.root.raw")));
        assert!(!is_a_jobs(Path::new("/fast/root.strake-new")));
    }
}
