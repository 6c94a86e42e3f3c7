//! Exports across ends of the daemon and of their monitors.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use common::{DISK, World, kill, soon};
use serde_json::{Value, json};
use strake_api::job::Phase;
use strake_api::rest::{Export, Job, VmState};

const EXPORT: &str = "/v1/exports/data";

fn body(world: &World) -> Value {
    let image = world.path("slow/data.raw");
    let file = std::fs::File::create(image).unwrap();
    file.set_len(DISK).unwrap();
    json!({ "name": "data", "source": "slow:data.raw", "nbd": world.text("nbd.sock") })
}

fn created(world: &World) -> Export {
    world.ok("POST", "/v1/exports", &body(world))
}

fn export(world: &World) -> Export {
    world.ok("GET", EXPORT, &Value::Null)
}

/// Another monitor than `pid` serves it.
fn served_anew(world: &World, pid: Option<u32>) -> Export {
    soon(|| {
        let now = export(world);
        (now.state == VmState::Running && now.pid != pid).then_some(now)
    })
    .unwrap_or_else(|| panic!("{:?}\n{}", export(world), world.log()))
}

#[test]
fn it_is_found_again_by_the_next_daemon() {
    let mut world = World::new();
    let before = created(&world);
    world.restart_daemon();
    let after = export(&world);
    assert_eq!(after.state, VmState::Running);
    assert_eq!(after.pid, before.pid);
    let vms: Vec<Value> = world.ok("GET", "/v1/vms", &Value::Null);
    assert!(vms.is_empty());
}

#[test]
fn a_monitor_that_died_is_replaced_by_this_daemon_or_the_next() {
    let mut world = World::new();
    let first = created(&world);
    kill(first.pid.unwrap());
    let second = served_anew(&world, first.pid);
    // With nobody there to see it.
    world.kill_daemon();
    kill(second.pid.unwrap());
    world.start_daemon();
    let third = served_anew(&world, second.pid);
    assert!(third.last_exit.is_some());
    world.ok::<Value>("DELETE", EXPORT, &Value::Null);
    assert!(!world.path("nbd.sock").exists());
    let (status, _) = world.refused("GET", EXPORT, &Value::Null);
    assert_eq!(status, 404);
}

/// The daemon dies at each point of the commit of an export that stands for a VM's disk: both are
/// bound to one image, and it is the one that the monitor uses.
#[test]
fn both_bindings_move_or_none() {
    for point in [
        "after-destination-named",
        "before-commit",
        "after-commit-before-reply",
        "after-commit-reply",
    ] {
        let mut world = World::new();
        world.create("");
        let request = json!({
            "name": "data", "source": "web1/root", "vhost_user": world.text("vhost.sock"),
        });
        let _: Export = world.ok("POST", "/v1/exports", &request);
        world.kill_daemon();
        world.start_daemon_that_dies(Some(point));
        let begin = "/v1/vms/data/disks/root/migrate";
        let _ = world.raw("POST", begin, br#"{"to":"fast"}"#.to_vec());
        world.wait_for_crash();
        world.start_daemon();
        let jobs = soon(|| {
            let jobs: Vec<Job> = world.ok("GET", "/v1/jobs", &Value::Null);
            jobs.iter()
                .all(|job| job.status.phase.is_final())
                .then_some(jobs)
        })
        .unwrap();
        let moved = jobs.iter().any(|job| job.status.phase == Phase::Completed);
        let expected = world.text(match moved {
            true => "fast/web1-root.raw",
            false => "slow/web1-root.raw",
        });
        assert_eq!(export(&world).disk.image, expected, "{point}");
        assert_eq!(world.vm("web1").disks[0].image, expected, "{point}");
        // It can be moved all the same.
        if !moved {
            let job: Job = world.ok("POST", begin, &json!({ "to": "fast" }));
            assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
            assert_eq!(
                world.vm("web1").disks[0].image,
                world.text("fast/web1-root.raw")
            );
        }
    }
}
