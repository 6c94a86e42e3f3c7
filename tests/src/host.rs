//! One host: a daemon with folders of its own, and the command line that talks to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::failure::{Failure, Outcome, While};
use crate::place;
use crate::process::{self, Ran, Running, wait_until};

/// How long the daemon may take to answer after its start. Under emulation on a busy machine a
/// second is long past.
const DAEMON_UP: Duration = Duration::from_secs(30);

/// How many lines of a log are shown when a test fails.
const LOG_LINES: usize = 25;

/// A daemon and its folders. Dropping it ends the daemon and every monitor that it started, and
/// removes the folders.
#[derive(Debug)]
pub struct Host {
    folder: PathBuf,
    stores: Vec<PathBuf>,
    daemon: Option<Child>,
    /// Monitors seen so far: they outlive a killed daemon.
    monitors: Vec<u32>,
}

impl Host {
    /// Starts a daemon with fresh folders and the datastores `a` and `b`.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn start(name: &str) -> Outcome<Self> {
        let folder = place::at(&format!("/tmp/strake-{name}"));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let mut host = Self {
            folder,
            stores: Vec::new(),
            daemon: None,
            monitors: Vec::new(),
        };
        host.start_daemon(&[])?;
        for store in ["a", "b"] {
            host.add_store(store, &place::store(store).join(name))?;
        }
        Ok(host)
    }

    /// Starts the daemon, with these environment variables too.
    ///
    /// # Errors
    /// If it does not answer in time.
    pub fn start_daemon(&mut self, env: &[(&str, &str)]) -> Outcome {
        self.start_daemon_with(&[], env)
    }

    /// Starts the daemon with these arguments and environment variables too.
    ///
    /// # Errors
    /// If it does not answer in time.
    pub fn start_daemon_with(&mut self, arguments: &[&str], env: &[(&str, &str)]) -> Outcome {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("straked.log"))?;
        let mut command = Command::new("straked");
        command
            .arg("--state-dir")
            .arg(self.folder.join("state"))
            .arg("--run-dir")
            .arg(self.run_dir())
            .args(arguments)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.daemon = Some(command.spawn().doing("starting straked")?);
        let mut last = String::new();
        let up = wait_until("straked answers", DAEMON_UP, || {
            let asked = self.strake(&["ps"])?;
            last = asked.err;
            Ok(asked.status == 0)
        });
        up.map_err(|failure| Failure::new(format!("{failure}\n{last}{}", self.daemon_log())))
    }

    /// Ends the daemon as `kill -9` does.
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Waits for the daemon to end by itself, at a crash point.
    ///
    /// # Errors
    /// If it still runs after the limit.
    pub fn daemon_ends(&mut self, limit: Duration) -> Outcome {
        let Some(daemon) = self.daemon.as_mut() else {
            return Ok(());
        };
        wait_until("straked ends", limit, || Ok(daemon.try_wait()?.is_some()))?;
        self.daemon = None;
        Ok(())
    }

    /// Registers a datastore; the folder is made, and removed with the host.
    ///
    /// # Errors
    /// If the daemon refuses it.
    pub fn add_store(&mut self, name: &str, folder: &Path) -> Outcome {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder)?;
        self.stores.push(folder.to_owned());
        let folder = folder.display().to_string();
        self.strake(&["datastore", "add", name, &folder])?.good()?;
        Ok(())
    }

    /// The folder of a datastore made by [`Host::start`].
    #[must_use]
    pub fn store(&self, name: &str) -> PathBuf {
        let own = self
            .folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let own = own.trim_start_matches("strake-").to_owned();
        place::store(name).join(own)
    }

    /// A folder for a test's own files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn run_dir(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// The command line, ready to be given more arguments.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new("strake");
        command.env("STRAKE_SOCKET", self.run_dir().join("straked.sock"));
        command.env("STRAKE_RUN_DIR", self.run_dir());
        command
    }

    /// Runs `strake` with these arguments.
    ///
    /// # Errors
    /// If it cannot be started or hangs.
    pub fn strake(&self, arguments: &[&str]) -> Outcome<Ran> {
        process::run(self.command().args(arguments))
    }

    /// Runs `strake --json` with these arguments and returns its answer.
    ///
    /// # Errors
    /// If it fails.
    pub fn json(&self, arguments: &[&str]) -> Outcome<Value> {
        let out = self.strake(&[&["--json"], arguments].concat())?.good()?;
        Ok(serde_json::from_str(&out)?)
    }

    /// Starts `strake` with these arguments in the background.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn in_background(&self, arguments: &[&str]) -> Outcome<Running> {
        Running::start(self.command().args(arguments))
    }

    /// Remembers a monitor, so that it does not outlive the test.
    pub fn knows_monitor(&mut self, pid: u32) {
        self.monitors.push(pid);
    }

    /// The last lines of the daemon's log.
    #[must_use]
    pub fn daemon_log(&self) -> String {
        let text = fs::read(self.folder.join("straked.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(20);
        lines.get(from..).unwrap_or_default().join("\n")
    }

    /// The last lines of a monitor's log.
    #[must_use]
    pub fn monitor_log(&self, vm: &str) -> String {
        let path = self.run_dir().join("vms").join(vm).join("monitor.log");
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// What a guest wrote to its serial console.
    #[must_use]
    pub fn console(&self, vm: &str) -> String {
        let path = self.folder.join("state/vms").join(vm).join("console.log");
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }
}

/// What the hosts dropped so far had in their logs: why a test failed may stand there.
static ENDED: Mutex<String> = Mutex::new(String::new());

/// The logs of the hosts dropped so far.
#[must_use]
pub fn logs_of_ended() -> String {
    ENDED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Removes what the host of a killed test left behind, and returns its logs. Its processes are
/// gone already.
#[must_use]
pub fn take_away(name: &str) -> String {
    let folder = place::at(&format!("/tmp/strake-{name}"));
    let logs = logs_in(&folder);
    for store in ["a", "b", "small"] {
        let _ = fs::remove_dir_all(place::store(store).join(name));
    }
    let _ = fs::remove_dir_all(folder);
    logs
}

/// The last lines of the daemon's log, of each monitor's, and of each guest's console.
fn logs_in(folder: &Path) -> String {
    let mut logs = tail_of(&folder.join("straked.log"), "daemon");
    for (vms, file, what) in [
        ("run/vms", "monitor.log", "monitor of"),
        ("state/vms", "console.log", "console of"),
    ] {
        for vm in fs::read_dir(folder.join(vms))
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = vm.file_name().to_string_lossy().into_owned();
            logs.push_str(&tail_of(&vm.path().join(file), &format!("{what} {name}")));
        }
    }
    logs
}

fn tail_of(file: &Path, what: &str) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LOG_LINES);
    let tail = lines.get(from..).unwrap_or_default().join("\n");
    format!("-- {what}:\n{tail}\n")
}

impl Drop for Host {
    fn drop(&mut self) {
        let logs = logs_in(&self.folder);
        ENDED
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_str(&logs);
        if let Ok(Value::Array(vms)) = self.json(&["ps"]) {
            let pids = vms.iter().filter_map(|vm| vm.get("pid")?.as_u64());
            self.monitors
                .extend(pids.filter_map(|pid| u32::try_from(pid).ok()));
        }
        self.kill_daemon();
        for pid in &self.monitors {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if name.starts_with("strake") {
                process::signal_pid(*pid, Signal::KILL);
            }
        }
        for store in &self.stores {
            let _ = fs::remove_dir_all(store);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}
