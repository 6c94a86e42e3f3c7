//! Two threads for each VM that runs.
//!
//! The supervisor hears what the monitor says unasked, and sees it end:
//!
//! ```text
//!  event ──► state, observation, question for a commit     (this thread alone changes the VM's
//!            job ended ──► the other thread                 state on events)
//!  closed ─► the process has ended? ── yes ─► settle jobs, record the end, start again on a reset
//!                 │ no
//!                 └─► connect again, ask what was missed, go on
//! ```
//!
//! A guest stands still while its monitor asks for a commit. So the supervisor waits for nobody who
//! may take long: what needs [`Cell::jobs`], which whoever begins a migration holds, is done by the
//! VM's second thread ([`JobNews`]).
//!
//! Both threads exist before the monitor is told to run its guest: from then on nothing may fail
//! for which a guest would have to be ended.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strake_api::control::{Event, ExitReason, Request, RunState};
use strake_api::job::MigrationStatus;
use strake_api::rest::VmState;
use strake_observe::{Because, Observation, OsContext, Result};

use super::death::Death;
use super::live::{Cell, LOOK_PATIENCE, Live, Monitor, Revival};
use super::{Host, note, now_ms};
use crate::crash;
use crate::inventory::StoredState;
use crate::monitor::connection::{Connection, Events, Incoming, QUICK};
use crate::monitor::process::Ending;
use crate::observations::{
    MonitorKilled, MonitorMismatch, MonitorSilent, MonitorUnreachable, StartFailed,
};
use crate::storage::store::remove_file;

/// How long a monitor that has said that its guest ended may take to end itself.
const EXIT_PATIENCE: Duration = Duration::from_secs(15);

/// How long after a lost connection the process is given to end before the daemon connects again.
const END_PATIENCE: Duration = Duration::from_millis(300);

/// Pause between attempts to reach a monitor that lives.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);

/// A guest that resets at once is not started again at once, nor is an export whose monitor dies.
const RESET_INTERVAL: Duration = Duration::from_secs(2);

/// Observations of one monitor that are kept within [`FLOOD_WINDOW`]; more say nothing new.
const FLOOD_LIMIT: u32 = 50;

/// See [`FLOOD_LIMIT`].
const FLOOD_WINDOW: Duration = Duration::from_secs(10);

/// Pause between attempts to record that a guest runs.
const RECORD_INTERVAL: Duration = Duration::from_secs(2);

/// How long the end of a VM waits for its jobs to be cleared up; they may take longer.
pub(super) const SETTLE_PATIENCE: Duration = Duration::from_secs(1);

/// News of jobs that may wait. Those beyond are not lost: see [`Host::check_jobs`].
const NEWS_BACKLOG: usize = 64;

/// What concerns jobs and may take long.
enum JobNews {
    /// A job has ended.
    Ended(Arc<Monitor>, Box<MigrationStatus>),
    /// Something may have been missed.
    Reconcile(Arc<Monitor>),
}

/// A supervisor that has no monitor yet. Dropped, it ends.
pub(super) struct Watch {
    tell: Sender<Task>,
}

/// What a supervisor begins with.
struct Task {
    monitor: Arc<Monitor>,
    /// None if the monitor has to be reached first.
    events: Option<Events>,
    recorded: Recorded,
}

/// Whether the inventory knows that the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recorded {
    Yes,
    /// It says that the VM is being started: the guest may not even run.
    No,
}

/// The thread's own state.
struct Supervisor {
    host: Arc<Host>,
    cell: Arc<Cell>,
    monitor: Arc<Monitor>,
    jobs: SyncSender<JobNews>,
    recorded: Recorded,
    exit: Option<ExitReason>,
    window: Instant,
    in_window: u32,
}

impl Host {
    /// Starts the VM's threads, which wait for a monitor.
    pub(super) fn watch(self: &Arc<Self>, cell: &Arc<Cell>) -> Result<Watch> {
        let failed = || StartFailed {
            vm: cell.name.clone(),
        };
        let (news, jobs) = sync_channel(NEWS_BACKLOG);
        let (host, of) = (Arc::clone(self), Arc::clone(cell));
        let job_thread = std::thread::Builder::new()
            .name(format!("jobs-{}", cell.name))
            .spawn(move || host.follow_jobs(&of, &jobs))
            .os("clone", "a thread for jobs")
            .because_of(failed)?;
        let (tell, told) = channel::<Task>();
        let (host, cell_of) = (Arc::clone(self), Arc::clone(cell));
        std::thread::Builder::new()
            .name(format!("vm-{}", cell.name))
            .spawn(move || {
                let Ok(task) = told.recv() else { return };
                let mut supervisor = Supervisor {
                    host,
                    cell: cell_of,
                    monitor: task.monitor,
                    jobs: news,
                    recorded: task.recorded,
                    exit: None,
                    window: Instant::now(),
                    in_window: 0,
                };
                supervisor.run(task.events);
                supervisor.ended(job_thread);
            })
            .os("clone", "a supervisor thread")
            .because_of(failed)?;
        Ok(Watch { tell })
    }

    /// Does what concerns a VM's jobs, one after another.
    fn follow_jobs(&self, cell: &Cell, news: &Receiver<JobNews>) {
        while let Ok(news) = news.recv() {
            match news {
                JobNews::Ended(monitor, status) => self.job_ended(cell, &monitor, &status),
                JobNews::Reconcile(monitor) => self.reconcile_jobs(cell, &monitor),
            }
            // A disk that has moved lies among the labels of another datastore; and whoever was
            // not reached by a change is reached now.
            if let Err(seen) = self.bring_into_force(cell) {
                note(seen);
            }
        }
    }
}

impl Watch {
    /// Makes `monitor` the VM's and begins to supervise it. Cannot fail: its guest may run.
    pub(super) fn adopt(
        self,
        cell: &Cell,
        monitor: Arc<Monitor>,
        events: Option<Events>,
        recorded: Recorded,
        how: impl FnOnce(&mut Live),
    ) {
        cell.change(|live| {
            how(live);
            live.monitor = Some(Arc::clone(&monitor));
        });
        let task = Task {
            monitor,
            events,
            recorded,
        };
        if self.tell.send(task).is_err() {
            tracing::error!(vm = %cell.name, "the supervisor has ended before its monitor");
        }
    }
}

impl Supervisor {
    fn run(&mut self, events: Option<Events>) {
        tracing::info!(vm = %self.cell.name, pid = self.monitor.process.pid(), "monitor runs");
        // Nothing comes of it if the monitor cannot be reached yet; once it is, it is told again.
        self.tell_jobs(JobNews::Reconcile(Arc::clone(&self.monitor)));
        let Some(mut events) = events.or_else(|| self.after_loss()) else {
            return;
        };
        loop {
            let incoming = match self.recorded {
                Recorded::Yes => Some(events.next()),
                Recorded::No => events.next_within(RECORD_INTERVAL),
            };
            match incoming {
                Some(Incoming::Event(event)) => self.event(event),
                Some(Incoming::Closed) => match self.after_loss() {
                    Some(again) => events = again,
                    None => return,
                },
                None => {
                    if let Err(seen) = self.record() {
                        tracing::warn!(%seen, "a running guest cannot be recorded yet");
                    }
                }
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::State(state) => self.state(state),
            Event::Observed(seen) => self.observed(seen),
            Event::JobAwaitsCommit { job } => {
                self.host.decide(&self.cell, &self.monitor, &job);
            }
            Event::JobEnded(status) => {
                let monitor = Arc::clone(&self.monitor);
                self.tell_jobs(JobNews::Ended(monitor, Box::new(status)));
            }
        }
    }

    /// Without waiting: what finds no room is found by [`Host::check_jobs`].
    fn tell_jobs(&self, news: JobNews) {
        if self.jobs.try_send(news).is_err() {
            tracing::debug!(vm = %self.cell.name, "news of jobs have to wait");
        }
    }

    /// Records that the guest runs, should that have failed before.
    fn record(&mut self) -> Result<()> {
        if self.recorded == Recorded::No {
            let monitor = &self.monitor;
            let identity = monitor.process.identity();
            self.host
                .inventory
                .vm_running(&self.cell.name, identity, monitor.started_ms)?;
            self.recorded = Recorded::Yes;
        }
        Ok(())
    }

    fn state(&mut self, state: RunState) {
        let shown = match state {
            RunState::Running => VmState::Running,
            RunState::Paused => VmState::Paused,
            RunState::Exited(reason) => {
                tracing::info!(vm = %self.cell.name, ?reason, "the guest ended");
                // Before the monitor goes: a daemon that dies meanwhile has nobody else to tell
                // the next one that the guest only wanted to start again.
                let (stored, _) = outcome(&reason, &self.cell);
                let name = &self.cell.name;
                if let Err(seen) = self.host.inventory.vm_ending(name, stored, &reason) {
                    note(seen);
                }
                crash::point("after-exit-recorded");
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
    fn after_loss(&mut self) -> Option<Events> {
        let monitor = Arc::clone(&self.monitor);
        let process = &monitor.process;
        if self.exit.is_some() || monitor.is_retired() {
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
                    self.cell.change(|live| {
                        live.trouble = None;
                        // It could not be reached until now, and runs.
                        if live.state == VmState::Failed {
                            live.state = VmState::Running;
                        }
                    });
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

    fn reconnect(&mut self) -> Result<Events> {
        let socket = self.host.config.control_socket(&self.cell.name);
        let (connection, greeting, events) = Connection::open(&socket)?;
        let pid = self.monitor.process.pid();
        if let Some(other) = greeting.pid.filter(|other| *other != pid) {
            return Err(MonitorMismatch {
                said: format!("another process ({other})"),
                expected: format!("the monitor of VM '{}' ({pid})", self.cell.name),
            }
            .into());
        }
        // Should it have been left in the middle of a handover: the guest is its own.
        {
            let retired = super::guard(&self.monitor.retired);
            if *retired {
                return Err(MonitorMismatch {
                    said: "the one that the guest has left".to_owned(),
                    expected: format!("the monitor of VM '{}'", self.cell.name),
                }
                .into());
            }
            super::handover::settle_place(&connection)?;
        }
        self.monitor.replace_connection(connection);
        // What may have been missed while nobody listened.
        let state = self.monitor.status().map(|status| status.state);
        if self.recorded == Recorded::No {
            match &state {
                None => {
                    return Err(MonitorSilent {
                        request: "status".to_owned(),
                        seconds: LOOK_PATIENCE.as_secs(),
                    }
                    .into());
                }
                Some(RunState::Unconfigured | RunState::Built) => self.end_unstarted(),
                Some(_) => {
                    if let Err(seen) = self.record() {
                        note(seen);
                    }
                }
            }
        }
        tracing::info!(vm = %self.cell.name, "connected to the monitor again");
        if let Some(state) = state {
            self.state(state);
        }
        self.tell_jobs(JobNews::Reconcile(Arc::clone(&self.monitor)));
        Ok(events)
    }

    /// The guest was to be started and never was: nobody knows any more what it was told.
    fn end_unstarted(&mut self) {
        let seen = self.killed("the order to start its guest did not reach it");
        note(seen.clone());
        self.exit = Some(ExitReason::Failed(seen));
        let asked = self
            .monitor
            .connection()
            .call("stop", Request::Stop, &[], LOOK_PATIENCE);
        if asked.is_err() || !self.monitor.process.wait(LOOK_PATIENCE) {
            self.monitor.process.kill();
        }
    }

    /// The monitor has ended: nothing of it is left when the VM is shown as stopped.
    fn ended(mut self, jobs: JoinHandle<()>) {
        let name = self.cell.name.as_str();
        if self.monitor.is_retired() {
            tracing::info!(vm = %name, pid = self.monitor.process.pid(), "the old monitor ended");
            self.monitor.process.how_it_ended();
            return; // Its second thread ends with it.
        }
        let pid = self.monitor.process.pid();
        let how = self.monitor.process.how_it_ended();
        tracing::info!(vm = %name, pid, ?how, exit = ?self.exit, "monitor ended");
        let why = self
            .exit
            .take()
            .unwrap_or_else(|| ExitReason::Failed(self.death(how)));
        let ran_ms = now_ms().saturating_sub(self.monitor.started_ms);
        // What was said of jobs counts before what the end of their monitor says.
        let Self {
            host,
            cell,
            jobs: news,
            ..
        } = self;
        drop(news);
        let shown = host.vm_has_ended(&cell, &why, Some(jobs), SETTLE_PATIENCE);
        if shown == VmState::Starting {
            crash::point("before-restart");
            let least = u64::try_from(RESET_INTERVAL.as_millis()).unwrap_or(0);
            if ran_ms < least {
                std::thread::sleep(Duration::from_millis(least - ran_ms));
            }
            host.start_after_reset(&cell);
        }
    }

    /// A monitor that ended without a word.
    fn death(&self, how: Option<Ending>) -> Observation {
        let told = std::mem::take(&mut self.cell.live().observed);
        let died = self.host.monitor_died(
            &self.cell.name,
            self.monitor.process.pid(),
            how.map(Death::Seen),
            told,
        );
        note(died.clone());
        died
    }
}

impl Host {
    /// The VM's monitor is gone: settles and records. What the VM does now is `Starting` if its
    /// guest asked for a reset; then the caller starts it again. For `jobs` and `patience`, see
    /// [`Host::settle_jobs`].
    pub(super) fn vm_has_ended(
        self: &Arc<Self>,
        cell: &Cell,
        why: &ExitReason,
        jobs: Option<JoinHandle<()>>,
        patience: Duration,
    ) -> VmState {
        let name = cell.name.as_str();
        self.settle_jobs(name, why, jobs, patience);
        if let Err(seen) = remove_file(&self.config.control_socket(name)) {
            note(seen);
        }
        let (stored, shown) = outcome(why, cell);
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
}

/// What becomes of a VM whose guest has ended: what is recorded, and what is shown.
fn outcome(why: &ExitReason, cell: &Cell) -> (StoredState, VmState) {
    let stop_asked = cell.live().stop_asked;
    match why {
        ExitReason::Failed(_) if cell.revival == Revival::Another && !stop_asked => {
            (StoredState::Restarting, VmState::Starting)
        }
        ExitReason::Failed(_) => (StoredState::Failed, VmState::Failed),
        ExitReason::GuestReset if !stop_asked => (StoredState::Restarting, VmState::Starting),
        _ => (StoredState::Stopped, VmState::Stopped),
    }
}
