//! `kill -9` of the daemon at each instant of a migration, with the monitor living on or dying too.
//!
//! Whatever happens: exactly one image is the disk's by the inventory, it holds everything that the
//! guest flushed, nothing else of the job is left, and the VM runs on it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use std::os::unix::fs::FileExt;

use common::{MIGRATE, World, kill, monitors, soon};
use serde_json::{Value, json};
use strake_api::job::Phase;
use strake_api::rest::{Job, VmState};

/// What becomes of the monitor while there is no daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Monitor {
    Lives,
    Dies,
}

fn reads(image: &str, at: u64) -> String {
    let mut bytes = [0; 6];
    let file = std::fs::File::open(image).unwrap_or_else(|error| panic!("{image}: {error}"));
    file.read_exact_at(&mut bytes, at).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Kills the daemon at `at`, starts it again, and checks what is left. `cmdline` decides how the
/// job would have ended.
fn walk(at: &str, cmdline: &str, monitor: Monitor) -> Option<Job> {
    let context = format!("{at}, '{cmdline}', monitor {monitor:?}");
    let mut world = World::new();
    world.create(cmdline);
    world.start("web1");
    world.tell("web1", "write 4096 before");
    world.kill_daemon();
    world.start_daemon_that_dies(Some(at));
    // The request may get its answer before the daemon dies of the job's later steps.
    let body = serde_json::to_vec(&json!({ "to": "fast", "remove_source": true })).unwrap();
    let _ = world.raw("POST", MIGRATE, body);
    world.wait_for_crash();
    if monitor == Monitor::Dies {
        monitors(&world.path("run")).into_iter().for_each(kill);
    }
    world.start_daemon();
    let jobs = || world.ok::<Vec<Job>>("GET", "/v1/jobs", &Value::Null);
    let ended = soon(|| {
        let jobs = jobs();
        jobs.iter()
            .all(|job| job.status.phase.is_final())
            .then_some(jobs)
    });
    let job = ended
        .unwrap_or_else(|| panic!("{context}: {:?}\n{}", jobs(), world.log()))
        .pop();
    let moved = job
        .as_ref()
        .is_some_and(|job| job.status.phase == Phase::Completed);
    let (bound, other) = if moved {
        ("fast", "slow")
    } else {
        ("slow", "fast")
    };
    let vm = world.vm("web1");
    let image = vm.disks[0].image.clone();
    assert_eq!(
        image,
        world.text(&format!("{bound}/web1-root.raw")),
        "{context}"
    );
    assert_eq!(vm.disks[0].datastore.as_deref(), Some(bound), "{context}");
    assert_eq!(world.files(bound), ["web1-root.raw"], "{context}");
    assert!(
        world.files(other).is_empty(),
        "{context}: {:?}",
        world.files(other)
    );
    assert_eq!(reads(&image, 4096), "before", "{context}");
    if monitor == Monitor::Dies {
        assert_eq!(vm.state, VmState::Failed, "{context}");
        world.start("web1");
    } else {
        assert_eq!(vm.state, VmState::Running, "{context}");
    }
    world.tell("web1", "write 8192 after!");
    assert_eq!(reads(&image, 8192), "after!", "{context}");
    // The next attempt works: nothing is in its way.
    if cmdline.is_empty() {
        let next: Job = world.ok(
            "POST",
            MIGRATE,
            &json!({ "to": other, "remove_source": true }),
        );
        let next = world.wait_for_job(&next);
        assert_eq!(next.status.phase, Phase::Completed, "{context}");
        let image = world.vm("web1").disks[0].image.clone();
        assert_eq!(reads(&image, 8192), "after!", "{context}");
    }
    job
}

/// The points before the decision: the monitor that lives decides whether it goes on.
#[test]
fn before_the_commit_the_source_counts_unless_the_monitor_goes_on() {
    for at in [
        "after-job-reserved",
        "after-destination-created",
        "after-job-recorded",
        "after-destination-named",
    ] {
        for monitor in [Monitor::Lives, Monitor::Dies] {
            let job = walk(at, "", monitor).unwrap();
            assert_eq!(job.status.phase, Phase::Failed, "{at} {monitor:?}");
            assert!(job.status.failure.is_some());
        }
    }
    for at in ["after-job-accepted", "before-commit"] {
        // The monitor asks the new daemon for the commit.
        let job = walk(at, "", Monitor::Lives).unwrap();
        assert_eq!(job.status.phase, Phase::Completed, "{at}");
        let job = walk(at, "", Monitor::Dies).unwrap();
        // Whether the decision fell before the kill at `after-job-accepted` is a matter of time.
        let decided = at == "after-job-accepted";
        assert!(decided || job.status.phase == Phase::Failed, "{at}");
    }
}

#[test]
fn after_the_commit_the_destination_counts() {
    for at in [
        "after-commit-before-reply",
        "after-commit-reply",
        "before-source-removal",
        "after-source-removal",
    ] {
        for monitor in [Monitor::Lives, Monitor::Dies] {
            let job = walk(at, "", monitor).unwrap();
            assert_eq!(job.status.phase, Phase::Completed, "{at} {monitor:?}");
        }
    }
}

#[test]
fn a_failed_job_is_cleared_up_by_the_next_daemon() {
    for at in ["before-destination-removal", "after-destination-removal"] {
        for monitor in [Monitor::Lives, Monitor::Dies] {
            let job = walk(at, "job=fail", monitor).unwrap();
            assert_eq!(job.status.phase, Phase::Failed, "{at} {monitor:?}");
        }
    }
}

#[test]
fn every_crash_point_is_walked() {
    let source = [
        include_str!("crash.rs"),
        include_str!("restart.rs"),
        include_str!("fast_restart.rs"),
        include_str!("interrupted.rs"),
        include_str!("profiles.rs"),
        include_str!("snapshot_crash.rs"),
    ]
    .concat();
    for point in strake_host::CRASH_POINTS {
        assert!(source.contains(&format!("\"{point}\"")), "{point}");
    }
}

#[test]
fn a_job_that_copies_goes_on_without_the_daemon() {
    let mut world = World::new();
    world.create("job=hold");
    world.start("web1");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    world.restart_daemon();
    assert_eq!(world.job(&job).status.phase, Phase::Copying);
    world.tell("web1", "go");
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
    // And its end is remembered by a daemon that comes later.
    world.restart_daemon();
    assert_eq!(world.job(&job).status.phase, Phase::Completed);
}
