//! A machine that was built: its life and what can be asked of it.
//!
//! ```text
//!            start            pause / hold
//!   Built ──────────▶ Running ◀──────────▶ Paused
//!     └──────────────────┴───────────────────┴──────▶ stopped (vCPUs gone, devices at rest)
//! ```
//!
//! Whether the vCPUs run follows from three facts under one lock ([`Run`]): the guest was started,
//! the daemon paused it, migrations hold it. So a migration's short hold and the daemon's pause may
//! overlap in any order. A fourth says in which monitor the guest is ([`Place`], see `handover`). The
//! lock is taken by the control thread and by migrations' threads, never
//! by a vCPU's.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use strake_api::control::{DiskLimits, DiskStatus, Event, RunState, VmStatus};
use strake_api::job::{JobId, LimitsChange, MigrationStatus};
use strake_block::LiveDisk;
use strake_devices::acpi_pm::AcpiPm;
use strake_devices::console_hub::ConsoleHub;
use strake_devices::lifecycle::{Component, Phase};
use strake_kvm::Vm;
use strake_memory::GuestRam;
use strake_observe::{Observation, Result};

use crate::Mailbox;
use crate::jobs::{ConsolidateRequest, Hold, Jobs, MigrationRequest, SnapshotRequest};
use crate::observations::{NoSuchDisk, StopIncomplete, WrongState};
use crate::vcpus::Vcpus;

/// A guest's machine.
pub struct Machine {
    pub(crate) name: String,
    pub(crate) run: Mutex<Run>,
    pub(crate) vcpus: Vcpus,
    /// In the order in which they are started; they are brought to rest in the opposite one.
    pub(crate) components: Vec<Arc<dyn Component>>,
    pub(crate) disks: Vec<Arc<LiveDisk>>,
    pub(crate) jobs: Jobs,
    pub(crate) mailbox: Arc<Mailbox>,
    /// Absent in an export. Last, so that the devices' interrupts and doorbells go first.
    pub(crate) guest: Option<Guest>,
}

/// What only a machine with a guest has.
pub(crate) struct Guest {
    pub(crate) console: Arc<ConsoleHub>,
    pub(crate) power: Arc<AcpiPm>,
    /// The tap of each interface, to be lent.
    pub(crate) taps: Vec<(String, OwnedFd)>,
    pub(crate) ram: GuestRam,
    pub(crate) vm: Vm,
}

/// Why the vCPUs run or not.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// When the guest was started.
    pub(crate) started: Option<Instant>,
    /// The daemon paused it.
    pub(crate) paused: bool,
    /// How many migrations hold it.
    pub(crate) holds: usize,
    /// It is over.
    pub(crate) stopped: bool,
    /// Where it is.
    pub(crate) place: Place,
}

/// Where the guest is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Place {
    /// In this monitor.
    #[default]
    Here,
    /// In this monitor since it came from another one, after it stood still for so long.
    Arrived {
        /// Microseconds.
        pause_us: u64,
    },
    /// Still in the monitor that it comes from.
    Awaited,
    /// Received, and not yet this monitor's to run; it stood still since then.
    Received {
        /// Nanoseconds of the monotonic clock.
        since_ns: u64,
    },
    /// Given away, unless that is called off.
    Given,
}

impl Run {
    pub(crate) fn shall_run(&self) -> bool {
        self.live() && !self.paused && self.holds == 0
    }

    /// Whether it was started, has not ended, and is this monitor's.
    pub(crate) fn live(&self) -> bool {
        self.started.is_some() && !self.stopped && self.is_here()
    }

    pub(crate) fn is_here(&self) -> bool {
        matches!(self.place, Place::Here | Place::Arrived { .. })
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("name", &self.name)
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts the devices, then the vCPUs.
    ///
    /// # Errors
    /// It was started before, or a device cannot start.
    pub fn start(&self) -> Result<()> {
        let mut run = self.lock();
        if run.started.is_some() || run.stopped {
            return Err(wrong_state("start", "started already"));
        }
        if !run.is_here() {
            return Err(wrong_state("start", "waiting for its guest"));
        }
        for component in &self.components {
            component.start()?;
        }
        run.started = Some(Instant::now());
        self.vcpus.let_run();
        drop(run);
        self.mailbox.post(Event::State(RunState::Running));
        Ok(())
    }

    /// Pauses the vCPUs.
    ///
    /// # Errors
    /// It does not run, or the vCPUs do not stop in time.
    pub fn pause(&self) -> Result<()> {
        let mut run = self.lock();
        if !run.live() {
            return Err(wrong_state("pause", "not running"));
        }
        if run.paused {
            return Ok(());
        }
        if run.shall_run() {
            self.vcpus.park()?;
        }
        run.paused = true;
        drop(run);
        self.mailbox.post(Event::State(RunState::Paused));
        Ok(())
    }

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// It was not started.
    pub fn resume(&self) -> Result<()> {
        let mut run = self.lock();
        if !run.live() {
            return Err(wrong_state("resume", "not running"));
        }
        if !run.paused {
            return Ok(());
        }
        run.paused = false;
        if run.shall_run() {
            self.vcpus.let_run();
        }
        drop(run);
        self.mailbox.post(Event::State(RunState::Running));
        Ok(())
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// The guest does not run.
    pub fn press_power_button(&self) -> Result<()> {
        let run = self.lock();
        if !run.live() {
            return Err(wrong_state("press the power button", "not running"));
        }
        let guest = self.guest("press the power button")?;
        guest.power.press_power_button();
        Ok(())
    }

    /// Attaches a stream to the serial console.
    ///
    /// # Errors
    /// The console takes no more.
    pub fn attach_console(&self, stream: OwnedFd) -> Result<()> {
        if !self.lock().is_here() {
            return Err(wrong_state("attach a console", "in another monitor"));
        }
        self.guest("attach a console")?.console.attach(stream)
    }

    /// What only a machine with a guest has.
    pub(crate) fn guest(&self, asked: &str) -> Result<&Guest> {
        self.guest
            .as_ref()
            .ok_or_else(|| wrong_state(asked, "an export"))
    }

    /// Its state, as long as its guest has not ended.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        let run = self.lock();
        if run.started.is_none() || matches!(run.place, Place::Awaited | Place::Received { .. }) {
            RunState::Built
        } else if run.paused {
            RunState::Paused
        } else {
            RunState::Running
        }
    }

    /// How it is, with the `state` that the control thread knows.
    #[must_use]
    pub fn status(&self, state: RunState) -> VmStatus {
        let uptime = self.lock().started.map_or(0, |since| {
            u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
        });
        VmStatus {
            state,
            uptime_ms: uptime,
            disks: self
                .disks
                .iter()
                .map(|disk| DiskStatus {
                    name: disk.name().to_owned(),
                    size_bytes: disk.size(),
                    counters: disk.counters(),
                })
                .collect(),
            jobs: self.jobs.statuses(),
        }
    }

    /// Sets how fast a disk's guest gets requests through.
    ///
    /// # Errors
    /// There is no such disk, or the host has no thread for it.
    pub fn set_disk_limits(&self, disk: &str, limits: DiskLimits) -> Result<()> {
        let found = self.disks.iter().find(|known| known.name() == disk);
        let found = found.ok_or_else(|| NoSuchDisk {
            disk: disk.to_owned(),
        })?;
        found.set_limits(limits)
    }

    /// Starts a migration.
    ///
    /// # Errors
    /// It is refused; nothing was changed.
    pub fn migrate(self: &Arc<Self>, request: MigrationRequest) -> Result<()> {
        if !self.lock().is_here() {
            return Err(wrong_state("migrate a disk", "in another monitor"));
        }
        let hold: Arc<dyn Hold> = Arc::clone(self) as Arc<dyn Hold>;
        self.jobs.start(request, &self.disks, &hold, &self.mailbox)
    }

    /// Starts a snapshot of a disk.
    ///
    /// # Errors
    /// It is refused; nothing was changed.
    pub fn snapshot(self: &Arc<Self>, request: SnapshotRequest) -> Result<()> {
        let hold: Arc<dyn Hold> = Arc::clone(self) as Arc<dyn Hold>;
        self.jobs
            .snapshot(request, &self.disks, &hold, &self.mailbox)
    }

    /// Starts to move what the uppermost layer of a disk has into the image below.
    ///
    /// # Errors
    /// It is refused; the disk is as it was.
    pub fn consolidate(self: &Arc<Self>, request: ConsolidateRequest) -> Result<()> {
        let hold: Arc<dyn Hold> = Arc::clone(self) as Arc<dyn Hold>;
        self.jobs
            .consolidate(request, &self.disks, &hold, &self.mailbox)
    }

    /// How a job is.
    ///
    /// # Errors
    /// There is no such job.
    pub fn job_status(&self, job: &JobId) -> Result<MigrationStatus> {
        self.jobs.status(job)
    }

    /// Ends a job; its disk stays on the source.
    ///
    /// # Errors
    /// There is no such job, or the daemon was asked to commit it.
    pub fn cancel_job(&self, job: &JobId) -> Result<()> {
        self.jobs.cancel(job)
    }

    /// Lets a job rest.
    ///
    /// # Errors
    /// There is no such job, or the daemon was asked to commit it.
    pub fn pause_job(&self, job: &JobId) -> Result<()> {
        self.jobs.pause(job)
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// There is no such job.
    pub fn resume_job(&self, job: &JobId) -> Result<()> {
        self.jobs.resume(job)
    }

    /// Changes a job's limits.
    ///
    /// # Errors
    /// There is no such job.
    pub fn set_job(&self, job: &JobId, change: &LimitsChange) -> Result<()> {
        self.jobs.set(job, change)
    }

    /// What the daemon decided about a job that awaits its commit.
    ///
    /// # Errors
    /// There is no such job.
    pub fn decide_job(&self, job: &JobId, committed: bool) -> Result<()> {
        self.jobs.decide(job, committed)
    }

    /// The jobs whose disk's gate stays closed until the daemon answers.
    #[must_use]
    pub fn jobs_awaiting_commit(&self) -> Vec<JobId> {
        self.jobs.awaiting_commit()
    }

    /// The guest has ended by itself: no vCPU enters it again. Jobs that still copy are ended.
    pub fn guest_ended(&self) {
        self.lock().stopped = true;
        self.vcpus.leave();
        self.jobs.interrupt_all();
    }

    /// Ends the guest and brings everything to rest: vCPUs gone, jobs ended, requests finished,
    /// disks flushed. What could not be brought to rest is told.
    #[must_use]
    pub fn stop(&self) -> Vec<Observation> {
        let started = {
            let mut run = self.lock();
            run.stopped = true;
            run.started.is_some()
        };
        self.vcpus.leave();
        self.jobs.interrupt_all();
        let mut seen = Vec::new();
        let mut incomplete = |part: &str, cause: Observation| {
            seen.push(
                Observation::from(StopIncomplete {
                    part: part.to_owned(),
                })
                .because(cause),
            );
        };
        if started {
            for component in self.components.iter().rev() {
                if component.phase() == Phase::Running
                    && let Err(cause) = component.quiesce()
                {
                    incomplete(component.name(), cause);
                }
            }
        }
        for disk in self.disks.iter().filter(|disk| !disk.read_only()) {
            if let Err(cause) = disk.flush() {
                incomplete(disk.name(), cause);
            }
        }
        // What the guest said last reaches the log.
        if let Some(guest) = &self.guest {
            guest.console.close();
        }
        seen
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold for Machine {
    fn hold(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        // A pause of the daemon's may hold the lock for longer than this one may last.
        let mut run = loop {
            match self.run.try_lock() {
                Ok(run) => break run,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(wrong_state(
                        "pause",
                        "being paused already, which takes long",
                    ));
                }
            }
        };
        if !run.is_here() {
            return Err(wrong_state("pause", "in another monitor"));
        }
        if run.shall_run() {
            let left = end.saturating_duration_since(Instant::now());
            self.vcpus.park_within(left)?;
        }
        run.holds += 1;
        Ok(())
    }

    fn release(&self) {
        let mut run = self.lock();
        run.holds = run.holds.saturating_sub(1);
        if run.shall_run() {
            self.vcpus.let_run();
        }
    }
}

pub(crate) fn wrong_state(asked: &str, state: &str) -> Observation {
    WrongState {
        asked: asked.to_owned(),
        state: state.to_owned(),
    }
    .into()
}
