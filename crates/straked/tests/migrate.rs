//! Disk migrations: commit, failure, cancelling, refusals.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use std::os::unix::fs::FileExt;

use common::{DISK, MIGRATE, World, soon};
use serde_json::{Value, json};
use strake_api::job::{Latency, Phase, Progress};
use strake_api::rest::{Job, VmState};

/// `web1` runs, with something on its disk.
fn running(cmdline: &str) -> World {
    let world = World::new();
    world.create(cmdline);
    world.start("web1");
    world.tell("web1", "write 4096 before");
    world
}

fn reads(world: &World, path: &str, at: u64) -> String {
    let mut bytes = [0; 6];
    let file = std::fs::File::open(world.path(path)).unwrap();
    file.read_exact_at(&mut bytes, at).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The disk is where it was, nothing is left of the job, and the next attempt works.
fn stays_on_source(world: &World, job: &Job) -> Job {
    let job = world.wait_for_job(job);
    let vm = world.vm("web1");
    assert_eq!(vm.disks[0].image, world.text("slow/web1-root.raw"));
    assert_eq!(vm.disks[0].datastore.as_deref(), Some("slow"));
    assert_eq!(reads(world, "slow/web1-root.raw", 4096), "before");
    if world.path("fast").exists() {
        assert!(world.files("fast").is_empty(), "{:?}", world.files("fast"));
    }
    job
}

#[test]
fn a_disk_moves_and_stays_moved() {
    let world = running("");
    let revision = world.vm("web1").revision;
    let job = world.migrate("fast");
    assert_eq!(job.destination, world.text("fast/web1-root.raw"));
    assert_eq!(job.source, world.text("slow/web1-root.raw"));
    let job = world.wait_for_job(&job);
    assert_eq!(job.status.phase, Phase::Completed, "{job:?}");
    assert_eq!(job.status.passes.len(), 1);
    let vm = world.vm("web1");
    assert!(vm.revision > revision);
    assert_eq!(vm.disks[0].image, world.text("fast/web1-root.raw"));
    assert_eq!(vm.disks[0].datastore.as_deref(), Some("fast"));
    assert_eq!(vm.disks[0].size_bytes, DISK);
    // The source was not to be removed; the journal is gone.
    assert_eq!(world.files("slow"), ["web1-root.raw"]);
    assert_eq!(world.files("fast"), ["web1-root.raw"]);
    // The guest goes on at the destination, and so does the next start.
    world.tell("web1", "write 8192 after!");
    assert_eq!(reads(&world, "fast/web1-root.raw", 4096), "before");
    assert_eq!(reads(&world, "fast/web1-root.raw", 8192), "after!");
    assert_ne!(reads(&world, "slow/web1-root.raw", 8192), "after!");
    world.stop_by_force("web1");
    world.start("web1");
    world.tell("web1", "write 8192 again!");
    assert_eq!(reads(&world, "fast/web1-root.raw", 8192), "again!");
    // Back again is refused as long as the old file is in the way.
    let (status, seen) = world.refused("POST", MIGRATE, &json!({ "to": "slow" }));
    assert_eq!(status, 409);
    assert!(seen.find("host.destination-exists").is_some(), "{seen}");
    std::fs::remove_file(world.path("slow/web1-root.raw")).unwrap();
    let body = json!({ "to": "slow", "remove_source": true });
    let job: Job = world.ok("POST", MIGRATE, &body);
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
    assert!(world.files("fast").is_empty());
    assert_eq!(reads(&world, "slow/web1-root.raw", 8192), "again!");
    let jobs: Vec<Job> = world.ok("GET", "/v1/jobs", &Value::Null);
    assert_eq!(jobs.len(), 2);
}

#[test]
fn a_job_that_fails_says_why_and_leaves_the_source() {
    let world = running("job=fail");
    let job = world.migrate("fast");
    let job = stays_on_source(&world, &job);
    assert_eq!(job.status.phase, Phase::Failed);
    let seen = job.status.failure.unwrap();
    assert_eq!(seen.id(), "host.migration-failed");
    assert!(seen.find("fake.staged").is_some(), "{seen:#?}");
    assert_eq!(world.vm("web1").state, VmState::Running);
    let (status, _) = world.refused("POST", "/v1/jobs/job-1/cancel", &Value::Null);
    assert_eq!(status, 409);
}

#[test]
fn a_failed_system_call_in_the_monitor_reaches_the_client_whole() {
    let world = running("job=eio");
    let job = world.migrate("fast");
    let job = stays_on_source(&world, &job);
    let seen = job.status.failure.unwrap();
    assert_eq!(seen.id(), "host.migration-failed");
    assert_eq!(seen.record().emitter.process, "straked");
    let call = seen.find("os.call-failed").unwrap();
    assert!(call.record().emitter.process.contains("web1"), "{call:?}");
    assert_eq!(call.datum("errno").unwrap(), 5);
    for part in ["pwrite", "offset 8192", "EIO"] {
        assert!(call.text().contains(part), "{call}");
    }
    assert!(!call.remedy().is_empty());
}

#[test]
fn a_job_can_be_paused_resumed_and_limited_while_it_copies() {
    let world = running("job=hold");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    let asked = |what: &str, body: &Value| -> Job {
        world.ok("POST", &format!("/v1/jobs/job-1/{what}"), body)
    };
    let paused = asked("pause", &Value::Null);
    assert_eq!(paused.status.progress, Progress::Paused);
    assert_eq!(asked("resume", &Value::Null).status.progress, Progress::On);
    // What is not named stays.
    let set = asked(
        "set",
        &json!({ "bytes_per_second": { "at": 4711 }, "pause_ms": 50 }),
    );
    assert_eq!(set.status.throughput, 4711);
    let set = asked(
        "set",
        &json!({ "iops": { "at": 9 }, "latency": { "us": 700 } }),
    );
    let limits = &set.limits;
    assert_eq!((limits.bytes_per_second, limits.pause_ms), (Some(4711), 50));
    assert_eq!((limits.iops, limits.latency), (Some(9), Latency::Us(700)));
    for wrong in [
        json!({ "bytes_per_second": { "at": 0 } }),
        json!({ "iops": { "at": 0 } }),
        json!({ "latency": { "us": 0 } }),
        json!({ "pause_ms": 0 }),
        json!({ "method": "mirror" }),
    ] {
        let (status, seen) = world.refused("POST", "/v1/jobs/job-1/set", &wrong);
        assert_eq!(status, 400, "{seen}");
    }
    world.tell("web1", "go");
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
    for what in ["pause", "resume", "set"] {
        let (status, _) = world.refused("POST", &format!("/v1/jobs/job-1/{what}"), &json!({}));
        assert_eq!(status, 409, "{what}");
    }
}

#[test]
fn a_thick_destination_has_its_space_from_the_start() {
    use std::os::unix::fs::MetadataExt;
    let world = running("job=hold");
    let taken = || {
        std::fs::metadata(world.path("fast/web1-root.raw"))
            .unwrap()
            .blocks()
            * 512
    };
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    assert_eq!(taken(), 0);
    let _: Job = world.ok("POST", "/v1/jobs/job-1/cancel", &Value::Null);
    stays_on_source(&world, &job);
    let body = json!({ "to": "fast", "limits": { "space": "thick" } });
    let job: Job = world.ok("POST", MIGRATE, &body);
    world.wait_for_phase(&job, Phase::Copying);
    assert!(taken() >= DISK, "{}", taken());
    world.tell("web1", "go");
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
    let body = json!({ "to": "slow", "format": "qcow2", "limits": { "space": "thick" } });
    let (status, seen) = world.refused("POST", MIGRATE, &body);
    assert_eq!(status, 400, "{seen}");
}

#[test]
fn a_job_can_be_cancelled_while_it_copies() {
    let world = running("job=hold");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    assert_eq!(
        world.files("fast"),
        [".web1-root.raw.strake-journal", "web1-root.raw"]
    );
    // Meanwhile the disk and both stores are taken.
    let (status, seen) = world.refused("POST", MIGRATE, &json!({ "to": "fast" }));
    assert_eq!(status, 409);
    assert!(
        seen.find("host.disk-busy").is_some() || seen.find("host.destination-exists").is_some(),
        "{seen}"
    );
    let (status, seen) = world.refused("DELETE", "/v1/datastores/fast", &Value::Null);
    assert_eq!(status, 409, "{seen}");
    let mut thief = world.vm_body("thief", "");
    thief["spec"]["disk"][0]["image"] = json!("fast:web1-root.raw");
    let (status, seen) = world.refused("POST", "/v1/vms", &thief);
    assert_eq!(
        (status, seen.find("host.image-in-use").is_some()),
        (409, true),
        "{seen}"
    );
    let _: Job = world.ok("POST", "/v1/jobs/job-1/cancel", &Value::Null);
    let job = stays_on_source(&world, &job);
    assert_eq!(job.status.phase, Phase::Cancelled);
    assert!(job.status.failure.is_none());
    let again = world.migrate("fast");
    world.wait_for_phase(&again, Phase::Copying);
    world.tell("web1", "go");
    assert_eq!(world.wait_for_job(&again).status.phase, Phase::Completed);
}

#[test]
fn refusals_come_before_a_byte_is_copied() {
    let world = running("");
    let migrate = |disk: &str| format!("/v1/vms/web1/disks/{disk}/migrate");
    let none = "/v1/vms/none/disks/root/migrate";
    let limits = |limits: Value| json!({ "to": "fast", "limits": limits });
    std::fs::create_dir(world.path("gone")).unwrap();
    world.add_datastore("gone");
    std::fs::remove_dir(world.path("gone")).unwrap();
    for (path, body, status, id) in [
        (none, json!({ "to": "fast" }), 404, "host.no-such-vm"),
        (
            &*migrate("data"),
            json!({ "to": "fast" }),
            404,
            "host.no-such-disk",
        ),
        (
            MIGRATE,
            json!({ "to": "none" }),
            404,
            "host.no-such-datastore",
        ),
        (MIGRATE, json!({ "to": "slow" }), 409, "host.same-datastore"),
        (
            MIGRATE,
            json!({ "to": "gone" }),
            503,
            "host.datastore-unavailable",
        ),
        (
            MIGRATE,
            limits(json!({ "pause_ms": 0 })),
            400,
            "host.request-refused",
        ),
        (
            MIGRATE,
            limits(json!({ "max_passes": 0 })),
            400,
            "host.request-refused",
        ),
        (
            MIGRATE,
            limits(json!({ "bytes_per_second": 0 })),
            400,
            "host.request-refused",
        ),
    ] {
        let (got, seen) = world.refused("POST", path, &body);
        assert!(seen.find(id).is_some(), "{path} {body}: {seen}");
        assert_eq!(got, status, "{path} {body}: {seen}");
    }
    // Somebody's file is in the way: it stays as it is.
    std::fs::write(world.path("fast/web1-root.raw"), b"precious").unwrap();
    let (status, seen) = world.refused("POST", MIGRATE, &json!({ "to": "fast" }));
    assert_eq!(status, 409, "{seen}");
    assert_eq!(
        std::fs::read(world.path("fast/web1-root.raw")).unwrap(),
        b"precious"
    );
    std::fs::remove_file(world.path("fast/web1-root.raw")).unwrap();
    assert!(world.files("fast").is_empty());
    assert!(
        world
            .ok::<Vec<Job>>("GET", "/v1/jobs", &Value::Null)
            .is_empty()
    );
    world.stop_by_force("web1");
    let (status, seen) = world.refused("POST", MIGRATE, &json!({ "to": "fast" }));
    assert_eq!(status, 409);
    let seen = seen.find("host.wrong-state").unwrap();
    assert!(seen.remedy().contains("start the VM"), "{seen}");
}

#[test]
fn a_monitor_that_refuses_leaves_no_trace() {
    let world = running("job=refuse");
    let (_, seen) = world.refused("POST", MIGRATE, &json!({ "to": "fast" }));
    assert_eq!(seen.id(), "host.migration-refused");
    assert!(seen.find("fake.staged").is_some(), "{seen}");
    assert!(world.files("fast").is_empty());
    assert!(
        world
            .ok::<Vec<Job>>("GET", "/v1/jobs", &Value::Null)
            .is_empty()
    );
}

#[test]
fn a_store_without_room_is_refused() {
    // A file system of 1 MiB; needs the right to mount, so it is skipped where that is missing.
    let world = running("");
    std::fs::create_dir(world.path("small")).unwrap();
    let mounted = rustix_mount(&world.text("small"));
    if !mounted {
        eprintln!("skipped: no right to mount a tmpfs");
        return;
    }
    world.add_datastore("small");
    let (status, seen) = world.refused("POST", MIGRATE, &json!({ "to": "small" }));
    let files = world.files("small");
    let _ = std::process::Command::new("umount")
        .arg(world.path("small"))
        .status();
    assert_eq!(status, 507, "{seen}");
    let seen = seen.find("host.datastore-full").unwrap();
    assert!(seen.text().contains("it has 1M free"), "{seen}");
    assert!(files.is_empty());
}

fn rustix_mount(at: &str) -> bool {
    std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1M", "none", at])
        .status()
        .is_ok_and(|status| status.success())
}

#[test]
fn a_monitor_that_dies_in_a_job_leaves_the_source() {
    for cmdline in ["job=crash", "job=crash-awaiting"] {
        let world = running(cmdline);
        let body = json!({ "to": "fast", "remove_source": true });
        // The monitor dies within the request: whether it accepted cannot be known.
        let job: Job = world.ok("POST", MIGRATE, &body);
        let job = stays_on_source(&world, &job);
        assert_eq!(job.status.phase, Phase::Failed, "{cmdline}");
        let seen = job.status.failure.unwrap();
        assert!(seen.find("host.monitor-died").is_some(), "{seen:#?}");
        assert_eq!(
            world.wait_for("web1", VmState::Failed).state,
            VmState::Failed
        );
        world.start("web1");
    }
}

#[test]
fn a_monitor_that_dies_after_the_commit_leaves_the_destination() {
    let world = running("job=crash-decided");
    let body = json!({ "to": "fast", "remove_source": true });
    let job: Job = world.ok("POST", MIGRATE, &body);
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
    assert_eq!(
        world.wait_for("web1", VmState::Failed).state,
        VmState::Failed
    );
    assert!(world.files("slow").is_empty());
    assert_eq!(world.files("fast"), ["web1-root.raw"]);
    assert_eq!(reads(&world, "fast/web1-root.raw", 4096), "before");
    world.start("web1");
    world.tell("web1", "write 8192 after!");
    assert_eq!(reads(&world, "fast/web1-root.raw", 8192), "after!");
}

#[test]
fn a_monitor_on_the_wrong_image_is_ended() {
    let world = running("job=contrary");
    let job = world.migrate("fast");
    let job = world.wait_for_job(&job);
    // The inventory is the truth: the destination.
    assert_eq!(job.status.phase, Phase::Completed);
    let vm = world.wait_for("web1", VmState::Failed);
    let Some(strake_api::control::ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert!(seen.find("host.binding-split").is_some(), "{seen:#?}");
    assert_eq!(vm.disks[0].image, world.text("fast/web1-root.raw"));
    world.start("web1");
}

#[test]
fn a_destination_that_vanishes_is_not_committed() {
    // The file, then the whole directory.
    for whole in [false, true] {
        let world = running("job=hold");
        let job = world.migrate("fast");
        world.wait_for_phase(&job, Phase::Copying);
        if whole {
            std::fs::remove_dir_all(world.path("fast")).unwrap();
        } else {
            std::fs::remove_file(world.path("fast/web1-root.raw")).unwrap();
        }
        world.tell("web1", "go");
        let job = stays_on_source(&world, &job);
        assert_eq!(job.status.phase, Phase::Failed);
        let vm = world.vm("web1");
        assert_eq!(vm.state, VmState::Running);
        let seen = job.status.failure.unwrap();
        let why = seen.find("host.commit-failed").unwrap();
        assert!(why.find("host.image-refused").is_some(), "{seen:#?}");
        if whole {
            std::fs::create_dir(world.path("fast")).unwrap();
        }
        let again = world.migrate("fast");
        world.wait_for_phase(&again, Phase::Copying);
        world.tell("web1", "go");
        assert_eq!(world.wait_for_job(&again).status.phase, Phase::Completed);
    }
}

#[test]
fn another_file_in_the_destinations_place_is_neither_committed_nor_removed() {
    let world = running("job=hold");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    std::fs::write(world.path("fast/new"), b"precious").unwrap();
    std::fs::rename(world.path("fast/new"), world.path("fast/web1-root.raw")).unwrap();
    world.tell("web1", "go");
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Failed);
    assert_eq!(
        world.vm("web1").disks[0].image,
        world.text("slow/web1-root.raw")
    );
    assert_eq!(
        std::fs::read(world.path("fast/web1-root.raw")).unwrap(),
        b"precious"
    );
}

#[test]
fn a_stop_or_reset_in_a_job_ends_it_on_the_source() {
    for word in ["reset", "poweroff", "force"] {
        let world = running("job=hold");
        let job = world.migrate("fast");
        world.wait_for_phase(&job, Phase::Copying);
        match word {
            "force" => drop(world.stop_by_force("web1")),
            word => drop(world.tell("web1", word)),
        }
        let job = stays_on_source(&world, &job);
        assert_eq!(job.status.phase, Phase::Failed, "{word}");
        if word == "reset" {
            let again = soon(|| Some(world.vm("web1")).filter(|vm| vm.state == VmState::Running));
            assert!(again.is_some());
        }
    }
}

#[test]
fn an_image_outside_of_any_datastore_moves_into_one() {
    let world = World::new();
    std::fs::write(world.path("own.raw"), vec![b'x'; 8192]).unwrap();
    let mut body = world.vm_body("web1", "");
    body["spec"]["disk"][0] =
        json!({ "name": "root", "image": world.path("own.raw"), "read-only": true });
    world.ok::<strake_api::rest::Vm>("POST", "/v1/vms", &body);
    world.start("web1");
    let job = world.migrate("fast");
    assert_eq!(world.wait_for_job(&job).status.phase, Phase::Completed);
    let disk = &world.vm("web1").disks[0];
    assert_eq!(disk.image, world.text("fast/own.raw"));
    assert_eq!(disk.datastore.as_deref(), Some("fast"));
    assert_eq!(reads(&world, "fast/own.raw", 0), "xxxxxx");
    assert!(world.path("own.raw").exists());
}

#[test]
fn an_inventory_without_room_fails_the_job_and_not_the_guest() {
    // A state directory on a file system of its own that can be filled.
    let dir = tempfile::TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2M", "none"])
        .arg(&state)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no right to mount a tmpfs");
        return;
    }
    let _unmount = Unmount(state.clone());
    let world = World::in_directory(dir);
    world.create("job=hold");
    world.start("web1");
    world.tell("web1", "write 4096 before");
    let job = world.migrate("fast");
    world.wait_for_phase(&job, Phase::Copying);
    let filler = state.join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    world.tell("web1", "go");
    // The disk works on its source at once, although the job's end cannot be recorded yet.
    let freed = soon(|| Some(world.files("fast")).filter(Vec::is_empty));
    assert!(freed.is_some(), "{}", world.log());
    world.tell("web1", "write 8192 after!");
    assert_eq!(reads(&world, "slow/web1-root.raw", 8192), "after!");
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    let job = stays_on_source(&world, &job);
    assert_eq!(job.status.phase, Phase::Failed);
    let seen: Vec<strake_observe::Recorded> = world.ok("GET", "/v1/observations", &Value::Null);
    let full = seen
        .iter()
        .find_map(|of| of.observation.find("host.inventory-failed"));
    assert!(full.unwrap().text().contains("full"), "{seen:#?}");
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn the_names_of_a_jobs_files_are_nobodys_image() {
    let world = World::new();
    for name in [".x.raw.strake-new", ".x.raw.strake-journal"] {
        let path = world.path("fast").join(name);
        std::fs::write(&path, vec![0; 8192]).unwrap();
        let link = world.path("link.raw");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for image in [&path, &link] {
            let mut body = world.vm_body("web1", "");
            body["spec"]["disk"][0] = json!({ "name": "root", "image": image });
            let (status, seen) = world.refused("POST", "/v1/vms", &body);
            assert_eq!(status, 422, "{seen}");
            assert!(seen.find("host.image-refused").is_some(), "{seen}");
        }
    }
}
