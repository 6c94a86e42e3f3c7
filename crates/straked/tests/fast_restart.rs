//! A guest that moves into a new monitor, and what becomes of it when somebody dies on the way.
//!
//! Whatever happens: there is at most one monitor that runs the guest, the inventory names it, and
//! what the guest flushed is there.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use common::{World, kill, monitors, soon};
use serde_json::{Value, json};
use strake_api::control::ExitReason;
use strake_api::rest::{Job, Restarted, Vm, VmState};

const RESTART: &str = "/v1/vms/web1/restart";

fn fast() -> Value {
    json!({ "fast": true })
}

fn restart(world: &World) -> Restarted {
    world.ok("POST", RESTART, &fast())
}

/// One monitor is left, which is the one that is shown, and its guest does what it is told.
#[track_caller]
fn is_whole(world: &World, context: &str) -> Vm {
    let vm = world.wait_for("web1", VmState::Running);
    let alone = soon(|| Some(monitors(&world.path("run"))).filter(|found| found.len() == 1));
    let alone = alone.unwrap_or_else(|| {
        panic!(
            "{context}: {:?}\n{}",
            monitors(&world.path("run")),
            world.log()
        )
    });
    assert_eq!(alone.first().copied(), vm.pid, "{context}");
    let said = world.tell("web1", "write 8192 after!");
    assert!(said.contains("did write"), "{context}: {said}");
    let image = std::fs::read(&vm.disks[0].image).unwrap();
    assert_eq!(&image[8192..8198], b"after!", "{context}");
    assert_eq!(&image[4096..4102], b"before", "{context}");
    for name in ["control-next.sock", "observations.next"] {
        let left = world.path("run/vms/web1").join(name);
        assert!(!left.exists(), "{context}: {name} is left");
    }
    vm
}

fn running(cmdline: &str) -> World {
    let mut world = World::new();
    world.create(cmdline);
    world.start("web1");
    world.tell("web1", "write 4096 before");
    world.kill_daemon();
    world.start_daemon();
    world
}

#[test]
fn a_guest_moves_again_and_again_and_a_later_daemon_finds_it() {
    let mut world = running("");
    let mut pid = world.vm("web1").pid;
    for _ in 0..3 {
        let moved = restart(&world);
        assert_eq!(moved.old_pid, pid);
        assert_ne!(moved.vm.pid, pid);
        assert_eq!(moved.pause_us, Some(7));
        assert_eq!(moved.new_version.as_deref(), Some("fake"));
        pid = moved.vm.pid;
        is_whole(&world, "moved");
    }
    world.kill_daemon();
    world.start_daemon();
    assert_eq!(is_whole(&world, "found").pid, pid);
    world.stop_by_force("web1");
    assert!(soon(|| monitors(&world.path("run")).is_empty().then_some(())).is_some());
}

#[test]
fn what_refuses_or_dies_leaves_the_guest_where_it_was() {
    for cmdline in ["keeps-its-guest", "refuse-guest", "die-at-receive"] {
        let world = running(cmdline);
        let pid = world.vm("web1").pid;
        let (_, seen) = world.refused("POST", RESTART, &fast());
        assert_eq!(seen.id(), "host.handover-failed", "{cmdline}: {seen}");
        assert_eq!(is_whole(&world, cmdline).pid, pid);
    }
}

/// What the monitor that has the guest saw last is known, whether it is the successor or one whose
/// handover was called off.
#[test]
fn what_a_killed_monitor_saw_last_is_known_after_a_handover() {
    for (cmdline, moves) in [("", true), ("refuse-guest", false)] {
        let world = running(cmdline);
        if moves {
            restart(&world);
        } else {
            world.refused("POST", RESTART, &fast());
        }
        world.tell("web1", "see-and-die");
        let vm = world.wait_for("web1", VmState::Failed);
        let Some(ExitReason::Failed(seen)) = vm.last_exit else {
            panic!("{vm:?}");
        };
        let last = seen.find("fake.staged").unwrap();
        assert!(last.text().contains("in the last moment"), "{seen:#?}");
    }
}

#[test]
fn a_predecessor_that_dies_before_it_gave_its_guest_away_has_failed() {
    let world = running("die-at-hand-over");
    let (_, seen) = world.refused("POST", RESTART, &fast());
    assert_eq!(seen.id(), "host.handover-failed", "{seen}");
    world.wait_for("web1", VmState::Failed);
    assert!(soon(|| monitors(&world.path("run")).is_empty().then_some(())).is_some());
    world.start("web1");
    is_whole(&world, "started again");
}

#[test]
fn a_successor_that_dies_when_it_has_the_guest_has_failed() {
    let world = running("die-at-take-over");
    let (_, seen) = world.refused("POST", RESTART, &fast());
    assert_eq!(seen.id(), "host.take-over-unclear", "{seen}");
    world.wait_for("web1", VmState::Failed);
    assert!(soon(|| monitors(&world.path("run")).is_empty().then_some(())).is_some());
}

#[test]
fn a_vm_that_does_not_run_and_one_with_a_job_are_refused() {
    let world = World::new();
    let mut world = world;
    world.create("job=hold");
    let (_, seen) = world.refused("POST", RESTART, &fast());
    assert!(seen.find("host.wrong-state").is_some(), "{seen}");
    world.start("web1");
    let job: Job = world.migrate("fast");
    let (_, seen) = world.refused("POST", RESTART, &fast());
    let why = seen.find("host.handover-meets-jobs").unwrap();
    assert!(why.text().contains(&job.status.job.to_string()), "{why}");
    world.kill_daemon();
    world.start_daemon();
}

/// What becomes of the monitors while there is no daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dies {
    Nobody,
    First,
    Second,
}

const POINTS: &[&str] = &[
    "before-successor",
    "after-successor-spawned",
    "after-successor-built",
    "after-handed-over",
    "before-handover-commit",
    "after-handover-commit",
    "after-take-over",
    "after-socket-renamed",
    "before-handover-end",
];

#[test]
fn a_daemon_that_dies_anywhere_leaves_one_that_runs() {
    for at in POINTS {
        for dies in [Dies::Nobody, Dies::First, Dies::Second] {
            let context = format!("{at}, {dies:?}");
            let mut world = World::new();
            world.create("");
            let first = world.start("web1").pid.unwrap();
            world.tell("web1", "write 4096 before");
            world.kill_daemon();
            world.start_daemon_that_dies(Some(at));
            world.dying("POST", RESTART, &fast());
            let second = monitors(&world.path("run"))
                .into_iter()
                .find(|pid| *pid != first);
            match (dies, second) {
                (Dies::First, _) => kill(first),
                (Dies::Second, Some(second)) => kill(second),
                _ => {}
            }
            world.start_daemon();
            // Who had the guest when the daemon died.
            let committed = POINTS.iter().position(|point| point == at)
                >= POINTS
                    .iter()
                    .position(|point| *point == "after-handover-commit");
            let lost = match dies {
                Dies::Nobody => false,
                Dies::First => !committed,
                Dies::Second => committed,
            };
            if lost {
                world.wait_for("web1", VmState::Failed);
                let gone = soon(|| monitors(&world.path("run")).is_empty().then_some(()));
                assert!(gone.is_some(), "{context}: {}", world.log());
                world.start("web1");
            }
            let vm = is_whole(&world, &context);
            if !lost {
                let expected = if committed { second } else { Some(first) };
                assert_eq!(vm.pid, expected, "{context}");
            }
            // The next one works.
            let moved = restart(&world);
            assert_ne!(moved.vm.pid, vm.pid);
            is_whole(&world, &context);
            world.stop_by_force("web1");
        }
    }
}

#[test]
fn without_fast_the_guest_is_started_again() {
    let world = running("");
    let pid = world.vm("web1").pid;
    let restarted: Restarted = world.ok("POST", RESTART, &json!({}));
    assert_eq!(restarted.old_pid, pid);
    assert_eq!(restarted.pause_us, None);
    assert_eq!(is_whole(&world, "started again").pid, restarted.vm.pid);
}
