//! `strake disk snapshot`, `tree`, `revert`, `delete-snapshot` and `consolidate`.

use std::time::Duration;

use strake_api::job::MigrationLimits;
use strake_api::rest::{Consolidate, DiskTree, Job, TakeSnapshot};
use strake_observe::Result;

use super::jobs::PATIENCE_S;
use crate::context::Context;
use crate::exit::Exit;
use crate::job;
use crate::output::printable;
use crate::units::{bytes_or_dash, utc};

/// The arguments of `strake disk snapshot`.
#[derive(Debug, clap::Args)]
pub struct Snapshot {
    /// The VM
    pub vm: String,

    /// The disk's name in the VM's spec
    pub disk: String,

    /// The snapshot's name [default: snapshot-N]
    pub name: Option<String>,

    /// The datastore for what is written from then on [default: beside the disk's image]
    #[arg(long, value_name = "DATASTORE")]
    pub to: Option<String>,

    /// The longest pause that the guest may see
    #[arg(long, value_name = "MS", default_value_t = MigrationLimits::default().pause_ms)]
    pub pause_ms: u64,
}

/// The arguments of `strake disk tree`.
#[derive(Debug, clap::Args)]
pub struct Tree {
    /// The VM
    pub vm: String,

    /// Only this disk
    pub disk: Option<String>,
}

/// The arguments of commands on one snapshot.
#[derive(Debug, clap::Args)]
pub struct OfSnapshot {
    /// The VM
    pub vm: String,

    /// The disk's name in the VM's spec
    pub disk: String,

    /// The snapshot's name
    pub snapshot: String,
}

/// The arguments of `strake disk consolidate`.
#[derive(Debug, clap::Args)]
pub struct Merge {
    /// The VM
    pub vm: String,

    /// The disk's name in the VM's spec
    pub disk: String,

    /// Delete the snapshots that the disk has come from before
    #[arg(long)]
    pub all: bool,

    /// The longest pause that the guest may see at each switch-over
    #[arg(long, value_name = "MS", default_value_t = MigrationLimits::default().pause_ms)]
    pub pause_ms: u64,
}

fn limits(pause_ms: u64) -> MigrationLimits {
    MigrationLimits {
        pause_ms,
        ..MigrationLimits::default()
    }
}

pub(super) async fn snapshot(args: Snapshot, context: &Context) -> Result<Exit> {
    let request = TakeSnapshot {
        name: args.name,
        to: args.to,
        limits: limits(args.pause_ms),
    };
    let job = context
        .client
        .snapshot(&args.vm, &args.disk, &request)
        .await?;
    let job = ended(job, context).await?;
    context.output.answer(&job, |job| {
        let name = job.snapshot.as_deref().unwrap_or("-");
        let pause = match job.status.pause_ms {
            Some(ms) => format!("; the guest's disk paused for {ms:.1} ms"),
            None => String::new(),
        };
        format!(
            "snapshot {name} is {}; from now on {} is written{pause}\n",
            job.source, job.destination
        )
    })?;
    Ok(Exit::Done)
}

pub(super) async fn tree(args: Tree, context: &Context) -> Result<Exit> {
    let names = match args.disk {
        Some(disk) => vec![disk],
        None => {
            let vm = context.client.vm(&args.vm).await?;
            vm.disks.into_iter().map(|disk| disk.name).collect()
        }
    };
    let mut trees = Vec::new();
    for name in names {
        trees.push(context.client.disk_tree(&args.vm, &name).await?);
    }
    context
        .output
        .answer(&trees, |trees| trees.iter().map(drawn).collect())?;
    Ok(Exit::Done)
}

pub(super) async fn revert(args: OfSnapshot, context: &Context) -> Result<Exit> {
    let OfSnapshot { vm, disk, snapshot } = &args;
    let job = context.client.revert(vm, disk, snapshot).await?;
    let job = ended(job, context).await?;
    context.output.answer(&job, |job| {
        format!(
            "disk {} is what it was at {snapshot}; from now on {} is written\n",
            job.status.disk, job.destination
        )
    })?;
    Ok(Exit::Done)
}

pub(super) async fn delete(args: OfSnapshot, context: &Context) -> Result<Exit> {
    let OfSnapshot { vm, disk, snapshot } = &args;
    let tree = context.client.delete_snapshot(vm, disk, snapshot).await?;
    context.output.answer(&tree, |tree| {
        let unnamed = tree.layers.iter().rev().skip(1);
        let unnamed = unnamed.filter(|layer| layer.snapshot.is_none()).count();
        let left = match unnamed {
            0 => String::new(),
            _ => format!(
                "; what later images need of it stays until `strake disk consolidate {vm} {disk}`"
            ),
        };
        format!("snapshot {snapshot} is deleted{left}\n")
    })?;
    Ok(Exit::Done)
}

pub(super) async fn consolidate(args: Merge, context: &Context) -> Result<Exit> {
    let request = Consolidate {
        all: args.all,
        limits: limits(args.pause_ms),
    };
    let mut done: Vec<Job> = Vec::new();
    while let Some(job) = context
        .client
        .consolidate(&args.vm, &args.disk, &request)
        .await?
    {
        done.push(ended(job, context).await?);
    }
    context.output.answer(&done, |done| match done.last() {
        None => "there is nothing to consolidate: a snapshot is right below the disk's image, or \
                 nothing (--all deletes the snapshots first)\n"
            .to_owned(),
        Some(last) => format!(
            "disk {} is on {} now; images that are gone: {}\n",
            last.status.disk,
            last.destination,
            done.len()
        ),
    })?;
    Ok(Exit::Done)
}

/// Waits for a job's end, if it has not ended yet.
async fn ended(job: Job, context: &Context) -> Result<Job> {
    job::watch(context, &job.status.job, Duration::from_secs(PATIENCE_S)).await
}

/// A tree as text: what is based on an image is below it, further to the right.
fn drawn(tree: &DiskTree) -> String {
    let mut out = format!("{} {}\n", printable(&tree.vm), printable(&tree.disk));
    draw(tree, None, 0, &mut out);
    out
}

fn draw(tree: &DiskTree, parent: Option<usize>, depth: usize, out: &mut String) {
    // As deep as there are images at most, whatever the daemon says.
    if depth > tree.layers.len() {
        return;
    }
    let last = tree.layers.len().saturating_sub(1);
    for (place, layer) in tree.layers.iter().enumerate() {
        if layer.parent != parent {
            continue;
        }
        let name = match &layer.snapshot {
            _ if place == last => "* now".to_owned(),
            Some(name) => name.clone(),
            None => "(no snapshot)".to_owned(),
        };
        let taken = layer.taken_ms.map_or_else(String::new, utc);
        out.push_str(&format!(
            "{:indent$}{name}  {taken}  {}  {} ({})\n",
            "",
            bytes_or_dash(layer.allocated_bytes),
            printable(&layer.image),
            layer.format,
            indent = 2 * (depth + 1),
        ));
        if place != last {
            draw(tree, Some(place), depth + 1, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use strake_api::image::ImageFormat;
    use strake_api::rest::DiskLayer;

    use super::*;

    #[test]
    fn a_tree_is_drawn_with_its_branches() {
        let layer = |image: &str, snapshot: Option<&str>, parent| DiskLayer {
            image: image.to_owned(),
            format: ImageFormat::Qcow2,
            datastore: None,
            allocated_bytes: Some(1 << 20),
            parent,
            snapshot: snapshot.map(str::to_owned),
            taken_ms: snapshot.map(|_| 0),
            current: true,
        };
        let tree = DiskTree {
            vm: "web1".to_owned(),
            disk: "root".to_owned(),
            layers: vec![
                layer("/a", Some("one"), None),
                layer("/b", Some("two"), Some(0)),
                layer("/c", None, Some(0)),
                layer("/d", None, Some(2)),
            ],
        };
        let drawn = drawn(&tree);
        let heads: Vec<&str> = drawn
            .lines()
            .map(|line| line.split("  ").find(|part| !part.is_empty()).unwrap_or(""))
            .collect();
        assert_eq!(heads, ["web1 root", "one", "two", "(no snapshot)", "* now"]);
        let indents: Vec<usize> = drawn
            .lines()
            .map(|line| line.len() - line.trim_start().len())
            .collect();
        assert_eq!(indents, [0, 2, 4, 4, 6]);
        // A list that names itself does not hang anybody.
        let mut odd = tree;
        odd.layers[0].parent = Some(0);
        drop(super::drawn(&odd));
    }
}
