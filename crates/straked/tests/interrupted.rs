//! Jobs whose VM ends before them: kept, taken up again, given up.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use std::os::unix::fs::FileExt;

use common::{MIGRATE, World, kill, soon};
use serde_json::{Value, json};
use strake_api::job::Phase;
use strake_api::rest::{Job, VmState};

const KEPT: &str = ".web1-root.raw.job-1.strake-kept";

/// What the fake monitor shows of a job that it has taken up again.
const AGAIN: u64 = 2222;

/// `web1` runs, with something on its disk, and copies it.
fn copying(cmdline: &str) -> (World, Job) {
    let world = World::new();
    world.create(&format!("job=hold job=keep {cmdline}"));
    world.start("web1");
    world.tell("web1", "write 4096 before");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    assert!(world.files("slow").iter().any(|name| name == KEPT));
    (world, job)
}

fn interrupted(world: &World, job: &Job) {
    let job = world.wait_for_phase(job, Phase::Interrupted);
    let why = job.status.failure.unwrap();
    assert_eq!(why.id(), "host.job-without-monitor");
    let files = world.files("fast");
    assert_eq!(files, [".web1-root.raw.strake-journal", "web1-root.raw"]);
    let bound = &world.vm("web1").disks[0];
    assert_eq!(bound.image, world.text("slow/web1-root.raw"));
}

fn completes(world: &World, job: &Job) {
    assert_eq!(
        world.wait_for_phase(job, Phase::Copying).status.throughput,
        AGAIN
    );
    world.tell("web1", "go");
    let job = world.wait_for_job(job);
    assert_eq!(job.status.phase, Phase::Completed, "{job:?}");
    assert_eq!(world.files("fast"), ["web1-root.raw"]);
    assert_eq!(world.files("slow"), ["web1-root.raw"]);
    let mut bytes = [0; 6];
    let file = std::fs::File::open(world.path("fast/web1-root.raw")).unwrap();
    file.read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(&bytes, b"before");
}

/// The job has failed, and nothing of it is left.
fn given_up(world: &World, job: &Job) {
    let job = world.wait_for_job(job);
    assert_eq!(job.status.phase, Phase::Failed, "{job:?}");
    let why = job.status.failure.unwrap();
    assert!(why.find("host.job-not-taken-up").is_some(), "{why:#?}");
    let clean = || world.files("fast").is_empty() && world.files("slow") == ["web1-root.raw"];
    assert!(
        soon(|| clean().then_some(())).is_some(),
        "{:?}",
        world.files("slow")
    );
    assert_eq!(world.vm("web1").state, VmState::Running);
    // The disk is free.
    let again = world.migrate("fast");
    world.wait_for_phase(&again, Phase::Copying);
}

#[test]
fn a_job_outlives_the_end_of_its_vm() {
    let (world, job) = copying("");
    world.stop_by_force("web1");
    interrupted(&world, &job);
    // Meanwhile the disk is taken, and nobody can do anything with the job but cancel it.
    for what in ["pause", "resume", "set"] {
        let path = format!("/v1/jobs/job-1/{what}");
        let (status, seen) = world.refused("POST", &path, &json!({}));
        assert_eq!(status, 409);
        assert!(seen.text().contains("interrupted"), "{seen}");
    }
    world.start("web1");
    completes(&world, &job);
}

#[test]
fn a_job_outlives_the_death_of_its_monitor_again_and_again() {
    let (world, job) = copying("");
    for _ in 0..2 {
        world.tell("web1", "crash");
        world.wait_for("web1", VmState::Failed);
        interrupted(&world, &job);
        world.start("web1");
        assert_eq!(
            world.wait_for_phase(&job, Phase::Copying).status.throughput,
            AGAIN
        );
    }
    completes(&world, &job);
}

#[test]
fn a_job_outlives_the_reset_of_its_guest() {
    let (world, job) = copying("");
    world.tell("web1", "reset");
    let again = soon(|| (world.job(&job).status.throughput == AGAIN).then_some(()));
    assert!(again.is_some(), "{:?}", world.job(&job));
    world.wait_for("web1", VmState::Running);
    completes(&world, &job);
}

#[test]
fn a_job_outlives_the_host() {
    let (mut world, job) = copying("");
    let pid = world.vm("web1").pid.unwrap();
    world.kill_daemon();
    kill(pid);
    world.start_daemon();
    world.wait_for("web1", VmState::Failed);
    interrupted(&world, &job);
    world.start("web1");
    completes(&world, &job);
}

#[test]
fn a_daemon_that_dies_while_it_takes_a_job_up_leaves_it_interrupted() {
    let (mut world, job) = copying("");
    world.stop_by_force("web1");
    interrupted(&world, &job);
    world.kill_daemon();
    world.start_daemon_that_dies(Some("after-job-taken-up"));
    world.dying("POST", "/v1/vms/web1/start", &Value::Null);
    world.start_daemon();
    interrupted(&world, &job);
    world.start("web1");
    completes(&world, &job);
}

#[test]
fn a_source_that_somebody_changed_is_not_believed() {
    let (world, job) = copying("");
    world.stop_by_force("web1");
    interrupted(&world, &job);
    let source = world.path("slow/web1-root.raw");
    let file = std::fs::File::options().write(true).open(source).unwrap();
    file.write_all_at(b"other!", 8192).unwrap();
    world.start("web1");
    given_up(&world, &job);
}

#[test]
fn files_that_are_gone_or_replaced_and_monitors_that_refuse_give_the_job_up() {
    for name in [
        "fast/web1-root.raw",
        "fast/.web1-root.raw.strake-journal",
        &format!("slow/{KEPT}"),
    ] {
        let (world, job) = copying("");
        world.stop_by_force("web1");
        interrupted(&world, &job);
        std::fs::remove_file(world.path(name)).unwrap();
        world.start("web1");
        given_up(&world, &job);
    }
    let (world, job) = copying("job=refuse-again");
    world.stop_by_force("web1");
    interrupted(&world, &job);
    world.start("web1");
    given_up(&world, &job);
}

#[test]
fn a_job_that_has_kept_nothing_fails_with_its_vm() {
    let world = World::new();
    world.create("job=hold");
    world.start("web1");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    world.tell("web1", "crash");
    let job = world.wait_for_job(&job);
    assert_eq!(job.status.phase, Phase::Failed);
    assert!(world.files("fast").is_empty());
    assert_eq!(world.files("slow"), ["web1-root.raw"]);
}

#[test]
fn an_interrupted_job_can_be_cancelled_and_goes_with_its_vm() {
    let (world, job) = copying("");
    world.stop_by_force("web1");
    interrupted(&world, &job);
    let ended: Job = world.ok("POST", "/v1/jobs/job-1/cancel", &Value::Null);
    assert_eq!(ended.status.phase, Phase::Cancelled);
    assert!(ended.status.failure.is_none(), "{ended:?}");
    assert!(world.files("fast").is_empty());
    assert_eq!(world.files("slow"), ["web1-root.raw"]);
    world.start("web1");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    world.stop_by_force("web1");
    world.wait_for_phase(&job, Phase::Interrupted);
    let (status, seen) = world.refused("POST", MIGRATE, &json!({ "to": "fast" }));
    assert_eq!(status, 409, "{seen}");
    let (status, _) = world
        .raw("DELETE", "/v1/vms/web1?disks=keep", Vec::new())
        .unwrap();
    assert_eq!(status, 204);
    assert!(world.files("fast").is_empty());
    assert_eq!(world.files("slow"), ["web1-root.raw"]);
    assert_eq!(world.job(&job).status.phase, Phase::Cancelled);
}
