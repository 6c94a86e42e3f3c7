//! Migrations: one copy, then the question for the commit.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::abort;
use std::sync::Arc;

use strake_api::control::{Event, FdIndex, ImageConfig, KeepConfig, LayerConfig, Reply};
use strake_api::job::{Ceiling, JobId, LimitsChange, MigrationStatus, PassReport, Phase, Progress};
use strake_block::Image;
use strake_observe::{OsContext, Result};

use crate::guest::Machine;
use crate::images::{self, Fds};
use crate::staged;

/// What is to be migrated.
pub(crate) struct Order {
    pub(crate) job: JobId,
    pub(crate) disk: String,
    pub(crate) keep: Option<KeepConfig>,
    pub(crate) to: To,
}

/// What a job puts in the place of a disk's image.
pub(crate) enum To {
    Copy {
        destination: ImageConfig,
        journal: FdIndex,
    },
    Cover(LayerConfig),
    Below(LayerConfig),
}

pub(crate) struct Job {
    pub(crate) status: MigrationStatus,
    destination: Option<Arc<dyn Image>>,
    /// Whether the destination has the source below it.
    covers: bool,
    _journal: Option<OwnedFd>,
    _kept: Option<File>,
}

impl Job {
    pub(crate) fn awaits(&self) -> bool {
        self.status.phase == Phase::AwaitingCommit
    }
}

impl Machine {
    pub(crate) fn job(&mut self, id: &JobId) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.status.job == *id)
    }

    pub(crate) fn migrate(
        &mut self,
        order: Order,
        fds: Vec<OwnedFd>,
        events: &mut Vec<Event>,
    ) -> Reply {
        if self.told("job=refuse") {
            return Reply::Failed(staged("job=refuse"));
        }
        let mut fds = Fds::new(fds);
        let disk = self.disks.iter().find(|of| of.name == order.disk);
        let opened = match (&order.to, disk) {
            (To::Copy { destination, .. }, _) => images::open(destination, false, &mut fds),
            (To::Cover(overlay), Some(disk)) => images::cover(&disk.image, overlay, &mut fds),
            (To::Below(below), Some(disk)) => images::below(&disk.image, below, &mut fds),
            (To::Cover(_) | To::Below(_), None) => Err(staged("no such disk")),
        };
        let destination = match opened {
            Ok(image) => image,
            Err(seen) => return Reply::Failed(seen),
        };
        let covers = matches!(order.to, To::Cover(_));
        let journal = match order.to {
            To::Copy { journal, .. } => fds.take(journal),
            To::Cover(_) | To::Below(_) => None,
        };
        // What is kept is that something was.
        let kept = match order.keep {
            Some(KeepConfig::New(file)) => {
                let kept = fds.take(file).map(File::from);
                if self.told("job=keep") {
                    let _ = kept.as_ref().map(|mut file| file.write_all(b"kept"));
                }
                kept
            }
            Some(KeepConfig::Again(_)) if self.told("job=refuse-again") => {
                return Reply::Failed(staged("job=refuse-again"));
            }
            Some(KeepConfig::Again(file)) => fds.take(file).map(File::from),
            None => None,
        };
        let again = matches!(order.keep, Some(KeepConfig::Again(_)));
        let id = order.job.clone();
        let disk = self.disks.iter().find(|of| of.name == order.disk);
        let size = disk.map_or(0, |of| of.size);
        let job = Job {
            status: MigrationStatus {
                phase: Phase::Copying,
                throughput: if again { 2222 } else { 1 },
                elapsed_ms: 1,
                ..MigrationStatus::new(order.job, order.disk, size)
            },
            destination: Some(destination),
            covers,
            _journal: journal,
            _kept: kept,
        };
        self.jobs.push(job);
        if !self.told("job=hold") {
            self.copy(&id, events);
        }
        Reply::Done
    }

    /// The jobs that were held go on.
    pub(crate) fn go_on(&mut self, events: &mut Vec<Event>) {
        let held = self
            .jobs
            .iter()
            .filter(|job| job.status.phase == Phase::Copying);
        let held: Vec<JobId> = held.map(|job| job.status.job.clone()).collect();
        for id in held {
            self.copy(&id, events);
        }
    }

    fn copy(&mut self, id: &JobId, events: &mut Vec<Event>) {
        if self.told("job=crash") {
            eprintln!("crashes while it copies");
            abort();
        }
        let fails = self.told("job=fail");
        let crashes = self.told("job=crash-awaiting");
        let copied = if self.told("job=eio") {
            Err(rustix::io::Errno::IO).os("pwrite", "the destination, 4096 bytes at offset 8192")
        } else if fails {
            Err(staged("job=fail"))
        } else {
            self.copy_all(id)
        };
        let Some(job) = self.job(id) else { return };
        match copied {
            Ok(bytes) => {
                job.status.phase = Phase::AwaitingCommit;
                job.status.passes.push(PassReport {
                    number: 1,
                    read_bytes: bytes,
                    ..PassReport::default()
                });
                if crashes {
                    eprintln!("crashes before it asks for the commit");
                    abort();
                }
                events.push(Event::JobAwaitsCommit { job: id.clone() });
            }
            Err(seen) => {
                job.status.failure = Some(seen);
                job.end(Phase::Failed, events);
            }
        }
    }

    fn copy_all(&mut self, id: &JobId) -> Result<u64> {
        let Some(position) = self.jobs.iter().position(|job| job.status.job == *id) else {
            return Ok(0);
        };
        let Some(job) = self.jobs.get(position) else {
            return Ok(0);
        };
        let disk = self.disks.iter().find(|disk| disk.name == job.status.disk);
        let (Some(disk), Some(to)) = (disk, &job.destination) else {
            return Err(staged("no such disk"));
        };
        if job.covers {
            disk.image.flush()?;
            return Ok(0);
        }
        let mut bytes = vec![0; usize::try_from(job.status.size_bytes).unwrap_or(0)];
        disk.image.read_at(0, &mut bytes)?;
        images::write(&**to, 0, &bytes)?;
        Ok(job.status.size_bytes)
    }

    pub(crate) fn cancel(&mut self, id: &JobId, events: &mut Vec<Event>) -> Reply {
        match self.job(id) {
            Some(job) if job.status.phase == Phase::Copying => {
                job.end(Phase::Cancelled, events);
                Reply::Done
            }
            _ => Reply::Failed(staged("nothing to cancel")),
        }
    }

    pub(crate) fn paused(&mut self, id: &JobId, progress: Progress) -> Reply {
        match self.job(id) {
            Some(job) if job.status.phase == Phase::Copying => {
                job.status.progress = progress;
                Reply::Done
            }
            _ => Reply::Failed(staged("nothing to pause")),
        }
    }

    /// Shows a new rate as the throughput.
    pub(crate) fn set(&mut self, id: &JobId, change: &LimitsChange) -> Reply {
        let Some(job) = self.job(id) else {
            return Reply::Failed(staged("no such job"));
        };
        if let Some(Ceiling::At(rate)) = change.bytes_per_second {
            job.status.throughput = rate;
        }
        Reply::Done
    }

    pub(crate) fn decided(
        &mut self,
        id: &JobId,
        committed: bool,
        events: &mut Vec<Event>,
    ) -> Reply {
        if self.told("job=crash-decided") {
            eprintln!("crashes when it hears the decision");
            abort();
        }
        eprintln!("decided {id} {committed}");
        if self.told("job=ask-again") && !committed {
            return Reply::Done; // And is asked again on the next connection.
        }
        let contrary = self.told("job=contrary");
        let Some(job) = self.job(id) else {
            return Reply::Failed(staged("no such job"));
        };
        if !job.awaits() {
            return Reply::Done;
        }
        if committed == contrary {
            job.end(Phase::Failed, events);
            return Reply::Done;
        }
        let name = job.status.disk.clone();
        let destination = job.destination.take();
        if let Some(image) = destination.as_ref().filter(|_| job.covers) {
            images::share(image);
        }
        job.end(Phase::Completed, events);
        let disk = self.disks.iter_mut().find(|disk| disk.name == name);
        if let (Some(disk), Some(destination)) = (disk, destination) {
            // The source's descriptor goes, and its lock with it.
            disk.image = destination;
        }
        Reply::Done
    }
}

impl Job {
    fn end(&mut self, phase: Phase, events: &mut Vec<Event>) {
        self.status.phase = phase;
        self.destination = None;
        self.status.pause_ms = Some(1.0);
        events.push(Event::JobEnded(self.status.clone()));
    }
}
