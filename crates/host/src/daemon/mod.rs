//! The host's operations.
//!
//! Threads: each request runs on a blocking thread of its own; each VM that runs has a supervisor
//! thread (`supervise`), a thread that ends its jobs, and inside of its connection a reader thread;
//! when its monitor has ended, one more clears up what is left of its jobs (`settle`); one thread
//! keeps house (`housekeeping`).
//!
//! Locks, in the order in which they may be taken:
//!
//! 1. [`Cell::operation`]: one operation that changes a VM at a time (start, remove, the begin of
//!    a stop or of a migration). Held while a monitor is being started, never while a guest is
//!    being waited for. A stop by force does without it if there is a monitor.
//! 2. [`Cell::jobs`]: the begin of a migration against the reconciliation of jobs with a monitor.
//!    May be held for as long as a monitor takes to accept a job, so a supervisor never waits for
//!    it while its VM runs: a guest may stand still until it answers.
//! 3. `Host::placing`: one decision about who gets which image at a time.
//!    Then `Host::steering`: one change of profiles, labels or values at a time; then
//!    `Host::forcing`: one change of running machines after it.
//! 4. `Host::verdicts`: one decision about the commit of one job at a time.
//! 5. [`Cell::live`]: what the VM does now. A leaf: nothing is waited for while it is held.
//!
//! The inventory has its own lock inside, below all of these.

mod commit;
mod console;
mod create;
mod datastores;
mod death;
mod exports;
mod files;
mod handover;
mod housekeeping;
mod interrupted;
mod launch;
mod lifecycle;
mod live;
mod migrate;
mod recover;
mod settle;
mod sharing;
mod snapshots;
mod steer;
mod supervise;
mod tree;
mod verdicts;
mod view;

pub use create::Images;
pub use steer::Intent;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use strake_api::rest::{HostInfo, VmState};
use strake_observe::{Kind, Observation, OsContext, Result, Task};

use crate::HostConfig;
use crate::config::show;
use crate::inventory::{Inventory, Workload};
use crate::lock::DirectoryLock;
use crate::observations::DaemonNotStarted;
use live::{Cell, Revival};

/// The host.
#[derive(Debug)]
pub struct Host {
    config: HostConfig,
    inventory: Inventory,
    cells: Mutex<BTreeMap<String, Arc<Cell>>>,
    placing: Mutex<()>,
    steering: Mutex<()>,
    forcing: Mutex<()>,
    profiles: steer::Profiles,
    verdicts: verdicts::Verdicts,
    since: Instant,
    _locks: [DirectoryLock; 2],
}

impl Host {
    /// Takes the directories, opens the inventory, finds the monitors that run and settles what a
    /// daemon before left unfinished.
    ///
    /// # Errors
    /// [`DaemonNotStarted`], for example because another daemon has the directories.
    pub fn open(config: HostConfig) -> Result<Arc<Self>> {
        let state_dir = show(&config.state_dir);
        let not_started = || DaemonNotStarted { state_dir };
        task("start the daemon", not_started, |_| {
            let host = Arc::new(Self::prepare(config)?);
            host.load_profiles()?;
            host.recover()?;
            // What a daemon before had committed and not yet made true.
            host.bring_all_into_force();
            host.keep_house()?;
            Ok(host)
        })
    }

    fn prepare(config: HostConfig) -> Result<Self> {
        let locks = [
            DirectoryLock::take(&config.state_dir)?,
            DirectoryLock::take(&config.run_dir)?,
        ];
        for directory in [&config.state_dir, &config.run_dir] {
            private(&directory.join("vms"))?;
        }
        Ok(Self {
            inventory: Inventory::open(&config.inventory())?,
            config,
            cells: Mutex::default(),
            placing: Mutex::default(),
            steering: Mutex::default(),
            forcing: Mutex::default(),
            profiles: steer::Profiles::default(),
            verdicts: verdicts::Verdicts::default(),
            since: Instant::now(),
            _locks: locks,
        })
    }

    /// What the daemon and its host are.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn info(&self) -> Result<HostInfo> {
        let mut vms = self.inventory.vms()?;
        vms.retain(|record| matches!(record.what, Workload::Vm(_)));
        let running = vms
            .iter()
            .filter(|vm| {
                let state = self.existing_cell(&vm.name).map(|cell| cell.live().state);
                !matches!(state, None | Some(VmState::Stopped | VmState::Failed))
            })
            .count();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(HostInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.since.elapsed().as_secs(),
            hostname: std::fs::read_to_string("/proc/sys/kernel/hostname")
                .map(|name| name.trim().to_owned())
                .unwrap_or_default(),
            running: count(running),
            vms: count(vms.len()),
        })
    }

    /// The live side of a VM that is in the inventory.
    fn cell(&self, name: &str) -> Result<Arc<Cell>> {
        if let Some(cell) = self.existing_cell(name) {
            return Ok(cell);
        }
        let record = self.inventory.vm(name)?;
        let mut cells = guard(&self.cells);
        let cell = cells
            .entry(name.to_owned())
            .or_insert_with(|| Arc::new(Cell::new(name, record.state, Revival::of(&record.what))));
        Ok(Arc::clone(cell))
    }

    fn existing_cell(&self, name: &str) -> Option<Arc<Cell>> {
        guard(&self.cells).get(name).cloned()
    }

    fn forget_cell(&self, name: &str) {
        guard(&self.cells).remove(name);
    }
}

/// Locks even if a thread panicked meanwhile: what these locks guard is changed in single steps.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` as a task: its failure is `own`, caused by what `work` met; its success clears what
/// `work` took in on the way.
fn task<T, K: Kind>(
    name: impl Into<String>,
    own: impl FnOnce() -> K,
    work: impl FnOnce(&mut Task) -> Result<T>,
) -> Result<T> {
    let mut task = Task::begin(name);
    match work(&mut task) {
        Ok(value) => {
            task.succeed();
            Ok(value)
        }
        Err(seen) => {
            task.saw(seen);
            Err(task.fail(own()))
        }
    }
}

/// Keeps an observation that no caller waits for.
fn note(seen: Observation) {
    tracing::warn!(%seen, id = seen.id(), "observed");
    strake_observe::recorder().record(seen, strake_observe::State::Open);
}

/// A directory for this daemon's account alone.
fn private(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).os("mkdir", directory.display())?;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700))
        .os("chmod", directory.display())
}

/// Milliseconds since the epoch.
fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}
