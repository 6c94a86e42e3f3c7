//! The daemon's REST API: JSON over HTTP on a unix socket.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/host` | [`HostInfo`] |
//! | `GET /v1/vms` | list of [`Vm`] |
//! | `POST /v1/vms` with [`CreateVm`] | [`Vm`] |
//! | `GET /v1/vms/{name}` | [`Vm`] |
//! | `DELETE /v1/vms/{name}?disks=keep\|delete` | – |
//! | `POST /v1/vms/{name}/start` | [`Vm`] |
//! | `POST /v1/vms/{name}/stop` with [`StopVm`] | [`Vm`] |
//! | `POST /v1/vms/{name}/restart` with [`RestartVm`] | [`Restarted`] |
//! | `GET /v1/vms/{name}/log?tail=BYTES` | the serial console's output so far, as bytes |
//! | `POST /v1/vms/{name}/console` with `Upgrade: strake-console` | 101, then the console both ways |
//! | `POST /v1/vms/{name}/disks/{disk}/migrate` with [`MigrateDisk`] | [`Job`] |
//! | `GET /v1/vms/{name}/disks/{disk}/snapshots` | [`DiskTree`] |
//! | `POST /v1/vms/{name}/disks/{disk}/snapshots` with [`TakeSnapshot`] | [`Job`] |
//! | `DELETE /v1/vms/{name}/disks/{disk}/snapshots/{snapshot}` | [`DiskTree`] |
//! | `POST /v1/vms/{name}/disks/{disk}/snapshots/{snapshot}/revert` | [`Job`] |
//! | `POST /v1/vms/{name}/disks/{disk}/consolidate` with [`Consolidate`] | [`Job`], or null if there was nothing to do |
//! | `GET /v1/jobs` | list of [`Job`] |
//! | `GET /v1/jobs/{id}` | [`Job`] |
//! | `POST /v1/jobs/{id}/cancel` | [`Job`] |
//! | `GET /v1/exports` | list of [`Export`] |
//! | `POST /v1/exports` with [`CreateExport`] | [`Export`] |
//! | `GET /v1/exports/{name}` | [`Export`] |
//! | `POST /v1/exports/{name}/start` | [`Export`] |
//! | `DELETE /v1/exports/{name}` | – |
//! | `POST /v1/jobs/{id}/pause` | [`Job`] |
//! | `POST /v1/jobs/{id}/resume` | [`Job`] |
//! | `POST /v1/jobs/{id}/set` with [`LimitsChange`](crate::job::LimitsChange) | [`Job`] |
//! | `GET /v1/datastores` | list of [`Datastore`] |
//! | `POST /v1/datastores` with [`AddDatastore`] | [`Datastore`] |
//! | `DELETE /v1/datastores/{name}` | – |
//! | `GET /v1/observations?since=SEQ` | list of [`strake_observe::Recorded`] |
//!
//! A failure is [`Problem`] (RFC 9457) with the observation tree, as `application/problem+json`.

use serde::{Deserialize, Serialize};
use strake_observe::Observation;

use crate::control::{DiskCounters, ExitReason};
use crate::export::{ExportSpec, NbdListen};
use crate::image::ImageFormat;
use crate::job::{JobKind, MigrationLimits, MigrationStatus};
use crate::spec::VmSpec;
use crate::steer::PlannedChange;

/// A failure: RFC 9457, with the observation tree as an extension member.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Problem {
    /// `tag:strake,2026:` and the observation's identifier.
    #[serde(rename = "type")]
    pub kind: String,
    /// The observation's text.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// The remedy.
    pub detail: String,
    /// The whole tree.
    pub observation: Observation,
}

/// What the daemon and its host are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostInfo {
    /// The daemon's version.
    pub version: String,
    /// The daemon's process identifier.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// The host's name.
    pub hostname: String,
    /// VMs that run.
    pub running: u32,
    /// VMs in the inventory.
    pub vms: u32,
}

/// Asks for a new VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Its name: letters, digits, `-`, `_` and `.`, at most 63 characters, a letter or digit first.
    pub name: String,
    /// What it is.
    pub spec: VmSpec,
}

/// How to stop a VM.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StopVm {
    /// Do not ask the guest: stop at once (disks are flushed).
    pub force: bool,
    /// Seconds to wait for the guest; then the stop fails and the VM keeps running.
    pub timeout_s: Option<u64>,
}

/// How to restart a VM.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestartVm {
    /// Only the monitor is replaced, by one of the installed version, under the running guest, which
    /// does not notice. Otherwise the guest is shut down and started again.
    pub fast: bool,
    /// Without `fast`: do not ask the guest.
    pub force: bool,
    /// Without `fast`: seconds to wait for the guest; then the restart fails and the VM keeps
    /// running.
    pub timeout_s: Option<u64>,
}

/// A VM that was restarted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Restarted {
    /// The VM now.
    pub vm: Vm,
    /// How long a guest that does not notice stood still, in microseconds.
    pub pause_us: Option<u64>,
    /// The process of the monitor before.
    pub old_pid: Option<u32>,
    /// Its version, if it is known.
    pub old_version: Option<String>,
    /// The version of the monitor now.
    pub new_version: Option<String>,
}

/// A VM as the inventory knows it, with its monitor's view where one runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Grows with each change of the record.
    pub revision: u64,
    /// What it does.
    pub state: VmState,
    /// What it is: while it runs what its machine has, else what profiles make of its own values.
    pub spec: VmSpec,
    /// What it says itself.
    pub own: VmSpec,
    /// Changes that the running machine does not have yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<PlannedChange>,
    /// The monitor's process, while one runs.
    pub pid: Option<u32>,
    /// Milliseconds since it started.
    pub uptime_ms: Option<u64>,
    /// Why it last ended.
    pub last_exit: Option<ExitReason>,
    /// Its disks and where they are: the authoritative binding.
    pub disks: Vec<Disk>,
    /// Its network interfaces.
    pub nics: Vec<Nic>,
}

/// What a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// No monitor.
    Stopped,
    /// A monitor is being started.
    Starting,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The guest was asked to shut down.
    Stopping,
    /// The monitor ended by itself; `last_exit` says why.
    Failed,
}

/// A disk of a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Disk {
    /// Its name in the spec.
    pub name: String,
    /// The image that holds its data: the binding.
    pub image: String,
    /// The image's format.
    pub format: ImageFormat,
    /// The datastore of that image, if it is in one.
    pub datastore: Option<String>,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What the image and everything below it take on their stores, in bytes, if it can be told.
    pub allocated_bytes: Option<u64>,
    /// Its snapshots, the oldest first.
    #[serde(default)]
    pub snapshots: Vec<Snapshot>,
    /// Its PCI slot.
    pub slot: u8,
    /// What the guest did with it since the VM started.
    pub counters: Option<DiskCounters>,
}

/// A snapshot of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// The image that holds what the disk was then, with everything below it.
    pub image: String,
    /// That image's format.
    pub format: ImageFormat,
    /// When it was taken, in milliseconds since the epoch.
    pub taken_ms: u64,
    /// The snapshot from which the disk had come to be what it was then.
    pub parent: Option<String>,
    /// Whether the disk of now has come from it.
    pub current: bool,
}

/// Asks for a snapshot.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TakeSnapshot {
    /// Its name; `snapshot-N` if absent.
    pub name: Option<String>,
    /// The datastore of the new image that is written from then on; the directory of the disk's
    /// image of now if absent.
    pub to: Option<String>,
    /// Limits; of these the pause counts, and what is suspended.
    pub limits: MigrationLimits,
}

/// Asks for a consolidation.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Consolidate {
    /// Whether the snapshots from which the disk of now has come are deleted before.
    pub all: bool,
    /// Limits.
    pub limits: MigrationLimits,
}

/// A disk with its images and snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskTree {
    /// The VM.
    pub vm: String,
    /// The disk's name in the spec.
    pub disk: String,
    /// Its images, each after the one it is based on. The last one is what the disk is now.
    pub layers: Vec<DiskLayer>,
}

/// An image of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLayer {
    /// Where it is.
    pub image: String,
    /// Its format.
    pub format: ImageFormat,
    /// Its datastore, if it is in one.
    pub datastore: Option<String>,
    /// What it takes on its store without what is below it, in bytes, if it can be told.
    pub allocated_bytes: Option<u64>,
    /// The place in the list of the image that it is based on, as far as the disk's own go.
    pub parent: Option<usize>,
    /// The snapshot that it is; none for the disk of now, and for what only other images need.
    pub snapshot: Option<String>,
    /// When it became a snapshot, in milliseconds since the epoch.
    pub taken_ms: Option<u64>,
    /// Whether the disk of now needs it.
    pub current: bool,
}

/// A network interface of a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Nic {
    /// Its name in the spec.
    pub name: String,
    /// Its tap device on the host.
    pub tap: String,
    /// Its MAC address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Its PCI slot.
    pub slot: u8,
}

/// Asks for a disk's migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateDisk {
    /// The destination datastore.
    pub to: String,
    /// The format of the destination; that of the source if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
    /// Limits; defaults where absent.
    #[serde(default)]
    pub limits: MigrationLimits,
    /// Whether the source image is removed once the destination is authoritative.
    #[serde(default)]
    pub remove_source: bool,
}

/// A job as the inventory knows it, with the monitor's progress.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// The VM.
    pub vm: String,
    /// What it does.
    #[serde(default)]
    pub kind: JobKind,
    /// The snapshot that it takes or goes back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The image that it copies from.
    pub source: String,
    /// Its format.
    pub source_format: ImageFormat,
    /// The image that it copies to.
    pub destination: String,
    /// Its format.
    pub format: ImageFormat,
    /// The destination's datastore; empty if it is in none.
    pub to: String,
    /// Its limits as they are now.
    #[serde(default)]
    pub limits: MigrationLimits,
    /// Progress.
    pub status: MigrationStatus,
}

/// Asks for a new export. Its disk is `POST /v1/vms/{name}/disks/{disk}/migrate`d as a VM's is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateExport {
    /// Its name, by the same rule as for VMs and different from all of theirs.
    pub name: String,
    /// `VM/DISK` of a stopped VM, `DATASTORE:FILE`, or an absolute path.
    pub source: String,
    /// The format of an image; the end of its name tells if it is absent.
    #[serde(default)]
    pub format: Option<ImageFormat>,
    /// Whether clients may not write.
    #[serde(default)]
    pub read_only: bool,
    /// See [`ExportSpec::vhost_user`].
    #[serde(default)]
    pub vhost_user: Option<String>,
    /// See [`ExportSpec::nbd`].
    #[serde(default)]
    pub nbd: Option<NbdListen>,
    /// See [`ExportSpec::tls_dir`].
    #[serde(default)]
    pub tls_dir: Option<String>,
}

/// An export as the inventory knows it, with its monitor's view where one runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// What it does: `running` is being served.
    pub state: VmState,
    /// What it is.
    pub spec: ExportSpec,
    /// The NBD URI of a client on this host.
    pub nbd_uri: Option<String>,
    /// The monitor's process, while one runs.
    pub pid: Option<u32>,
    /// Milliseconds since it started.
    pub uptime_ms: Option<u64>,
    /// Why it last ended.
    pub last_exit: Option<ExitReason>,
    /// Its disk and where it is.
    pub disk: Disk,
}

/// Asks for a new datastore.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddDatastore {
    /// Its name: the same rule as for VMs.
    pub name: String,
    /// An existing directory, absolute.
    pub path: String,
}

/// A datastore: a directory that holds images.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Datastore {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub path: String,
    /// Bytes in all, if it can be reached.
    pub size_bytes: Option<u64>,
    /// Bytes free for new data, if it can be reached.
    pub free_bytes: Option<u64>,
    /// How many disks of VMs lie on it.
    pub disks: u32,
    /// Why it cannot be used.
    pub problem: Option<Observation>,
}
