//! Start and stop of VMs.
//!
//! ```text
//!            start                 guest runs
//!  Stopped ─────────► Starting ─────────────────► Running ◄──► Paused
//!  Failed ──┘            │                           │
//!     ▲                  │ anything fails            │ stop
//!     │                  ▼                           ▼
//!     │               Stopped ◄───────────────── Stopping
//!     │                  ▲   the monitor has ended   │ the guest does not react: Running again
//!     └──────────────────┴───────────────────────────┘
//!      the monitor died       (`supervise`)
//! ```

use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use strake_api::control::Request;
use strake_api::rest::{RestartVm, Restarted, StopVm, Vm, VmState};
use strake_observe::{Because, Observation, Result, Task};

use super::death::Death;
use super::interrupted::Again;
use super::launch::Launch;
use super::live::{Cell, Live, Monitor, state_name};
use super::supervise::Recorded;
use super::{Host, guard, note, now_ms, private, task};
use crate::crash;
use crate::inventory::{StoredState, VmRecord};
use crate::monitor::connection::{Connection, Events, Greeting, QUICK};
use crate::monitor::process::{Ending, Process};
use crate::monitor::spawn;
use crate::observations::{
    MonitorKilled, MonitorRefused, MonitorSaid, MonitorUnreachable, StartFailed, StartUnclear,
    StopFailed, StopTimedOut, WrongState,
};
use crate::storage::store::remove_file;

/// How long a monitor may take to build its machine: it may have to read a kernel out of an image
/// on a slow store.
pub(super) const CONFIGURE_PATIENCE: Duration = Duration::from_secs(60);

/// How long a guest has to shut down if nobody says otherwise.
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// A guest that was too early in its boot to hear the power button hears it the next time.
const BUTTON_INTERVAL: Duration = Duration::from_secs(10);

/// How long a forced stop waits for the monitor to flush the disks; then it is killed.
const FORCE_PATIENCE: Duration = Duration::from_secs(30);

/// A monitor that was just told to run its guest. From then on it is never ended for anything that
/// fails here: the supervisor goes on from wherever this came to.
struct Started {
    monitor: Arc<Monitor>,
    /// None if it is not known whether the guest runs.
    events: Option<Events>,
    recorded: Recorded,
    /// Why it is not known.
    doubt: Option<Observation>,
}

/// The way from hello to the running guest, as far as it came.
struct BroughtUp {
    connection: Connection,
    events: Events,
    started_ms: u64,
    recorded: Recorded,
    doubt: Option<Observation>,
}

impl Host {
    /// Starts a VM.
    ///
    /// # Errors
    /// [`StartFailed`], with the reason; no monitor is left behind then. [`StartUnclear`] if the
    /// monitor does not say whether its guest runs.
    pub fn start(self: &Arc<Self>, name: &str) -> Result<Vm> {
        // An export is no VM.
        self.inventory.vm(name)?.spec()?;
        self.start_named(name)?;
        self.vm(name)
    }

    /// Starts the VM again after its guest asked for a reset, or an export after its monitor died.
    /// The state is `Starting` since then.
    pub(super) fn start_after_reset(self: &Arc<Self>, cell: &Arc<Cell>) {
        let _operation = guard(&cell.operation);
        if cell.live().state != VmState::Starting {
            return; // Somebody stopped it in between.
        }
        let name = &cell.name;
        let failed = || StartFailed { vm: name.clone() };
        let restarted = task(format!("restart VM '{name}'"), failed, |task| {
            self.start_stopped(cell, task).map(drop)
        });
        if let Err(seen) = restarted {
            tracing::error!(%seen, "what was to run on could not be started again");
            cell.change(|live| live.trouble = Some(seen));
        }
    }

    /// The caller holds the VM's operation lock. Gives the reason if the guest may or may not run.
    fn start_stopped(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        task: &mut Task,
    ) -> Result<Option<Observation>> {
        let name = cell.name.as_str();
        let record = self.inventory.vm(name)?;
        self.refuse_living_monitor(cell, &record)?;
        self.refuse_exported(name)?;
        cell.change(|live| {
            live.state = VmState::Starting;
            live.stop_asked = false;
            live.trouble = None;
            live.observed.clear();
        });
        let watched = self.watch(cell);
        let started = watched.and_then(|watch| Ok((watch, self.launch(&record, task)?)));
        let (watch, started) = match started {
            Ok(started) => started,
            Err(seen) => {
                // Nothing runs; if even that cannot be recorded, the next daemon finds out.
                if let Err(more) = self.inventory.vm_ended(name, StoredState::Stopped, None) {
                    task.saw(more);
                }
                cell.change(|live| live.state = VmState::Stopped);
                return Err(seen);
            }
        };
        let doubt = started.doubt.map(|seen| {
            let pid = started.monitor.process.pid();
            let vm = name.to_owned();
            Observation::from(StartUnclear { vm, pid }).because(seen)
        });
        let trouble = doubt.clone();
        watch.adopt(
            cell,
            started.monitor,
            started.events,
            started.recorded,
            |live| {
                live.state = match trouble {
                    Some(_) => VmState::Failed,
                    None => VmState::Running,
                };
                live.trouble = trouble;
            },
        );
        // What was changed while it was being started.
        if let Err(seen) = self.bring_into_force(cell) {
            note(seen);
        }
        Ok(doubt)
    }

    fn launch(&self, record: &VmRecord, task: &mut Task) -> Result<Started> {
        let name = &record.name;
        let launch = self.prepare_launch(record)?;
        let cell = self.cell(name)?;
        let again = self.prepare_again(&cell, record)?;
        private(&self.config.vm_run(name))?;
        // From here on a daemon that comes back must look for a monitor.
        self.inventory.vm_starting(name, &launch.files)?;
        if let Some(spec) = &launch.spec {
            self.inventory.in_force(name, spec)?;
        }
        let socket = self.config.control_socket(name);
        let log = self.config.monitor_log(name);
        crash::point("before-spawn");
        let child = spawn::spawn(&self.config.vmm, name, &socket, &log)?;
        crash::point("after-spawn");
        // Before it is given anything: one that is not recorded has neither images nor a guest. One
        // that is does not pass for dead if it is too busy to answer a daemon that comes back.
        let recorded = Process::identity_of(&child)
            .and_then(|process| self.inventory.vm_spawned(name, process));
        let mut newborn = Newborn::Child(child);
        let up =
            recorded.and_then(|()| self.bring_up(name, (&launch, again), &socket, &mut newborn));
        let seen = match up {
            Ok(up) => {
                let process = newborn.keep()?;
                return Ok(Started {
                    monitor: Arc::new(Monitor::new(process, up.connection, up.started_ms)),
                    events: up.doubt.is_none().then_some(up.events),
                    recorded: up.recorded,
                    doubt: up.doubt,
                });
            }
            Err(seen) => seen,
        };
        let told = self.end_of_newborn(newborn, name, &log);
        if let Err(more) = remove_file(&socket) {
            task.saw(more);
        }
        Err(seen.because_all(told))
    }

    /// Ends a monitor that has no guest; tells how it ended if it did so by itself, and what it said
    /// last: that says more than the connection that it left.
    pub(super) fn end_of_newborn(
        &self,
        newborn: Newborn,
        vm: &str,
        log: &Path,
    ) -> Option<Observation> {
        match newborn.end() {
            Some((pid, how)) => Some(self.monitor_died(vm, pid, Some(Death::Seen(how)), None)),
            None => spawn::last_words(log).map(|lines| {
                let path = crate::config::show(log);
                MonitorSaid { path, lines }.into()
            }),
        }
    }

    /// From hello to the running guest. An error means that the guest does not run.
    fn bring_up(
        &self,
        name: &str,
        (launch, again): (&Launch, Vec<Again>),
        socket: &Path,
        newborn: &mut Newborn,
    ) -> Result<BroughtUp> {
        let (connection, greeting, events) = Connection::open(socket)?;
        let process = newborn.hold(&greeting)?;
        let configure = launch.configure.clone();
        connection.call("configure", configure, &launch.fds(), CONFIGURE_PATIENCE)?;
        crash::point("after-configure");
        for job in again {
            self.take_up(&connection, job)?;
        }
        let mut up = BroughtUp {
            connection,
            events,
            started_ms: now_ms(),
            recorded: Recorded::No,
            doubt: None,
        };
        match up.connection.call("start", Request::Start, &[], QUICK) {
            Ok(_) => {}
            Err(seen) if seen.is::<MonitorRefused>() => return Err(seen),
            Err(seen) if process.wait(OWN_END_PATIENCE) => return Err(seen),
            Err(seen) => {
                // It may have heard.
                up.connection.close();
                up.doubt = Some(seen);
                return Ok(up);
            }
        }
        crash::point("after-start");
        let identity = process.identity();
        match self.inventory.vm_running(name, identity, up.started_ms) {
            Ok(()) => up.recorded = Recorded::Yes,
            Err(seen) => note(seen), // The supervisor tries again.
        }
        Ok(up)
    }

    /// Refuses while a monitor of the VM lives although nobody can reach it.
    pub(super) fn refuse_living_monitor(&self, cell: &Cell, record: &VmRecord) -> Result<()> {
        let unreachable = |pid| {
            Err(MonitorUnreachable {
                vm: record.name.clone(),
                pid,
            }
            .into())
        };
        if let Some(monitor) = &cell.live().monitor {
            return unreachable(monitor.process.pid());
        }
        let living = record
            .process
            .map(|(pid, started)| Process::find(pid, started))
            .transpose()?
            .flatten();
        match living {
            Some(process) => unreachable(process.pid()),
            None => Ok(()),
        }
    }

    /// Stops a VM and waits until its monitor has ended.
    ///
    /// # Errors
    /// [`StopFailed`]; after [`StopTimedOut`] the VM keeps running.
    pub fn stop(self: &Arc<Self>, name: &str, how: &StopVm) -> Result<Vm> {
        self.inventory.vm(name)?.spec()?;
        let cell = self.cell(name)?;
        let failed = || StopFailed {
            vm: name.to_owned(),
        };
        task(format!("stop VM '{name}'"), failed, |task| {
            let Some(monitor) = self.ask_to_stop(&cell, how)? else {
                return Ok(());
            };
            if how.force {
                self.force(&cell, &monitor, task);
                return Ok(());
            }
            self.wait_for_guest(&cell, &monitor, how)
        })?;
        self.vm(name)
    }

    /// Ends an export that runs, once its clients' requests are finished and its disk is flushed.
    pub(super) fn end_export(&self, cell: &Cell, task: &mut Task) -> Result<()> {
        let how = StopVm {
            force: true,
            timeout_s: None,
        };
        if !cell.live().at_rest()
            && let Some(monitor) = self.ask_to_stop(cell, &how)?
        {
            self.force(cell, &monitor, task);
        }
        Ok(())
    }

    /// Starts whatever it is.
    pub(super) fn start_named(self: &Arc<Self>, name: &str) -> Result<()> {
        let cell = self.cell(name)?;
        let _operation = guard(&cell.operation);
        let failed = || StartFailed {
            vm: name.to_owned(),
        };
        let doubt = task(format!("start '{name}'"), failed, |task| {
            let state = cell.live().state;
            if !matches!(state, VmState::Stopped | VmState::Failed) {
                return Err(already_runs(name, state));
            }
            self.start_stopped(&cell, task)
        })?;
        doubt.map_or(Ok(()), Err)
    }

    /// Stops a VM and starts it again: its guest reboots, with everything as its spec says now.
    ///
    /// # Errors
    /// As [`Host::stop`] and [`Host::start`].
    pub fn restart(self: &Arc<Self>, name: &str, how: &RestartVm) -> Result<Restarted> {
        let old_pid = self.vm(name)?.pid;
        let stop = StopVm {
            force: how.force,
            timeout_s: how.timeout_s,
        };
        self.stop(name, &stop)?;
        let vm = self.start(name)?;
        Ok(Restarted {
            vm,
            pause_us: None,
            old_pid,
            old_version: None,
            new_version: None,
        })
    }

    /// The begin of a stop; `None` if there is no monitor to wait for.
    fn ask_to_stop(&self, cell: &Cell, how: &StopVm) -> Result<Option<Arc<Monitor>>> {
        let name = cell.name.as_str();
        // By force, no operation is waited for: it may itself wait for a store that hangs.
        if how.force
            && let Some(monitor) = cell.change(stop_by_force)
        {
            return Ok(Some(monitor));
        }
        let _operation = guard(&cell.operation);
        let monitor = cell.change(|live| {
            if live.state == VmState::Starting && live.monitor.is_none() {
                // Between the reset of a guest and its new start: there is nothing to ask.
                live.state = VmState::Stopped;
                return Ok(None);
            }
            if how.force
                && let Some(monitor) = stop_by_force(live)
            {
                return Ok(Some(monitor));
            }
            let advice = match live.monitor {
                Some(_) => {
                    format!("its monitor does not answer; `strake stop {name} --force` ends it")
                }
                None => "it does not run, so there is nothing to stop".to_owned(),
            };
            let monitor = live.running(name, &advice)?;
            live.state = VmState::Stopping;
            live.stop_asked = true;
            Ok::<_, Observation>(Some(monitor))
        })?;
        let Some(monitor) = monitor else {
            // Not to be started again by the next daemon either.
            self.inventory.vm_ended(name, StoredState::Stopped, None)?;
            return Ok(None);
        };
        let asked = if how.force {
            // Answered or not: the end is waited for.
            Ok(())
        } else {
            press_button(&monitor)
        };
        if asked.is_err() {
            keeps_running(cell, &monitor);
        }
        asked.map(|()| Some(monitor))
    }

    fn wait_for_guest(&self, cell: &Cell, monitor: &Arc<Monitor>, how: &StopVm) -> Result<()> {
        let patience = how.timeout_s.map_or(STOP_PATIENCE, Duration::from_secs);
        let mut left = patience;
        while !left.is_zero() {
            let now = left.min(BUTTON_INTERVAL);
            if cell.wait_for_end(monitor, now) {
                return Ok(());
            }
            left -= now;
            if !left.is_zero() {
                // A monitor that is about to end may not answer any more.
                let _ = press_button(monitor);
            }
        }
        keeps_running(cell, monitor);
        Err(StopTimedOut {
            vm: cell.name.clone(),
            seconds: patience.as_secs(),
        }
        .into())
    }

    fn force(&self, cell: &Cell, monitor: &Arc<Monitor>, task: &mut Task) {
        let asked = monitor
            .connection()
            .call("stop", Request::Stop, &[], FORCE_PATIENCE);
        let reason = match asked {
            // A monitor may well end before its reply has left.
            Ok(_) => "it did not end after it had been asked to stop",
            Err(seen) => {
                task.saw(seen);
                "it did not answer the request to stop"
            }
        };
        if cell.wait_for_end(monitor, FORCE_PATIENCE) {
            return;
        }
        task.saw(MonitorKilled {
            vm: cell.name.clone(),
            pid: monitor.process.pid(),
            reason: reason.to_owned(),
        });
        monitor.process.kill();
        cell.wait_for_end(monitor, FORCE_PATIENCE);
    }
}

fn already_runs(name: &str, state: VmState) -> Observation {
    WrongState {
        vm: name.to_owned(),
        state: state_name(state).to_owned(),
        needed: "stopped".to_owned(),
        advice: "it needs no start; `strake ps` shows it".to_owned(),
    }
    .into()
}

/// The monitor that is to be ended, even if it cannot be reached.
fn stop_by_force(live: &mut Live) -> Option<Arc<Monitor>> {
    let monitor = Arc::clone(live.monitor.as_ref()?);
    live.state = VmState::Stopping;
    live.stop_asked = true;
    Some(monitor)
}

fn press_button(monitor: &Monitor) -> Result<()> {
    monitor
        .connection()
        .call("press the power button", Request::PowerButton, &[], QUICK)
        .map(drop)
}

/// A stop came to nothing: the VM is what it was.
fn keeps_running(cell: &Cell, monitor: &Arc<Monitor>) {
    cell.change(|live| {
        let ours = live
            .monitor
            .as_ref()
            .is_some_and(|of| Arc::ptr_eq(of, monitor));
        if ours && live.state == VmState::Stopping {
            live.state = VmState::Running;
            live.stop_asked = false;
        }
    });
}

/// How long a monitor that failed is given to end by itself, so that it can be told how it did.
const OWN_END_PATIENCE: Duration = Duration::from_millis(500);

/// A monitor's process before its guest runs: ended if anything fails.
pub(super) enum Newborn {
    /// What was started.
    Child(Child),
    /// The process that answered the hello.
    Held(Process),
    /// It is the VM's now.
    Gone,
}

impl Newborn {
    pub(super) fn child(child: Child) -> Self {
        Self::Child(child)
    }

    /// What the inventory records of it before it has said anything.
    pub(super) fn identity(&self) -> Result<Option<(u32, u64)>> {
        match self {
            Self::Child(child) => Process::identity_of(child).map(Some),
            Self::Held(process) => Ok(Some(process.identity())),
            Self::Gone => Ok(None),
        }
    }

    /// Holds the process that answered the hello: the child itself, or its child if a jail put a
    /// process between.
    pub(super) fn hold(&mut self, greeting: &Greeting) -> Result<&Process> {
        let gone = || crate::observations::MonitorLost {
            request: "hello".to_owned(),
        };
        if let Self::Child(child) = std::mem::replace(self, Self::Gone) {
            let pid = greeting.pid.unwrap_or_else(|| child.id());
            *self = Self::Held(Process::hold(pid, Some(child)).because_of(gone)?);
        }
        match self {
            Self::Held(process) => Ok(process),
            Self::Child(_) | Self::Gone => Err(gone().into()),
        }
    }

    pub(super) fn keep(mut self) -> Result<Process> {
        match std::mem::replace(&mut self, Self::Gone) {
            Self::Held(process) => Ok(process),
            Self::Child(_) | Self::Gone => Err(crate::observations::Internal {
                what: "a monitor runs that nobody holds".to_owned(),
            }
            .into()),
        }
    }

    /// Ends it; tells how it ended if it did so by itself.
    pub(super) fn end(mut self) -> Option<(u32, Ending)> {
        let process = match std::mem::replace(&mut self, Self::Gone) {
            Self::Held(process) => process,
            Self::Child(child) => {
                let pid = child.id();
                Process::hold(pid, Some(child)).map_err(note).ok()?
            }
            Self::Gone => return None,
        };
        let by_itself = process.wait(OWN_END_PATIENCE);
        if !by_itself {
            process.kill();
            process.wait(QUICK);
        }
        let how = process.how_it_ended()?;
        by_itself.then(|| (process.pid(), how))
    }
}
