//! The job's journal.

use std::fs::File;

use serde::{Deserialize, Serialize};
use strake_api::job::{JobId, Phase};
use strake_observe::Result;

/// What the journal says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The job.
    pub job: JobId,
    /// The disk's name in its VM's spec.
    pub disk: String,
    /// The path of the source.
    pub source: String,
    /// The path of the destination.
    pub destination: String,
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// The last phase that the job is known to have reached.
    pub phase: Phase,
}

/// Reads a journal.
///
/// # Errors
/// When it cannot be read or holds no whole record.
pub fn read(_file: &mut File) -> Result<Record> {
    Err(crate::NoUring {
        reason: "not built yet".into(),
    }
    .into())
}
