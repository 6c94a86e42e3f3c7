//! The daemon goes and comes back while VMs run.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use common::{World, kill, monitors, signal, small_state, soon};
use rustix::process::Signal;
use serde_json::Value;
use strake_api::control::ExitReason;
use strake_api::rest::{Vm, VmState};

#[test]
fn a_killed_daemon_finds_its_vms_again() {
    let mut world = World::new();
    world.create("");
    let before = world.start("web1");
    for _ in 0..3 {
        world.restart_daemon();
        let after = world.vm("web1");
        assert_eq!((after.state, after.pid), (VmState::Running, before.pid));
    }
    assert_eq!(world.tell("web1", "hello"), "did hello\n");
    let (status, _) = world.refused("POST", "/v1/vms/web1/start", &Value::Null);
    assert_eq!(status, 409);
    let stopped: Vm = world.ok("POST", "/v1/vms/web1/stop", &Value::Null);
    assert_eq!(stopped.state, VmState::Stopped);
    assert!(monitors(&world.path("run")).is_empty());
}

#[test]
fn a_daemon_that_is_asked_to_end_leaves_the_vms_alone() {
    let mut world = World::new();
    world.create("deaf");
    let before = world.start("web1");
    let mut daemon = world.daemon.take().unwrap();
    std::thread::scope(|scope| {
        // A request that would wait for a minute does not hold up the end.
        scope.spawn(|| world.raw("POST", "/v1/vms/web1/stop", Vec::new()));
        assert!(soon(|| (world.vm("web1").state == VmState::Stopping).then_some(())).is_some());
        let pid = rustix::process::Pid::from_child(&daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = soon(|| daemon.try_wait().unwrap()).unwrap();
        assert!(status.success());
    });
    world.start_daemon();
    let after = world.vm("web1");
    assert_eq!((after.state, after.pid), (VmState::Running, before.pid));
}

#[test]
fn what_the_guest_did_meanwhile_is_learnt() {
    let mut world = World::new();
    world.create("");
    world.start("web1");
    world.tell("web1", "poweroff-when-alone");
    world.restart_daemon();
    let vm = world.wait_for("web1", VmState::Stopped);
    assert_eq!(vm.last_exit, Some(ExitReason::GuestPowerOff));
    assert!(monitors(&world.path("run")).is_empty());
}

#[test]
fn a_monitor_that_died_meanwhile_is_told() {
    let mut world = World::new();
    world.create("");
    world.start("web1");
    let pid = world.vm("web1").pid.unwrap();
    world.kill_daemon();
    kill(pid);
    world.start_daemon();
    let vm = world.wait_for("web1", VmState::Failed);
    let Some(ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert_eq!(seen.id(), "host.monitor-died");
    assert!(seen.text().contains("while no daemon ran"), "{seen}");
    assert_eq!(world.start("web1").state, VmState::Running);
}

#[test]
fn a_monitor_that_lives_but_cannot_be_reached_is_not_doubled() {
    let mut world = World::new();
    world.create("");
    let pid = world.start("web1").pid.unwrap();
    world.kill_daemon();
    std::fs::remove_file(world.path("run/vms/web1/control.sock")).unwrap();
    world.start_daemon();
    let vm = world.vm("web1");
    assert_eq!(vm.state, VmState::Failed);
    let Some(ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert_eq!(seen.id(), "host.monitor-unreachable");
    let (status, seen) = world.refused("POST", "/v1/vms/web1/start", &Value::Null);
    assert_eq!(status, 409, "{seen}");
    assert!(seen.find("host.monitor-unreachable").is_some(), "{seen}");
    let (status, _) = world.refused("DELETE", "/v1/vms/web1", &Value::Null);
    assert_eq!(status, 409);
    kill(pid);
    assert!(soon(|| monitors(&world.path("run")).is_empty().then_some(())).is_some());
    assert_eq!(world.start("web1").state, VmState::Running);
}

#[test]
fn a_daemon_that_dies_while_it_starts_a_vm_leaves_no_second_monitor() {
    for (at, runs) in [
        ("before-spawn", false),
        ("after-spawn", false),
        ("after-configure", false),
        ("after-start", true),
    ] {
        let mut world = World::new();
        world.create("");
        world.kill_daemon();
        world.start_daemon_that_dies(Some(at));
        world.dying("POST", "/v1/vms/web1/start", &Value::Null);
        world.start_daemon();
        let vm = world.vm("web1");
        if runs {
            assert_eq!(vm.state, VmState::Running, "{at}");
            assert_eq!(monitors(&world.path("run")), [vm.pid.unwrap()], "{at}");
            continue;
        }
        assert_eq!(vm.state, VmState::Failed, "{at}");
        let gone = soon(|| monitors(&world.path("run")).is_empty().then_some(()));
        assert!(gone.is_some(), "{at}: {}", world.log());
        assert_eq!(world.start("web1").state, VmState::Running, "{at}");
    }
}

#[test]
fn a_monitor_that_is_slow_to_say_hello_is_found_later() {
    let mut world = World::new();
    world.create("");
    let pid = world.start("web1").pid.unwrap();
    world.kill_daemon();
    signal(pid, Signal::STOP);
    world.start_daemon();
    let vm = world.vm("web1");
    assert_eq!(vm.state, VmState::Failed);
    let Some(ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert_eq!(seen.id(), "host.monitor-unreachable");
    signal(pid, Signal::CONT);
    let vm = world.wait_for("web1", VmState::Running);
    assert_eq!((vm.pid, vm.last_exit), (Some(pid), None));
    assert_eq!(world.tell("web1", "hello"), "did hello\n");
}

#[test]
fn a_monitor_that_cannot_be_reached_can_be_stopped_by_force() {
    let mut world = World::new();
    world.create("");
    let pid = world.start("web1").pid.unwrap();
    world.kill_daemon();
    std::fs::remove_file(world.path("run/vms/web1/control.sock")).unwrap();
    world.start_daemon();
    assert_eq!(world.vm("web1").state, VmState::Failed);
    let (_, seen) = world.refused("POST", "/v1/vms/web1/stop", &Value::Null);
    let why = seen.find("host.wrong-state").unwrap();
    assert!(why.remedy().contains("--force"), "{why}");
    let stopped = std::thread::scope(|scope| {
        let stop = scope.spawn(|| world.stop_by_force("web1"));
        // It is asked first, in vain; here the test ends it sooner than the daemon's patience.
        assert!(soon(|| (world.vm("web1").state == VmState::Stopping).then_some(())).is_some());
        kill(pid);
        stop.join().unwrap()
    });
    assert!(matches!(stopped.state, VmState::Failed | VmState::Stopped));
    assert!(monitors(&world.path("run")).is_empty());
    assert_eq!(world.start("web1").state, VmState::Running);
}

#[test]
fn a_reset_survives_the_daemon_that_heard_of_it() {
    for at in ["after-exit-recorded", "before-restart"] {
        let mut world = World::new();
        world.create("");
        let before = world.start("web1").pid.unwrap();
        world.kill_daemon();
        world.start_daemon_that_dies(Some(at));
        world.tell("web1", "reset");
        world.wait_for_crash();
        world.start_daemon();
        let vm = world.wait_for("web1", VmState::Running);
        assert_ne!(vm.pid, Some(before), "{at}");
        assert_eq!(monitors(&world.path("run")), [vm.pid.unwrap()], "{at}");
        assert_eq!(world.tell("web1", "hello"), "did hello\n");
    }
}

#[test]
fn a_power_off_survives_the_daemon_that_heard_of_it() {
    let mut world = World::new();
    world.create("");
    world.start("web1");
    world.kill_daemon();
    world.start_daemon_that_dies(Some("after-exit-recorded"));
    world.tell("web1", "poweroff");
    world.wait_for_crash();
    world.start_daemon();
    let gone = soon(|| monitors(&world.path("run")).is_empty().then_some(()));
    assert!(gone.is_some(), "{}", world.log());
    let vm = world.wait_for("web1", VmState::Stopped);
    assert_eq!(vm.last_exit, Some(ExitReason::GuestPowerOff));
    let started = soon(|| {
        let answer = world.raw("POST", "/v1/vms/web1/start", Vec::new());
        answer.filter(|(status, _)| *status == 200)
    });
    assert!(started.is_some(), "{}", world.log());
}

#[test]
fn a_guest_that_runs_is_not_ended_because_that_cannot_be_recorded() {
    let Some((_state, mut world)) = small_state() else {
        return;
    };
    let filler = world.path("state/filler");
    // The monitor fills the file system in the moment in which it starts its guest.
    world.create(&format!("fill={}", filler.display()));
    let vm = world.start("web1");
    assert_eq!(vm.state, VmState::Running, "{}", world.log());
    let pid = vm.pid.unwrap();
    assert_eq!(world.tell("web1", "hello"), "did hello\n");
    std::fs::remove_file(filler).unwrap();
    let recorded = "strake_host::daemon::supervise";
    assert!(world.log().contains(recorded) || world.log().contains("inventory"));
    // Recorded by and by, and found by the next daemon.
    std::thread::sleep(std::time::Duration::from_secs(3));
    world.restart_daemon();
    let vm = world.vm("web1");
    assert_eq!((vm.state, vm.pid), (VmState::Running, Some(pid)));
}

#[test]
fn a_monitor_that_does_not_say_whether_its_guest_runs_is_asked_again() {
    let world = World::new();
    world.create("start=silent");
    let (status, seen) = world.refused("POST", "/v1/vms/web1/start", &Value::Null);
    assert_eq!((status, seen.id()), (504, "host.start-unclear"), "{seen}");
    let pid = monitors(&world.path("run"));
    let vm = world.wait_for("web1", VmState::Running);
    assert_eq!(pid, [vm.pid.unwrap()]);
    assert_eq!(world.tell("web1", "hello"), "did hello\n");
}

#[test]
fn a_connection_that_is_lost_is_made_again() {
    let world = World::new();
    world.create("");
    let pid = world.start("web1").pid;
    // Somebody else connects: the monitor serves the newest, and the daemon comes back.
    for times in 1..4 {
        common::steal_connection(&world);
        let again = || {
            world
                .log()
                .matches("connected to the monitor again")
                .count()
        };
        assert!(soon(|| (again() == times).then_some(())).is_some());
        assert_eq!(world.vm("web1").pid, pid);
    }
    assert_eq!(world.tell("web1", "hello"), "did hello\n");
}

/// A file of a store that takes long to go: locked, and waited for.
fn locked(path: &std::path::Path) -> std::fs::File {
    let file = std::fs::File::create(path).unwrap();
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    file
}

#[test]
fn neither_daemon_nor_guest_waits_for_files_to_go() {
    let mut world = World::new();
    world.create("");
    let before = world.start("web1").pid.unwrap();
    world.kill_daemon();
    world.start_daemon_that_dies(Some("after-job-reserved"));
    world.dying(
        "POST",
        common::MIGRATE,
        &serde_json::json!({ "to": "fast" }),
    );
    let _one = locked(&world.path("fast/.web1-root.raw.strake-new"));
    let _other = locked(&world.path("fast/.web1-root.raw.strake-journal"));
    world.start_daemon();
    let job = || {
        let mut jobs: Vec<strake_api::rest::Job> = world.ok("GET", "/v1/jobs", &Value::Null);
        jobs.pop().unwrap()
    };
    assert!(!job().status.phase.is_final());
    assert_eq!(world.vm("web1").state, VmState::Running);
    world.tell("web1", "reset");
    let again = soon(|| world.vm("web1").pid.filter(|pid| *pid != before));
    assert!(again.is_some(), "{}", world.log());
    assert!(!job().status.phase.is_final());
    assert_eq!(world.wait_for("web1", VmState::Running).pid, again);
    let ended = soon(|| job().status.phase.is_final().then_some(()));
    assert!(ended.is_some(), "{:?}", job());
    let job = world.wait_for_job(&job());
    assert_eq!(job.status.phase, strake_api::job::Phase::Failed);
    assert_eq!(world.vm("web1").pid, again);
}
