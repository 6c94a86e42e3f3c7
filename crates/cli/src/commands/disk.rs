//! `strake disk`

use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use strake_api::image::ImageFormat;
use strake_api::job::{Ceiling, Latency, Method, MigrationLimits, Space, Suspend};
use strake_api::rest::MigrateDisk;
use strake_observe::Result;

use super::{limits, snapshots};
use crate::context::Context;
use crate::exit::Exit;
use crate::job;
use crate::observations::Interrupted;
use crate::signals::Interrupts;

/// Work on the disks of VMs
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  strake disk migrate web1 root --to fast")]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Disk,
}

/// What can be done with disks.
#[derive(Debug, Subcommand)]
pub enum Disk {
    /// Move a disk to another datastore while the VM runs
    #[command(after_help = "\
Examples:
  strake disk migrate web1 root --to fast
  strake disk migrate web1 root --to fast --pause-ms 50 --rate 200M
  strake disk migrate web1 root --to fast --method mirror
  strake disk migrate web1 root --to fast --latency-ms 5 --iops 500
  strake disk migrate web1 root --to fast --format qcow2
  strake disk migrate web1 root --to fast --detach --json | jq -r .status.job

Ctrl-C leaves the client, not the job: `strake jobs wait ID` watches it again,
`strake jobs cancel ID` ends it.")]
    Migrate(Migrate),

    /// Keep a disk as it is now, under a name, whether the VM runs or not
    #[command(after_help = "\
Examples:
  strake disk snapshot web1 root
  strake disk snapshot web1 root before-upgrade
  strake disk snapshot web1 root before-upgrade --to fast

With a running VM it is what the disk would be after a loss of power at that moment. It takes no
space by itself: what is written from then on goes to a new image.")]
    Snapshot(snapshots::Snapshot),

    /// Show the images and snapshots of a VM's disks
    #[command(
        after_help = "Examples:\n  strake disk tree web1\n  strake disk tree web1 root --json"
    )]
    Tree(snapshots::Tree),

    /// Make a disk of a stopped VM what it was at a snapshot
    #[command(after_help = "\
Example:
  strake stop web1 && strake disk revert web1 root before-upgrade

What was written since is gone: take another snapshot before if it may be needed. All snapshots
stay.")]
    Revert(snapshots::OfSnapshot),

    /// Delete a snapshot; the disk stays as it is
    #[command(after_help = "Example:\n  strake disk delete-snapshot web1 root before-upgrade")]
    DeleteSnapshot(snapshots::OfSnapshot),

    /// Bring a disk's images into fewer, whether the VM runs or not
    #[command(after_help = "\
Examples:
  strake disk consolidate web1 root
  strake disk consolidate web1 root --all

What was written since a snapshot that was deleted goes into the image below, until that is a
snapshot. With --all the disk is one image again.")]
    Consolidate(snapshots::Merge),
}

/// The arguments of `strake disk migrate`.
#[derive(Debug, clap::Args)]
pub struct Migrate {
    /// The VM
    pub vm: String,

    /// The disk's name in the VM's spec
    pub disk: String,

    /// The destination datastore
    #[arg(long, value_name = "DATASTORE")]
    pub to: String,

    /// The longest pause that the guest may see at the switch-over
    #[arg(long, value_name = "MS", default_value_t = MigrationLimits::default().pause_ms)]
    pub pause_ms: u64,

    /// Copy at most so many bytes per second, for example 100M [default: unlimited]
    #[arg(long, value_name = "BYTES", value_parser = limits::rate)]
    pub rate: Option<Ceiling>,

    /// Make at most so many requests per second, reads and writes together [default: unlimited]
    #[arg(long, value_name = "NUMBER", value_parser = limits::iops)]
    pub iops: Option<Ceiling>,

    /// Give way when the guest's own reads and writes take longer; `auto` is twice as long as before
    /// and 2 ms at least, `any` never gives way
    #[arg(long, value_name = "MS", default_value = "auto", value_parser = limits::latency)]
    pub latency_ms: Latency,

    /// How the disk is moved
    #[arg(long, value_enum, default_value_t = How::Auto)]
    pub method: How,

    /// Take all of the disk's size on the destination's store at once, instead of what has data
    #[arg(long)]
    pub thick: bool,

    /// What stops for the switch-over
    #[arg(long, value_enum, default_value_t = Stops::Disk)]
    pub suspend: Stops,

    /// The format of the destination [default: that of the source]
    #[arg(long, value_enum)]
    pub format: Option<Format>,

    /// Delete the source image once the VM runs on the destination
    #[arg(long)]
    pub remove_source: bool,

    /// Print the job's name and leave it alone
    #[arg(long, conflicts_with = "wait")]
    pub detach: bool,

    /// Wait for the end; this is the default
    #[arg(long)]
    pub wait: bool,

    /// How long to wait for the daemon if it goes away meanwhile
    #[arg(long, value_name = "SECONDS", default_value_t = super::jobs::PATIENCE_S)]
    pub patience: u64,
}

/// How the disk is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// Like dirty, and on to mirror when the guest writes too fast for it
    Auto,
    /// Copy again what was written meanwhile, until little is left
    Dirty,
    /// Copy once, and write what is copied already on both sides
    Mirror,
}

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Byte for byte, thin where the file system has holes
    Raw,
    /// qcow2: thin everywhere, can have snapshots
    Qcow2,
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

/// What stops for the switch-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stops {
    /// Only the disk: its requests wait
    Disk,
    /// The whole VM
    Vm,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    match args.command {
        Disk::Migrate(args) => migrate(args, context).await,
        Disk::Snapshot(args) => snapshots::snapshot(args, context).await,
        Disk::Tree(args) => snapshots::tree(args, context).await,
        Disk::Revert(args) => snapshots::revert(args, context).await,
        Disk::DeleteSnapshot(args) => snapshots::delete(args, context).await,
        Disk::Consolidate(args) => snapshots::consolidate(args, context).await,
    }
}

async fn migrate(args: Migrate, context: &Context) -> Result<Exit> {
    let request = MigrateDisk {
        to: args.to,
        format: args.format.map(ImageFormat::from),
        limits: MigrationLimits {
            pause_ms: args.pause_ms,
            bytes_per_second: args.rate.and_then(Ceiling::limit),
            iops: args.iops.and_then(Ceiling::limit),
            latency: args.latency_ms,
            space: if args.thick {
                Space::Thick
            } else {
                Space::Thin
            },
            suspend: match args.suspend {
                Stops::Disk => Suspend::Disk,
                Stops::Vm => Suspend::Vm,
            },
            method: match args.method {
                How::Auto => Method::Auto,
                How::Dirty => Method::Dirty,
                How::Mirror => Method::Mirror,
            },
            ..MigrationLimits::default()
        },
        remove_source: args.remove_source,
    };
    // Between the request and its answer the job may exist and its name is not known yet.
    let mut interrupts = Interrupts::new()?;
    let job = tokio::select! {
        job = context.client.migrate(&args.vm, &args.disk, &request) => job?,
        () = interrupts.next() => return Err(Interrupted {
            remains: "the daemon may already have begun the migration".to_owned(),
            advice: "see with `strake jobs ls`, end it with `strake jobs cancel JOB`".to_owned(),
        }
        .into()),
    };
    drop(interrupts);
    if args.detach {
        context.output.answer(&job, |job| {
            let id = &job.status.job;
            format!("{id}\n")
        })?;
        return Ok(Exit::Done);
    }
    let patience = Duration::from_secs(args.patience);
    let job = job::watch(context, &job.status.job, patience).await?;
    super::jobs::ended(context, &job)?;
    Ok(Exit::Done)
}
