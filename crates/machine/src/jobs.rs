//! Migrations of the machine's disks, as the control thread sees them.
//!
//! A migration runs in its own thread (`strake_block::Migration`) and calls [`Hooks`] from there.
//! Its question for the commit goes through the mailbox to the daemon; the answer comes back
//! through the control thread. While no daemon is there the question waits, and the guest does not.
//! A daemon that goes after it was asked leaves the disk's gate closed: both images are equal then,
//! and only the daemon's transaction says which one counts.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use strake_api::control::{Event, LayerConfig};
use strake_api::job::{JobId, LimitsChange, MigrationLimits, MigrationStatus, Phase};
use strake_block::{Covered, Image, Keep, LiveDisk, MakeCover, Migration, SwitchHooks};
use strake_observe::Result;

use crate::images;
use crate::observations::{JobExists, NoSuchDisk, NoSuchJob, WrongState};
use crate::{Descriptors, Mailbox};

/// How many ended jobs a status tells of. A daemon that comes back and misses one asks for it by
/// name.
const ENDED_TOLD: usize = 8;

/// How long the end of a machine waits for a cancelled job. It ends within 100 ms on a healthy
/// device; on another one the source counts all the same.
const CANCEL_LIMIT: Duration = Duration::from_secs(2);

/// What a migration needs.
#[derive(Debug)]
pub struct MigrationRequest {
    /// Its name.
    pub job: JobId,
    /// The disk.
    pub disk: String,
    /// The destination image.
    pub destination: Arc<dyn Image>,
    /// The journal.
    pub journal: OwnedFd,
    /// Limits.
    pub limits: MigrationLimits,
    /// Whether it can be taken up again.
    pub keep: Keep,
}

/// What a snapshot needs.
#[allow(missing_debug_implementations)] // closures
pub struct SnapshotRequest {
    /// Its name.
    pub job: JobId,
    /// The disk.
    pub disk: String,
    /// Makes the image that covers the disk's own.
    pub make: MakeCover,
    /// Called once it does.
    pub covered: Covered,
    /// Limits.
    pub limits: MigrationLimits,
}

/// What a consolidation needs.
#[derive(Debug)]
pub struct ConsolidateRequest {
    /// Its name.
    pub job: JobId,
    /// The disk.
    pub disk: String,
    /// The image below the disk's uppermost layer.
    pub below: LayerConfig,
    /// The descriptors that came with it.
    pub fds: Descriptors,
    /// Limits.
    pub limits: MigrationLimits,
}

/// Keeps the guest from running for a moment.
pub(crate) trait Hold: Send + Sync {
    /// Pauses the vCPUs.
    ///
    /// # Errors
    /// They do not stop within `limit`; they run on.
    fn hold(&self, limit: Duration) -> Result<()>;

    /// Undoes one `hold`.
    fn release(&self);
}

/// The jobs of this process, ended ones included, in the order of their start.
#[derive(Debug, Default)]
pub(crate) struct Jobs(Mutex<Vec<(JobId, Arc<Migration>)>>);

struct Hooks {
    machine: Weak<dyn Hold>,
    mailbox: Arc<Mailbox>,
}

impl SwitchHooks for Hooks {
    fn suspend_vm(&self, limit: Duration) -> Result<()> {
        match self.machine.upgrade() {
            Some(machine) => machine.hold(limit),
            None => Err(WrongState {
                asked: "pause".to_owned(),
                state: "gone".to_owned(),
            }
            .into()),
        }
    }

    fn resume_vm(&self) {
        if let Some(machine) = self.machine.upgrade() {
            machine.release();
        }
    }

    fn can_ask(&self) -> bool {
        self.mailbox.is_heard()
    }

    fn await_commit(&self, job: &JobId) {
        self.mailbox
            .post(Event::JobAwaitsCommit { job: job.clone() });
    }

    fn ended(&self, status: &MigrationStatus) {
        self.mailbox.post(Event::JobEnded(status.clone()));
    }
}

/// The hooks of a job after which the disk's image is no longer shared.
struct Claims {
    inner: Arc<dyn SwitchHooks>,
    disk: Weak<LiveDisk>,
}

impl SwitchHooks for Claims {
    fn suspend_vm(&self, limit: Duration) -> Result<()> {
        self.inner.suspend_vm(limit)
    }

    fn resume_vm(&self) {
        self.inner.resume_vm();
    }

    fn can_ask(&self) -> bool {
        self.inner.can_ask()
    }

    fn await_commit(&self, job: &JobId) {
        self.inner.await_commit(job);
    }

    fn ended(&self, status: &MigrationStatus) {
        if status.phase == Phase::Completed
            && let Some(disk) = self.disk.upgrade()
        {
            images::claim(&*disk.image());
        }
        self.inner.ended(status);
    }
}

impl Jobs {
    pub(crate) fn start(
        &self,
        request: MigrationRequest,
        disks: &[Arc<LiveDisk>],
        machine: &Arc<dyn Hold>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<()> {
        let (id, name) = (request.job.clone(), request.disk.clone());
        self.begin(&id, &name, disks, machine, mailbox, |disk, hooks| {
            let journal = File::from(request.journal);
            let to = request.destination;
            let (keep, job, limits) = (request.keep, request.job, request.limits);
            Migration::start_kept(disk, to, journal, keep, job, limits, hooks)
        })
    }

    pub(crate) fn snapshot(
        &self,
        request: SnapshotRequest,
        disks: &[Arc<LiveDisk>],
        machine: &Arc<dyn Hold>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<()> {
        let (id, name) = (request.job.clone(), request.disk.clone());
        self.begin(&id, &name, disks, machine, mailbox, |disk, hooks| {
            let (make, covered) = (request.make, request.covered);
            Migration::cover(disk, make, covered, request.job, request.limits, hooks)
        })
    }

    pub(crate) fn consolidate(
        &self,
        request: ConsolidateRequest,
        disks: &[Arc<LiveDisk>],
        machine: &Arc<dyn Hold>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<()> {
        let (id, name) = (request.job.clone(), request.disk.clone());
        let mut fds = request.fds;
        self.begin(&id, &name, disks, machine, mailbox, |disk, hooks| {
            let image = disk.image();
            let overlay = images::consolidation(&*image, &request.below, &mut fds)?;
            drop(image);
            let hooks = Arc::new(Claims {
                inner: hooks,
                disk: Arc::downgrade(&disk),
            });
            let base = overlay.base();
            let (job, limits) = (request.job, request.limits);
            Migration::consolidate(disk, base, Arc::new(overlay), job, limits, hooks)
        })
    }

    fn begin(
        &self,
        job: &JobId,
        disk: &str,
        disks: &[Arc<LiveDisk>],
        machine: &Arc<dyn Hold>,
        mailbox: &Arc<Mailbox>,
        start: impl FnOnce(Arc<LiveDisk>, Arc<dyn SwitchHooks>) -> Result<Arc<Migration>>,
    ) -> Result<()> {
        let mut jobs = self.lock();
        if jobs.iter().any(|(other, _)| other == job) {
            return Err(JobExists {
                job: job.to_string(),
            }
            .into());
        }
        let disk = disks
            .iter()
            .find(|of| of.name() == disk)
            .ok_or_else(|| NoSuchDisk {
                disk: disk.to_owned(),
            })?;
        let hooks = Arc::new(Hooks {
            machine: Arc::downgrade(machine),
            mailbox: Arc::clone(mailbox),
        });
        jobs.push((job.clone(), start(Arc::clone(disk), hooks)?));
        Ok(())
    }

    /// How all of them are, as far as a status tells: without passes, and of those that ended the
    /// last [`ENDED_TOLD`] only.
    pub(crate) fn statuses(&self) -> Vec<MigrationStatus> {
        let all: Vec<_> = self
            .lock()
            .iter()
            .map(|(_, migration)| migration.status())
            .collect();
        told(all)
    }

    pub(crate) fn status(&self, job: &JobId) -> Result<MigrationStatus> {
        Ok(self.find(job)?.status())
    }

    pub(crate) fn cancel(&self, job: &JobId) -> Result<()> {
        self.find(job)?.cancel()
    }

    pub(crate) fn pause(&self, job: &JobId) -> Result<()> {
        self.find(job)?.pause()
    }

    pub(crate) fn resume(&self, job: &JobId) -> Result<()> {
        self.find(job)?.resume();
        Ok(())
    }

    pub(crate) fn set(&self, job: &JobId, change: &LimitsChange) -> Result<()> {
        self.find(job)?.set(change);
        Ok(())
    }

    pub(crate) fn decide(&self, job: &JobId, committed: bool) -> Result<()> {
        self.find(job)?.decide(committed);
        Ok(())
    }

    pub(crate) fn awaiting_commit(&self) -> Vec<JobId> {
        self.lock()
            .iter()
            .filter(|(_, migration)| migration.awaits_decision())
            .map(|(job, _)| job.clone())
            .collect()
    }

    /// Ends what still copies, so that the VM's next run can take it up again. A job that awaits its
    /// commit stays as it is.
    pub(crate) fn interrupt_all(&self) {
        let jobs = self.lock();
        let end = Instant::now() + CANCEL_LIMIT;
        // All are asked before one is waited for.
        let asked: Vec<_> = jobs
            .iter()
            .filter(|(_, migration)| !migration.status().phase.is_final())
            .filter(|(_, migration)| migration.interrupt().is_ok())
            .collect();
        for (_, migration) in asked {
            while !migration.status().phase.is_final() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn find(&self, job: &JobId) -> Result<Arc<Migration>> {
        self.lock()
            .iter()
            .find(|(found, _)| found == job)
            .map(|(_, migration)| Arc::clone(migration))
            .ok_or_else(|| {
                NoSuchJob {
                    job: job.to_string(),
                }
                .into()
            })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(JobId, Arc<Migration>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn told(mut all: Vec<MigrationStatus>) -> Vec<MigrationStatus> {
    let ended = all.iter().filter(|job| job.phase.is_final()).count();
    let mut old = ended.saturating_sub(ENDED_TOLD);
    all.retain_mut(|job| {
        job.passes.clear();
        let left_out = old > 0 && job.phase.is_final();
        old -= usize::from(left_out);
        !left_out
    });
    all
}

#[cfg(test)]
mod tests {
    use strake_api::control::{Body, MAX_PACKET, Packet, Reply, RunState, VmStatus};
    use strake_api::job::{PassReport, Progress};

    use super::*;

    #[test]
    fn a_status_tells_of_what_goes_on_and_of_the_last_that_ended_and_stays_small() {
        let job = |number: usize, phase| MigrationStatus {
            job: JobId(format!("j{number}")),
            disk: "root".into(),
            phase,
            size_bytes: u64::MAX,
            passes: vec![PassReport::default(); 1000],
            throughput: u64::MAX,
            expected_pause_ms: Some(0.1),
            pause_ms: Some(0.1),
            elapsed_ms: u64::MAX,
            method: None,
            progress: Progress::Paused,
            latency: Some(Box::default()),
            kept: Some(Box::default()),
            overlay: None,
            failure: None,
        };
        let mut all: Vec<_> = (0..500).map(|n| job(n, Phase::Completed)).collect();
        all[3] = job(3, Phase::AwaitingCommit);
        all.push(job(500, Phase::Copying));
        let jobs = told(all);
        let names: Vec<_> = jobs.iter().map(|job| job.job.0.as_str()).collect();
        let expected = [
            "j3", "j492", "j493", "j494", "j495", "j496", "j497", "j498", "j499", "j500",
        ];
        assert_eq!(names, expected);
        let status = VmStatus {
            state: RunState::Running,
            uptime_ms: 0,
            disks: Vec::new(),
            jobs,
        };
        let body = Body::Reply(Reply::Status(status));
        let wire = serde_json::to_vec(&Packet { id: 0, body }).unwrap();
        assert!(wire.len() < MAX_PACKET / 8, "{}", wire.len());
    }
}
