//! A VM's serial console: what `console`, `run` and `logs --follow` share.
//!
//! ```text
//! stdin thread ──keys──▶ ┌─────────┐ ──▶ console stream (daemon ▶ monitor)
//! signals      ────────▶ │  attach │
//! stdout       ◀──────── └─────────┘ ◀── console stream
//! ```
//!
//! The stream ends when the VM does, but also when the guest resets (the daemon starts a new
//! monitor) and when the daemon restarts. So at its end the VM's state is asked for: if it still
//! runs, the console is attached again, within [`PATIENCE`].
//!
//! The log so far and the stream overlap: a piece of output that arrives between the attachment
//! and the reading of the log is in both. What the log ends with is cut from the stream's
//! beginning ([`overlap`]).

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use strake_api::control::ExitReason;
use strake_api::rest::{Vm, VmState};
use strake_observe::{Observation, OsContext, Result, Task};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc::Receiver;

use crate::client::{ConsoleReader, ConsoleStream, ConsoleWriter};
use crate::context::Context;
use crate::exit::Exit;
use crate::observations::{ConsoleLost, VmFailed};
use crate::output;
use crate::signals::Endings;
use crate::terminal::{self, RawTerminal};

/// Ctrl-]: leaves the console.
const ESCAPE: u8 = 0x1d;

/// How long it is tried to attach again. A daemon restarts in a second, a guest in a few.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often it is tried.
const INTERVAL: Duration = Duration::from_millis(200);

/// A stream that lived so long was a real one: the next loss has its own patience.
const REAL: Duration = Duration::from_secs(1);

/// How long the pieces that a fresh stream already holds are waited for.
const SETTLE: Duration = Duration::from_millis(50);

/// How much of the log's end is kept to find the overlap: far above what a serial console prints
/// in the time of one request.
const OVERLAP: usize = 256 << 10;

/// How much typed input may wait for the guest.
const MOST_TYPED: usize = 64 << 10;

/// The most that is read of a log to find its last lines.
const MOST_TAIL: u64 = 64 << 20;

/// How much of the output so far is shown first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backlog {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// The last lines.
    Lines(u64),
}

/// Where the input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// Standard input, raw if it is a terminal.
    Standard,
    /// There is none.
    None,
}

/// Why the console was left.
#[derive(Debug)]
pub(crate) enum Left {
    /// The escape key.
    Detached,
    /// A signal.
    Interrupted,
    /// The VM no longer runs.
    Ended(Box<Vm>),
}

/// Shows the console of a running VM until it ends or is left.
///
/// # Errors
/// The first attachment was refused, or a lost one could not be made again.
pub(crate) async fn attach(
    context: &Context,
    name: &str,
    backlog: Backlog,
    input: Input,
) -> Result<Left> {
    // The signals first: from here on none ends the process with the terminal still raw.
    let mut endings = Endings::new()?;
    let mut stream = context.client.console(name).await?;
    let mut keys = Keys::new(input)?;
    let mut fresh = backlog_first(context, name, backlog, &mut stream).await?;
    let mut lost: Option<Instant> = None;
    loop {
        output::bytes(&fresh)?;
        let attached = Instant::now();
        let (mut reader, mut writer) = tokio::io::split(stream);
        let moved = tokio::select! {
            moved = copy(&mut reader, &mut writer, &mut keys) => moved?,
            () = endings.next() => return Ok(Left::Interrupted),
        };
        // The daemon ends its side of the console with ours.
        drop((reader, writer));
        match moved {
            Moved::Detached => return Ok(Left::Detached),
            Moved::Ended { any } => {
                if any || attached.elapsed() > REAL {
                    lost = None;
                }
            }
        }
        let since = *lost.get_or_insert_with(Instant::now);
        let again = tokio::select! {
            again = again(context, name, since) => again?,
            () = keys.escape() => return Ok(Left::Detached),
            () = endings.next() => return Ok(Left::Interrupted),
        };
        match again {
            Again::Attached(new) => {
                stream = new;
                fresh = Vec::new();
                keys.notice(
                    context,
                    "attached again; output in between is in `strake logs`",
                );
            }
            Again::Ended(vm) => return Ok(Left::Ended(vm)),
        }
    }
}

/// How a VM that ended under its console is told: a word, or its failure.
pub(crate) fn ending(vm: &Vm) -> Result<String> {
    let name = &vm.name;
    match &vm.last_exit {
        Some(ExitReason::Failed(why)) => {
            Err(Observation::from(VmFailed { vm: name.clone() }).because(why.clone()))
        }
        Some(ExitReason::GuestPowerOff) => Ok(format!("{name} powered off")),
        _ => Ok(format!("{name} stopped")),
    }
}

/// Prints the log of a VM without attaching, and returns its end.
///
/// # Errors
/// See [`Client::host`](crate::client::Client::host).
pub(crate) async fn print_log(context: &Context, name: &str, backlog: Backlog) -> Result<Vec<u8>> {
    let mut end = Vec::new();
    match backlog {
        Backlog::None | Backlog::Lines(0) => {}
        Backlog::All => {
            let mut body = context.client.log(name, None).await?;
            while let Some(piece) = body.next().await? {
                output::bytes(&piece)?;
                end.extend_from_slice(&piece);
                let surplus = end.len().saturating_sub(OVERLAP);
                end.drain(..surplus);
            }
        }
        Backlog::Lines(lines) => {
            end = last_lines(context, name, lines).await?;
            output::bytes(&end)?;
        }
    }
    Ok(end)
}

/// The last lines of a log. Lines have no fixed length, so ever more bytes are asked for until
/// there are enough lines in them.
async fn last_lines(context: &Context, name: &str, lines: u64) -> Result<Vec<u8>> {
    let mut tail: u64 = 64 << 10;
    loop {
        let mut log = Vec::new();
        let mut body = context.client.log(name, Some(tail)).await?;
        while let Some(piece) = body.next().await? {
            log.extend_from_slice(&piece);
        }
        let whole = u64::try_from(log.len()).is_ok_and(|length| length < tail);
        match nth_line_from_end(&log, lines) {
            Some(start) => return Ok(log.split_off(start)),
            None if whole || tail >= MOST_TAIL => return Ok(log),
            None => tail *= 8,
        }
    }
}

/// Where the last `lines` lines of `log` begin; none if it has fewer.
fn nth_line_from_end(log: &[u8], lines: u64) -> Option<usize> {
    let text = log.strip_suffix(b"\n").unwrap_or(log);
    let mut newlines = text
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    let nth = usize::try_from(lines).ok()?.checked_sub(1)?;
    newlines.nth(nth).map(|(at, _)| at + 1)
}

/// Prints the log and returns what the fresh stream holds beyond it.
async fn backlog_first(
    context: &Context,
    name: &str,
    backlog: Backlog,
    stream: &mut ConsoleStream,
) -> Result<Vec<u8>> {
    if backlog == Backlog::None {
        return Ok(Vec::new());
    }
    let log = print_log(context, name, backlog).await?;
    let mut fresh = Vec::new();
    let _ = tokio::time::timeout(SETTLE, async {
        // An end or a failure shows again at the next read.
        while fresh.len() < OVERLAP && stream.read_buf(&mut fresh).await.is_ok_and(|n| n > 0) {}
    })
    .await;
    let known = overlap(&log, &fresh);
    Ok(fresh.split_off(known))
}

/// The longest beginning of `fresh` that `log` ends with.
fn overlap(log: &[u8], fresh: &[u8]) -> usize {
    let most = log.len().min(fresh.len());
    (0..=most)
        .rev()
        .find(|length| {
            fresh
                .get(..*length)
                .is_some_and(|start| log.ends_with(start))
        })
        .unwrap_or(0)
}

/// How one stream ended.
enum Moved {
    Detached,
    Ended { any: bool },
}

async fn copy(
    reader: &mut ConsoleReader,
    writer: &mut ConsoleWriter,
    keys: &mut Keys,
) -> Result<Moved> {
    const PIECE: usize = 16 << 10;
    let mut piece = vec![0; PIECE];
    // What was typed and not yet taken by the guest. While it is short more is read, so that the
    // escape key is seen even if the guest takes nothing.
    let mut typed = Vec::new();
    let mut any = false;
    loop {
        tokio::select! {
            read = reader.read(&mut piece) => match read {
                // Whether it ended or broke, the VM's state says what that means.
                Ok(0) | Err(_) => return Ok(Moved::Ended { any }),
                Ok(length) => {
                    any = true;
                    output::bytes(piece.get(..length).unwrap_or_default())?;
                }
            },
            written = writer.write(&typed), if !typed.is_empty() => match written {
                Ok(0) | Err(_) => return Ok(Moved::Ended { any }),
                Ok(length) => {
                    typed.drain(..length.min(typed.len()));
                    // Nothing is buffered below; this is for the trait's contract.
                    if writer.flush().await.is_err() {
                        return Ok(Moved::Ended { any });
                    }
                }
            },
            new = keys.next(), if typed.len() < MOST_TYPED => {
                if let Some(escape) = keys.find_escape(&new) {
                    let before = new.get(..escape).unwrap_or_default();
                    // Best effort: the one who leaves does not wait for the guest.
                    let _ = tokio::time::timeout(SETTLE, writer.write_all(before)).await;
                    return Ok(Moved::Detached);
                }
                typed.extend_from_slice(&new);
            }
        }
    }
}

/// What follows the end of a stream.
enum Again {
    Attached(ConsoleStream),
    Ended(Box<Vm>),
}

async fn again(context: &Context, name: &str, since: Instant) -> Result<Again> {
    let mut task = Task::begin("attach the console again");
    loop {
        match context.client.vm(name).await {
            Ok(vm) if ended(&vm) => {
                task.succeed();
                return Ok(Again::Ended(Box::new(vm)));
            }
            Ok(_) => match context.client.console(name).await {
                Ok(stream) => {
                    task.succeed();
                    return Ok(Again::Attached(stream));
                }
                Err(refused) => latest(&mut task, refused),
            },
            Err(away) if Exit::is_away(&away) => latest(&mut task, away),
            Err(refused) => {
                task.succeed();
                return Err(refused);
            }
        }
        if since.elapsed() >= PATIENCE {
            return Err(task.fail(ConsoleLost {
                vm: name.to_owned(),
                seconds: PATIENCE.as_secs(),
            }));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Keeps the first failure of each kind: the tries that follow say the same.
fn latest(task: &mut Task, failure: Observation) {
    if !task.received().iter().any(|seen| seen.id() == failure.id()) {
        task.saw(failure);
    }
}

/// Whether a VM is at its end, and not between two monitors of a reset.
fn ended(vm: &Vm) -> bool {
    match vm.state {
        VmState::Failed => true,
        VmState::Stopped => vm.last_exit != Some(ExitReason::GuestReset),
        VmState::Starting | VmState::Running | VmState::Paused | VmState::Stopping => false,
    }
}

/// What is typed.
struct Keys {
    pieces: Option<Receiver<Vec<u8>>>,
    raw: Option<RawTerminal>,
}

impl Keys {
    fn new(input: Input) -> Result<Self> {
        match input {
            Input::None => Ok(Self {
                pieces: None,
                raw: None,
            }),
            Input::Standard => Ok(Self {
                raw: RawTerminal::enter()?,
                pieces: Some(terminal::input()?),
            }),
        }
    }

    /// The next piece. Never comes back at the end of the input: output goes on.
    async fn next(&mut self) -> Vec<u8> {
        if let Some(pieces) = &mut self.pieces {
            if let Some(piece) = pieces.recv().await {
                return piece;
            }
            self.pieces = None;
        }
        std::future::pending().await
    }

    /// Where the escape key is in `typed`. In a pipe it is a byte like any other.
    fn find_escape(&self, typed: &[u8]) -> Option<usize> {
        self.raw.as_ref()?;
        typed.iter().position(|byte| *byte == ESCAPE)
    }

    /// Waits for the escape key; what else is typed goes nowhere, because there is no console.
    async fn escape(&mut self) {
        loop {
            let typed = self.next().await;
            if self.find_escape(&typed).is_some() {
                return;
            }
        }
    }

    /// A remark in the middle of a console, where a raw terminal needs its own line ends.
    fn notice(&self, context: &Context, text: &str) {
        if context.output.json() || !io::stderr().is_terminal() {
            return;
        }
        let end = if self.raw.is_some() { "\r\n" } else { "\n" };
        let _ = write!(io::stderr(), "{end}[strake: {text}]{end}").os("write", "standard error");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overlap_is_what_both_have() {
        assert_eq!(overlap(b"Booting\nlogin: ", b"login: _"), 7);
        assert_eq!(overlap(b"abc", b"abc"), 3);
        assert_eq!(overlap(b"abc", b"xyz"), 0);
        assert_eq!(overlap(b"", b"x"), 0);
        assert_eq!(overlap(b"x", b""), 0);
        assert_eq!(overlap(b"aaa", b"aaaaa"), 3);
    }

    #[test]
    fn last_lines_are_found_with_and_without_a_last_newline() {
        assert_eq!(nth_line_from_end(b"a\nb\nc\n", 1), Some(4));
        assert_eq!(nth_line_from_end(b"a\nb\nc", 1), Some(4));
        assert_eq!(nth_line_from_end(b"a\nb\nc\n", 2), Some(2));
        assert_eq!(nth_line_from_end(b"a\nb\nc\n", 3), None);
        assert_eq!(nth_line_from_end(b"", 1), None);
    }
}
