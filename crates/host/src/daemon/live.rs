//! What a VM does now: the part of it that is not in the inventory.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use strake_api::control::VmStatus;
use strake_api::control::{Reply, Request};
use strake_api::rest::VmState;
use strake_observe::{Observation, Result};

use super::guard;
use crate::inventory::{StoredState, Workload};
use crate::monitor::connection::Connection;
use crate::monitor::process::Process;

/// How many observations of a monitor are kept for the day it dies.
const OBSERVED_KEPT: usize = 16;

/// How long a look at a VM waits for its monitor.
pub(super) const LOOK_PATIENCE: Duration = Duration::from_secs(2);

/// A VM that runs or may run.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) name: String,
    pub(super) revival: Revival,
    pub(super) operation: Mutex<()>,
    pub(super) jobs: Mutex<()>,
    live: Mutex<Live>,
    changed: Condvar,
}

/// What is to be done when a monitor has died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Revival {
    /// Nothing: the guest is gone with it.
    None,
    /// Another one takes its place: those who use an export are still there.
    Another,
}

impl Revival {
    pub(super) fn of(what: &Workload) -> Self {
        match what {
            Workload::Vm(_) => Self::None,
            Workload::Export(_) => Self::Another,
        }
    }
}

/// What a VM does now.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) state: VmState,
    pub(super) monitor: Option<Arc<Monitor>>,
    /// Whether somebody asked for the stop: then a reset of the guest is one.
    pub(super) stop_asked: bool,
    /// Why a VM that seems to run cannot be reached.
    pub(super) trouble: Option<Observation>,
    /// The last observations of the monitor.
    pub(super) observed: VecDeque<Observation>,
}

/// A monitor that runs.
#[derive(Debug)]
pub(super) struct Monitor {
    pub(super) process: Process,
    pub(super) started_ms: u64,
    /// The version of its binary, if it was asked.
    pub(super) version: Option<String>,
    /// Held while the guest is being handed to another monitor, by whoever decides which of the two
    /// has it; says whether it is the other one.
    pub(super) retired: Mutex<bool>,
    connection: Mutex<Arc<Connection>>,
}

impl Monitor {
    pub(super) fn new(process: Process, connection: Connection, started_ms: u64) -> Self {
        Self {
            process,
            started_ms,
            version: None,
            retired: Mutex::new(false),
            connection: Mutex::new(Arc::new(connection)),
        }
    }

    /// Whether its guest runs in another monitor; waits while that is being decided.
    pub(super) fn is_retired(&self) -> bool {
        *guard(&self.retired)
    }

    pub(super) fn connection(&self) -> Arc<Connection> {
        Arc::clone(&guard(&self.connection))
    }

    pub(super) fn replace_connection(&self, connection: Connection) {
        *guard(&self.connection) = Arc::new(connection);
    }

    /// Its own view of the VM, if it gives one soon.
    pub(super) fn status(&self) -> Option<VmStatus> {
        let reply = self
            .connection()
            .call("status", Request::Status, &[], LOOK_PATIENCE);
        match reply {
            Ok(Reply::Status(status)) => Some(status),
            Ok(_) | Err(_) => None,
        }
    }
}

impl Cell {
    pub(super) fn new(name: &str, stored: StoredState, revival: Revival) -> Self {
        Self {
            name: name.to_owned(),
            revival,
            operation: Mutex::default(),
            jobs: Mutex::default(),
            live: Mutex::new(Live {
                state: match stored {
                    StoredState::Stopped => VmState::Stopped,
                    StoredState::Restarting => VmState::Starting,
                    StoredState::Starting | StoredState::Running | StoredState::Failed => {
                        VmState::Failed
                    }
                },
                monitor: None,
                stop_asked: false,
                trouble: None,
                observed: VecDeque::new(),
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn live(&self) -> MutexGuard<'_, Live> {
        guard(&self.live)
    }

    /// Changes what the VM does and wakes those who wait for it.
    pub(super) fn change<T>(&self, how: impl FnOnce(&mut Live) -> T) -> T {
        let value = how(&mut self.live());
        self.changed.notify_all();
        value
    }

    /// Waits until `monitor` is no longer the VM's; tells whether that came to pass.
    pub(super) fn wait_for_end(&self, monitor: &Arc<Monitor>, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut live = self.live();
        loop {
            let theirs = live
                .monitor
                .as_ref()
                .is_some_and(|current| Arc::ptr_eq(current, monitor));
            if !theirs {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            live = self
                .changed
                .wait_timeout(live, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Live {
    /// The monitor of a VM whose guest runs.
    pub(super) fn running(&self, vm: &str, advice: &str) -> Result<Arc<Monitor>> {
        match (&self.monitor, self.state) {
            (Some(monitor), VmState::Running | VmState::Paused | VmState::Stopping) => {
                Ok(Arc::clone(monitor))
            }
            _ => Err(crate::observations::WrongState {
                vm: vm.to_owned(),
                state: state_name(self.state).to_owned(),
                needed: "running".to_owned(),
                advice: advice.to_owned(),
            }
            .into()),
        }
    }

    /// Whether there is no monitor, not even one that cannot be reached.
    pub(super) fn at_rest(&self) -> bool {
        let ended = matches!(self.state, VmState::Stopped | VmState::Failed);
        ended && self.monitor.is_none() && self.trouble.is_none()
    }

    pub(super) fn observe(&mut self, seen: Observation) {
        if self.observed.len() == OBSERVED_KEPT {
            self.observed.pop_front();
        }
        self.observed.push_back(seen);
    }
}

pub(super) fn state_name(state: VmState) -> &'static str {
    match state {
        VmState::Stopped => "stopped",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopping => "stopping",
        VmState::Failed => "failed",
    }
}
