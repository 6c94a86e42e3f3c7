//! The peer: qemu-storage-daemon with a vhost-user-blk export and `blockdev-mirror`, in both of its
//! copy modes.
//!
//! The export runs in the daemon's main loop: on an iothread, mirroring under load was seen to
//! hang (see the research notes).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use strake_observe::{Because, OsContext, Result};

use crate::observations::{NoPeer, StepFailed};
use crate::signals::ends_with_us;

/// How long the daemon may take to start or to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon.
#[derive(Debug)]
pub(crate) struct Qsd {
    child: Child,
    monitor: BufReader<UnixStream>,
}

/// How a mirror went.
#[derive(Debug)]
pub(crate) enum Mirrored {
    /// It completed: when completion was asked for, when it was there, and the bytes that it says
    /// it copied.
    Done {
        asked: Instant,
        done: Instant,
        bytes: Option<u64>,
    },
    /// It was not ready in time, or failed.
    Not(String),
}

/// The peer's `copy-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Background,
    WriteBlocking,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
        }
    }
}

fn program() -> PathBuf {
    std::env::var_os("STRAKE_BENCH_QSD").map_or_else(
        || PathBuf::from("/usr/bin/qemu-storage-daemon"),
        PathBuf::from,
    )
}

/// What it calls itself. Installs it if it is missing and that can be done.
pub(crate) fn at_hand() -> Result<String> {
    match version() {
        Err(seen) if std::env::var_os("STRAKE_BENCH_QSD").is_none() => {
            install().map_err(|reason| seen.because(reason))?;
            version()
        }
        version => version,
    }
}

/// `apt-get install qemu-utils`, as root on Debian.
fn install() -> Result<()> {
    if !rustix::process::geteuid().is_root() || !Path::new("/etc/debian_version").exists() {
        return Err(failed("install it", "only as root on Debian"));
    }
    println!("installing qemu-utils");
    let apt = |arguments: &[&str]| {
        Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .os("execve", "apt-get")
    };
    let install = [
        "install",
        "-y",
        "-q",
        "--no-install-recommends",
        "qemu-utils",
    ];
    if apt(&install)?.success() {
        return Ok(());
    }
    // The package lists may be missing or old.
    apt(&["update", "-q"])?;
    let status = apt(&install)?;
    if status.success() {
        Ok(())
    } else {
        Err(failed("install it", format!("apt-get: {status}")))
    }
}

/// Whether there is a `qemu-img`.
pub(crate) fn has_compare() -> bool {
    Command::new("qemu-img")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Compares two images with the peer's own tool. Both must be at rest.
pub(crate) fn compare(one: &Path, other: &Path) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(["compare", "-U", "-T", "none", "-f", "raw", "-F", "raw"])
        .args([one, other])
        .output()
        .os("execve", "qemu-img")?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(StepFailed {
        step: "compare source and destination with qemu-img".to_owned(),
        reason: format!("{} {}", text.trim(), errors.trim()),
    }
    .into())
}

fn version() -> Result<String> {
    let program = program();
    let missing = |reason: String| NoPeer {
        program: program.display().to_string(),
        reason,
    };
    let output = Command::new(&program)
        .arg("--version")
        .output()
        .os("execve", program.display())
        .because_of(|| missing("it cannot be started".to_owned()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.to_owned()),
        _ => Err(missing(format!("it ended with {}", output.status)).into()),
    }
}

fn failed(step: &str, reason: impl std::fmt::Display) -> strake_observe::Observation {
    StepFailed {
        step: format!("qemu-storage-daemon: {step}"),
        reason: reason.to_string(),
    }
    .into()
}

impl Qsd {
    /// Exports `source` at `socket`, with `destination` at hand.
    pub(crate) fn start(
        dir: &Path,
        source: &Path,
        destination: &Path,
        socket: &Path,
    ) -> Result<Self> {
        Self::launch(dir, source, Some(destination), socket)
    }

    /// Exports `source` at `socket`.
    pub(crate) fn serving(dir: &Path, source: &Path, socket: &Path) -> Result<Self> {
        Self::launch(dir, source, None, socket)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn launch(
        dir: &Path,
        source: &Path,
        destination: Option<&Path>,
        socket: &Path,
    ) -> Result<Self> {
        let monitor = dir.join("qmp.sock");
        for path in [&monitor, &socket.to_path_buf()] {
            let _ = std::fs::remove_file(path);
        }
        let file = |node: &str, path: &Path| {
            format!(
                "driver=file,node-name={node},filename={},cache.direct=on,aio=io_uring,discard=unmap",
                path.display()
            )
        };
        let mut command = Command::new(program());
        ends_with_us(&mut command);
        command
            .arg("--blockdev")
            .arg(file("source-file", source))
            .args(["--blockdev", "driver=raw,node-name=source,file=source-file"]);
        if let Some(destination) = destination {
            command
                .arg("--blockdev")
                .arg(file("destination-file", destination))
                .args([
                    "--blockdev",
                    "driver=raw,node-name=destination,file=destination-file",
                ]);
        }
        let child = command
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=source,writable=on,addr.type=unix,addr.path={}",
                socket.display()
            ))
            .arg("--chardev")
            .arg(format!(
                "socket,id=qmp,path={},server=on,wait=off",
                monitor.display()
            ))
            .args(["--monitor", "chardev=qmp"])
            .stdin(Stdio::null())
            .spawn()
            .os("execve", program().display())?;
        let mut starting = Starting(Some(child));
        let end = Instant::now() + PATIENCE;
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&monitor) {
                break stream;
            }
            let exited = starting.0.as_mut().map(Child::try_wait);
            if let Some(Ok(Some(status))) = exited {
                return Err(failed("start", format!("it ended with {status}")));
            }
            if Instant::now() > end {
                return Err(failed("start", "its monitor does not appear"));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let Some(child) = starting.0.take() else {
            return Err(failed("start", "it is gone"));
        };
        let mut qsd = Self {
            child,
            monitor: BufReader::new(stream),
        };
        qsd.read(PATIENCE)?; // the greeting
        qsd.execute("qmp_capabilities", &json!({}))?;
        Ok(qsd)
    }

    /// Mirrors to the destination and switches over; gives up if it is not ready after `limit`.
    pub(crate) fn mirror(&mut self, mode: Mode, limit: Duration) -> Result<Mirrored> {
        let began = Instant::now();
        self.execute(
            "blockdev-mirror",
            &json!({
                "job-id": "job", "device": "source", "target": "destination",
                "sync": "full", "copy-mode": mode.name(),
            }),
        )?;
        loop {
            let left = limit.saturating_sub(began.elapsed());
            if left.is_zero() {
                let reason = format!("not ready after {} s", limit.as_secs());
                self.execute("block-job-cancel", &json!({"device": "job", "force": true}))?;
                self.event(&["BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED"], PATIENCE)?;
                return Ok(Mirrored::Not(reason));
            }
            match self.event(&["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"], left)? {
                None => {}
                Some(event) if event.name == "BLOCK_JOB_READY" => break,
                Some(_) => {
                    return Ok(Mirrored::Not(
                        "the job ended before it was ready".to_owned(),
                    ));
                }
            }
        }
        let asked = Instant::now();
        self.execute("block-job-complete", &json!({"device": "job"}))?;
        match self.event(&["BLOCK_JOB_COMPLETED"], PATIENCE)? {
            Some(event) => Ok(Mirrored::Done {
                asked,
                done: Instant::now(),
                bytes: event.bytes,
            }),
            None => Ok(Mirrored::Not(
                "completion was asked for and did not come".to_owned(),
            )),
        }
    }

    /// Ends it; everything is flushed.
    pub(crate) fn stop(mut self) -> Result<()> {
        let _ = self.execute("quit", &json!({}));
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if self
                .child
                .try_wait()
                .os("wait", "qemu-storage-daemon")?
                .is_some()
            {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(failed("end", "it does not"))
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.monitor
            .get_mut()
            .write_all(line.as_bytes())
            .os("write", "its monitor")?;
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let Some(message) = self.read(left)? else {
                return Err(failed(command, "no answer"));
            };
            if let Some(error) = message.get("error") {
                return Err(failed(command, error));
            }
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
            self.note(message);
        }
    }

    /// The next event of these names; none if `limit` passes.
    fn event(&mut self, names: &[&str], limit: Duration) -> Result<Option<Event>> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let Some(message) = self.read(left)? else {
                return Ok(None);
            };
            let name = message.get("event").and_then(Value::as_str).unwrap_or("");
            if names.contains(&name) {
                let bytes = message.pointer("/data/offset").and_then(Value::as_u64);
                return Ok(Some(Event {
                    name: name.to_owned(),
                    bytes,
                }));
            }
        }
    }

    /// Events that arrive between a command and its answer are none that we wait for: jobs take
    /// longer to become ready than a command to be answered.
    fn note(&self, message: Value) {
        drop(message);
    }

    fn read(&mut self, limit: Duration) -> Result<Option<Value>> {
        let limit = limit.max(Duration::from_millis(1));
        self.monitor
            .get_ref()
            .set_read_timeout(Some(limit))
            .os("setsockopt", "its monitor")?;
        let mut line = String::new();
        match self.monitor.read_line(&mut line) {
            Ok(0) => Err(failed("read from its monitor", "it is closed")),
            Ok(_) => serde_json::from_str(&line)
                .map(Some)
                .map_err(|error| failed("read from its monitor", error)),
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).os("read", "its monitor"),
        }
    }
}

/// One event of a job.
struct Event {
    name: String,
    /// What the job has copied so far.
    bytes: Option<u64>,
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A child that is not yet known to work.
struct Starting(Option<Child>);

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
