//! What a daemon does first: it finds the monitors that ran on without it, and settles what the
//! daemon before it left unfinished.
//!
//! | the inventory says | the control socket | then |
//! | --- | --- | --- |
//! | running or starting | answers for this VM | the monitor is taken over |
//! | running or starting | answers, but has no guest yet | it is ended: nobody knows what it was told |
//! | running or starting | no answer, the process lives | the VM is shown as failed, and why; its supervisor keeps trying |
//! | running or starting | no answer, no process | the VM has failed; its jobs are settled |
//! | stopped, failed, restarting | – | its monitor, should it still be there, is let go; its jobs are settled |
//! | restarting | – | and then it is started |
//!
//! A VM that was being handed from one monitor to another has two. The one that the record names as
//! its process has the guest, and is told so; the other one, which stands still, is ended first
//! (`handover`).

use std::sync::Arc;
use std::time::Duration;

use strake_api::control::{Event, ExitReason, Request, RunState};
use strake_api::rest::VmState;
use strake_observe::{Observation, OsContext, Result};

use super::death::Death;
use super::live::{Cell, Monitor};
use super::supervise::{Recorded, SETTLE_PATIENCE};
use super::{Host, guard, note, now_ms};
use crate::inventory::{StoredState, VmRecord};
use crate::monitor::connection::{Connection, Events, Greeting, Incoming, QUICK};
use crate::monitor::process::Process;
use crate::observations::{
    MonitorKilled, MonitorMismatch, MonitorUnreachable, StartFailed, StartUnclear,
};

/// How long a monitor may take for the first hello: the daemon comes up only when all have been
/// tried. Afterwards its supervisor has more patience.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);

/// How long a monitor that no longer listens is given to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// How long a connection that could not be used may still say why.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(1);

impl Host {
    /// Settles every VM and every job; what cannot be settled is observed and shown with the VM.
    /// Files are removed by threads of their own: guests wait for the daemon to come up.
    pub(super) fn recover(self: &Arc<Self>) -> Result<()> {
        for record in self.inventory.vms()? {
            let cell = self.cell(&record.name)?;
            match record.state {
                StoredState::Stopped | StoredState::Failed if record.process.is_none() => {
                    self.settle_jobs(&record.name, &ExitReason::Stopped, None, Duration::ZERO);
                }
                StoredState::Stopped | StoredState::Failed | StoredState::Restarting => {
                    self.finish_end(&cell, record);
                }
                StoredState::Starting | StoredState::Running => self.find(&cell, &record)?,
            }
        }
        // Jobs whose VM is gone altogether: there is nothing that they could belong to.
        for job in self.inventory.unfinished_jobs()? {
            if self.inventory.vm(&job.vm).is_err() {
                self.settle_jobs(&job.vm, &ExitReason::Stopped, None, Duration::ZERO);
            }
        }
        Ok(())
    }

    fn find(self: &Arc<Self>, cell: &Arc<Cell>, record: &VmRecord) -> Result<()> {
        self.finish_handover(record);
        let socket = self.config.control_socket(&record.name);
        let seen = match Connection::open_within(&socket, HELLO_PATIENCE) {
            Ok((connection, greeting, events)) => {
                match self.take_over(record, connection, &greeting) {
                    Ok(found) => return self.adopt(cell, record, found, events),
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
        self.lost(cell, record, seen)
    }

    fn adopt(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        record: &VmRecord,
        found: Found,
        events: Events,
    ) -> Result<()> {
        let watch = self.watch(cell)?;
        let monitor = found.monitor;
        let Some(state) = found.state else {
            // Whether its guest runs only it can say: it is asked until it does.
            let pid = monitor.process.pid();
            let vm = record.name.clone();
            let unclear = Observation::from(StartUnclear { vm, pid });
            note(unclear.clone());
            monitor.connection().close();
            watch.adopt(cell, monitor, None, Recorded::No, |live| {
                live.state = VmState::Failed;
                live.trouble = Some(unclear);
            });
            return Ok(());
        };
        let mut recorded = Recorded::Yes;
        if record.state == StoredState::Starting {
            let identity = monitor.process.identity();
            let running = self
                .inventory
                .vm_running(&record.name, identity, monitor.started_ms);
            if let Err(seen) = running {
                note(seen); // The supervisor tries again.
                recorded = Recorded::No;
            }
        }
        // The supervisor compares the jobs: their files may take long to go.
        watch.adopt(cell, monitor, Some(events), recorded, |live| {
            live.state = state;
        });
        Ok(())
    }

    fn ended_meanwhile(self: &Arc<Self>, cell: &Arc<Cell>, why: &ExitReason) {
        if self.vm_has_ended(cell, why, None, Duration::ZERO) == VmState::Starting {
            let (host, cell) = (Arc::clone(self), Arc::clone(cell));
            // Not here: the daemon is not yet up, and a start may take long.
            aside("restart", move || host.start_after_reset(&cell));
        }
    }

    /// The daemon before recorded that the guest had ended and came no further. Not here: the
    /// daemon is not yet up, and all of this may take long.
    fn finish_end(self: &Arc<Self>, cell: &Arc<Cell>, record: VmRecord) {
        let (host, cell) = (Arc::clone(self), Arc::clone(cell));
        let work = move || {
            let operation = guard(&cell.operation);
            let unchanged = host
                .inventory
                .vm(&record.name)
                .is_ok_and(|now| now.revision == record.revision);
            if !unchanged || cell.live().monitor.is_some() {
                return; // Somebody was quicker.
            }
            let before = record
                .process
                .map(|(pid, started)| Process::find(pid, started))
                .transpose();
            match before.map(Option::flatten) {
                Ok(Some(process)) => host.let_go(&record.name, &process),
                Ok(None) => {}
                Err(seen) => {
                    // It may live: nothing is settled, and the next start looks again.
                    note(seen.clone());
                    cell.change(|live| {
                        live.state = VmState::Failed;
                        live.trouble = Some(seen);
                    });
                    return;
                }
            }
            let restarts = record.state == StoredState::Restarting;
            cell.change(|live| live.stop_asked = !restarts);
            let why = record.last_exit.unwrap_or(ExitReason::Stopped);
            let shown = host.vm_has_ended(&cell, &why, None, SETTLE_PATIENCE);
            let restarts = shown == VmState::Starting;
            drop(operation);
            if restarts {
                host.start_after_reset(&cell);
            }
        };
        aside("end", work);
    }

    /// Ends a monitor whose guest has ended.
    fn let_go(&self, vm: &str, process: &Process) {
        let socket = self.config.control_socket(vm);
        if let Ok((connection, _, _)) = Connection::open_within(&socket, HELLO_PATIENCE) {
            // It may end before it answers.
            let _ = connection.call("dismiss", Request::Dismiss, &[], QUICK);
        }
        if !process.wait(END_PATIENCE) {
            let seen = MonitorKilled {
                vm: vm.to_owned(),
                pid: process.pid(),
                reason: "it did not end after its guest had".to_owned(),
            };
            note(seen.into());
            process.kill();
            process.wait(END_PATIENCE);
        }
    }

    /// Makes sure that the one who answered is this VM's monitor and runs its guest.
    fn take_over(
        &self,
        record: &VmRecord,
        connection: Connection,
        greeting: &Greeting,
    ) -> Result<Found> {
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
        // What was started may have put the monitor into a process of its own.
        if record.state == StoredState::Running
            && let Some(expected) = record.process
            && expected != process.identity()
        {
            return Err(mismatch(format!("another process ({})", process.pid())));
        }
        match &greeting.vm {
            Some(vm) if vm != name => return Err(mismatch(format!("the monitor of VM '{vm}'"))),
            _ => {}
        }
        if record.other_process.is_some() {
            super::handover::settle_place(&connection)?;
        }
        let started_ms = record.started_ms.unwrap_or_else(now_ms);
        let identity = process.identity();
        let monitor = Arc::new(Monitor::new(process, connection, started_ms));
        let status = monitor.status();
        let state = match status.as_ref().map(|status| &status.state) {
            Some(RunState::Running | RunState::Exited(_)) => Some(VmState::Running),
            Some(RunState::Paused) => Some(VmState::Paused),
            // It is slow, or ends just now: the supervisor will see.
            None if record.state == StoredState::Running => Some(VmState::Running),
            None => None,
            // It was not started: what it was told cannot be known.
            Some(RunState::Unconfigured | RunState::Built) => {
                return Err(end_unfinished(name, &monitor));
            }
        };
        tracing::info!(vm = name, pid = identity.0, "found a monitor that runs");
        Ok(Found { monitor, state })
    }

    /// Nobody answers for the VM. Its process decides what that means; a monitor whose process is
    /// not recorded was given nothing yet.
    fn lost(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        record: &VmRecord,
        seen: Observation,
    ) -> Result<()> {
        let name = record.name.as_str();
        let living = record
            .process
            .map(|(pid, started)| Process::find(pid, started))
            .transpose()?
            .flatten()
            .filter(|process| !process.wait(END_PATIENCE));
        if let Some(process) = living {
            let unreachable = Observation::from(MonitorUnreachable {
                vm: name.to_owned(),
                pid: process.pid(),
            })
            .because(seen);
            note(unreachable.clone());
            let started_ms = record.started_ms.unwrap_or_else(now_ms);
            let monitor = Arc::new(Monitor::new(process, Connection::lost()?, started_ms));
            let watch = self.watch(cell)?;
            // One that was being started may be busy with its configuration: what it came to, its
            // supervisor learns once it answers.
            let recorded = match record.state {
                StoredState::Starting => Recorded::No,
                _ => Recorded::Yes,
            };
            watch.adopt(cell, monitor, None, recorded, |live| {
                live.state = VmState::Failed;
                live.trouble = Some(unreachable);
            });
            return Ok(());
        }
        let why = match record.process {
            Some((pid, _)) if record.state == StoredState::Running => {
                self.monitor_died(name, pid, Some(Death::Unseen), None)
            }
            _ => Observation::from(StartFailed {
                vm: name.to_owned(),
            })
            .because(seen),
        };
        note(why.clone());
        self.ended_meanwhile(cell, &ExitReason::Failed(why));
        Ok(())
    }
}

/// A monitor that answers for a VM.
struct Found {
    monitor: Arc<Monitor>,
    /// What its VM does; `None` if that is not known yet.
    state: Option<VmState>,
}

/// Why the guest ended, if the monitor said so before it closed the connection.
fn farewell(events: &Events) -> Option<ExitReason> {
    while let Some(Incoming::Event(event)) = events.next_within(FAREWELL_PATIENCE) {
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

/// Does something in a thread of its own. Without one the record stays as it is, and the daemon's
/// next start does it.
fn aside(what: &str, work: impl FnOnce() + Send + 'static) {
    let spawned = std::thread::Builder::new()
        .name(format!("recover-{what}"))
        .spawn(work)
        .os("clone", "a thread that recovers a VM");
    if let Err(seen) = spawned {
        note(seen);
    }
}
