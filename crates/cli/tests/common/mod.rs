//! A daemon for tests: HTTP on a unix socket, scripted answers, and a record of what was asked.
//!
//! It runs in a thread of the test with a runtime of its own, so that a test can drive the real
//! binary from outside. [`FakeDaemon::stop`] kills it as a crash would: the socket goes and every
//! connection breaks; [`FakeDaemon::resume`] brings it back on the same socket.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use strake_api::control::ExitReason;
use strake_api::job::{JobId, MigrationStatus, PassReport, Phase};
use strake_api::rest::{Datastore, Disk, HostInfo, Job, Problem, Vm, VmState};
use strake_api::spec::VmSpec;
use strake_observe::Observation;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

/// What was asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    /// With its query.
    pub(crate) path: String,
    pub(crate) body: Value,
}

impl Asked {
    /// `METHOD path`.
    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

/// What is answered.
pub(crate) enum Answer {
    Json(u16, Value),
    Bytes(Vec<u8>),
    /// 101, then these steps on the console.
    Console(Vec<Step>),
    /// The connection breaks.
    Break,
    /// Nothing, for ever.
    Hang,
}

/// One step of a console.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// The guest writes.
    Say(&'static [u8]),
    /// The guest waits until what it read ends with this.
    Hear(&'static [u8]),
    /// The stream stays open.
    Stay,
}

type Script = Arc<dyn Fn(&Asked) -> Answer + Send + Sync>;

pub(crate) struct FakeDaemon {
    dir: TempDir,
    script: Script,
    asked: Arc<Mutex<Vec<Asked>>>,
    heard: Arc<Mutex<Vec<u8>>>,
    running: Option<(tokio::sync::oneshot::Sender<()>, thread::JoinHandle<()>)>,
}

impl FakeDaemon {
    pub(crate) fn new(script: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let mut daemon = Self {
            dir: tempfile::tempdir().unwrap(),
            script: Arc::new(script),
            asked: Arc::default(),
            heard: Arc::default(),
            running: None,
        };
        daemon.resume();
        daemon
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("straked.sock")
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Everything that was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.asked().iter().map(Asked::line).collect()
    }

    /// What was typed at the console.
    pub(crate) fn heard(&self) -> Vec<u8> {
        self.heard.lock().unwrap().clone()
    }

    pub(crate) fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            let _ = stop.send(());
            thread.join().unwrap();
        }
        let _ = std::fs::remove_file(self.socket());
    }

    pub(crate) fn resume(&mut self) {
        let listener = StdListener::bind(self.socket()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (script, asked, heard) = (self.script.clone(), self.asked.clone(), self.heard.clone());
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            // Dropping the runtime breaks every connection.
            runtime.block_on(async {
                let listener = UnixListener::from_std(listener).unwrap();
                tokio::select! {
                    () = serve(listener, script, asked, heard) => {}
                    _ = stopped => {}
                }
            });
        });
        self.running = Some((stop, thread));
    }

    /// `strake` with these arguments, to be run against this daemon.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = strake();
        command.args(args).env("STRAKE_SOCKET", self.socket());
        command
    }

    /// Runs `strake` with these arguments to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Done {
        done(self.command(args).stdin(Stdio::null()).output().unwrap())
    }

    /// Starts `strake` with these arguments, everything piped.
    pub(crate) fn spawn(&self, args: &[&str]) -> Child {
        self.command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits until something was asked `times` times.
    pub(crate) fn wait_for(&self, line: &str, times: usize) {
        until(|| self.lines().iter().filter(|l| *l == line).count() >= times);
    }
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        self.stop();
    }
}

/// `strake`, without what the environment of the tests may say.
pub(crate) fn strake() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strake"));
    for name in [
        "STRAKE_SOCKET",
        "STRAKE_RUN_DIR",
        "STRAKE_STATE_DIR",
        "NO_COLOR",
        "STRAKE_VMM",
    ] {
        command.env_remove(name);
    }
    command
}

/// How a call ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Done {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Fails the test unless the call succeeded.
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }
}

pub(crate) fn done(output: Output) -> Done {
    Done {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Waits for something that must happen; the bound is for a broken test only.
pub(crate) fn until(condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "it never happened"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

async fn serve(
    listener: UnixListener,
    script: Script,
    asked: Arc<Mutex<Vec<Asked>>>,
    heard: Arc<Mutex<Vec<u8>>>,
) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        let (script, asked, heard) = (script.clone(), asked.clone(), heard.clone());
        tokio::spawn(async move {
            let service =
                service_fn(|request| answer(request, script.clone(), asked.clone(), heard.clone()));
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await;
        });
    }
}

#[derive(Debug)]
struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken on purpose")
    }
}

impl std::error::Error for Broken {}

async fn answer(
    mut request: Request<Incoming>,
    script: Script,
    asked: Arc<Mutex<Vec<Asked>>>,
    heard: Arc<Mutex<Vec<u8>>>,
) -> Result<Response<Full<Bytes>>, Broken> {
    let upgrade = request.headers().get("upgrade").cloned();
    let body = request.body_mut().collect().await.unwrap().to_bytes();
    let this = Asked {
        method: request.method().to_string(),
        path: request.uri().to_string(),
        body: if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&body).unwrap()
        },
    };
    asked.lock().unwrap().push(this.clone());
    let reply = |status: u16, kind: &str, body: Vec<u8>| {
        Response::builder()
            .status(status)
            .header("content-type", kind)
            .body(Full::new(body.into()))
            .unwrap()
    };
    Ok(match script(&this) {
        Answer::Json(204, _) => reply(204, "application/json", Vec::new()),
        Answer::Json(status, value) => reply(
            status,
            "application/json",
            serde_json::to_vec(&value).unwrap(),
        ),
        Answer::Bytes(bytes) => reply(200, "application/octet-stream", bytes),
        Answer::Break => return Err(Broken),
        Answer::Hang => std::future::pending::<Result<_, Infallible>>()
            .await
            .unwrap(),
        Answer::Console(steps) => {
            assert_eq!(upgrade.unwrap(), "strake-console");
            tokio::spawn(async move {
                let upgraded = hyper::upgrade::on(request).await.unwrap();
                console(TokioIo::new(upgraded), steps, heard).await;
            });
            Response::builder()
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header("connection", "upgrade")
                .header("upgrade", "strake-console")
                .body(Full::default())
                .unwrap()
        }
    })
}

async fn console(
    mut stream: TokioIo<hyper::upgrade::Upgraded>,
    steps: Vec<Step>,
    heard: Arc<Mutex<Vec<u8>>>,
) {
    let mut own = Vec::new();
    let mut piece = [0; 1024];
    for step in steps {
        match step {
            Step::Say(text) => {
                if stream.write_all(text).await.is_err() || stream.flush().await.is_err() {
                    return;
                }
            }
            Step::Hear(text) => {
                while !own.ends_with(text) {
                    match stream.read(&mut piece).await {
                        Ok(0) | Err(_) => return,
                        Ok(length) => {
                            own.extend_from_slice(&piece[..length]);
                            heard.lock().unwrap().extend_from_slice(&piece[..length]);
                        }
                    }
                }
            }
            Step::Stay => while stream.read(&mut piece).await.is_ok_and(|length| length > 0) {},
        }
    }
}

/// A success with `value`.
pub(crate) fn ok(value: impl serde::Serialize) -> Answer {
    Answer::Json(200, serde_json::to_value(value).unwrap())
}

/// A refusal with an observation tree of two levels.
pub(crate) fn refusal(status: u16) -> Answer {
    let observation = observation();
    let problem = Problem {
        kind: format!("tag:strake,2026:{}", observation.id()),
        title: observation.text().to_owned(),
        status,
        detail: observation.remedy().to_owned(),
        observation,
    };
    Answer::Json(status, serde_json::to_value(problem).unwrap())
}

pub(crate) fn not_found() -> Answer {
    refusal(404)
}

/// What a daemon and its monitor might have seen.
pub(crate) fn observation() -> Observation {
    serde_json::from_value(json!({
        "id": "host.refused", "text": "the daemon refuses 'web1'", "remedy": "do it otherwise",
        "data": {}, "at_ms": 1_795_423_531_110_u64, "component": "strake-host",
        "emitter": { "process": "straked", "pid": 7, "thread": "main" },
        "causes": [{
            "id": "os.call-failed", "text": "pwrite on /fast/root.raw: no space (ENOSPC)",
            "remedy": "free space on that file system", "data": {}, "at_ms": 1,
            "component": "strake-block",
            "emitter": { "process": "strake-vmm web1", "pid": 8, "thread": "copier" }
        }]
    }))
    .unwrap()
}

pub(crate) fn spec() -> VmSpec {
    let text = r#"
        cpus = 2
        memory = "1G"
        [boot]
        from = "disk"
        [[disk]]
        name = "root"
        image = "slow:web1-root.raw"
    "#;
    VmSpec::from_toml(text, "test").unwrap()
}

pub(crate) fn vm(name: &str, state: VmState) -> Vm {
    let runs = matches!(state, VmState::Running | VmState::Paused);
    Vm {
        own: spec(),
        pending: Vec::new(),
        name: name.to_owned(),
        revision: 1,
        state,
        spec: spec(),
        pid: runs.then_some(4711),
        uptime_ms: runs.then_some(61_000),
        last_exit: (state == VmState::Stopped).then_some(ExitReason::GuestPowerOff),
        disks: vec![Disk {
            name: "root".into(),
            image: "/slow/web1-root.raw".into(),
            format: strake_api::image::ImageFormat::Raw,
            snapshots: Vec::new(),
            datastore: Some("slow".into()),
            size_bytes: 4 << 30,
            allocated_bytes: Some(1 << 30),
            slot: 4,
            counters: None,
        }],
        nics: vec![],
    }
}

pub(crate) fn host() -> HostInfo {
    HostInfo {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: 4242,
        uptime_s: 5,
        hostname: "host1".into(),
        running: 1,
        vms: 2,
    }
}

pub(crate) fn store(name: &str) -> Datastore {
    Datastore {
        name: name.into(),
        path: format!("/{name}"),
        size_bytes: Some(100 << 30),
        free_bytes: Some(40 << 30),
        disks: 1,
        problem: None,
    }
}

pub(crate) fn job(phase: Phase) -> Job {
    let pass = |number: u32, planned: u64, read: u64| PassReport {
        number,
        planned_bytes: planned,
        read_bytes: read,
        written_bytes: read / 2,
        elapsed_ms: 700,
        dirty_after_bytes: 5 << 20,
    };
    let first = 1 << 30;
    let passes = match phase {
        Phase::Preparing => vec![],
        Phase::Copying => vec![pass(1, first, first / 4)],
        _ => vec![pass(1, first, first), pass(2, 5 << 20, 5 << 20)],
    };
    Job {
        vm: "web1".into(),
        source: "/slow/web1-root.raw".into(),
        destination: "/fast/web1-root.raw".into(),
        format: strake_api::image::ImageFormat::Raw,
        source_format: strake_api::image::ImageFormat::Raw,
        kind: strake_api::job::JobKind::Migrate,
        snapshot: None,
        to: "fast".into(),
        limits: strake_api::job::MigrationLimits::default(),
        status: MigrationStatus {
            phase,
            passes,
            throughput: 500 << 20,
            expected_pause_ms: Some(40.0),
            pause_ms: (phase == Phase::Completed).then_some(38.25),
            elapsed_ms: 1500,
            failure: (phase == Phase::Failed).then(observation),
            ..MigrationStatus::new(JobId("j1".into()), "root".into(), 4 << 30)
        },
    }
}

/// A pseudo-terminal with `strake` on it.
pub(crate) struct Terminal {
    pub(crate) child: Child,
    pub(crate) screen: Arc<Mutex<String>>,
    master: std::fs::File,
    /// Kept open, so that the terminal's settings outlive the child.
    pub(crate) slave: std::fs::File,
}

impl Terminal {
    /// Runs `command` with all three streams on a new terminal.
    pub(crate) fn run(command: &mut Command) -> Self {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = std::fs::File::options()
            .read(true)
            .write(true)
            .open(name)
            .unwrap();
        let stream = || Stdio::from(slave.try_clone().unwrap());
        let child = command
            .env("TERM", "xterm")
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .spawn()
            .unwrap();
        let master = std::fs::File::from(master);
        let screen: Arc<Mutex<String>> = Arc::default();
        let (mut reader, shown) = (master.try_clone().unwrap(), screen.clone());
        thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length) = reader.read(&mut piece) {
                if length == 0 {
                    return;
                }
                let text = String::from_utf8_lossy(&piece[..length]);
                shown.lock().unwrap().push_str(&text);
            }
        });
        Self {
            child,
            screen,
            master,
            slave,
        }
    }

    pub(crate) fn type_keys(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    pub(crate) fn screen(&self) -> String {
        self.screen.lock().unwrap().clone()
    }

    pub(crate) fn wait_for(&self, text: &str) {
        until(|| self.screen().contains(text));
    }

    /// Whether the terminal edits lines: what raw mode switches off.
    pub(crate) fn cooked(&self) -> bool {
        use rustix::termios::{LocalModes, tcgetattr};
        let modes = tcgetattr(&self.slave).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    pub(crate) fn end(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

/// Sends a signal to a child.
pub(crate) fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, signal).unwrap();
}
