//! Failed operations as observations.

use std::io;

use strake_observe::{Observation, OsCallFailed};

use crate::{FlushFailed, Operation, ReadFailed, WriteFailed};

/// What was asked of the system. Not always what the guest asked for: a write that changes a part
/// of a block begins with a read of it, and zeroes are written where they cannot be allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Read,
    ReadAtOnce,
    Write,
    Sync,
    Allocate,
    DiscardDevice,
    Truncate,
    /// The ring did not take the step.
    Submit,
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "readv",
            Self::ReadAtOnce => "pread",
            Self::Write => "writev",
            Self::Sync => "fdatasync",
            Self::Allocate => "fallocate",
            Self::DiscardDevice => "ioctl(BLKDISCARD)",
            Self::Truncate => "ftruncate",
            Self::Submit => "io_uring_enter",
        }
    }
}

/// The call that failed, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) call: Call,
    pub(crate) errno: i32,
}

impl Failure {
    pub(crate) fn new(call: Call, errno: i32) -> Self {
        Self { call, errno }
    }

    /// As if the call that usually does `op` had failed.
    pub(crate) fn usual(op: Operation, errno: i32) -> Self {
        let call = match op {
            Operation::Read => Call::Read,
            Operation::Write => Call::Write,
            Operation::Flush => Call::Sync,
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => Call::Allocate,
        };
        Self { call, errno }
    }
}

/// The observation of an operation on an image that failed.
pub(crate) fn failed(
    op: Operation,
    path: &str,
    offset: u64,
    length: u64,
    failure: Failure,
) -> Observation {
    let errno = failure.errno;
    let error = io::Error::from_raw_os_error(errno);
    let object = match failure.call {
        Call::Sync | Call::Truncate | Call::Submit => path.to_owned(),
        _ => format!("{path} at offset {offset}"),
    };
    let os = OsCallFailed::new(failure.call.name(), object, &error);
    let advice = os.advice.clone();
    let path = path.to_owned();
    let own: Observation = match op {
        Operation::Read => ReadFailed {
            path,
            offset,
            length,
            errno,
            advice,
        }
        .into(),
        Operation::Flush => FlushFailed {
            path,
            errno,
            advice,
        }
        .into(),
        Operation::Write | Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
            WriteFailed {
                path,
                operation: op.name().to_owned(),
                offset,
                length,
                errno,
                advice,
            }
            .into()
        }
    };
    own.because(os)
}
