//! Jobs whose VM ended before them, and that the VM's next start takes up again.
//!
//! A monitor keeps a job's progress in a file beside the source: it claims regions that are the same on
//! both sides, and keeps that true for as long as it lives (`strake_block`, `kept`). Whoever else writes to the
//! source makes it false. So from the end of one monitor to the start of the next nobody may:
//!
//! * when the monitor is gone it is recorded that the job is interrupted, which also decides that it is not
//!   committed; then, with the source locked, what the source looks like (its [`Stamp`]);
//! * a start opens and locks the VM's images first. If the source still looks the same, the new monitor gets the
//!   job's files before its guest runs. In any other case the job is aborted, durably, before that.
//!
//! The states are changed by transactions that name the state before, so of a start that aborts and
//! somebody slow who still records what the source looks like exactly one comes first.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use strake_api::control::{KeepConfig, Request};
use strake_api::job::{JobId, Phase};
use strake_api::rest::Job;
use strake_block::lock::{self, Share};
use strake_observe::{Observation, OsContext, Result};

use super::commit::{beside, journal_path};
use super::live::Cell;
use super::{Host, guard, note};
use crate::config::show;
use crate::inventory::{JobFiles, JobRecord, JobState, VmRecord};
use crate::monitor::connection::Connection;
use crate::monitor::descriptors::Descriptors;
use crate::observations::{ImageInUse, ImageRefused, JobNotTakenUp, MonitorRefused};
use crate::storage::chain::{self, OpenImage};
use crate::storage::image::{self, Mode};
use crate::storage::store;
use crate::{FileIdentity, Stamp, crash};

/// How long a start waits for whoever settles the jobs of the run before. Then it goes on without them.
const TURN_PATIENCE: Duration = Duration::from_secs(5);

/// How long a monitor may take to accept a job.
const ACCEPT_PATIENCE: Duration = Duration::from_secs(30);

/// A job to be taken up again, with its files.
#[derive(Debug)]
pub(super) struct Again {
    job: JobRecord,
    destination: OpenImage,
    journal: OwnedFd,
    kept: OwnedFd,
}

/// Where a job keeps its progress: beside its source, which others may be migrated from as well.
pub(super) fn kept_path(source: &Path, job: &JobId) -> PathBuf {
    beside(source, &format!("{job}.strake-kept"))
}

/// Creates the file; none where there can be none: then the job cannot be taken up again, and that is all.
pub(super) fn create_kept(job: &JobRecord) -> Option<(OwnedFd, FileIdentity)> {
    let source = job.source.file().ok()?;
    if !std::fs::metadata(source).is_ok_and(|meta| meta.is_file()) {
        return None; // Beside a device are devices.
    }
    let path = kept_path(source, &job.id);
    let create = || -> Result<(OwnedFd, FileIdentity)> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .os("open", path.display())?;
        let identity = FileIdentity::of(&file, &path)?;
        lock::take(&file, Share::Alone).os("fcntl(F_OFD_SETLK)", path.display())?;
        if let Some(directory) = path.parent() {
            store::sync(directory)?;
        }
        Ok((file.into(), identity))
    };
    match create() {
        Ok(made) => Some(made),
        Err(seen) => {
            tracing::info!(job = %job.id, %seen, "a job's progress is not kept");
            None
        }
    }
}

/// Opens a file of a job, if it is still that file and nobody has it.
fn open(path: &Path, meant: &FileIdentity) -> Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(i32::from_ne_bytes(OFlags::NOFOLLOW.bits().to_ne_bytes()))
        .open(path)
        .os("open", path.display())?;
    is(&FileIdentity::of(&file, path)?, meant, path)?;
    if !lock::take(&file, Share::Alone).os("fcntl(F_OFD_SETLK)", path.display())? {
        return Err(ImageInUse {
            path: show(path),
            user: "another process, which has it locked".to_owned(),
        }
        .into());
    }
    Ok(file.into())
}

fn is(found: &FileIdentity, meant: &FileIdentity, path: &Path) -> Result<()> {
    if found.is(meant) {
        return Ok(());
    }
    Err(refused(path, "another file has taken its place"))
}

fn refused(path: &Path, reason: &str) -> Observation {
    ImageRefused {
        path: show(path),
        reason: reason.to_owned(),
        advice: "start the migration again".to_owned(),
    }
    .into()
}

impl Host {
    /// The monitor of a running job is gone: decides that the binding stays for now. False if the job
    /// keeps nothing, or if that cannot be recorded.
    pub(super) fn interrupt(&self, job: &JobRecord) -> bool {
        let kept = job.files.as_ref().is_some_and(|files| files.kept.is_some());
        if job.state != JobState::Running || !kept {
            return false;
        }
        match self.inventory.interrupt_job(&job.id) {
            Ok(()) => {
                self.verdicts.forget(&job.id);
                true
            }
            Err(seen) => {
                note(seen);
                false
            }
        }
    }

    /// Records what the source of an interrupted job looks like. False if it cannot be taken up again: it
    /// had kept nothing yet, or its VM or its source is gone.
    pub(super) fn stamp(&self, job: &JobRecord, why: &Observation) -> bool {
        let stamped = || -> Result<bool> {
            let source = job.source.file()?;
            let kept = std::fs::metadata(kept_path(source, &job.id));
            if self.inventory.vm(&job.vm).is_err() || !kept.is_ok_and(|kept| kept.len() > 0) {
                return Ok(false);
            }
            // Waits until the kernel has let the monitor's requests end.
            let user = || "another process, which has it locked".to_owned();
            let file = File::from(image::open_any(source, Mode::Write, user)?);
            let mut status = job.status.clone();
            status.phase = Phase::Interrupted;
            status.failure = Some(why.clone());
            let stamp = Stamp::of(&file, source)?;
            self.inventory.stamp_job(&job.id, &stamp, &status)?;
            Ok(true)
        };
        stamped().unwrap_or_else(|seen| {
            note(seen);
            false
        })
    }

    /// Opens the files of the jobs that a VM's start is to take up again. The VM's images are open and
    /// locked. What cannot be taken up is aborted; its files go later.
    ///
    /// # Errors
    /// The inventory does not take it: then the guest must not run.
    pub(super) fn prepare_again(&self, cell: &Cell, vm: &VmRecord) -> Result<Vec<Again>> {
        let concerned = |job: &JobRecord| {
            let kept = job.files.as_ref().is_some_and(|files| files.kept.is_some());
            kept && matches!(job.state, JobState::Running | JobState::Interrupted)
        };
        if !self.inventory.active_jobs(&vm.name)?.iter().any(concerned) {
            return Ok(Vec::new());
        }
        let deadline = Instant::now() + TURN_PATIENCE;
        let turn = loop {
            match cell.jobs.try_lock() {
                Ok(turn) => break Some(turn),
                Err(std::sync::TryLockError::Poisoned(poisoned)) => {
                    break Some(poisoned.into_inner());
                }
                Err(std::sync::TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    break None;
                }
                Err(std::sync::TryLockError::WouldBlock) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        let mut again = Vec::new();
        for job in self.inventory.active_jobs(&vm.name)? {
            if !concerned(&job) {
                continue;
            }
            let opened = match &turn {
                Some(_) => self.open_again(vm, job.clone()),
                None => Err(refused(
                    job.source.file()?,
                    "what it looked like at the end of the last run is not recorded yet",
                )),
            };
            match opened {
                Ok(opened) => again.push(opened),
                Err(seen) => self.give_up(&job, seen)?,
            }
        }
        Ok(again)
    }

    fn open_again(&self, vm: &VmRecord, job: JobRecord) -> Result<Again> {
        let source = job.source.file()?;
        let bound = vm.disks.iter().find(|disk| disk.name == job.disk);
        if bound.is_none_or(|bound| bound.image != job.source) {
            return Err(refused(source, "the disk is on another image by now"));
        }
        let file = File::open(source).os("open", source.display())?;
        if let Some(meant) = &job.source_file {
            is(&FileIdentity::of(&file, source)?, meant, source)?;
        }
        if job.stamp != Some(Stamp::of(&file, source)?) {
            return Err(refused(source, "it has changed since the VM ended"));
        }
        let Some(JobFiles {
            destination: meant,
            journal: Some(journal),
            kept: Some(kept),
        }) = job.files.clone()
        else {
            return Err(refused(source, "nothing of the job was kept"));
        };
        let path = job.destination.file()?;
        let user = |_: &Path| "another process, which has it locked".to_owned();
        let destination = chain::open(&job.destination, Mode::Write, &[], &user)?;
        is(&destination.identity, &meant, path)?;
        Ok(Again {
            journal: open(&journal_path(path), &journal)?,
            kept: open(&kept_path(source, &job.id), &kept)?,
            destination,
            job,
        })
    }

    /// Gives a new monitor a job of the run before. The guest does not run yet.
    ///
    /// # Errors
    /// It is not known whether the monitor has it, or the inventory does not take it: then the guest must not
    /// run.
    pub(super) fn take_up(&self, connection: &Connection, again: Again) -> Result<()> {
        let Again {
            job,
            destination,
            journal,
            kept,
        } = again;
        let mut fds = Descriptors::default();
        let request = Request::MigrateDisk {
            job: job.id.clone(),
            disk: job.disk.clone(),
            destination: destination.give(&mut fds)?,
            journal: fds.add(journal)?,
            limits: job.limits.clone(),
            keep: Some(KeepConfig::Again(fds.add(kept)?)),
        };
        self.inventory.take_up_job(&job.id)?;
        self.verdicts.forget(&job.id);
        crash::point("after-job-taken-up");
        match connection.call("take a job up again", request, &fds.all(), ACCEPT_PATIENCE) {
            Ok(_) => {
                tracing::info!(job = %job.id, "taken up again");
                Ok(())
            }
            Err(seen) if seen.is::<MonitorRefused>() => self.give_up(&job, seen),
            Err(seen) => Err(seen),
        }
    }

    /// The guest will run without the job: from now on nobody may believe what it has kept.
    fn give_up(&self, job: &JobRecord, why: Observation) -> Result<()> {
        let seen = Observation::from(JobNotTakenUp {
            job: job.id.to_string(),
        })
        .because(why);
        note(seen.clone());
        self.inventory.abort_job(&job.id, Some(&seen))
    }

    /// Ends an interrupted job; the disk stays on its source. None if it is not interrupted.
    pub(super) fn cancel_interrupted(&self, id: &JobId) -> Result<Option<Job>> {
        let job = self.inventory.job(id)?;
        if job.state != JobState::Interrupted {
            return Ok(None);
        }
        let cell = self.cell(&job.vm)?;
        let _jobs = guard(&cell.jobs);
        if self.inventory.job(id)?.state != JobState::Interrupted {
            return Ok(None);
        }
        self.end_interrupted(job);
        self.job(id).map(Some)
    }

    fn end_interrupted(&self, mut job: JobRecord) {
        job.status.failure = None;
        let mut status = job.status.clone();
        status.phase = Phase::Cancelled;
        self.finish_on_source(&job, &status);
    }

    /// The VM is about to be removed: so are its interrupted jobs.
    pub(super) fn end_all_interrupted(&self, cell: &Cell) -> Result<()> {
        let _jobs = guard(&cell.jobs);
        for job in self.inventory.active_jobs(&cell.name)? {
            if job.state == JobState::Interrupted {
                self.end_interrupted(job);
            }
        }
        Ok(())
    }
}
