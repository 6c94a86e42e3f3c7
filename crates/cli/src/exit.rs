//! How a call ends.

use std::process::ExitCode;

use strake_observe::{Kind, Observation};

use crate::observations::{
    ConnectionLost, DaemonGone, DaemonSilent, DaemonUnreachable, Interrupted, OutputClosed,
};

/// The exit codes of `strake`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It was done.
    Done,
    /// It failed.
    Failed,
    /// The daemon cannot be reached.
    Unreachable,
    /// Interrupted by Ctrl-C.
    Interrupted,
    /// Whoever read the output closed it.
    OutputClosed,
}

impl Exit {
    /// The number. 2 is missing: the parser of the arguments ends the process with it.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Unreachable => 3,
            Self::Interrupted => 130,
            Self::OutputClosed => 141,
        }
    }

    /// What a failure ends the process with. The kinds asked for are this crate's own: none comes
    /// with a tree of the daemon.
    #[must_use]
    pub fn of(failure: &Observation) -> Self {
        const UNREACHABLE: [&str; 4] = [
            DaemonUnreachable::ID,
            DaemonSilent::ID,
            ConnectionLost::ID,
            DaemonGone::ID,
        ];
        if failure.find(OutputClosed::ID).is_some() {
            Self::OutputClosed
        } else if failure.find(Interrupted::ID).is_some() {
            Self::Interrupted
        } else if UNREACHABLE.iter().any(|id| failure.find(id).is_some()) {
            Self::Unreachable
        } else {
            Self::Failed
        }
    }

    /// Whether a failure says that the daemon is away, so that a retry may find it again.
    #[must_use]
    pub fn is_away(failure: &Observation) -> bool {
        Self::of(failure) == Self::Unreachable
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}
