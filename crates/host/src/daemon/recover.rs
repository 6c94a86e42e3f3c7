//! What a daemon does first: it finds the monitors that ran on without it, and settles what the
//! daemon before it left unfinished.
//!
//! | the inventory says | the control socket | then |
//! | --- | --- | --- |
//! | running or starting | answers for this VM | the monitor is taken over |
//! | running or starting | answers, but has no guest yet | it is ended: nobody knows what it was told |
//! | running or starting | no answer, the process lives | the VM is shown as failed, and why |
//! | running or starting | no answer, no process | the VM has failed; its jobs are settled |
//! | stopped or failed | – | its jobs, if any, are settled |

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use strake_api::control::{Event, ExitReason, Request, RunState};
use strake_api::rest::VmState;
use strake_observe::{Observation, Result};

use super::live::{Cell, Monitor};
use super::{Host, note, now_ms};
use crate::inventory::{StoredState, VmRecord};
use crate::monitor::connection::{Connection, Greeting, Incoming, QUICK};
use crate::monitor::process::Process;
use crate::observations::{MonitorKilled, MonitorMismatch, MonitorUnreachable, StartFailed};

/// How long a monitor that no longer listens is given to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// How long a connection that could not be used may still say why.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(1);

impl Host {
    /// Settles every VM and every job; what cannot be settled is observed and shown with the VM.
    pub(super) fn recover(self: &Arc<Self>) -> Result<()> {
        for record in self.inventory.vms()? {
            let cell = self.cell(&record.name)?;
            match record.state {
                StoredState::Stopped | StoredState::Failed => {
                    self.settle_jobs(&record.name, &ExitReason::Stopped);
                }
                StoredState::Starting | StoredState::Running => self.find(&cell, &record)?,
            }
        }
        // Jobs whose VM is gone altogether: there is nothing that they could belong to.
        for job in self.inventory.unfinished_jobs()? {
            if self.inventory.vm(&job.vm).is_err() {
                self.settle_jobs(&job.vm, &ExitReason::Stopped);
            }
        }
        Ok(())
    }

    fn find(self: &Arc<Self>, cell: &Arc<Cell>, record: &VmRecord) -> Result<()> {
        let socket = self.config.control_socket(&record.name);
        let seen = match Connection::open(&socket) {
            Ok((connection, greeting, events)) => {
                match self.take_over(cell, record, connection, &greeting) {
                    Ok((monitor, state)) => return self.adopt(cell, monitor, events, state),
                    Err(seen) => {
                        // A monitor whose guest ended meanwhile says so and is gone at once.
                        if record.state == StoredState::Running
                            && let Some(why) = farewell(&events)
                        {
                            self.ended_meanwhile(cell, &why);
                            return Ok(());
                        }
                        seen
                    }
                }
            }
            Err(seen) => seen,
        };
        self.lost(cell, record, seen);
        Ok(())
    }

    fn ended_meanwhile(self: &Arc<Self>, cell: &Arc<Cell>, why: &ExitReason) {
        if self.vm_has_ended(cell, why) == VmState::Starting {
            let (host, cell) = (Arc::clone(self), Arc::clone(cell));
            // Not here: the daemon is not yet up, and a start may take long.
            std::thread::spawn(move || host.start_after_reset(&cell));
        }
    }

    /// Makes sure that the one who answered is this VM's monitor and runs its guest.
    fn take_over(
        &self,
        cell: &Arc<Cell>,
        record: &VmRecord,
        connection: Connection,
        greeting: &Greeting,
    ) -> Result<(Arc<Monitor>, VmState)> {
        let name = record.name.as_str();
        let mismatch = |said: String| {
            Observation::from(MonitorMismatch {
                said,
                expected: format!("the monitor of VM '{name}'"),
            })
        };
        let pid = greeting.pid.or(record.process.map(|(pid, _)| pid));
        let process = match pid {
            Some(pid) => Process::hold(pid, None)?,
            None => return Err(mismatch("a process that cannot be told".to_owned())),
        };
        if let Some(expected) = record.process
            && expected != process.identity()
        {
            return Err(mismatch(format!("another process ({})", process.pid())));
        }
        match &greeting.vm {
            Some(vm) if vm != name => return Err(mismatch(format!("the monitor of VM '{vm}'"))),
            _ => {}
        }
        let started_ms = record.started_ms.unwrap_or_else(now_ms);
        let identity = process.identity();
        let monitor = Arc::new(Monitor::new(process, connection, started_ms));
        let status = monitor.status();
        let state = match status.as_ref().map(|status| &status.state) {
            Some(RunState::Running | RunState::Exited(_)) => VmState::Running,
            Some(RunState::Paused) => VmState::Paused,
            // It is slow, or ends just now: the supervisor will see.
            None if record.state == StoredState::Running => VmState::Running,
            // It was not started: what it was told cannot be known.
            None | Some(RunState::Unconfigured | RunState::Built) => {
                return Err(end_unfinished(name, &monitor));
            }
        };
        tracing::info!(vm = name, pid = identity.0, "found a monitor that runs");
        if record.state == StoredState::Starting {
            self.inventory.vm_running(name, identity, started_ms)?;
        }
        self.reconcile_jobs(cell, &monitor);
        Ok((monitor, state))
    }

    /// Nobody answers for the VM.
    fn lost(&self, cell: &Arc<Cell>, record: &VmRecord, seen: Observation) {
        let name = record.name.as_str();
        let living = record
            .process
            .and_then(|(pid, started)| Process::find(pid, started))
            .filter(|process| !process.wait(END_PATIENCE));
        if let Some(process) = living {
            let unreachable = Observation::from(MonitorUnreachable {
                vm: name.to_owned(),
                pid: process.pid(),
            })
            .because(seen);
            note(unreachable.clone());
            cell.change(|live| {
                live.state = VmState::Failed;
                live.trouble = Some(unreachable);
            });
            return;
        }
        let why = match record.process {
            Some((pid, _)) => self.monitor_died(
                name,
                pid,
                Some("it ended while no daemon ran, or the host was restarted"),
            ),
            None => Observation::from(StartFailed {
                vm: name.to_owned(),
            })
            .because(seen),
        };
        note(why.clone());
        self.vm_has_ended(cell, &ExitReason::Failed(why));
    }
}

/// Why the guest ended, if the monitor said so before it closed the connection.
fn farewell(events: &Receiver<Incoming>) -> Option<ExitReason> {
    while let Ok(Incoming::Event(event)) = events.recv_timeout(FAREWELL_PATIENCE) {
        if let Event::State(RunState::Exited(why)) = event {
            return Some(why);
        }
    }
    None
}

/// Ends a monitor whose guest never ran.
fn end_unfinished(name: &str, monitor: &Monitor) -> Observation {
    let _ = monitor.connection().call("stop", Request::Stop, &[], QUICK);
    if !monitor.process.wait(QUICK) {
        monitor.process.kill();
        monitor.process.wait(QUICK);
    }
    MonitorKilled {
        vm: name.to_owned(),
        pid: monitor.process.pid(),
        reason: "the daemon that started it ended before its guest ran".to_owned(),
    }
    .into()
}
