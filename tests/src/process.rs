//! Running programs: to their end, in the background, on a terminal.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::failure::{Failure, Outcome, While};

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Ran {
    /// What was run.
    pub command: String,
    /// Its exit status; 128 and the signal's number if a signal ended it.
    pub status: i32,
    /// What it printed.
    pub out: String,
    /// What it complained of.
    pub err: String,
}

impl Ran {
    /// The program's output, if it ended well.
    ///
    /// # Errors
    /// Its complaints otherwise.
    pub fn good(self) -> Outcome<String> {
        if self.status == 0 {
            return Ok(self.out);
        }
        Err(Failure::new(format!(
            "`{}` ended with {}:\n{}{}",
            self.command, self.status, self.out, self.err
        )))
    }

    /// The program's output and complaints, if it ended with this status.
    ///
    /// # Errors
    /// If it ended otherwise.
    pub fn ended_with(self, status: i32) -> Outcome<String> {
        let said = format!("{}{}", self.out, self.err);
        if self.status == status {
            return Ok(said);
        }
        Err(Failure::new(format!(
            "`{}` ended with {} instead of {status}:\n{said}",
            self.command, self.status
        )))
    }
}

/// A program in the background. Ended when dropped.
#[derive(Debug)]
pub struct Running {
    command: String,
    child: Child,
    out: Option<JoinHandle<String>>,
    err: Option<JoinHandle<String>>,
}

impl Running {
    /// Starts it; what it prints is collected.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Outcome<Self> {
        let shown = show(command);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .doing(&shown)?;
        let out = child.stdout.take().map(collect);
        let err = child.stderr.take().map(collect);
        Ok(Self {
            command: shown,
            child,
            out,
            err,
        })
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        signal_pid(self.pid(), signal);
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn wait(mut self, limit: Duration) -> Outcome<Ran> {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().doing(&self.command)? {
                break status;
            }
            if started.elapsed() > limit {
                let _ = self.child.kill();
                let said = self.said();
                return Err(Failure::new(format!(
                    "`{}` did not end within {} s:\n{}{}",
                    self.command,
                    limit.as_secs(),
                    said.0,
                    said.1
                )));
            }
            thread::sleep(Duration::from_millis(20));
        };
        let status = status
            .code()
            .or_else(|| status.signal().map(|signal| 128 + signal))
            .unwrap_or(-1);
        let (out, err) = self.said();
        Ok(Ran {
            command: self.command.clone(),
            status,
            out,
            err,
        })
    }

    fn said(&mut self) -> (String, String) {
        let join = |handle: Option<JoinHandle<String>>| {
            handle
                .and_then(|handle| handle.join().ok())
                .unwrap_or_default()
        };
        (join(self.out.take()), join(self.err.take()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end.
///
/// # Errors
/// If it cannot be started or does not end within two minutes.
pub fn run(command: &mut Command) -> Outcome<Ran> {
    Running::start(command)?.wait(Duration::from_secs(120))
}

/// Runs a program by its words and returns its output.
///
/// # Errors
/// If it ends badly.
pub fn sh(words: &[&str]) -> Outcome<String> {
    let (program, rest) = words
        .split_first()
        .ok_or_else(|| Failure::new("no command"))?;
    run(Command::new(program).args(rest))?.good()
}

/// Sends a process a signal; that it is gone already is no matter.
pub fn signal_pid(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Whether a process exists and is not just waiting to be reaped.
#[must_use]
pub fn exists(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.starts_with(" Z"))
    })
}

/// Waits until something holds.
///
/// # Errors
/// If it does not within the limit; the words name it.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut holds: impl FnMut() -> Outcome<bool>,
) -> Outcome {
    let started = Instant::now();
    loop {
        if holds()? {
            return Ok(());
        }
        if started.elapsed() > limit {
            return Err(Failure::new(format!(
                "not within {} s: {what}",
                limit.as_secs()
            )));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Reads what comes until the end, as text.
fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

/// A terminal: our end and the program's. What draws a progress bar draws it only on one.
///
/// # Errors
/// If the system has no terminal left.
pub fn terminal(columns: u16) -> Outcome<(OwnedFd, OwnedFd)> {
    use rustix::fs::OFlags;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let failed = |error: rustix::io::Errno| Failure::from(std::io::Error::from(error));
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).map_err(failed)?;
    grantpt(&ours).map_err(failed)?;
    unlockpt(&ours).map_err(failed)?;
    let name = ptsname(&ours, Vec::new()).map_err(failed)?;
    // It must not become our own terminal, whose end would end us.
    let theirs = std::fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOCTTY.bits().cast_signed())
        .open(name.to_string_lossy().as_ref())?;
    let size = rustix::termios::Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&theirs, size).map_err(failed)?;
    Ok((ours, theirs.into()))
}
