//! One thread for each VM that runs: it hears what the monitor says unasked, and sees it end.
//!
//! ```text
//!  event ──► state, observation, job        (this thread alone changes the VM's state on events)
//!  closed ─► the process has ended? ── yes ─► settle jobs, record the end, start again on a reset
//!                 │ no
//!                 └─► connect again, ask what was missed, go on
//! ```

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use strake_api::control::{Event, ExitReason, Request, RunState};
use strake_api::rest::VmState;
use strake_observe::{Because, Observation, OsContext, Result};

use super::live::{Cell, Monitor};
use super::{Host, note, now_ms};
use crate::config::show;
use crate::inventory::StoredState;
use crate::monitor::connection::{Connection, Incoming, QUICK};
use crate::monitor::spawn;
use crate::observations::{
    MonitorDied, MonitorKilled, MonitorSaid, MonitorUnreachable, StartFailed,
};
use crate::storage::store::remove_file;

/// How long a monitor that has said that its guest ended may take to end itself.
const EXIT_PATIENCE: Duration = Duration::from_secs(15);

/// How long after a lost connection the process is given to end before the daemon connects again.
const END_PATIENCE: Duration = Duration::from_millis(300);

/// Pause between attempts to reach a monitor that lives.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);

/// A guest that resets at once is not started again at once.
const RESET_INTERVAL: Duration = Duration::from_secs(2);

/// What a monitor observed this long before its death may have to do with it.
const CAUSE_WINDOW_MS: u64 = 30_000;

/// Observations of one monitor that are kept within [`FLOOD_WINDOW`]; more say nothing new.
const FLOOD_LIMIT: u32 = 50;

/// See [`FLOOD_LIMIT`].
const FLOOD_WINDOW: Duration = Duration::from_secs(10);

/// The thread's own state.
struct Supervisor {
    host: Arc<Host>,
    cell: Arc<Cell>,
    monitor: Arc<Monitor>,
    exit: Option<ExitReason>,
    window: Instant,
    in_window: u32,
}

impl Host {
    /// Makes `monitor` the VM's and begins to supervise it.
    pub(super) fn adopt(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        monitor: Arc<Monitor>,
        events: Receiver<Incoming>,
        state: VmState,
    ) -> Result<()> {
        cell.change(|live| {
            live.state = state;
            live.monitor = Some(Arc::clone(&monitor));
        });
        let mut supervisor = Supervisor {
            host: Arc::clone(self),
            cell: Arc::clone(cell),
            monitor,
            exit: None,
            window: Instant::now(),
            in_window: 0,
        };
        std::thread::Builder::new()
            .name(format!("vm-{}", cell.name))
            .spawn(move || supervisor.run(events))
            .os("clone", "a supervisor thread")
            .because_of(|| StartFailed {
                vm: cell.name.clone(),
            })
            .map(drop)
    }
}

impl Supervisor {
    fn run(&mut self, mut events: Receiver<Incoming>) {
        tracing::info!(vm = %self.cell.name, pid = self.monitor.process.pid(), "monitor runs");
        loop {
            // A channel without a sender says the same as the connection's last word.
            match events.recv().unwrap_or(Incoming::Closed) {
                Incoming::Event(event) => self.event(event),
                Incoming::Closed => match self.after_loss() {
                    Some(again) => events = again,
                    None => break,
                },
            }
        }
        self.ended();
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::State(state) => self.state(state),
            Event::Observed(seen) => self.observed(seen),
            Event::JobAwaitsCommit { job } => {
                self.host.decide(&self.cell, &self.monitor, &job);
            }
            Event::JobEnded(status) => {
                self.host.job_ended(&self.cell, &self.monitor, &status);
            }
        }
    }

    fn state(&mut self, state: RunState) {
        let shown = match state {
            RunState::Running => VmState::Running,
            RunState::Paused => VmState::Paused,
            RunState::Exited(reason) => {
                tracing::info!(vm = %self.cell.name, ?reason, "the guest ended");
                self.exit = Some(reason);
                self.dismiss();
                return;
            }
            RunState::Unconfigured | RunState::Built => return,
        };
        self.cell.change(|live| {
            if live.state != VmState::Stopping {
                live.state = shown;
            }
        });
    }

    /// Lets a monitor go whose guest has ended. One that ended because this daemon asked for it may
    /// be gone already.
    fn dismiss(&self) {
        let connection = self.monitor.connection();
        if let Err(seen) = connection.call("dismiss", Request::Dismiss, &[], QUICK) {
            tracing::debug!(vm = %self.cell.name, %seen, "a monitor was not dismissed");
        }
    }

    fn observed(&mut self, seen: Observation) {
        if self.window.elapsed() > FLOOD_WINDOW {
            self.window = Instant::now();
            self.in_window = 0;
        }
        self.in_window += 1;
        if self.in_window <= FLOOD_LIMIT {
            note(seen.clone());
        }
        self.cell.change(|live| live.observe(seen));
    }

    /// The connection has ended: the new one, or `None` once the monitor has ended too.
    fn after_loss(&mut self) -> Option<Receiver<Incoming>> {
        let monitor = Arc::clone(&self.monitor);
        let process = &monitor.process;
        if self.exit.is_some() {
            if !process.wait(EXIT_PATIENCE) {
                note(self.killed("it did not end after its guest had"));
                process.kill();
                process.wait(EXIT_PATIENCE);
            }
            return None;
        }
        let mut told = false;
        let mut patience = END_PATIENCE;
        while !process.wait(patience) {
            match self.reconnect() {
                Ok(events) => {
                    self.cell.change(|live| live.trouble = None);
                    return Some(events);
                }
                Err(seen) if !told => {
                    told = true;
                    let unreachable = Observation::from(MonitorUnreachable {
                        vm: self.cell.name.clone(),
                        pid: process.pid(),
                    })
                    .because(seen);
                    note(unreachable.clone());
                    self.cell.change(|live| live.trouble = Some(unreachable));
                }
                Err(_) => {}
            }
            patience = RECONNECT_INTERVAL;
        }
        None
    }

    fn killed(&self, reason: &str) -> Observation {
        MonitorKilled {
            vm: self.cell.name.clone(),
            pid: self.monitor.process.pid(),
            reason: reason.to_owned(),
        }
        .into()
    }

    fn reconnect(&mut self) -> Result<Receiver<Incoming>> {
        let socket = self.host.config.control_socket(&self.cell.name);
        let (connection, _, events) = Connection::open(&socket)?;
        self.monitor.replace_connection(connection);
        tracing::info!(vm = %self.cell.name, "connected to the monitor again");
        // What may have been missed while nobody listened.
        if let Some(status) = self.monitor.status() {
            self.state(status.state);
        }
        self.host.reconcile_jobs(&self.cell, &self.monitor);
        Ok(events)
    }

    /// The monitor has ended: nothing of it is left when the VM is shown as stopped.
    fn ended(&mut self) {
        let name = self.cell.name.as_str();
        let pid = self.monitor.process.pid();
        let how = self.monitor.process.how_it_ended();
        tracing::info!(vm = %name, pid, ?how, exit = ?self.exit, "monitor ended");
        let why = self
            .exit
            .take()
            .unwrap_or_else(|| ExitReason::Failed(self.death(how.as_deref())));
        let ran_ms = now_ms().saturating_sub(self.monitor.started_ms);
        if self.host.vm_has_ended(&self.cell, &why) == VmState::Starting {
            let least = u64::try_from(RESET_INTERVAL.as_millis()).unwrap_or(0);
            if ran_ms < least {
                std::thread::sleep(Duration::from_millis(least - ran_ms));
            }
            self.host.start_after_reset(&self.cell);
        }
    }

    /// A monitor that ended without a word.
    fn death(&self, how: Option<&str>) -> Observation {
        let observed = std::mem::take(&mut self.cell.live().observed);
        let now = now_ms();
        let observed = observed
            .into_iter()
            .filter(|seen| now.saturating_sub(seen.record().at_ms) <= CAUSE_WINDOW_MS);
        let died = self
            .host
            .monitor_died(&self.cell.name, self.monitor.process.pid(), how)
            .because_all(observed);
        note(died.clone());
        died
    }
}

impl Host {
    /// The VM's monitor is gone: settles and records. What the VM does now is `Starting` if its
    /// guest asked for a reset; then the caller starts it again.
    pub(super) fn vm_has_ended(&self, cell: &Cell, why: &ExitReason) -> VmState {
        let name = cell.name.as_str();
        let stop_asked = cell.live().stop_asked;
        self.settle_jobs(name, why);
        if let Err(seen) = remove_file(&self.config.control_socket(name)) {
            note(seen);
        }
        let (stored, shown) = match why {
            ExitReason::Failed(_) => (StoredState::Failed, VmState::Failed),
            ExitReason::GuestReset if !stop_asked => (StoredState::Stopped, VmState::Starting),
            _ => (StoredState::Stopped, VmState::Stopped),
        };
        if let Err(seen) = self.inventory.vm_ended(name, stored, Some(why)) {
            // The next daemon finds the process gone.
            note(seen);
        }
        cell.change(|live| {
            live.state = shown;
            live.monitor = None;
            live.stop_asked = false;
            live.trouble = None;
        });
        shown
    }

    /// The observation of a monitor's death, with its last words.
    pub(super) fn monitor_died(&self, vm: &str, pid: u32, how: Option<&str>) -> Observation {
        let died = Observation::from(MonitorDied {
            vm: vm.to_owned(),
            pid,
            how: how
                .unwrap_or("how cannot be told, it was not started by this daemon")
                .to_owned(),
        });
        let log = self.config.monitor_log(vm);
        match spawn::last_words(&log) {
            Some(lines) => died.because(MonitorSaid {
                path: show(&log),
                lines,
            }),
            None => died,
        }
    }
}
