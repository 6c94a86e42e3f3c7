//! The begin of a migration, its progress, its cancelling.
//!
//! Everything that can be refused is refused before a byte is copied. Then, in this order: the job
//! is recorded, so that a daemon that dies from here on knows what to clear up; the destination and
//! the journal are created and synced, under names that only Strake gives; it is recorded which
//! files they are; the destination gets its own name, unless that is somebody's by now; the monitor
//! is told. What follows is in `commit`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use strake_api::control::{Reply, Request};
use strake_api::image::ImageFormat;
use strake_api::job::{
    JobId, JobKind, Latency, LimitsChange, MigrationLimits, MigrationStatus, Phase, Space,
};
use strake_api::rest::{Job, MigrateDisk};
use strake_observe::{Because, OsContext, Result};

use super::commit::{journal_path, unnamed_path};
use super::files::{self, Files};
use super::interrupted::kept_path;
use super::live::{Cell, Monitor};
use super::{Host, guard, note, task};
use crate::config::show;
use crate::crash;
use crate::inventory::{DiskRecord, JobFiles, JobRecord, JobState, NewJob};
use crate::monitor::descriptors::Descriptors;
use crate::observations::{
    DestinationExists, ImageRefused, JobNotActive, MigrationRefused, MonitorGarbled,
    MonitorRefused, NoSuchDisk, RequestRefused, SameDatastore,
};
use crate::storage::chain;
use crate::storage::removal::{self, Claim};
use crate::storage::store;
use crate::{Binding, FileIdentity};

/// How long a monitor may take to accept a job.
const ACCEPT_PATIENCE: Duration = Duration::from_secs(30);

/// How long a look at a job waits for the monitor.
const LOOK_PATIENCE: Duration = Duration::from_secs(2);

/// The longest pause that may be asked for: guests give up on their disks after 30 s.
const MAX_PAUSE_MS: u64 = 20_000;

impl Host {
    /// Begins to migrate a disk of a VM that runs.
    ///
    /// # Errors
    /// [`MigrationRefused`], with the reason; nothing was copied and nothing is left behind then.
    pub fn migrate(&self, vm: &str, disk: &str, request: &MigrateDisk) -> Result<Job> {
        let cell = self.cell(vm)?;
        let refused = || MigrationRefused {
            vm: vm.to_owned(),
            disk: disk.to_owned(),
            to: request.to.clone(),
        };
        let doing = format!("migrate disk '{disk}' of VM '{vm}'");
        let id = task(doing, refused, |_| {
            let _operation = guard(&cell.operation);
            let mut new = self.plan(vm, disk, request)?;
            let advice = "start the VM first: a disk is migrated while its VM runs";
            let monitor = cell.live().running(vm, advice)?;
            new.size = running_size(&monitor, disk)?;
            self.begin(&cell, &monitor, &new, None)
        })?;
        self.job(&id)
    }

    /// Decides everything, changes nothing.
    fn plan(&self, vm: &str, disk: &str, request: &MigrateDisk) -> Result<NewJob> {
        check_limits(&request.limits)?;
        let record = self.inventory.vm(vm)?;
        let Some(bound) = record.disks.iter().find(|of| of.name == disk) else {
            let has: Vec<_> = record.disks.iter().map(|of| of.name.as_str()).collect();
            return Err(NoSuchDisk {
                vm: vm.to_owned(),
                disk: disk.to_owned(),
                has: has.join(", "),
            }
            .into());
        };
        let to = self.inventory.datastore(&request.to)?;
        let format = request.format.unwrap_or(bound.image.format);
        // Within a datastore only another format is something else.
        if bound.datastore.as_deref() == Some(to.name.as_str()) && format == bound.image.format {
            return Err(SameDatastore {
                disk: disk.to_owned(),
                datastore: to.name,
            }
            .into());
        }
        let source = bound.image.file()?;
        let looks = chain::look(&bound.image, &self.allowed_below()?)?;
        let looks = looks.ok_or_else(|| ImageRefused {
            path: show(source),
            reason: "there is no such file any more".to_owned(),
            advice: "restore its name: the VM still has it open".to_owned(),
        })?;
        let found = FileIdentity::at(source)?;
        if let (Some(given), Some(found)) = (&bound.file, &found)
            && !found.is(given)
        {
            return Err(ImageRefused {
                path: show(source),
                reason: "another file has taken its place since the VM was started".to_owned(),
                advice: "give the VM's own image its name back: the VM still has it open"
                    .to_owned(),
            }
            .into());
        }
        let destination = to.path.join(file_name(vm, bound, looks.regular, format)?);
        store::room(&to.name, &to.path)?;
        refuse_existing(&destination)?;
        let bytes = match request.limits.space {
            Space::Thin => looks.allocated,
            Space::Thick if format == ImageFormat::Raw => looks.size,
            Space::Thick => {
                return Err(RequestRefused {
                    reason: format!("a {format} image takes its space as it needs it"),
                    advice: "migrate to a raw image for --thick, or leave it out".to_owned(),
                }
                .into());
            }
        };
        store::require_room(&to.name, &to.path, bytes)?;
        Ok(NewJob {
            vm: vm.to_owned(),
            disk: disk.to_owned(),
            size: looks.size,
            source: bound.image.clone(),
            destination: Binding::new(destination, format),
            to: to.name,
            limits: request.limits.clone(),
            kind: JobKind::Migrate,
            snapshot: None,
            layer: None,
            remove_source: request.remove_source,
            // Only as it was recorded when the monitor got it: what bears the name now may be
            // another file, which nobody may remove.
            source_file: bound.file.clone(),
        })
    }

    /// Begins a job with the monitor. `below` is what the destination is to be based on.
    pub(super) fn begin(
        &self,
        cell: &Cell,
        monitor: &Monitor,
        new: &NewJob,
        below: Option<&Binding>,
    ) -> Result<JobId> {
        let _jobs = guard(&cell.jobs);
        let (job, files) = self.prepare_job(new, below)?;
        match self.hand_over(monitor, &job, &files) {
            Ok(()) => {
                crash::point("after-job-accepted");
                Ok(job.id)
            }
            Err(seen) => {
                self.take_back(&job, Some(&files.known));
                Err(seen)
            }
        }
    }

    /// Records a job and makes its files. The caller holds the VM's lock of jobs.
    pub(super) fn prepare_job(
        &self,
        new: &NewJob,
        below: Option<&Binding>,
    ) -> Result<(JobRecord, Files)> {
        let job = {
            let _placing = guard(&self.placing);
            self.inventory.reserve_job(new)?
        };
        crash::point("after-job-reserved");
        let files = match Files::make(new, &job, below) {
            Ok(files) => files,
            Err(seen) => {
                self.take_back(&job, None);
                return Err(seen);
            }
        };
        crash::point("after-destination-created");
        let recorded = self.inventory.job_running(&job.id, &files.known);
        let prepared = recorded.and_then(|()| {
            crash::point("after-job-recorded");
            if job.kind != JobKind::Consolidate {
                files::give_name(job.destination.file()?)?;
            }
            crash::point("after-destination-named");
            Ok(())
        });
        match prepared {
            Ok(()) => Ok((self.inventory.job(&job.id)?, files)),
            Err(seen) => {
                self.take_back(&job, Some(&files.known));
                Err(seen)
            }
        }
    }

    /// Tells the monitor. If it is not known whether the monitor has heard, the job stands: the
    /// supervisor settles it, either with the monitor on a new connection or without it.
    fn hand_over(&self, monitor: &Monitor, job: &JobRecord, files: &Files) -> Result<()> {
        let mut fds = Descriptors::default();
        let request = files.request(job, &mut fds)?;
        let connection = monitor.connection();
        let what = match job.kind {
            JobKind::Migrate => "migrate a disk",
            JobKind::Snapshot | JobKind::Revert => "take a snapshot of a disk",
            JobKind::Consolidate => "consolidate a disk",
        };
        match connection.call(what, request, &fds.all(), ACCEPT_PATIENCE) {
            Ok(_) => Ok(()),
            Err(seen) if seen.is::<MonitorRefused>() => Err(seen),
            Err(seen) => {
                note(seen);
                connection.close();
                Ok(())
            }
        }
    }

    /// A job that the monitor never had: as if it had never been. Only files that were made for
    /// it go; what is in their place may be anybody's.
    fn take_back(&self, job: &JobRecord, made: Option<&JobFiles>) {
        let mut left = Vec::new();
        if let (Some(made), Ok(destination)) = (made, job.destination.file())
            && job.kind != JobKind::Consolidate
        {
            let unnamed = unnamed_path(destination);
            for path in [destination, &unnamed] {
                left.extend(removal::remove(path, &made.destination, Claim::Ours).err());
            }
            if let Some(journal) = &made.journal {
                let path = journal_path(destination);
                left.extend(removal::remove(&path, journal, Claim::Ours).err());
            }
            if let (Some(kept), Ok(source)) = (&made.kept, job.source.file()) {
                let path = kept_path(source, &job.id);
                left.extend(removal::remove(&path, kept, Claim::Ours).err());
            }
        }
        left.extend(self.inventory.drop_job(&job.id).err());
        left.into_iter().for_each(note);
    }

    /// All jobs, the newest last.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn jobs(&self) -> Result<Vec<Job>> {
        let jobs = self.inventory.jobs()?;
        Ok(jobs.into_iter().map(|job| self.job_view(job)).collect())
    }

    /// One job, with the monitor's progress while it runs.
    ///
    /// # Errors
    /// No such job, or the inventory cannot be read.
    pub fn job(&self, id: &JobId) -> Result<Job> {
        Ok(self.job_view(self.inventory.job(id)?))
    }

    fn job_view(&self, record: JobRecord) -> Job {
        let status = match record.state {
            JobState::Ended => record.status,
            JobState::Interrupted => record.status,
            _ => self.live_status(&record).unwrap_or(record.status),
        };
        Job {
            vm: record.vm,
            kind: record.kind,
            snapshot: record.snapshot,
            source: record.source.to_string(),
            source_format: record.source.format,
            destination: record.destination.to_string(),
            format: record.destination.format,
            to: record.to,
            limits: record.limits,
            status,
        }
    }

    /// The monitor's status. It is final only once the inventory says so too: until then there
    /// are still files to be removed.
    fn live_status(&self, record: &JobRecord) -> Option<MigrationStatus> {
        let monitor = self.existing_cell(&record.vm)?.live().monitor.clone()?;
        let request = Request::JobStatus {
            job: record.id.clone(),
        };
        let reply = monitor
            .connection()
            .call("job status", request, &[], LOOK_PATIENCE);
        let Ok(Reply::Job(mut status)) = reply else {
            return None;
        };
        if status.phase.is_final() {
            match self.inventory.job(&record.id) {
                Ok(job) if job.state == JobState::Ended => return Some(job.status),
                _ => {
                    status.phase = match status.phase {
                        Phase::Completed => Phase::AwaitingCommit,
                        _ => Phase::Copying,
                    };
                    status.failure = None;
                }
            }
        }
        Some(status)
    }

    /// Asks the monitor to end a job; the disk stays on its source.
    ///
    /// # Errors
    /// No such job; [`JobNotActive`] if it is over or beyond cancelling.
    pub fn cancel_job(&self, id: &JobId) -> Result<Job> {
        if let Some(ended) = self.cancel_interrupted(id)? {
            return Ok(ended);
        }
        let request = Request::CancelJob { job: id.clone() };
        self.ask_of_job(id, "cancel a job", "not to be cancelled now", request)?;
        self.job(id)
    }

    /// Lets a job rest until [`Host::resume_job`]: nothing is copied and the disk is not switched
    /// over; what the guest writes is marked.
    ///
    /// # Errors
    /// No such job; [`JobNotActive`] if it is over or beyond pausing.
    pub fn pause_job(&self, id: &JobId) -> Result<Job> {
        let request = Request::PauseJob { job: id.clone() };
        self.ask_of_job(id, "pause a job", "not to be paused now", request)?;
        self.job(id)
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// No such job; [`JobNotActive`] if it is over.
    pub fn resume_job(&self, id: &JobId) -> Result<Job> {
        let request = Request::ResumeJob { job: id.clone() };
        self.ask_of_job(id, "resume a job", "not to be resumed now", request)?;
        self.job(id)
    }

    /// Changes the limits of a job while it runs.
    ///
    /// # Errors
    /// No such job; [`JobNotActive`] if it is over; a limit is out of range.
    pub fn set_job(&self, id: &JobId, change: &LimitsChange) -> Result<Job> {
        let mut limits = self.inventory.job(id)?.limits;
        change.apply(&mut limits);
        check_limits(&limits)?;
        let request = Request::SetJob {
            job: id.clone(),
            change: change.clone(),
        };
        self.ask_of_job(
            id,
            "change a job's limits",
            "not to be changed now",
            request,
        )?;
        self.inventory.limit_job(id, &limits)?;
        self.job(id)
    }

    /// Asks something of the monitor that runs a job.
    fn ask_of_job(
        &self,
        id: &JobId,
        what: &'static str,
        refused: &str,
        request: Request,
    ) -> Result<()> {
        let record = self.inventory.job(id)?;
        let not_active = |phase: &str| JobNotActive {
            job: id.to_string(),
            phase: phase.to_owned(),
        };
        if record.state == JobState::Ended {
            let phase = match record.status.phase {
                Phase::Completed => "completed",
                Phase::Cancelled => "cancelled",
                _ => "failed",
            };
            return Err(not_active(phase).into());
        }
        if record.state == JobState::Interrupted {
            let phase = "interrupted: its VM's next start takes it up again";
            return Err(not_active(phase).into());
        }
        if record.state == JobState::Committed {
            return Err(not_active("committed").into());
        }
        let monitor = self
            .existing_cell(&record.vm)
            .and_then(|cell| cell.live().monitor.clone());
        let Some(monitor) = monitor else {
            return Err(not_active("without a monitor and about to end").into());
        };
        monitor
            .connection()
            .call(what, request, &[], LOOK_PATIENCE)
            .because_of(|| not_active(refused))?;
        Ok(())
    }
}

pub(super) fn check_limits(limits: &MigrationLimits) -> Result<()> {
    let refused = |reason: &str, advice: &str| {
        Err(RequestRefused {
            reason: reason.to_owned(),
            advice: advice.to_owned(),
        }
        .into())
    };
    if limits.pause_ms == 0 || limits.pause_ms > MAX_PAUSE_MS {
        return refused(
            "the allowed pause is out of range",
            "allow 1 to 20000 milliseconds; guests give up on their disks after 30 s",
        );
    }
    if limits.max_passes == 0 {
        return refused("a migration needs a pass", "allow at least one pass");
    }
    if limits.bytes_per_second == Some(0) {
        return refused(
            "at 0 bytes per second it would never end",
            "give a rate, or none for no limit",
        );
    }
    if limits.iops == Some(0) {
        return refused(
            "at 0 requests per second it would never end",
            "give a number, or none for no limit",
        );
    }
    if limits.latency == Latency::Us(0) {
        return refused(
            "no request takes less than 0 microseconds",
            "give a time above 0, or `auto`, or `any` for a copy that never gives way",
        );
    }
    Ok(())
}

/// The file keeps its name, but for its end if that tells the format; what was a block device gets
/// one.
fn file_name(vm: &str, disk: &DiskRecord, regular: bool, format: ImageFormat) -> Result<PathBuf> {
    Ok(match disk.image.file()?.file_name() {
        Some(name) if regular && format == disk.image.format => PathBuf::from(name),
        Some(name) if regular => with_end(Path::new(name), format),
        _ => PathBuf::from(format!("{vm}-{}.{format}", disk.name)),
    })
}

fn with_end(name: &Path, format: ImageFormat) -> PathBuf {
    let end = name.extension().and_then(|end| end.to_str());
    match end {
        Some("raw" | "img" | "qcow2") => name.with_extension(format.name()),
        _ => {
            let mut name = name.as_os_str().to_owned();
            name.push(".");
            name.push(format.name());
            PathBuf::from(name)
        }
    }
}

pub(super) fn refuse_existing(path: &Path) -> Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).os("stat", path.display()),
        Ok(_) => Err(DestinationExists {
            path: show(path),
            user: "perhaps the source of an earlier migration".to_owned(),
        }
        .into()),
    }
}

/// What the monitor says: the guest's disk is as large as it was when it was started, whatever has
/// become of the name of its image.
pub(super) fn running_size(monitor: &Monitor, name: &str) -> Result<u64> {
    let reply = monitor
        .connection()
        .call("status", Request::Status, &[], LOOK_PATIENCE)?;
    let disks = match reply {
        Reply::Status(status) => status.disks,
        _ => Vec::new(),
    };
    let disk = disks.iter().find(|disk| disk.name == name);
    disk.map(|disk| disk.size_bytes).ok_or_else(|| {
        MonitorGarbled {
            reason: format!("its status does not tell disk '{name}'"),
        }
        .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_format_is_told_by_the_end_of_the_name() {
        for (name, format, expected) in [
            ("root.raw", ImageFormat::Qcow2, "root.qcow2"),
            ("root.img", ImageFormat::Qcow2, "root.qcow2"),
            ("root.qcow2", ImageFormat::Raw, "root.raw"),
            ("web1.example", ImageFormat::Qcow2, "web1.example.qcow2"),
            ("root", ImageFormat::Raw, "root.raw"),
        ] {
            assert_eq!(with_end(Path::new(name), format), Path::new(expected));
        }
    }
}
