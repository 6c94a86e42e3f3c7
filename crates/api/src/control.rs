//! The protocol between `straked` and one `strake-vmm`.
//!
//! The carrier is a `SOCK_SEQPACKET` unix socket. Each packet is one JSON document
//! ([`Packet`]), at most [`MAX_PACKET`] bytes, and may carry descriptors (`SCM_RIGHTS`, at most
//! [`MAX_FDS`]). Where a message names a descriptor it does so by [`FdIndex`], its place among the
//! descriptors of the same packet.
//!
//! The monitor inherits a *listening* socket as descriptor [`LISTEN_FD`] and serves one connection
//! after another, the newest replacing the one before. So the daemon may die and come back: it
//! connects again and asks for [`Request::Status`]. A lost connection changes nothing in the VM.
//!
//! **Handover.** A guest moves into another monitor in this order, each step asked for by the daemon,
//! which alone decides:
//!
//! ```text
//!   daemon                  predecessor                     successor
//!   Lend ──────────────────▶ gives its descriptors
//!   Configure (Predecessor) ───────────────────────────────▶ builds everything
//!   Receive ───────────────────────────────────────────────▶ waits for the records
//!   HandOver ──────────────▶ pauses, drains, saves ─records─▶ restores
//!                            Done                            Done: it could run
//!   the inventory's transaction
//!   TakeOver ──────────────────────────────────────────────▶ runs
//!   Retire ────────────────▶ ends
//! ```
//!
//! Until the transaction, `CallOff` makes the predecessor go on as if nothing had happened. Neither
//! of the two ever runs the guest again on its own: whose daemon goes away in between waits for the
//! next one.
//!
//! Requests carry an identifier that their reply repeats. Events come unasked and carry 0.

use serde::{Deserialize, Serialize};
use strake_observe::Observation;

pub use crate::image::{ImageConfig, ImageFormat, LayerAccess, LayerConfig};
pub use crate::spec::ConsoleKind;

use crate::job::{JobId, LimitsChange, MigrationLimits, MigrationStatus};

/// The version of this protocol. A monitor refuses another one by name.
pub const PROTOCOL_VERSION: u32 = 1;

/// The descriptor number at which a monitor finds its listening control socket.
pub const LISTEN_FD: i32 = 3;

/// The largest packet, in bytes. A reply or an event that would be larger is cut: first the passes of
/// its jobs go, then causes far down in its observations, which say so.
pub const MAX_PACKET: usize = 128 * 1024;

/// The most descriptors in one packet (the kernel's own bound is 253). A VM whose disks have more
/// layers than this leaves room for is refused by the daemon.
pub const MAX_FDS: usize = 240;

/// The place of a descriptor among those of its packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u8);

/// One packet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Packet {
    /// Of a request, and of its reply; 0 for events.
    pub id: u64,
    /// What it says.
    pub body: Body,
}

/// What a packet says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Body {
    /// Daemon to monitor.
    Request(Request),
    /// Monitor to daemon.
    Reply(Reply),
    /// Monitor to daemon, unasked.
    Event(Event),
}

/// What a daemon asks of a monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// First on each connection. Answered by [`Reply::Hello`].
    Hello {
        /// [`PROTOCOL_VERSION`] of the daemon.
        version: u32,
    },
    /// Builds the machine; the guest does not run yet. Once per process.
    Configure(Box<MachineConfig>),
    /// Builds an export instead of a machine: a disk that other programs use. Everything else is as
    /// with a machine: it is started, its disk is migrated, it is stopped. Once per process.
    ConfigureExport(Box<ExportConfig>),
    /// Runs the guest from its start.
    Start,
    /// Pauses the vCPUs.
    Pause,
    /// Lets them run again.
    Resume,
    /// Answered by [`Reply::Status`].
    Status,
    /// Presses the ACPI power button: asks the guest to shut down.
    PowerButton,
    /// Stops the guest at once, flushes the disks, and exits.
    Stop,
    /// Ends a monitor that has said [`RunState::Exited`]: the daemon has taken note of why, for good.
    /// Without it a monitor whose guest ended by itself stays, and tells each new daemon again; after
    /// an hour it ends nevertheless. Refused while the guest lives.
    Dismiss,
    /// Sets how fast a disk's guest gets requests through, from now on.
    SetDiskLimits {
        /// The disk's name.
        disk: String,
        /// The limits in place of those of now.
        limits: DiskLimits,
    },
    /// Attaches a stream socket to the consoles: output of both from now on, input for the one that
    /// [`MachineConfig::console`] names at any time.
    /// Several may be attached; one that does not read loses output, never blocks the guest.
    AttachConsole {
        /// The monitor's end.
        stream: FdIndex,
    },
    /// Answered by [`Reply::Lent`], with descriptors of its own for another monitor of the same VM.
    /// Changes nothing.
    Lend,
    /// Pauses the guest, finishes what is in flight, and sends everything that the guest would miss.
    /// Once it is [`Reply::Done`], the guest stands still until [`Request::CallOff`] or
    /// [`Request::Retire`]; if it fails, the guest runs as before.
    HandOver {
        /// A stream socket to the monitor that receives.
        records: FdIndex,
    },
    /// After [`Request::HandOver`]: the guest goes on here. Does nothing if it does already.
    CallOff,
    /// After [`Request::HandOver`]: the guest runs elsewhere; the process ends.
    Retire,
    /// To a monitor that was configured with [`BootConfig::Predecessor`]: takes everything over from
    /// the stream. Done once the guest could run.
    Receive {
        /// A stream socket to the monitor that hands over.
        records: FdIndex,
    },
    /// After [`Request::Receive`]: the guest runs here from now on. Answered by
    /// [`Reply::TookOver`], also if it does already.
    TakeOver,
    /// Starts a migration. Answered by [`Reply::Done`] once it is accepted.
    MigrateDisk {
        /// Names it from now on.
        job: JobId,
        /// The disk's name.
        disk: String,
        /// The destination: an empty, writable image at least as large as the disk.
        destination: ImageConfig,
        /// The job's journal file beside the destination.
        journal: FdIndex,
        /// Limits.
        limits: MigrationLimits,
        /// Where the job keeps what it takes to be taken up again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<KeepConfig>,
    },
    /// Takes a snapshot: puts a new, empty image over the disk's own, and asks for the commit as a
    /// migration does ([`Event::JobAwaitsCommit`]); until then nothing is written to it. Answered by
    /// [`Reply::Done`] once it is accepted.
    SnapshotDisk {
        /// Names it from now on.
        job: JobId,
        /// The disk's name.
        disk: String,
        /// The new image, writable; its header names the disk's image of now as its backing file.
        overlay: LayerConfig,
        /// Of these the pause counts, and what is suspended.
        limits: MigrationLimits,
    },
    /// Moves what the uppermost layer of a disk has into the image below it, as a migration to that
    /// one. Answered by [`Reply::Done`] once it is accepted.
    ConsolidateDisk {
        /// Names it from now on.
        job: JobId,
        /// The disk's name.
        disk: String,
        /// The image below the disk's uppermost layer, open for writing.
        below: LayerConfig,
        /// Limits.
        limits: MigrationLimits,
    },
    /// Answered by [`Reply::Job`].
    JobStatus {
        /// Which.
        job: JobId,
    },
    /// Ends a job; the disk stays on its source. Refused once the daemon was asked to commit.
    CancelJob {
        /// Which.
        job: JobId,
    },
    /// Lets a job rest: it copies nothing and does not switch over until [`Request::ResumeJob`], and
    /// what the guest writes meanwhile is only marked. Refused once the daemon was asked to commit.
    PauseJob {
        /// Which.
        job: JobId,
    },
    /// Lets a paused job go on.
    ResumeJob {
        /// Which.
        job: JobId,
    },
    /// Changes a job's limits while it runs.
    SetJob {
        /// Which.
        job: JobId,
        /// What changes.
        change: LimitsChange,
    },
    /// The answer to [`Event::JobAwaitsCommit`]: what the inventory's transaction decided.
    JobDecision {
        /// Which.
        job: JobId,
        /// Whether the binding record now names the destination.
        committed: bool,
    },
}

/// Where a job keeps its progress, beside its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepConfig {
    /// An empty file.
    New(FdIndex),
    /// What an earlier run of the job has left; destination and journal are those of that run. Only before
    /// [`Request::Start`].
    Again(FdIndex),
}

/// What a monitor answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done.
    Done,
    /// It was not done; nothing changed.
    Failed(Observation),
    /// Who the monitor is.
    Hello {
        /// [`PROTOCOL_VERSION`] of the monitor.
        version: u32,
        /// The version of its binary.
        monitor: String,
        /// The VM it runs, once it is configured.
        vm: Option<String>,
    },
    /// How the VM is.
    Status(VmStatus),
    /// How a job is.
    Job(MigrationStatus),
    /// What another monitor of the VM needs.
    Lent(Lent),
    /// The guest runs here now.
    TookOver {
        /// How long it stood still, in microseconds: from the order to pause its vCPUs in the other
        /// monitor to the order to run them in this one.
        pause_us: u64,
    },
}

/// Descriptors that a monitor shares with its successor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lent {
    /// The guest's RAM.
    pub memory: FdIndex,
    /// The files of all images, with the locks on them, in no order: which is which, the receiver
    /// sees.
    pub images: Vec<FdIndex>,
    /// The tap of each interface, by its name in the spec.
    pub taps: Vec<LentTap>,
}

/// An interface's tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentTap {
    /// The interface.
    pub nic: String,
    /// The tap.
    pub tap: FdIndex,
}

/// What a monitor says unasked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The VM's state changed.
    State(RunState),
    /// All is at the destination and flushed; the disk's gate is closed. The daemon answers with
    /// [`Request::JobDecision`]. Sent again on each new connection until it is answered.
    JobAwaitsCommit {
        /// Which.
        job: JobId,
    },
    /// A job reached a final phase.
    JobEnded(MigrationStatus),
    /// Something was seen that no request waits for, for example a failed guest write.
    Observed(Observation),
}

/// What a VM does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The monitor waits for [`Request::Configure`].
    Unconfigured,
    /// Built, not started.
    Built,
    /// The guest runs.
    Running,
    /// The vCPUs are paused.
    Paused,
    /// The guest does not run any more and all is at rest. The monitor exits once it has been told
    /// [`Request::Dismiss`], or at once if the daemon asked for the end.
    Exited(ExitReason),
}

/// Why a guest no longer runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest powered off (ACPI S5).
    GuestPowerOff,
    /// The guest asked for a reset (ACPI, keyboard controller or triple fault); the monitor ends
    /// and the daemon starts the VM anew.
    GuestReset,
    /// [`Request::Stop`].
    Stopped,
    /// The monitor cannot go on.
    Failed(Observation),
}

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// What it does.
    pub state: RunState,
    /// Milliseconds since [`Request::Start`].
    pub uptime_ms: u64,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
    /// The jobs of this process: those that go on, and the last eight that ended, all without
    /// their passes ([`Request::JobStatus`] has them, and knows older jobs too).
    pub jobs: Vec<MigrationStatus>,
}

/// How a disk is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name in the spec.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Requests and bytes since the start.
    pub counters: DiskCounters,
}

/// What a guest did with a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCounters {
    /// Read requests.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Discard and write-zeroes requests.
    pub discards: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// Everything a monitor needs to build its machine. Paths are names for observations: the monitor
/// opens none of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// The VM's name.
    pub vm: String,
    /// How many vCPUs, 1 to 16.
    pub cpus: u8,
    /// `/dev/kvm`.
    pub kvm: FdIndex,
    /// The guest's RAM.
    pub memory: MemoryConfig,
    /// What to boot.
    pub boot: BootConfig,
    /// Disks, in the order of the spec.
    pub disks: Vec<DiskConfig>,
    /// Network interfaces, in the order of the spec.
    pub nics: Vec<NicConfig>,
    /// Which console attached terminals type into.
    #[serde(default)]
    pub console: ConsoleKind,
    /// The file that the output of both consoles is appended to.
    pub console_log: FdIndex,
    /// An empty file that outlives the monitor, for its last observations.
    #[serde(default)]
    pub observations: Option<FdIndex>,
}

/// Everything a monitor needs to build an export: a disk with front-ends instead of a guest. As in
/// [`MachineConfig`] the monitor opens nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportConfig {
    /// The export's name.
    pub export: String,
    /// Its disk. The slot means nothing here.
    pub disk: DiskConfig,
    /// By what other programs use it; at least one.
    pub front_ends: Vec<FrontEndConfig>,
    /// An empty file that outlives the monitor, for its last observations.
    #[serde(default)]
    pub observations: Option<FdIndex>,
}

/// A way by which other programs use a disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum FrontEndConfig {
    /// vhost-user-blk.
    VhostUser {
        /// A listening unix stream socket.
        listener: FdIndex,
    },
    /// NBD.
    Nbd(NbdConfig),
}

/// NBD.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NbdConfig {
    /// A listening stream socket.
    pub listener: FdIndex,
    /// Of which kind the socket is.
    pub transport: Transport,
    /// The name by which clients ask for the disk.
    pub name: String,
    /// The files for TLS, if only clients with certificates may connect.
    pub tls: Option<TlsFiles>,
}

/// Of which kind a stream socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// A unix socket.
    Unix,
    /// TCP.
    Tcp,
}

/// Files for TLS, in PEM, open for reading.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// The authority whose certificates the other side must have.
    pub authority: FdIndex,
    /// This side's certificate.
    pub certificate: FdIndex,
    /// Its private key.
    pub key: FdIndex,
}

/// The guest's RAM: one memfd, mapped below and above the hole under 4 GiB.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// Bytes, a multiple of 2 MiB.
    pub size: u64,
    /// A memfd of that size.
    pub memfd: FdIndex,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "kebab-case")]
pub enum BootConfig {
    /// A kernel from the host: bzImage or ELF with a PVH note.
    Kernel {
        /// The kernel file.
        kernel: FdIndex,
        /// Its path.
        kernel_path: String,
        /// The initial RAM disk.
        initrd: Option<FdIndex>,
        /// The command line.
        cmdline: String,
    },
    /// The kernel, initial RAM disk and command line that the guest's own disk image names.
    Disk {
        /// The disk's name.
        disk: String,
        /// Appended to the image's own command line.
        cmdline_append: String,
    },
    /// Nothing: the guest has booted already and comes from another monitor
    /// ([`Request::Receive`]).
    Predecessor,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its name in the spec.
    pub name: String,
    /// Its PCI slot, 1 to 31, recorded by the inventory so that it never changes by accident.
    pub slot: u8,
    /// Its image, writable unless the disk is read-only.
    pub image: ImageConfig,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// What the guest sees as its serial number, at most 20 bytes.
    pub serial: String,
    /// How many virtqueues, 1 to 16.
    pub queues: u16,
    /// How fast the guest gets requests through.
    #[serde(default)]
    pub limits: DiskLimits,
}

/// How fast a guest gets requests through to a disk. Flushes cost nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLimits {
    /// The most reads and changes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// The most bytes per second, read and written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NicConfig {
    /// Its name in the spec.
    pub name: String,
    /// Its PCI slot.
    pub slot: u8,
    /// The tap device, opened with IFF_NO_PI and IFF_VNET_HDR.
    pub tap: FdIndex,
    /// Its MAC address.
    pub mac: [u8; 6],
}
