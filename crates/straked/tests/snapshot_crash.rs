//! `kill -9` of the daemon at each instant of a snapshot, a revert, a deletion and a consolidation,
//! with the monitor living on or dying too.
//!
//! Whatever happens: the inventory names exactly one chain, it is whole, it holds everything that
//! the guest flushed, nothing else is left, and the VM runs on it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use common::images::{check, content, word};
use common::{World, kill, monitors, soon};
use serde_json::{Value, json};
use strake_api::image::ImageFormat;
use strake_api::job::Phase;
use strake_api::rest::{Disk, DiskTree, Job, VmState};

const SNAPSHOTS: &str = "/v1/vms/web1/disks/root/snapshots";

/// What becomes of the monitor while there is no daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Monitor {
    None,
    Lives,
    Dies,
}

/// `web1` with what it has on its disk, with or without a guest.
fn world(monitor: Monitor, before: &[&str]) -> World {
    let world = World::new();
    world.create("");
    world.start("web1");
    world.tell("web1", "write 4096 before");
    for name in before {
        let job: Job = world.ok("POST", SNAPSHOTS, &json!({ "name": name }));
        world.wait_for_job(&job);
        world.tell("web1", &format!("write 65536 {name}"));
    }
    if monitor == Monitor::None {
        world.stop_by_force("web1");
    }
    world
}

fn disk(world: &World) -> Disk {
    world.vm("web1").disks.remove(0)
}

/// Kills the daemon at `at` of a request, starts it again, and waits until all jobs have ended.
fn walk(world: &mut World, at: &str, monitor: Monitor, method: &str, path: &str) -> Option<Job> {
    world.kill_daemon();
    world.start_daemon_that_dies(Some(at));
    let body = if method == "POST" { "{}" } else { "" };
    let _ = world.raw(method, path, body.into());
    world.wait_for_crash();
    if monitor == Monitor::Dies {
        monitors(&world.path("run")).into_iter().for_each(kill);
    }
    world.start_daemon();
    let jobs = || world.ok::<Vec<Job>>("GET", "/v1/jobs", &Value::Null);
    let ended = soon(|| {
        let jobs = jobs();
        let all = jobs.iter().all(|job| job.status.phase.is_final());
        all.then_some(jobs)
    });
    ended
        .unwrap_or_else(|| panic!("{at} {monitor:?}: {:?}\n{}", jobs(), world.log()))
        .pop()
}

/// The disk is sound, holds what it held, and has no file in its store but those of its tree.
fn sound(world: &World, context: &str, holds: &[(usize, &str)]) {
    let disk = disk(world);
    if disk.format == ImageFormat::Qcow2 {
        check(&disk.image);
    }
    let bytes = content(world, &disk.image, disk.format.name());
    for (at, word) in holds {
        assert_eq!(&bytes[*at..at + word.len()], word.as_bytes(), "{context}");
    }
    let tree: DiskTree = world.ok("GET", SNAPSHOTS, &Value::Null);
    let mut files: Vec<String> = tree
        .layers
        .iter()
        .map(|layer| layer.image.rsplit('/').next().unwrap().to_owned())
        .collect();
    files.sort();
    // What is not needed goes in its own time.
    let clean = soon(|| Some(()).filter(|()| world.files("slow") == files));
    assert!(
        clean.is_some(),
        "{context}: {:?}, {files:?}",
        world.files("slow")
    );
    // And the guest goes on.
    match world.vm("web1").state {
        VmState::Running => {}
        _ => drop(world.start("web1")),
    }
    world.tell("web1", "write 8192 after!");
    let disk = self::disk(world);
    assert_eq!(
        word(world, &disk.image, disk.format.name(), 8192),
        "after!",
        "{context}"
    );
}

#[test]
fn a_snapshot_is_there_or_it_is_not() {
    for monitor in [Monitor::Lives, Monitor::Dies, Monitor::None] {
        for (at, taken) in [
            ("after-job-reserved", Some(false)),
            ("after-destination-created", Some(false)),
            ("after-job-recorded", Some(false)),
            ("after-destination-named", Some(false)),
            ("after-job-accepted", None),
            ("before-commit", Some(monitor == Monitor::Lives)),
            ("after-commit-before-reply", Some(true)),
            ("after-commit-reply", Some(true)),
        ] {
            let needs_a_monitor = ["after-job-accepted", "after-commit-reply"].contains(&at);
            if monitor == Monitor::None && needs_a_monitor {
                continue;
            }
            let context = format!("{at}, {monitor:?}");
            let mut world = world(monitor, &[]);
            let job = walk(&mut world, at, monitor, "POST", SNAPSHOTS).unwrap();
            let there = !disk(&world).snapshots.is_empty();
            assert_eq!(there, job.status.phase == Phase::Completed, "{context}");
            assert!(taken.is_none_or(|taken| taken == there), "{context}");
            if there {
                let base = world.text("slow/web1-root.raw");
                assert_eq!(word(&world, &base, "raw", 4096), "before", "{context}");
            }
            sound(&world, &context, &[(4096, "before")]);
        }
    }
}

#[test]
fn a_disk_has_gone_back_or_it_has_not() {
    for (at, gone) in [
        ("after-job-recorded", false),
        ("after-destination-named", false),
        ("before-commit", false),
        ("after-commit-before-reply", true),
        ("before-source-removal", true),
        ("after-source-removal", true),
    ] {
        let mut world = world(Monitor::None, &["one"]);
        let path = format!("{SNAPSHOTS}/one/revert");
        walk(&mut world, at, Monitor::None, "POST", &path);
        let since = if gone { "\0\0\0" } else { "one" };
        sound(&world, at, &[(4096, "before"), (65_536, since)]);
    }
}

#[test]
fn a_deleted_snapshot_is_gone_and_what_it_leaves_goes() {
    for at in ["after-snapshot-forgotten", "after-layer-removal"] {
        let mut world = world(Monitor::None, &["one", "two"]);
        let path = format!("{SNAPSHOTS}/one/revert");
        let _: Job = world.ok("POST", &path, &Value::Null);
        // Nothing but the name holds the image of "two" now.
        let path = format!("{SNAPSHOTS}/two");
        walk(&mut world, at, Monitor::None, "DELETE", &path);
        let names: Vec<_> = disk(&world)
            .snapshots
            .into_iter()
            .map(|of| of.name)
            .collect();
        assert_eq!(names, ["one"], "{at}");
        // The next job of the VM clears up what is left.
        let job: Job = world.ok("POST", SNAPSHOTS, &json!({ "name": "three" }));
        assert_eq!(job.status.phase, Phase::Completed);
        sound(&world, at, &[(4096, "before")]);
    }
}

#[test]
fn a_consolidation_may_be_begun_again() {
    for at in [
        "after-job-recorded",
        "after-merge",
        "before-commit",
        "after-commit-before-reply",
        "after-merge-committed",
        "before-source-removal",
        "after-source-removal",
    ] {
        let mut world = world(Monitor::None, &["one"]);
        let _: DiskTree = world.ok("DELETE", &format!("{SNAPSHOTS}/one"), &Value::Null);
        let path = "/v1/vms/web1/disks/root/consolidate";
        walk(&mut world, at, Monitor::None, "POST", path);
        sound(&world, at, &[(4096, "before"), (65_536, "one")]);
        world.stop_by_force("web1");
        let _: Option<Job> = world.ok("POST", path, &json!({}));
        assert_eq!(world.files("slow"), ["web1-root.raw"], "{at}");
        sound(&world, at, &[(4096, "before"), (65_536, "one")]);
    }
}
