//! Commits: what is answered stays answered, and only the files that are meant are touched.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{DISK, MIGRATE, World, monitor_log, small_state, soon, steal_connection};
use serde_json::{Value, json};
use strake_api::job::Phase;
use strake_api::rest::{Job, Vm, VmState};

fn running(cmdline: &str) -> World {
    let world = World::new();
    world.create(cmdline);
    world.start("web1");
    world.tell("web1", "write 4096 before");
    world
}

/// How often the monitor heard this decision on the first job.
fn heard(world: &World, committed: bool) -> usize {
    let line = format!("decided job-1 {committed}");
    monitor_log(world).matches(&line).count()
}

#[test]
fn a_question_that_was_refused_is_refused_again() {
    // A refusal that the inventory has no room for: it is remembered all the same, by this daemon
    // and by the one after it.
    for restart in [false, true] {
        let Some((state, mut world)) = small_state() else {
            return;
        };
        world.create("job=hold job=ask-again");
        world.start("web1");
        let job = world.migrate("fast");
        world.wait_for_phase(&job, Phase::Copying);
        let filler = state.fill();
        world.tell("web1", "go");
        assert!(
            soon(|| (heard(&world, false) == 1).then_some(())).is_some(),
            "{}",
            monitor_log(&world)
        );
        std::fs::remove_file(filler).unwrap();
        if restart {
            world.restart_daemon();
        } else {
            steal_connection(&world);
        }
        assert!(soon(|| (heard(&world, false) == 2).then_some(())).is_some());
        assert_eq!(heard(&world, true), 0, "{}", monitor_log(&world));
        let vm = world.vm("web1");
        assert_eq!(vm.disks[0].image, world.text("slow/web1-root.raw"));
    }
}

#[test]
fn a_question_that_was_granted_is_granted_again() {
    let mut world = running("");
    world.kill_daemon();
    world.start_daemon_that_dies(Some("after-commit-before-reply"));
    let body = serde_json::to_vec(&json!({ "to": "fast" })).unwrap();
    let _ = world.raw("POST", MIGRATE, body);
    world.wait_for_crash();
    assert_eq!(heard(&world, true), 0);
    world.start_daemon();
    assert!(soon(|| (heard(&world, true) == 1).then_some(())).is_some());
    let vm = world.vm("web1");
    assert_eq!(vm.disks[0].image, world.text("fast/web1-root.raw"));
}

#[test]
fn a_source_that_is_another_file_by_now_is_not_removed() {
    let world = running("job=hold");
    let body = json!({ "to": "fast", "remove_source": true });
    let job: Job = world.ok("POST", MIGRATE, &body);
    world.wait_for_phase(&job, Phase::Copying);
    // Removed and made again: a file system gives the number of the inode again, as likely as not.
    std::fs::remove_file(world.path("slow/web1-root.raw")).unwrap();
    std::fs::write(world.path("slow/web1-root.raw"), b"precious").unwrap();
    world.tell("web1", "go");
    let job = world.wait_for_job(&job);
    assert_eq!(job.status.phase, Phase::Completed);
    assert_eq!(
        std::fs::read(world.path("slow/web1-root.raw")).unwrap(),
        b"precious"
    );
    let seen: Vec<strake_observe::Recorded> = world.ok("GET", "/v1/observations", &Value::Null);
    let told = seen
        .iter()
        .any(|seen| seen.observation.find("host.not-removed").is_some());
    assert!(told, "{seen:#?}");
}

#[test]
fn a_source_that_was_exchanged_before_is_not_migrated() {
    let world = running("");
    std::fs::rename(world.path("slow/web1-root.raw"), world.path("slow/kept")).unwrap();
    let other = vec![b'x'; usize::try_from(DISK).unwrap()];
    std::fs::write(world.path("slow/web1-root.raw"), other).unwrap();
    let (status, seen) = world.refused("POST", MIGRATE, &json!({ "to": "fast" }));
    assert_eq!(status, 422, "{seen}");
    let why = seen.find("host.image-refused").unwrap();
    assert!(why.text().contains("taken its place"), "{seen}");
    assert!(world.files("fast").is_empty());
    // With the image back in its place it moves.
    std::fs::rename(world.path("slow/kept"), world.path("slow/web1-root.raw")).unwrap();
    let job = world.migrate("fast");
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
}

#[test]
fn a_destination_that_was_made_again_is_not_committed() {
    let world = running("job=hold");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    let path = world.path("fast/web1-root.raw");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, vec![0; usize::try_from(DISK).unwrap()]).unwrap();
    world.tell("web1", "go");
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Failed);
    assert!(path.exists());
    let vm = world.vm("web1");
    assert_eq!(vm.disks[0].image, world.text("slow/web1-root.raw"));
}

#[test]
fn somebodys_empty_file_is_not_taken_for_the_destination() {
    let mut world = running("");
    world.kill_daemon();
    world.start_daemon_that_dies(Some("after-job-reserved"));
    world.dying("POST", MIGRATE, &json!({ "to": "fast" }));
    let theirs = world.path("fast/web1-root.raw");
    std::fs::File::create(&theirs)
        .unwrap()
        .set_len(DISK)
        .unwrap();
    world.start_daemon();
    let jobs = || world.ok::<Vec<Job>>("GET", "/v1/jobs", &Value::Null);
    let ended = soon(|| {
        let jobs = jobs();
        jobs.iter()
            .all(|job| job.status.phase.is_final())
            .then_some(())
    });
    assert!(ended.is_some(), "{:?}", jobs());
    assert!(theirs.exists());
    let (_, seen) = world.refused("POST", MIGRATE, &json!({ "to": "fast" }));
    assert!(seen.find("host.destination-exists").is_some(), "{seen}");
    assert_eq!(world.files("fast"), ["web1-root.raw"]);
}

#[test]
fn a_disk_is_as_large_as_it_runs() {
    let world = running("");
    let image = std::fs::OpenOptions::new()
        .write(true)
        .open(world.path("slow/web1-root.raw"))
        .unwrap();
    image.set_len(2 * DISK).unwrap();
    let job = world.migrate("fast");
    let job = world.wait_for_job(&job);
    assert_eq!(job.status.phase, Phase::Completed);
    assert_eq!(job.status.size_bytes, DISK);
    let moved = std::fs::metadata(world.path("fast/web1-root.raw")).unwrap();
    assert_eq!(moved.len(), DISK);
}

#[test]
fn a_question_is_answered_while_another_migration_begins() {
    let world = World::new();
    let mut body = world.vm_body("web1", "job=hold accept-late");
    let disk =
        |name: &str| json!({ "name": name, "image": format!("slow:{name}.raw"), "size": DISK });
    body["spec"]["disk"] = json!([disk("a"), disk("b"), disk("c")]);
    let _: Vm = world.ok("POST", "/v1/vms", &body);
    world.start("web1");
    let migrate = |disk: &str| format!("/v1/vms/web1/disks/{disk}/migrate");
    let to = json!({ "to": "fast" });
    let a: Job = world.ok("POST", &migrate("a"), &to);
    let b: Job = world.ok("POST", &migrate("b"), &to);
    world.wait_for_phase(&a, Phase::Copying);
    world.wait_for_phase(&b, Phase::Copying);
    std::thread::scope(|scope| {
        // The monitor takes its time to accept this one.
        let c = scope.spawn(|| world.ok::<Job>("POST", &migrate("c"), &to));
        assert!(soon(|| world.path("fast/c.raw").exists().then_some(())).is_some());
        // The end of one job, which has to wait for that, then the question of another.
        let id = &b.status.job;
        let _: Job = world.ok("POST", &format!("/v1/jobs/{id}/cancel"), &Value::Null);
        world.tell("web1", "go");
        let began = Instant::now();
        let image = || world.vm("web1").disks[0].image.clone();
        let moved = soon(|| (image() == world.text("fast/a.raw")).then_some(()));
        assert!(moved.is_some(), "{}", world.log());
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(!c.is_finished());
        world.tell("web1", "accept");
        c.join().unwrap();
    });
    assert_eq!(world.wait_for_job(&a).status.phase, Phase::Completed);
    assert_eq!(world.wait_for_job(&b).status.phase, Phase::Cancelled);
    assert_eq!(world.vm("web1").state, VmState::Running);
    let mut bytes = [0; 1];
    let file = std::fs::File::open(world.path("fast/a.raw")).unwrap();
    file.read_exact_at(&mut bytes, 0).unwrap();
}

#[test]
fn a_stop_by_force_does_not_wait_for_a_migration_to_begin() {
    let world = World::new();
    let mut body = world.vm_body("web1", "job=hold accept-late");
    let disk =
        |name: &str| json!({ "name": name, "image": format!("slow:{name}.raw"), "size": DISK });
    body["spec"]["disk"] = json!([disk("a"), disk("b"), disk("c")]);
    let _: Vm = world.ok("POST", "/v1/vms", &body);
    world.start("web1");
    let migrate = |disk: &str| format!("/v1/vms/web1/disks/{disk}/migrate");
    let to = serde_json::to_vec(&json!({ "to": "fast" })).unwrap();
    std::thread::scope(|scope| {
        let begun = ["a", "b", "c"].map(|disk| {
            let (path, to) = (migrate(disk), to.clone());
            let world = &world;
            let begin = scope.spawn(move || world.raw("POST", &path, to));
            assert!(
                soon(|| (world.path(&format!("fast/{disk}.raw")).exists()).then_some(())).is_some()
            );
            begin
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(!begun[2].is_finished());
        let began = Instant::now();
        assert_eq!(world.stop_by_force("web1").state, VmState::Stopped);
        assert!(began.elapsed() < Duration::from_secs(15));
    });
    let jobs = || world.ok::<Vec<Job>>("GET", "/v1/jobs", &Value::Null);
    let ended = soon(|| {
        let ended = jobs().iter().all(|job| job.status.phase.is_final());
        ended.then_some(())
    });
    assert!(ended.is_some(), "{:?}", jobs());
    assert!(world.files("fast").is_empty(), "{:?}", world.files("fast"));
}
