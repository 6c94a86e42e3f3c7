//! Progress of long work: the same types from the monitor that does it up to the command line.

use serde::{Deserialize, Serialize};
use strake_observe::Observation;

/// Names a job on its host. Given by the daemon, unique for the life of the inventory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub String);

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is suspended while the last blocks of a migration are copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Suspend {
    /// Only the disk: its requests wait behind the closed gate.
    #[default]
    Disk,
    /// The whole VM: its vCPUs are paused too, so its clock-driven work does not pile up.
    Vm,
}

/// The limits of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationLimits {
    /// The longest pause the guest's disk may see at the switch-over, in milliseconds.
    pub pause_ms: u64,
    /// Bytes per second to copy at most; none means as fast as the devices go.
    pub bytes_per_second: Option<u64>,
    /// Passes over the disk before the job gives up if the dirty set does not shrink.
    pub max_passes: u32,
    /// What is suspended for the last blocks.
    pub suspend: Suspend,
}

impl Default for MigrationLimits {
    fn default() -> Self {
        // 300 ms is far below every guest's disk timeout (30 s in Linux) and what users of live
        // migration elsewhere accept by default; 64 passes end even a slowly converging job.
        Self {
            pause_ms: 300,
            bytes_per_second: None,
            max_passes: 64,
            suspend: Suspend::Disk,
        }
    }
}

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Accepted, not yet copying.
    Preparing,
    /// Copying: the first pass over what is allocated or a later one over what was written since.
    Copying,
    /// The gate is closed and the remainder is being copied.
    Suspended,
    /// All is at the destination; the daemon decides. The gate stays closed until it has.
    AwaitingCommit,
    /// The disk runs on the destination.
    Completed,
    /// The disk runs on the source; the reason is in the status.
    Failed,
    /// The disk runs on the source, as asked.
    Cancelled,
}

impl Phase {
    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// One pass of a migration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PassReport {
    /// 1 for the first pass.
    pub number: u32,
    /// Bytes that this pass set out to copy.
    pub planned_bytes: u64,
    /// Bytes read from the source so far.
    pub read_bytes: u64,
    /// Bytes written to the destination so far: less than read where zeroes were found.
    pub written_bytes: u64,
    /// How long it has taken, in milliseconds.
    pub elapsed_ms: u64,
    /// Bytes dirtied by the guest when it ended (0 while it runs).
    pub dirty_after_bytes: u64,
}

/// The state of a migration job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// The job.
    pub job: JobId,
    /// The disk's name in its VM's spec.
    pub disk: String,
    /// Where it is.
    pub phase: Phase,
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// Every pass so far, the running one last. The copy inside the pause is the last pass.
    pub passes: Vec<PassReport>,
    /// Bytes per second over the last second, whatever slowed the job down (its rate limit too).
    pub throughput: u64,
    /// What the pause would be if it began now, in milliseconds, once it can be told.
    pub expected_pause_ms: Option<f64>,
    /// How long the gate was closed, in milliseconds, once it has been opened.
    pub pause_ms: Option<f64>,
    /// How long the job has taken or took, in milliseconds.
    pub elapsed_ms: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Observation>,
}
