//! Failed operations as observations.

use std::io;

use strake_observe::{Observation, OsCallFailed};

use crate::{FlushFailed, Operation, ReadFailed, WriteFailed};

/// The observation of an operation on an image that failed with `errno`.
pub(crate) fn failed(
    op: Operation,
    path: &str,
    offset: u64,
    length: u64,
    errno: i32,
) -> Observation {
    let error = io::Error::from_raw_os_error(errno);
    let call = match op {
        Operation::Read => "readv",
        Operation::Write => "writev",
        Operation::Flush => "fdatasync",
        Operation::Discard { .. } | Operation::WriteZeroes { .. } => "fallocate",
    };
    let object = match op {
        Operation::Flush => path.to_owned(),
        _ => format!("{path} at offset {offset}"),
    };
    let os = OsCallFailed::new(call, object, &error);
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
