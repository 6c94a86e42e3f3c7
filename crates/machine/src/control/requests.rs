//! What each request does.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use strake_api::control::{
    Body, ExitReason, KeepConfig, Lent, PROTOCOL_VERSION, Reply, Request, RunState, VmStatus,
};
use strake_block::{Access, Keep};
use strake_observe::{Observation, Result};

use super::Server;
use crate::images;
use crate::observations::{BadPacket, HelloMissing, WrongState, WrongVersion};
use crate::{ConsolidateRequest, Descriptors, Machine, MigrationRequest, SnapshotRequest};

impl Server {
    /// Does what a packet asks. Descriptors that the request does not use are closed.
    pub(super) fn answer(&mut self, body: Body, fds: Descriptors) -> (Reply, Vec<OwnedFd>) {
        let alone = |reply| (reply, Vec::new());
        match body {
            Body::Request(Request::Lend) => match self.lend() {
                Ok((lent, fds)) => (Reply::Lent(lent), fds),
                Err(seen) => alone(Reply::Failed(seen)),
            },
            Body::Request(request) => {
                alone(self.perform(request, fds).unwrap_or_else(Reply::Failed))
            }
            _ => alone(Reply::Failed(
                BadPacket {
                    reason: "it is not a request".to_owned(),
                }
                .into(),
            )),
        }
    }

    fn lend(&self) -> Result<(Lent, Vec<OwnedFd>)> {
        if !self.greeted() {
            return Err(HelloMissing {}.into());
        }
        self.live("lend what it has")?.lend()
    }

    fn perform(&mut self, request: Request, mut fds: Descriptors) -> Result<Reply> {
        if let Request::Hello { version } = request {
            return self.hello(version);
        }
        if !self.greeted() {
            return Err(HelloMissing {}.into());
        }
        match request {
            Request::Hello { version } => return self.hello(version),
            Request::Configure(config) => {
                if self.machine.is_some() {
                    return Err(self.wrong_state("configure the machine again"));
                }
                self.machine = Some(Machine::build(*config, &mut fds, &self.mailbox)?);
            }
            Request::ConfigureExport(config) => {
                if self.machine.is_some() {
                    return Err(self.wrong_state("configure an export"));
                }
                self.machine = Some(Machine::export(*config, &mut fds, &self.mailbox)?);
            }
            Request::Status => return Ok(Reply::Status(self.status())),
            Request::Stop => self.mailbox.exit(ExitReason::Stopped),
            Request::Dismiss => self.dismiss()?,
            Request::Start => self.live("start")?.start()?,
            Request::Pause => self.live("pause")?.pause()?,
            Request::Resume => self.live("resume")?.resume()?,
            Request::PowerButton => self.live("press the power button")?.press_power_button()?,
            Request::SetDiskLimits { disk, limits } => {
                self.live("limit a disk")?.set_disk_limits(&disk, limits)?;
            }
            Request::AttachConsole { stream } => {
                let stream = fds.take(stream, "the console")?;
                self.live("attach a console")?.attach_console(stream)?;
            }
            Request::Lend => {
                return Err(BadPacket {
                    reason: "it was answered elsewhere".to_owned(),
                }
                .into());
            }
            Request::HandOver { records } => {
                let records = fds.take(records, "the records")?;
                self.live("hand the guest over")?.hand_over(records)?;
            }
            Request::CallOff => self.live("call the handover off")?.call_off()?,
            Request::Retire => {
                self.any("retire")?.may_retire()?;
                self.retire();
            }
            Request::Receive { records } => {
                let records = fds.take(records, "the records")?;
                self.live("receive a guest")?.receive(records)?;
            }
            Request::TakeOver => {
                let pause_us = self.live("take a guest over")?.take_over()?;
                return Ok(Reply::TookOver { pause_us });
            }
            Request::MigrateDisk {
                job,
                disk,
                destination,
                journal,
                limits,
                keep,
            } => {
                let access = Access::ReadWrite;
                let request = MigrationRequest {
                    job,
                    disk,
                    destination: images::open(&destination, access, "the destination", &mut fds)?,
                    journal: fds.take(journal, "the journal")?,
                    limits,
                    keep: match keep {
                        None => Keep::Nothing,
                        Some(KeepConfig::New(file)) => {
                            Keep::In(File::from(fds.take(file, "the job's progress")?))
                        }
                        Some(KeepConfig::Again(_)) if self.run_state() != RunState::Built => {
                            return Err(self.wrong_state("take a job up again"));
                        }
                        Some(KeepConfig::Again(file)) => {
                            Keep::Again(File::from(fds.take(file, "the job's progress")?))
                        }
                    },
                };
                self.live("migrate a disk")?.migrate(request)?;
            }
            Request::SnapshotDisk {
                job,
                disk,
                overlay,
                limits,
            } => {
                let (make, covered) = images::cover(&overlay, &mut fds)?;
                let request = SnapshotRequest {
                    job,
                    disk,
                    make,
                    covered,
                    limits,
                };
                self.live("take a snapshot")?.snapshot(request)?;
            }
            Request::ConsolidateDisk {
                job,
                disk,
                below,
                limits,
            } => {
                let request = ConsolidateRequest {
                    job,
                    disk,
                    below,
                    fds,
                    limits,
                };
                self.live("consolidate a disk")?.consolidate(request)?;
            }
            Request::JobStatus { job } => {
                return Ok(Reply::Job(self.any("tell about a job")?.job_status(&job)?));
            }
            Request::CancelJob { job } => self.any("cancel a job")?.cancel_job(&job)?,
            Request::PauseJob { job } => self.any("pause a job")?.pause_job(&job)?,
            Request::ResumeJob { job } => self.any("resume a job")?.resume_job(&job)?,
            Request::SetJob { job, change } => {
                self.any("change a job's limits")?.set_job(&job, &change)?;
            }
            Request::JobDecision { job, committed } => {
                self.any("decide a job")?.decide_job(&job, committed)?;
            }
        }
        Ok(Reply::Done)
    }

    fn hello(&self, version: u32) -> Result<Reply> {
        if version != PROTOCOL_VERSION {
            return Err(WrongVersion {
                theirs: version,
                ours: PROTOCOL_VERSION,
            }
            .into());
        }
        Ok(Reply::Hello {
            version: PROTOCOL_VERSION,
            monitor: self.config.version.clone(),
            vm: self
                .machine
                .as_ref()
                .map(|machine| machine.name().to_owned()),
        })
    }

    fn status(&self) -> VmStatus {
        let state = self.run_state();
        match &self.machine {
            Some(machine) => machine.status(state),
            None => VmStatus {
                state,
                uptime_ms: 0,
                disks: Vec::new(),
                jobs: Vec::new(),
            },
        }
    }

    /// The machine, if its guest has not ended.
    fn live(&self, asked: &str) -> Result<&Arc<Machine>> {
        match self.run_state() {
            RunState::Exited(_) => Err(self.wrong_state(asked)),
            _ => self.any(asked),
        }
    }

    /// The machine, whatever its guest does.
    fn any(&self, asked: &str) -> Result<&Arc<Machine>> {
        self.machine.as_ref().ok_or_else(|| self.wrong_state(asked))
    }

    pub(super) fn wrong_state(&self, asked: &str) -> Observation {
        let state = match self.run_state() {
            RunState::Unconfigured => "not configured",
            RunState::Built => "built, not started",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::Exited(_) => "at its end",
        };
        WrongState {
            asked: asked.to_owned(),
            state: state.to_owned(),
        }
        .into()
    }
}
