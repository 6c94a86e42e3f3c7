//! A real `straked` in a directory of its own, with the fake monitor, and a client for its API.

#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

pub(crate) mod images;

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use strake_api::job::Phase;
use strake_api::rest::{Datastore, Job, Problem, Vm, VmState};
use strake_observe::Observation;
use tempfile::TempDir;

/// How long anything may take that should happen soon.
const SOON: Duration = Duration::from_secs(15);

/// The size of the disks that these tests make.
pub(crate) const DISK: u64 = 256 * 1024;

/// The directories of one test, with the datastores `slow` and `fast`.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) daemon: Option<Child>,
}

impl World {
    /// Starts a daemon and adds the datastores.
    pub(crate) fn new() -> Self {
        // Not in /tmp's tmpfs, should it be one: O_DIRECT and statvfs are to be as on a disk.
        Self::in_directory(TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    pub(crate) fn in_directory(dir: TempDir) -> Self {
        let mut world = Self { dir, daemon: None };
        std::fs::write(world.path("kernel"), b"no kernel, but a file").unwrap();
        world.start_daemon();
        for name in ["slow", "fast"] {
            std::fs::create_dir(world.path(name)).unwrap();
            world.add_datastore(name);
        }
        world
    }

    pub(crate) fn add_datastore(&self, name: &str) -> Datastore {
        let body = json!({ "name": name, "path": self.path(name) });
        self.ok("POST", "/v1/datastores", &body)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/straked.sock")
    }

    pub(crate) fn start_daemon(&mut self) {
        self.start_daemon_that_dies(None);
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_straked"));
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.path("straked.log"))
            .unwrap();
        command
            .env_clear()
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--vmm")
            .arg(env!("CARGO_BIN_EXE_strake-fake-monitor"))
            .args(["--kvm", "/dev/null", "--log", "debug"])
            .stdin(Stdio::null())
            .stderr(log);
        command
    }

    /// Starts the daemon and waits until it says READY; `at` is a crash point.
    pub(crate) fn start_daemon_that_dies(&mut self, at: Option<&str>) {
        assert!(self.daemon.is_none());
        let notify = self.path("notify");
        let _ = std::fs::remove_file(&notify);
        let ready = UnixDatagram::bind(&notify).unwrap();
        ready.set_read_timeout(Some(SOON)).unwrap();
        let mut command = self.command();
        command.env("NOTIFY_SOCKET", &notify);
        if let Some(at) = at {
            command.env("STRAKE_CRASH_AT", at);
        }
        self.daemon = Some(command.spawn().unwrap());
        let mut word = [0; 64];
        let length = ready.recv(&mut word).unwrap_or_else(|error| {
            panic!("the daemon does not come up ({error}): {}", self.log());
        });
        assert_eq!(&word[..length], b"READY=1");
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("straked.log")).unwrap_or_default()
    }

    /// As `kill -9` does.
    pub(crate) fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Waits until the daemon has ended at its crash point.
    pub(crate) fn wait_for_crash(&mut self) {
        // It stays ours until it has ended: a failed test must not leave it behind.
        let daemon = self.daemon.as_mut().unwrap();
        let ended = soon(|| daemon.try_wait().unwrap());
        assert!(
            ended.is_some(),
            "the crash point was not reached: {}",
            self.log()
        );
        self.daemon = None;
    }

    pub(crate) fn restart_daemon(&mut self) {
        self.kill_daemon();
        self.start_daemon();
    }

    // ---- Requests ----

    pub(crate) fn raw(&self, method: &str, path: &str, body: Vec<u8>) -> Option<(u16, Vec<u8>)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let stream = tokio::net::UnixStream::connect(self.socket()).await.ok()?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .ok()?;
            tokio::spawn(connection);
            let request = hyper::Request::builder()
                .method(method)
                .uri(path)
                .header("host", "strake")
                .body(Full::new(Bytes::from(body)))
                .unwrap();
            let response = sender.send_request(request).await.ok()?;
            let status = response.status().as_u16();
            let bytes = response.into_body().collect().await.ok()?.to_bytes();
            Some((status, bytes.to_vec()))
        })
    }

    fn exchange(&self, method: &str, path: &str, body: &Value) -> Option<(u16, Vec<u8>)> {
        let body = match body {
            Value::Null => Vec::new(),
            body => serde_json::to_vec(body).unwrap(),
        };
        self.raw(method, path, body)
    }

    /// A request that must succeed.
    pub(crate) fn ok<T: DeserializeOwned>(&self, method: &str, path: &str, body: &Value) -> T {
        let (status, bytes) = self
            .exchange(method, path, body)
            .unwrap_or_else(|| panic!("no answer to {method} {path}: {}", self.log()));
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(
            (200..300).contains(&status),
            "{method} {path}: {status} {text}"
        );
        let text = if text.is_empty() { "null" } else { &text };
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// A request that must fail.
    pub(crate) fn refused(&self, method: &str, path: &str, body: &Value) -> (u16, Observation) {
        let (status, bytes) = self.exchange(method, path, body).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(status >= 400, "{method} {path}: {status} {text}");
        let problem: Problem = serde_json::from_str(&text).unwrap();
        assert_eq!(problem.status, status);
        assert!(problem.kind.ends_with(problem.observation.id()));
        assert!(!problem.detail.is_empty());
        (status, problem.observation)
    }

    /// A request during which the daemon dies.
    pub(crate) fn dying(&mut self, method: &str, path: &str, body: &Value) {
        let answer = self.exchange(method, path, body);
        assert!(answer.is_none(), "the daemon answered: {answer:?}");
        self.wait_for_crash();
    }

    // ---- VMs ----

    /// Creates `web1` with the disk `root` on `slow`, told `cmdline`.
    pub(crate) fn create(&self, cmdline: &str) -> Vm {
        self.create_named("web1", cmdline)
    }

    pub(crate) fn create_named(&self, name: &str, cmdline: &str) -> Vm {
        self.ok("POST", "/v1/vms", &self.vm_body(name, cmdline))
    }

    pub(crate) fn vm_body(&self, name: &str, cmdline: &str) -> Value {
        json!({ "name": name, "spec": {
            "cpus": 1,
            "memory": "64M",
            "boot": { "from": "kernel", "kernel": self.path("kernel"), "cmdline": cmdline },
            "disk": [{ "name": "root", "image": format!("slow:{name}-root.raw"), "size": DISK }],
        }})
    }

    pub(crate) fn start(&self, name: &str) -> Vm {
        self.ok("POST", &format!("/v1/vms/{name}/start"), &Value::Null)
    }

    pub(crate) fn stop_by_force(&self, name: &str) -> Vm {
        self.ok(
            "POST",
            &format!("/v1/vms/{name}/stop"),
            &json!({ "force": true }),
        )
    }

    pub(crate) fn vm(&self, name: &str) -> Vm {
        self.ok("GET", &format!("/v1/vms/{name}"), &Value::Null)
    }

    pub(crate) fn wait_for(&self, name: &str, state: VmState) -> Vm {
        let reached = soon(|| Some(self.vm(name)).filter(|vm| vm.state == state));
        reached.unwrap_or_else(|| panic!("{:?}\n{}", self.vm(name), self.log()))
    }

    /// Writes lines to the console; the guest does what they say and says so.
    pub(crate) fn tell(&self, name: &str, line: &str) -> String {
        let mut stream = self.console(name);
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut said = [0; 200];
        let length = stream.read(&mut said).unwrap_or(0);
        String::from_utf8_lossy(&said[..length]).into_owned()
    }

    pub(crate) fn console(&self, name: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        write!(
            stream,
            "POST /v1/vms/{name}/console HTTP/1.1\r\nHost: strake\r\nConnection: upgrade\r\n\
             Upgrade: strake-console\r\nContent-Length: 0\r\n\r\n"
        )
        .unwrap();
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            assert_eq!(stream.read(&mut byte).unwrap(), 1, "no answer");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        stream
    }

    // ---- Jobs ----

    pub(crate) fn migrate_body(&self, to: &str) -> Value {
        json!({ "to": to })
    }

    pub(crate) fn migrate(&self, to: &str) -> Job {
        self.ok("POST", MIGRATE, &json!({ "to": to }))
    }

    pub(crate) fn job(&self, job: &Job) -> Job {
        self.ok("GET", &format!("/v1/jobs/{}", job.status.job), &Value::Null)
    }

    pub(crate) fn wait_for_job(&self, job: &Job) -> Job {
        let ended = soon(|| Some(self.job(job)).filter(|job| job.status.phase.is_final()));
        ended.unwrap_or_else(|| panic!("{:?}\n{}", self.job(job), self.log()))
    }

    pub(crate) fn wait_for_phase(&self, job: &Job, phase: Phase) -> Job {
        let reached = soon(|| Some(self.job(job)).filter(|job| job.status.phase == phase));
        reached.unwrap_or_else(|| panic!("{:?}\n{}", self.job(job), self.log()))
    }

    /// What lies in a datastore's directory.
    pub(crate) fn files(&self, datastore: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(datastore)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// A small file system of its own; unmounted with this.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// `None` without the right to mount.
    pub(crate) fn at(path: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(path)
            .status();
        if status.is_ok_and(|status| status.success()) {
            return Some(Self(path.to_owned()));
        }
        eprintln!("skipped: no right to mount a tmpfs");
        None
    }

    /// Leaves no room on it.
    pub(crate) fn fill(&self) -> PathBuf {
        let filler = self.0.join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        filler
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A world whose state directory is a small file system of its own.
pub(crate) fn small_state() -> Option<(Mounted, World)> {
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mounted = Mounted::at(&dir.path().join("state"), "2M")?;
    Some((mounted, World::in_directory(dir)))
}

/// What the monitor of `web1` wrote to its log.
pub(crate) fn monitor_log(world: &World) -> String {
    std::fs::read_to_string(world.path("run/vms/web1/monitor.log")).unwrap_or_default()
}

/// Connects to the monitor in the daemon's place, so that the daemon has to connect again.
pub(crate) fn steal_connection(world: &World) {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    let path = world.path("run/vms/web1/control.sock");
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
}

pub(crate) fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

pub(crate) const MIGRATE: &str = "/v1/vms/web1/disks/root/migrate";

impl Drop for World {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // The monitors are not our children; they listen in the run directory.
        for pid in monitors(&self.path("run")) {
            kill(pid);
        }
        if std::thread::panicking() {
            eprintln!("---- straked's log\n{}", self.log());
        }
    }
}

/// The fake monitors whose standard error is in `run`.
pub(crate) fn monitors(run: &Path) -> Vec<u32> {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let log = std::fs::read_link(format!("/proc/{pid}/fd/2"));
            log.is_ok_and(|log| log.starts_with(run))
        })
        .collect()
}

pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Tries until it gives something, or too long.
pub(crate) fn soon<T>(mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(value) = attempt() {
            return Some(value);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
