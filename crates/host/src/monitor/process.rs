//! A monitor's process, whether this daemon started it or one before.
//!
//! A pid alone may name another process by the time it is used. So a process is known by its pid
//! together with the time it started, and held by a pidfd, which never names another.

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use strake_observe::{Observation, OsCallFailed, Result};

/// How long the end of a child of ours may take to be told after its process is gone.
const REAP_PATIENCE: Duration = Duration::from_secs(2);

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    started: u64,
    pidfd: OwnedFd,
    /// The process that we started, which is this one or, if a jail put a process between, its
    /// parent.
    child: Mutex<Option<Child>>,
}

impl Process {
    /// Holds the process `pid` that is alive now.
    pub(crate) fn hold(pid: u32, child: Option<Child>) -> Result<Self> {
        Self::try_hold(pid, child).map_err(|failed| failed.seen(pid))
    }

    /// Holds the process if it is still the one that started at `started`; `None` only if that one
    /// is certainly gone.
    ///
    /// # Errors
    /// It cannot be told: then it may well live, and what it has is not free.
    pub(crate) fn find(pid: u32, started: u64) -> Result<Option<Self>> {
        match Self::try_hold(pid, None) {
            Ok(process) => {
                let same = process.started == started && !process.wait(Duration::ZERO);
                Ok(same.then_some(process))
            }
            Err(failed) if failed.gone() => Ok(None),
            Err(failed) => Err(failed.seen(pid)),
        }
    }

    fn try_hold(pid: u32, child: Option<Child>) -> std::result::Result<Self, NotHeld> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pidfd = raw
            .ok_or(Errno::SRCH)
            .and_then(|raw| pidfd_open(raw, PidfdFlags::empty()))
            .map_err(NotHeld::Open)?;
        let started = start_time(pid).map_err(NotHeld::Look)?;
        Ok(Self {
            pid,
            started,
            pidfd,
            child: Mutex::new(child),
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// What the inventory records of it.
    pub(crate) fn identity(&self) -> (u32, u64) {
        (self.pid, self.started)
    }

    /// Waits until it has ended; tells whether it has.
    pub(crate) fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) if left.is_zero() => return false,
                Ok(0) | Err(Errno::INTR) => {}
                // A pidfd that cannot be polled tells nothing: it is taken as alive.
                Err(_) => return false,
                Ok(_) => return true,
            }
        }
    }

    /// Ends it by force.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        self.with_child(|child| {
            // If a jail put a process between, that one too.
            let _ = child.kill();
        });
    }

    /// How it ended, if it was a child of ours. Also takes its exit status from the kernel.
    pub(crate) fn how_it_ended(&self) -> Option<Ending> {
        let deadline = Instant::now() + REAP_PATIENCE;
        loop {
            let ended = self.with_child(|child| child.try_wait());
            match ended {
                None | Some(Err(_)) => return None,
                Some(Ok(Some(status))) => return Some(Ending::of(status)),
                Some(Ok(None)) if Instant::now() >= deadline => return None,
                Some(Ok(None)) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn with_child<T>(&self, work: impl FnOnce(&mut Child) -> T) -> Option<T> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.as_mut().map(work)
    }
}

/// Why a process is not held.
enum NotHeld {
    Open(Errno),
    Look(std::io::Error),
}

impl NotHeld {
    /// Whether there is no such process.
    fn gone(&self) -> bool {
        match self {
            // EINVAL: the number is now that of a thread of some other process.
            Self::Open(errno) => matches!(*errno, Errno::SRCH | Errno::NOENT | Errno::INVAL),
            Self::Look(error) => [Errno::SRCH, Errno::NOENT]
                .map(Errno::raw_os_error)
                .contains(&error.raw_os_error().unwrap_or_default()),
        }
    }

    fn seen(self, pid: u32) -> Observation {
        match self {
            Self::Open(errno) => {
                OsCallFailed::new("pidfd_open", format!("process {pid}"), &errno.into()).into()
            }
            Self::Look(error) => {
                OsCallFailed::new("read", format!("/proc/{pid}/stat"), &error).into()
            }
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Signal(i32),
    Status(i32),
}

impl Ending {
    fn of(status: ExitStatus) -> Self {
        match (status.signal(), status.code()) {
            (Some(signal), _) => Self::Signal(signal),
            (None, code) => Self::Status(code.unwrap_or_default()),
        }
    }

    /// Whether it made a system call that its jail forbids. The kernel ends it so, or the
    /// monitor's own handler of the signal does after a line in its log.
    pub(crate) fn broke_out(self) -> bool {
        self == Self::Signal(libc::SIGSYS) || self == Self::Status(128 + libc::SIGSYS)
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Signal(signal) => {
                let name = match signal {
                    libc::SIGABRT => " (SIGABRT)",
                    libc::SIGBUS => " (SIGBUS)",
                    libc::SIGILL => " (SIGILL)",
                    libc::SIGKILL => " (SIGKILL)",
                    libc::SIGSEGV => " (SIGSEGV)",
                    libc::SIGSYS => " (SIGSYS)",
                    libc::SIGTERM => " (SIGTERM)",
                    _ => "",
                };
                write!(f, "signal {signal}{name}")
            }
            Self::Status(code) if self.broke_out() => write!(f, "exit status {code} (SIGSYS)"),
            Self::Status(code) => write!(f, "exit status {code}"),
        }
    }
}

/// When a process started, in clock ticks since boot: field 22 of its stat file.
fn start_time(pid: u32) -> std::io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command, field 2, stands in parentheses and may hold anything, parentheses too.
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(19))
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::InvalidData))
}
