//! The start of a monitor.
//!
//! It inherits exactly four descriptors: nothing on standard input, its log on standard output and
//! error, and its listening control socket. Everything that this process opens is close-on-exec,
//! and the child marks whatever might not be once more before it becomes the monitor. It leads a
//! session of its own, so that neither a signal to the daemon's terminal nor the daemon's end
//! reaches it, and of the environment it gets only what is about itself ([`PASSED`]).

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use strake_api::control::LISTEN_FD;
use strake_observe::{Because, OsContext, Result};

use crate::config::show;
use crate::observations::MonitorNotSpawned;
use crate::storage::store::remove_file;

/// Connections that may wait for a monitor: the daemon's own and one of a daemon that comes back.
const BACKLOG: i32 = 4;

/// The log of a monitor is begun anew at a start if it has grown beyond this.
const LOG_LIMIT: u64 = 1 << 20;

/// The environment that a monitor may see: how much it logs.
const PASSED: &[&str] = &["RUST_LOG", "RUST_BACKTRACE"];

/// Stands in the log where a monitor began.
const LOG_MARK: &str = "--- straked starts the monitor of VM";

/// Starts a monitor that listens at `socket`.
pub(crate) fn spawn(program: &Path, vm: &str, socket: &Path, log: &Path) -> Result<Child> {
    let listener = listening(socket)?;
    let mut log_file = open_log(log)?;
    writeln!(log_file, "{LOG_MARK} '{vm}'").os("write", log.display())?;
    let mut command = Command::new(program);
    command
        .arg("--name")
        .arg(vm)
        .env_clear()
        .envs(
            PASSED
                .iter()
                .filter_map(|name| Some((name, std::env::var_os(name)?))),
        )
        .stdin(Stdio::null())
        .stdout(log_file.try_clone().os("dup", log.display())?)
        .stderr(log_file)
        .current_dir("/");
    let fd = listener.as_raw_fd();
    // SAFETY: between fork and exec the closure makes only system calls that are safe there
    // (setsid, dup2, fcntl, close_range), allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || become_monitor(fd));
    }
    command
        .spawn()
        .os("exec", program.display())
        .because_of(|| MonitorNotSpawned {
            program: show(program),
        })
}

/// Runs in the child, before it becomes the monitor.
fn become_monitor(listener: i32) -> std::io::Result<()> {
    // SAFETY: plain system calls on numbers. Descriptor 3 of the child is either the listener
    // itself or one of the daemon's own (the daemon holds its locks from the first moment on, so
    // the number is never free for the pipe by which a failed exec is told).
    unsafe {
        if libc::setsid() < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let placed = if listener == LISTEN_FD {
            libc::fcntl(listener, libc::F_SETFD, 0)
        } else {
            libc::dup2(listener, LISTEN_FD)
        };
        if placed < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // The pipe by which a failed exec is told must live until exec: marked, not closed.
        // A kernel before 5.11 does not know the mark; everything is close-on-exec anyway.
        let first = (LISTEN_FD + 1).unsigned_abs();
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
    }
    Ok(())
}

fn listening(path: &Path) -> Result<OwnedFd> {
    let object = path.display();
    remove_file(path)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .os("socket", &object)?;
    let address = SocketAddrUnix::new(path).os("bind", &object)?;
    bind(&socket, &address).os("bind", &object)?;
    listen(&socket, BACKLOG).os("listen", &object)?;
    Ok(socket)
}

fn open_log(path: &Path) -> Result<File> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .os("open", path.display())?;
    if log.metadata().is_ok_and(|meta| meta.len() > LOG_LIMIT) {
        log.set_len(0).os("ftruncate", path.display())?;
    }
    Ok(log)
}

/// The last lines that the latest monitor wrote, joined; `None` if it wrote none.
pub(crate) fn last_words(log: &Path) -> Option<String> {
    const BYTES: u64 = 4096;
    const LINES: usize = 8;
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))
        .ok()?;
    let mut tail = Vec::new();
    file.take(BYTES).read_to_end(&mut tail).ok()?;
    let text = String::from_utf8_lossy(&tail);
    let latest = match text.rfind(LOG_MARK) {
        Some(at) => text.get(at..)?.split_once('\n')?.1,
        None => &text,
    };
    let lines: Vec<&str> = latest
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let last = lines.get(lines.len().saturating_sub(LINES)..)?;
    (!last.is_empty()).then(|| last.join(" ⏎ "))
}
