//! Snapshots: taken with and without a guest, as a tree, gone back to, deleted, consolidated.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use common::images::{check, content, qemu_img, word};
use common::{DISK, World};
use serde_json::{Value, json};
use strake_api::image::ImageFormat;
use strake_api::job::{JobKind, Phase};
use strake_api::rest::{Disk, DiskTree, Job, VmState};

const SNAPSHOTS: &str = "/v1/vms/web1/disks/root/snapshots";
const CONSOLIDATE: &str = "/v1/vms/web1/disks/root/consolidate";

fn snapshot(world: &World, name: &str) -> Job {
    let job: Job = world.ok("POST", SNAPSHOTS, &json!({ "name": name }));
    let job = world.wait_for_job(&job);
    assert_eq!(job.status.phase, Phase::Completed, "{job:?}");
    assert_eq!(
        (job.kind, job.snapshot.as_deref()),
        (JobKind::Snapshot, Some(name))
    );
    job
}

fn disk(world: &World) -> Disk {
    world.vm("web1").disks.remove(0)
}

fn now(world: &World) -> Vec<u8> {
    let disk = disk(world);
    if disk.format == ImageFormat::Qcow2 {
        check(&disk.image);
    }
    content(world, &disk.image, disk.format.name())
}

/// Merges as long as there is something to merge.
fn consolidate(world: &World, all: bool) -> usize {
    let mut done = 0;
    loop {
        let job: Option<Job> = world.ok("POST", CONSOLIDATE, &json!({ "all": all }));
        let Some(job) = job else { return done };
        let job = world.wait_for_job(&job);
        assert_eq!(job.status.phase, Phase::Completed, "{job:?}");
        done += 1;
    }
}

fn shape(tree: &DiskTree) -> Vec<(Option<&str>, Option<usize>, bool)> {
    tree.layers
        .iter()
        .map(|layer| (layer.snapshot.as_deref(), layer.parent, layer.current))
        .collect()
}

/// The whole life of a tree; the guest runs while snapshots are taken, or not.
fn life(runs: bool) {
    let world = World::new();
    world.create("");
    let write = |line: &str| {
        if !runs {
            world.start("web1");
        }
        world.tell("web1", line);
        if !runs {
            world.stop_by_force("web1");
        }
    };
    if runs {
        world.start("web1");
    }
    write("write 4096 first!");
    let job = snapshot(&world, "one");
    assert_eq!(job.destination, world.text("slow/web1-root.1.qcow2"));
    let info = qemu_img(&["info", "-U", &job.destination]);
    assert!(info.contains("backing file format: raw"), "{info}");
    write("write 4096 second");
    write("write 65536 second");
    snapshot(&world, "two");
    write("write 4096 third!");
    let disk_now = disk(&world);
    assert_eq!(disk_now.image, world.text("slow/web1-root.2.qcow2"));
    let told: Vec<_> = disk_now
        .snapshots
        .iter()
        .map(|of| (of.name.as_str(), of.parent.as_deref(), of.current))
        .collect();
    assert_eq!(told, [("one", None, true), ("two", Some("one"), true)]);
    // Each is what the disk was.
    let base = world.text("slow/web1-root.raw");
    let two = world.text("slow/web1-root.1.qcow2");
    assert_eq!(word(&world, &base, "raw", 4096), "first!");
    assert_eq!(word(&world, &two, "qcow2", 4096), "second");
    assert_eq!(&now(&world)[4096..4102], b"third!");
    let (status, seen) = world.refused("POST", SNAPSHOTS, &json!({ "name": "two" }));
    assert_eq!(status, 409, "{seen}");
    let (status, seen) = world.refused("POST", SNAPSHOTS, &json!({ "name": "../x" }));
    assert_eq!(status, 400, "{seen}");
    // Back to the first: a branch. Only while the guest does not run.
    let revert = format!("{SNAPSHOTS}/one/revert");
    if runs {
        let (status, seen) = world.refused("POST", &revert, &Value::Null);
        assert_eq!(status, 409, "{seen}");
        assert!(seen.find("host.wrong-state").is_some(), "{seen}");
        world.stop_by_force("web1");
    }
    let (status, _) = world.refused("POST", &format!("{SNAPSHOTS}/three/revert"), &Value::Null);
    assert_eq!(status, 404);
    let job: Job = world.ok("POST", &revert, &Value::Null);
    assert_eq!(
        (job.kind, job.status.phase),
        (JobKind::Revert, Phase::Completed)
    );
    assert_eq!(&now(&world)[4096..4102], b"first!");
    assert_eq!(
        world.files("slow"),
        ["web1-root.1.qcow2", "web1-root.3.qcow2", "web1-root.raw"]
    );
    let tree: DiskTree = world.ok("GET", SNAPSHOTS, &Value::Null);
    assert_eq!(
        shape(&tree),
        [
            (Some("one"), None, true),
            (Some("two"), Some(0), false),
            (None, Some(0), true)
        ]
    );
    if runs {
        world.start("web1");
    }
    write("write 8192 branch");
    // Two are based on the first: it stays, without a name, until the other one goes.
    assert_eq!(consolidate(&world, false), 0);
    let tree: DiskTree = world.ok("DELETE", &format!("{SNAPSHOTS}/one"), &Value::Null);
    assert_eq!(shape(&tree)[0], (None, None, true));
    assert_eq!(consolidate(&world, false), 0);
    assert_eq!(word(&world, &two, "qcow2", 4096), "second");
    let tree: DiskTree = world.ok("DELETE", &format!("{SNAPSHOTS}/two"), &Value::Null);
    assert_eq!(shape(&tree), [(None, None, true), (None, Some(0), true)]);
    assert_eq!(world.files("slow"), ["web1-root.3.qcow2", "web1-root.raw"]);
    let before = now(&world);
    assert_eq!(consolidate(&world, false), 1);
    assert_eq!(now(&world), before);
    assert_eq!(&before[8192..8198], b"branch");
    let disk = disk(&world);
    assert_eq!(
        (disk.image.as_str(), disk.format),
        (base.as_str(), ImageFormat::Raw)
    );
    assert_eq!(disk.size_bytes, DISK);
    assert_eq!(world.files("slow"), ["web1-root.raw"]);
    // The disk is as any other again, and nothing stands in the way of removing it.
    if !runs {
        world.start("web1");
    }
    world.tell("web1", "write 4096 again!");
    assert_eq!(&now(&world)[4096..4102], b"again!");
    world.stop_by_force("web1");
    world.ok::<Value>("DELETE", "/v1/vms/web1?disks=delete", &Value::Null);
    assert!(world.files("slow").is_empty());
}

#[test]
fn a_tree_lives_while_the_guest_runs() {
    life(true);
}

#[test]
fn a_tree_lives_while_the_vm_is_stopped() {
    life(false);
}

#[test]
fn a_chain_of_qcow2_is_consolidated_from_the_top() {
    for runs in [false, true] {
        consolidated(runs);
    }
}

fn consolidated(runs: bool) {
    let world = World::new();
    world.create("");
    world.start("web1");
    for number in 0..4 {
        world.tell(
            "web1",
            &format!("write {} layer{number}", 4096 * (number + 1)),
        );
        world.tell("web1", &format!("write 131072 layer{number}"));
        snapshot(&world, &format!("s{number}"));
    }
    if !runs {
        world.stop_by_force("web1");
    }
    let before = now(&world);
    assert_eq!(consolidate(&world, false), 0);
    assert_eq!(consolidate(&world, true), 4);
    assert_eq!(now(&world), before);
    assert_eq!(&before[131_072..131_078], b"layer3");
    assert_eq!(world.files("slow"), ["web1-root.raw"]);
    assert!(disk(&world).snapshots.is_empty());
}

#[test]
fn a_removed_vm_takes_its_snapshots_along_and_a_store_with_one_stays() {
    let world = World::new();
    world.create("");
    let job: Job = world.ok("POST", SNAPSHOTS, &json!({ "to": "fast" }));
    assert_eq!(job.snapshot.as_deref(), Some("snapshot-1"));
    let top = world.text("fast/web1-root.1.qcow2");
    assert_eq!(disk(&world).image, top);
    let info = qemu_img(&["info", "-U", &top]);
    assert!(info.contains(&world.text("slow/web1-root.raw")), "{info}");
    for store in ["slow", "fast"] {
        let path = format!("/v1/datastores/{store}");
        let (status, seen) = world.refused("DELETE", &path, &Value::Null);
        assert_eq!(status, 409, "{seen}");
    }
    world.start("web1");
    world.wait_for("web1", VmState::Running);
    world.stop_by_force("web1");
    world.ok::<Value>("DELETE", "/v1/vms/web1?disks=delete", &Value::Null);
    assert!(world.files("slow").is_empty() && world.files("fast").is_empty());
}

#[test]
fn what_a_migration_leaves_of_a_chain_can_be_gone_back_to() {
    let world = World::new();
    world.create("");
    world.start("web1");
    world.tell("web1", "write 4096 first!");
    snapshot(&world, "one");
    world.tell("web1", "write 4096 second");
    let job = world.migrate("fast");
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
    let moved = disk(&world);
    assert_eq!(moved.image, world.text("fast/web1-root.1.qcow2"));
    assert!(!qemu_img(&["info", "-U", &moved.image]).contains("backing file"));
    let names: Vec<_> = moved.snapshots.iter().map(|of| of.name.as_str()).collect();
    assert_eq!(names, ["one", "before-job-2"]);
    world.stop_by_force("web1");
    let path = format!("{SNAPSHOTS}/one/revert");
    let _: Job = world.ok("POST", &path, &Value::Null);
    assert_eq!(&now(&world)[4096..4102], b"first!");
    assert!(world.files("fast").len() == 1, "{:?}", world.files("fast"));
}
