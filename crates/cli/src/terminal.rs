//! The terminal in raw mode, and standard input.

use std::io::{self, IsTerminal, Read};
use std::thread;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use strake_observe::{OsContext, Result};
use tokio::sync::mpsc::{Receiver, channel};

/// Standard input in raw mode. Dropping it restores the terminal, also when a panic unwinds; the
/// signals that would end the process without unwinding are caught by
/// [`Endings`](crate::signals::Endings).
#[derive(Debug)]
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Nothing if standard input is no terminal.
    pub(crate) fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin).os("tcgetattr", "the terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw).os("tcsetattr", "the terminal")?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Drain, so that the last output is still written in raw mode. If the terminal is gone
        // there is nothing to restore.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Reads standard input in a thread of its own, piece by piece; the channel closes at its end.
pub(crate) fn input() -> Result<Receiver<Vec<u8>>> {
    const PIECE: usize = 4096;
    const PIECES: usize = 16;
    let (say, hear) = channel(PIECES);
    thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            let mut stdin = io::stdin().lock();
            let mut piece = vec![0; PIECE];
            loop {
                match stdin.read(&mut piece) {
                    Ok(0) => return,
                    Ok(length) => {
                        let read = piece.get(..length).unwrap_or_default().to_vec();
                        if say.blocking_send(read).is_err() {
                            return;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        })
        .os("clone", "the thread that reads standard input")?;
    Ok(hear)
}
