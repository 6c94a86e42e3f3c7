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

/// What a job does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Moves a disk to another image.
    #[default]
    Migrate,
    /// Puts a new image over a disk's own, which becomes the snapshot.
    Snapshot,
    /// Puts a new image over a snapshot; the disk is what it was then.
    Revert,
    /// Moves what a disk's image has into the one below it.
    Consolidate,
}

impl JobKind {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Migrate => "migrate",
            Self::Snapshot => "snapshot",
            Self::Revert => "revert",
            Self::Consolidate => "consolidate",
        }
    }

    /// What has that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [
            Self::Migrate,
            Self::Snapshot,
            Self::Revert,
            Self::Consolidate,
        ]
        .into_iter()
        .find(|kind| kind.name() == name)
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

/// How a disk is moved while its guest writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Passes first; mirroring as soon as the passes cannot keep up with the guest.
    #[default]
    Auto,
    /// Passes over what was written since the last one. The guest never waits for the destination.
    Dirty,
    /// One pass; what the guest writes to copied parts goes to both sides at once.
    Mirror,
    /// The guest's writes go to an overlay while the image, which does not change then, is copied;
    /// the overlay is consolidated into the copy afterwards.
    Snapshot,
}

impl Method {
    /// Its name, as it is asked for.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Dirty => "dirty",
            Self::Mirror => "mirror",
            Self::Snapshot => "snapshot",
        }
    }

    /// Whether it is the usual one.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What the daemon's record of the disk is to name when it commits. A job with method
/// [`Snapshot`](Method::Snapshot) asks twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The destination. The job is complete then.
    #[default]
    Destination,
    /// The overlay. It is over the source until its own header names the destination.
    Overlay,
    /// The source again: what came into the overlay meanwhile is there. The job has failed then.
    Source,
}

impl Stage {
    /// Whether it is the usual one.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The method that a job uses at the moment (never [`Method::Auto`]), and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MethodUsed {
    /// What it is.
    pub method: Method,
    /// Why it is that one.
    pub why: MethodReason,
    /// Bytes that the guest's own writes have brought to the destination.
    #[serde(default)]
    pub mirrored_bytes: u64,
}

/// Why a job uses a method.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum MethodReason {
    /// It was asked for.
    Asked,
    /// So far the passes keep up with the guest.
    PassesKeepUp,
    /// The guest writes too fast for passes to end soon.
    WritesTooFast {
        /// Bytes per second that the guest dirties, counted in whole blocks.
        write_rate: u64,
        /// Bytes per second that are copied.
        copy_rate: u64,
    },
    /// The guest writes too fast for passes, and what it writes until the image is copied is
    /// expected to be within the limit of an overlay.
    OverlayFits {
        /// How many bytes the overlay is expected to get.
        expected: u64,
        /// Its limit.
        limit: u64,
    },
    /// A pass left nearly as much as it found, or more.
    NotShrinking {
        /// Bytes that were dirty before it.
        before: u64,
        /// Bytes that were dirty after it.
        after: u64,
    },
}

impl std::fmt::Display for MethodReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const MIB: u64 = 1 << 20;
        match self {
            Self::Asked => f.write_str("as asked"),
            Self::PassesKeepUp => f.write_str("passes keep up with the guest"),
            Self::WritesTooFast {
                write_rate,
                copy_rate,
            } => write!(
                f,
                "the guest dirties {} MiB/s, {} MiB/s are copied",
                write_rate / MIB,
                copy_rate / MIB
            ),
            Self::OverlayFits { expected, limit } => write!(
                f,
                "the guest writes too fast for passes; an overlay takes some {} MiB of the {} MiB that it may",
                expected.div_ceil(MIB),
                limit / MIB
            ),
            Self::NotShrinking { before, after } => write!(
                f,
                "a pass over {} MiB left {} MiB dirty",
                before / MIB,
                after / MIB
            ),
        }
    }
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
    /// How the disk is moved.
    // Not written if it is the usual one, which monitors from before there were others do not know.
    #[serde(skip_serializing_if = "Method::is_default")]
    pub method: Method,
    /// Requests per second that the copy makes at most, reads and writes together; none means no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// How long the guest's own requests may take before the copy gives way.
    #[serde(skip_serializing_if = "Latency::is_default")]
    pub latency: Latency,
    /// How much of its store the destination takes.
    #[serde(skip_serializing_if = "Space::is_default")]
    pub space: Space,
    /// The most that the overlay of method `snapshot` may get, in bytes, before the job turns back;
    /// none means the size of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta_bytes: Option<u64>,
}

/// How much of its store a destination takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Space {
    /// What has data: holes stay holes, and what is found to be zeroes becomes one.
    #[default]
    Thin,
    /// All of the disk's size, from the start: no later write of the guest can find its store full.
    Thick,
}

impl Space {
    /// Whether it is the usual one.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How long the reads and writes of a guest may take, in the mean, before a copy beside it gives way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Latency {
    /// Twice as long as before the copy began, and 2 ms at least. The copy has at least a chunk of
    /// 1 MiB on its way, so it goes on whatever the guest does.
    #[default]
    Auto,
    /// As long as it takes: the copy never gives way.
    Any,
    /// So many microseconds. The copy gets as slow as that needs, but a quarter of its time it
    /// always copies.
    Us(u64),
}

impl Latency {
    /// Whether it is the usual one.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Any => f.write_str("any"),
            Self::Us(us) => write!(f, "{}.{:03} ms", us / 1000, us % 1000),
        }
    }
}

/// A limit as it is changed: none, or so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ceiling {
    /// There is none.
    Unlimited,
    /// So many at most.
    At(u64),
}

impl Ceiling {
    /// The number, if there is one.
    #[must_use]
    pub fn limit(self) -> Option<u64> {
        match self {
            Self::Unlimited => None,
            Self::At(most) => Some(most),
        }
    }
}

/// What changes of a job's limits while it runs. What is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsChange {
    /// The longest pause at the switch-over, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<u64>,
    /// Bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<Ceiling>,
    /// Requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<Ceiling>,
    /// How long the guest's own requests may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
}

impl LimitsChange {
    /// Changes `limits`.
    pub fn apply(&self, limits: &mut MigrationLimits) {
        if let Some(pause_ms) = self.pause_ms {
            limits.pause_ms = pause_ms;
        }
        if let Some(rate) = self.bytes_per_second {
            limits.bytes_per_second = rate.limit();
        }
        if let Some(iops) = self.iops {
            limits.iops = iops.limit();
        }
        if let Some(latency) = self.latency {
            limits.latency = latency;
        }
    }
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
            method: Method::default(),
            iops: None,
            latency: Latency::default(),
            space: Space::default(),
            delta_bytes: None,
        }
    }
}

/// Whether a job goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progress {
    /// It does.
    #[default]
    On,
    /// It was paused.
    Paused,
}

impl Progress {
    /// Whether it does.
    #[must_use]
    pub fn is_on(&self) -> bool {
        *self == Self::On
    }
}

/// What a job that can be taken up again has kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Bytes that need not be copied again if the VM or its host died now.
    pub bytes: u64,
}

/// What a copy costs the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencySeen {
    /// The mean of the guest's reads and writes of the last moments, in microseconds.
    pub now_us: u64,
    /// What it was before the copy began.
    pub before_us: u64,
    /// What makes the copy give way; none if nothing does.
    pub target_us: Option<u64>,
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
    /// The VM ended before the job. The disk is on its source; the VM's next run takes the job up again.
    Interrupted,
}

impl Phase {
    /// Whether nothing more will happen in this run of the VM.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Interrupted
        )
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

/// The overlay of a job with method [`Snapshot`](Method::Snapshot).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayStatus {
    /// Its path.
    pub path: String,
    /// Bytes that it uses.
    pub bytes: u64,
    /// The most that it may before the job turns back.
    pub limit: u64,
    /// What is done meanwhile.
    pub step: OverlayStep,
}

/// What a job with method [`Snapshot`](Method::Snapshot) does while the disk is on the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OverlayStep {
    /// It copies the source, which the overlay is over.
    Copy,
    /// It consolidates the overlay into the copy, which the overlay is over now.
    Consolidate,
    /// It turns back: it consolidates the overlay into the source.
    TurnBack,
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
    /// The method in use, once one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Box<MethodUsed>>,
    /// Whether it was asked to pause: it copies nothing and does not switch over until it is resumed.
    #[serde(default, skip_serializing_if = "Progress::is_on")]
    pub progress: Progress,
    /// How long the guest's own reads and writes take at the moment, and how long they may, in
    /// microseconds, while the guest makes any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Box<LatencySeen>>,
    /// What a job that can be taken up again has kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Box<Kept>>,
    /// The overlay that the disk is on. In a job that has ended: that it was left on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Box<OverlayStatus>>,
    /// Why it failed, or what it left to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Observation>,
}

impl MigrationStatus {
    /// A job that was accepted.
    #[must_use]
    pub fn new(job: JobId, disk: String, size_bytes: u64) -> Self {
        Self {
            job,
            disk,
            phase: Phase::Preparing,
            size_bytes,
            passes: Vec::new(),
            throughput: 0,
            expected_pause_ms: None,
            pause_ms: None,
            elapsed_ms: 0,
            method: None,
            progress: Progress::On,
            latency: None,
            kept: None,
            overlay: None,
            failure: None,
        }
    }
}
