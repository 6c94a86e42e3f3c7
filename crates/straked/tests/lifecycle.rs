//! VMs from their creation to their removal, against a real daemon.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use common::{World, monitors, soon};
use serde_json::{Value, json};
use strake_api::control::ExitReason;
use strake_api::rest::{Datastore, HostInfo, Vm, VmState};
use strake_observe::Recorded;

#[test]
fn a_vm_lives_and_leaves_nothing() {
    let world = World::new();
    let created = world.create("");
    assert_eq!((created.state, created.revision), (VmState::Stopped, 1));
    assert_eq!(created.disks[0].image, world.text("slow/web1-root.raw"));
    assert_eq!(created.disks[0].datastore.as_deref(), Some("slow"));
    assert_eq!(created.disks[0].size_bytes, common::DISK);
    let started = world.start("web1");
    assert_eq!(started.state, VmState::Running);
    let pid = started.pid.unwrap();
    assert_eq!(monitors(&world.path("run")), [pid]);
    assert_eq!(world.vm("web1").disks[0].counters.unwrap().reads, 7);
    let info: HostInfo = world.ok("GET", "/v1/host", &Value::Null);
    assert_eq!((info.running, info.vms), (1, 1));
    // What it must not be given: the daemon's inventory, locks, API socket.
    let mut fds = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap();
        fds.push(target.to_str().unwrap().to_owned());
    }
    let leaked =
        |fd: &&String| fd.contains("sqlite") || fd.ends_with("lock") || fd.contains("epoll");
    assert_eq!(fds.iter().find(leaked), None, "{fds:?}");
    // Standard three, listener, connection, kvm, kernel, disk, memory, console log, its observations.
    assert_eq!(fds.len(), 11, "{fds:?}");
    let (status, seen) = world.refused("POST", "/v1/vms/web1/start", &Value::Null);
    assert_eq!(status, 409, "{seen}");
    let (status, _) = world.refused("DELETE", "/v1/vms/web1", &Value::Null);
    assert_eq!(status, 409);
    let stopped: Vm = world.ok("POST", "/v1/vms/web1/stop", &Value::Null);
    assert_eq!(stopped.state, VmState::Stopped);
    assert_eq!(stopped.last_exit, Some(ExitReason::GuestPowerOff));
    assert_eq!(stopped.pid, None);
    assert!(monitors(&world.path("run")).is_empty());
    let (status, _) = world.refused("POST", "/v1/vms/web1/stop", &Value::Null);
    assert_eq!(status, 409);
    world.start("web1");
    assert_eq!(
        world.stop_by_force("web1").last_exit,
        Some(ExitReason::Stopped)
    );
    world.ok::<()>("DELETE", "/v1/vms/web1?disks=delete", &Value::Null);
    assert!(world.files("slow").is_empty());
    assert!(!world.path("state/vms/web1").exists());
    let (status, seen) = world.refused("GET", "/v1/vms/web1", &Value::Null);
    assert_eq!((status, seen.id()), (404, "host.no-such-vm"));
}

#[test]
fn images_stay_unless_they_are_to_go() {
    let world = World::new();
    world.create("");
    world.ok::<()>("DELETE", "/v1/vms/web1", &Value::Null);
    assert_eq!(world.files("slow"), ["web1-root.raw"]);
    // The image is used again; one of another size is not silently another disk.
    world.create("");
    world.ok::<()>("DELETE", "/v1/vms/web1?disks=keep", &Value::Null);
    let mut body = world.vm_body("web1", "");
    body["spec"]["disk"][0]["size"] = json!(4096);
    let (status, seen) = world.refused("POST", "/v1/vms", &body);
    assert_eq!(status, 422);
    assert!(seen.find("host.image-refused").is_some(), "{seen}");
    // An image outside of any datastore that Strake did not create is not Strake's to remove.
    std::fs::write(world.path("own.raw"), vec![1; 8192]).unwrap();
    body["spec"]["disk"][0] = json!({ "name": "root", "image": world.path("own.raw") });
    world.ok::<Vm>("POST", "/v1/vms", &body);
    world.ok::<()>("DELETE", "/v1/vms/web1?disks=delete", &Value::Null);
    assert!(world.path("own.raw").exists());
    let (status, _) = world.refused("DELETE", "/v1/vms/web1?disks=perhaps", &Value::Null);
    assert_eq!(status, 400);
}

#[test]
fn a_vm_that_cannot_be_is_refused_whole() {
    let world = World::new();
    world.create("");
    let disk = |image: &str| json!({ "name": "more", "image": image, "size": 4096 });
    let nic = |tap: &str| json!({ "name": "net0", "tap": tap, "mac": "52:54:00:00:00:01" });
    let mut other = world.vm_body("other", "");
    other["spec"]["nic"] = json!([nic("tap0")]);
    world.ok::<Vm>("POST", "/v1/vms", &other);
    let before = world.files("slow");
    // (what is changed, how, status, observation)
    let cases = [
        ("/name", json!("../x"), 400, "host.bad-name"),
        ("/name", json!("web1"), 409, "host.vm-exists"),
        ("/spec/cpus", json!(17), 422, "api.spec-invalid"),
        (
            "/spec/boot/kernel",
            json!("/no/kernel"),
            422,
            "host.boot-file-refused",
        ),
        (
            "/spec/boot/kernel",
            json!(world.path("slow")),
            422,
            "host.boot-file-refused",
        ),
        (
            "/spec/disk/1",
            disk("none:x.raw"),
            404,
            "host.no-such-datastore",
        ),
        (
            "/spec/disk/1",
            disk("slow:web1-root.raw"),
            422,
            "host.image-refused",
        ),
        (
            "/spec/disk/1",
            disk("slow:web2-root.raw"),
            422,
            "api.spec-invalid",
        ),
        ("/spec/disk/1", disk("slow:../x"), 422, "api.spec-invalid"),
        (
            "/spec/disk/1",
            disk(&world.text("slow")),
            422,
            "host.image-refused",
        ),
        (
            "/spec/disk/1",
            json!({"name": "more", "image": "slow:no"}),
            422,
            "host.image-refused",
        ),
        ("/spec/nic", json!([nic("tap0")]), 409, "host.nic-conflict"),
        ("/spec/nic", json!([nic("no/tap")]), 422, "api.spec-invalid"),
    ];
    for (pointer, value, status, id) in cases {
        let mut body = world.vm_body("web2", "");
        let disks = body["spec"]["disk"].as_array_mut().unwrap();
        disks.push(disk("slow:web2-more.raw"));
        body["spec"]["nic"] = json!([]);
        *body.pointer_mut(pointer).unwrap() = value.clone();
        let (got, seen) = world.refused("POST", "/v1/vms", &body);
        assert!(seen.find(id).is_some(), "{pointer} {value}: {seen}");
        assert_eq!(got, status, "{pointer} {value}: {seen}");
        assert_eq!(
            world.files("slow"),
            before,
            "{pointer} {value} left something"
        );
    }
    let mut shared = world.vm_body("web2", "");
    shared["spec"]["disk"][0]["image"] = json!("slow:web1-root.raw");
    let (status, seen) = world.refused("POST", "/v1/vms", &shared);
    assert_eq!(status, 409);
    assert!(
        seen.find("host.image-in-use")
            .unwrap()
            .text()
            .contains("web1"),
        "{seen}"
    );
    assert_eq!(world.ok::<Vec<Vm>>("GET", "/v1/vms", &Value::Null).len(), 2);
}

#[test]
fn requests_that_are_none_are_told_so() {
    let world = World::new();
    for (method, path, body, status) in [
        ("POST", "/v1/vms", "{", 400),
        ("POST", "/v1/vms", "{\"name\": \"x\"}", 400),
        (
            "POST",
            "/v1/datastores",
            "{\"name\": \"x\", \"path\": \"/\", \"no\": 1}",
            400,
        ),
        ("GET", "/v1/nothing", "", 404),
        ("PUT", "/v1/vms", "", 405),
        ("GET", "/v1/jobs/job-7", "", 404),
        ("GET", "/v1/observations?since=x", "", 400),
        ("GET", "/v1/vms/none/log", "", 404),
        ("POST", "/v1/vms/none/console", "", 426),
    ] {
        let (got, bytes) = world.raw(method, path, body.as_bytes().to_vec()).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(got, status, "{method} {path} {body}: {text}");
        let problem: strake_api::rest::Problem = serde_json::from_str(&text).unwrap();
        assert!(!problem.observation.remedy().is_empty());
    }
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    let world = World::new();
    // (VM, what its monitor is told, part of the tree)
    for (name, cmdline, id) in [
        ("web1", "refuse-configure", "fake.staged"),
        ("web2", "crash-on-start", "host.monitor-died"),
        ("die-1", "", "host.monitor-died"),
        ("old-1", "", "host.monitor-mismatch"),
    ] {
        world.create_named(name, cmdline);
        let path = format!("/v1/vms/{name}/start");
        let (_, seen) = world.refused("POST", &path, &Value::Null);
        assert_eq!(seen.id(), "host.start-failed");
        assert!(seen.find(id).is_some(), "{name}: {seen:#?}");
        assert!(
            seen.find("host.monitor-said").is_some(),
            "{name}: {seen:#?}"
        );
        assert_eq!(world.vm(name).state, VmState::Stopped);
        assert!(monitors(&world.path("run")).is_empty(), "{name}");
        assert!(
            !world
                .path("run/vms")
                .join(name)
                .join("control.sock")
                .exists()
        );
    }
    let seen: Vec<Recorded> = world.ok("GET", "/v1/observations", &Value::Null);
    let failed = seen
        .iter()
        .filter(|of| of.observation.id() == "host.start-failed");
    assert_eq!(failed.count(), 4);
    let last = seen.last().unwrap().seq;
    let path = format!("/v1/observations?since={last}");
    assert!(
        world
            .ok::<Vec<Recorded>>("GET", &path, &Value::Null)
            .is_empty()
    );
}

#[test]
fn files_that_went_missing_or_are_locked_are_told_at_the_start() {
    let world = World::new();
    world.create("");
    let path = world.path("slow/web1-root.raw");
    // Two VMs with one image under two names: the lock sees through it.
    std::fs::hard_link(&path, world.path("slow/other.raw")).unwrap();
    let mut other = world.vm_body("web2", "");
    other["spec"]["disk"][0]["image"] = json!("slow:other.raw");
    world.ok::<Vm>("POST", "/v1/vms", &other);
    world.start("web1");
    let (status, seen) = world.refused("POST", "/v1/vms/web2/start", &Value::Null);
    assert_eq!(status, 409);
    let seen = seen.find("host.image-in-use").unwrap();
    assert!(seen.text().contains("disk 'root' of VM 'web1'"), "{seen}");
    world.stop_by_force("web1");
    world.start("web2");
    world.stop_by_force("web2");
    std::fs::remove_file(&path).unwrap();
    let (status, seen) = world.refused("POST", "/v1/vms/web1/start", &Value::Null);
    assert_eq!(
        (status, seen.find("host.image-refused").is_some()),
        (422, true),
        "{seen}"
    );
    std::fs::remove_file(world.path("kernel")).unwrap();
    let (_, seen) = world.refused("POST", "/v1/vms/web2/start", &Value::Null);
    assert!(seen.find("host.boot-file-refused").is_some(), "{seen}");
}

#[test]
fn a_deaf_guest_keeps_running_until_it_is_forced() {
    let world = World::new();
    world.create("deaf");
    world.start("web1");
    let (status, seen) = world.refused("POST", "/v1/vms/web1/stop", &json!({ "timeout_s": 1 }));
    assert_eq!(status, 504);
    assert!(seen.find("host.stop-timed-out").is_some(), "{seen}");
    assert_eq!(world.vm("web1").state, VmState::Running);
    // A forced stop overtakes one that waits.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| -> Vm { world.ok("POST", "/v1/vms/web1/stop", &Value::Null) });
        assert!(soon(|| (world.vm("web1").state == VmState::Stopping).then_some(())).is_some());
        assert_eq!(world.stop_by_force("web1").state, VmState::Stopped);
        assert_eq!(waiting.join().unwrap().state, VmState::Stopped);
    });
}

#[test]
fn the_guest_ends_in_its_own_ways() {
    let world = World::new();
    world.create("");
    let first = world.start("web1").pid.unwrap();
    world.tell("web1", "reset");
    let again = soon(|| {
        let vm = world.vm("web1");
        (vm.state == VmState::Running && vm.pid != Some(first)).then_some(vm)
    });
    assert_eq!(again.unwrap().last_exit, Some(ExitReason::GuestReset));
    world.tell("web1", "poweroff");
    let vm = world.wait_for("web1", VmState::Stopped);
    assert_eq!(vm.last_exit, Some(ExitReason::GuestPowerOff));
    world.start("web1");
    world.tell("web1", "fail");
    let vm = world.wait_for("web1", VmState::Failed);
    let Some(ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert_eq!(seen.id(), "fake.staged");
    assert_eq!(world.start("web1").state, VmState::Running);
}

#[test]
fn a_monitor_that_dies_is_explained() {
    let world = World::new();
    world.create("");
    world.start("web1");
    world.tell("web1", "observe");
    let noted = soon(|| {
        let seen: Vec<Recorded> = world.ok("GET", "/v1/observations", &Value::Null);
        seen.into_iter()
            .find(|of| of.observation.id() == "fake.staged")
    });
    let emitter = noted.unwrap().observation.record().emitter.clone();
    assert_eq!(emitter.process, "fake-monitor web1");
    world.tell("web1", "crash");
    let vm = world.wait_for("web1", VmState::Failed);
    let Some(ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert_eq!(seen.id(), "host.monitor-died");
    assert!(seen.text().contains("SIGABRT"), "{seen}");
    let said = seen.find("host.monitor-said").unwrap();
    assert!(
        said.text().contains("crashes because a test says so"),
        "{said}"
    );
    assert!(seen.find("fake.staged").is_some(), "{seen:#?}");
    assert_eq!(world.start("web1").state, VmState::Running);
}

#[test]
fn what_a_killed_monitor_saw_last_is_known() {
    let world = World::new();
    world.create("");
    world.start("web1");
    world.tell("web1", "see-and-die");
    let vm = world.wait_for("web1", VmState::Failed);
    let Some(ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert_eq!(seen.id(), "host.monitor-died");
    assert!(seen.text().contains("SIGKILL"), "{seen}");
    let last = seen.find("fake.staged").unwrap();
    assert!(last.text().contains("in the last moment"), "{last}");
    // The next one's death has nothing to do with it.
    world.start("web1");
    world.tell("web1", "crash");
    let vm = world.wait_for("web1", VmState::Failed);
    let Some(ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert!(seen.find("fake.staged").is_none(), "{seen:#?}");
}

#[test]
fn a_monitor_that_breaks_out_of_its_jail_is_told_as_such() {
    let world = World::new();
    world.create("");
    world.start("web1");
    world.tell("web1", "sigsys");
    let vm = world.wait_for("web1", VmState::Failed);
    let Some(ExitReason::Failed(seen)) = vm.last_exit else {
        panic!("{vm:?}");
    };
    assert_eq!(seen.id(), "host.monitor-died");
    assert!(seen.text().contains("SIGSYS"), "{seen}");
    let why = seen.find("host.monitor-broke-out").unwrap();
    assert!(why.remedy().contains("monitor.log"), "{why}");
}

/// A loop device on a file; detached with this.
struct Loop(String);

impl Loop {
    fn on(file: &std::path::Path) -> Option<Self> {
        let made = std::process::Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        match made {
            Ok(output) if output.status.success() => Some(Self(
                String::from_utf8(output.stdout).ok()?.trim().to_owned(),
            )),
            _ => {
                eprintln!("skipped: no right to make a loop device");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
    }
}

#[test]
fn a_block_device_is_a_disk() {
    let world = World::new();
    let file = world.path("backing");
    std::fs::File::create(&file)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let Some(device) = Loop::on(&file) else {
        return;
    };
    let body = |name: &str| {
        let mut body = world.vm_body(name, "");
        body["spec"]["disk"] = json!([{ "name": "root", "image": device.0 }]);
        body
    };
    let vm: Vm = world.ok("POST", "/v1/vms", &body("web1"));
    assert_eq!(vm.disks[0].size_bytes, 1 << 20);
    assert_eq!(vm.disks[0].image, device.0);
    let (status, seen) = world.refused("POST", "/v1/vms", &body("web2"));
    assert_eq!(status, 409, "{seen}");
    world.start("web1");
    // Nobody else gets it while the VM runs: no second user, no mount.
    let again = std::fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc_o_excl())
        .open(&device.0);
    assert_eq!(again.unwrap_err().raw_os_error(), Some(16));
    world.tell("web1", "write 4096 guest!");
    // It moves into a datastore as a file, and the device stays as it is.
    let job: strake_api::rest::Job = world.ok(
        "POST",
        common::MIGRATE,
        &json!({ "to": "fast", "remove_source": true }),
    );
    let job = world.wait_for_job(&job);
    assert_eq!(job.destination, world.text("fast/web1-root.raw"));
    assert_eq!(job.status.phase, strake_api::job::Phase::Completed);
    assert!(std::path::Path::new(&device.0).exists());
    // Somebody has mounted it, or otherwise has it to himself: the start says so.
    let holder = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc_o_excl())
        .open(&device.0)
        .unwrap();
    let _: Vm = world.ok("POST", "/v1/vms", &body("web3"));
    let (status, seen) = world.refused("POST", "/v1/vms/web3/start", &Value::Null);
    assert_eq!(status, 409, "{seen}");
    let why = seen.find("host.image-in-use").unwrap();
    assert!(why.text().contains(&device.0), "{why}");
    drop(holder);
    assert_eq!(world.start("web3").state, VmState::Running);
    world.stop_by_force("web3");
    // And what becomes of the VM, the device stays.
    world.ok::<Value>("DELETE", "/v1/vms/web3?disks=delete", &Value::Null);
    assert!(std::path::Path::new(&device.0).exists());
}

fn libc_o_excl() -> i32 {
    rustix::fs::OFlags::EXCL.bits().cast_signed()
}

#[test]
fn the_console_goes_both_ways_and_its_log_stays() {
    let world = World::new();
    world.create("");
    let (status, seen) = world.refused("POST", "/v1/vms/web1/console", &Value::Null);
    assert_eq!((status, seen.id()), (426, "host.request-refused"));
    world.start("web1");
    let mut one = world.console("web1");
    let mut two = world.console("web1");
    one.write_all(b"hello\n").unwrap();
    for stream in [&mut one, &mut two] {
        let mut said = [0; 10];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"did hello\n");
    }
    drop(one);
    assert_eq!(world.tell("web1", "again"), "did again\n");
    world.stop_by_force("web1");
    // The stream ends with the guest.
    let mut rest = Vec::new();
    two.read_to_end(&mut rest).unwrap();
    let (_, log) = world.raw("GET", "/v1/vms/web1/log", Vec::new()).unwrap();
    assert_eq!(log, b"guest boots\ndid hello\ndid again\n");
    let (_, tail) = world
        .raw("GET", "/v1/vms/web1/log?tail=6", Vec::new())
        .unwrap();
    assert_eq!(tail, b"again\n");
}

#[test]
fn datastores_are_added_shown_and_removed() {
    let world = World::new();
    world.create("");
    std::fs::create_dir(world.path("third")).unwrap();
    world.add_datastore("third");
    for (body, status) in [
        (json!({ "name": "third", "path": world.path("run") }), 409),
        (
            json!({ "name": "fourth", "path": world.path("third") }),
            409,
        ),
        (json!({ "name": "no good", "path": world.path("run") }), 400),
        (json!({ "name": "x", "path": "run" }), 422),
        (json!({ "name": "x", "path": world.path("missing") }), 422),
        (json!({ "name": "x", "path": world.path("kernel") }), 422),
    ] {
        let (got, seen) = world.refused("POST", "/v1/datastores", &body);
        assert_eq!(got, status, "{body}: {seen}");
    }
    let list = || world.ok::<Vec<Datastore>>("GET", "/v1/datastores", &Value::Null);
    let names: Vec<String> = list().into_iter().map(|store| store.name).collect();
    assert_eq!(names, ["fast", "slow", "third"]);
    assert_eq!(list()[1].disks, 1);
    assert!(list()[1].free_bytes.unwrap() > 0);
    std::fs::remove_dir(world.path("third")).unwrap();
    let gone = list().remove(2);
    assert_eq!(gone.problem.unwrap().id(), "host.datastore-unavailable");
    assert_eq!(gone.free_bytes, None);
    world.ok::<()>("DELETE", "/v1/datastores/third", &Value::Null);
    let (status, seen) = world.refused("DELETE", "/v1/datastores/slow", &Value::Null);
    assert_eq!(status, 409);
    assert!(seen.text().contains("disk 'root' of VM 'web1'"), "{seen}");
    let (status, _) = world.refused("DELETE", "/v1/datastores/third", &Value::Null);
    assert_eq!(status, 404);
}

#[test]
fn one_daemon_for_each_directory() {
    let world = World::new();
    let output = world
        .command()
        .stderr(std::process::Stdio::piped())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("another straked (pid "), "{text}");
    assert!(text.contains("remedy: "), "{text}");
    // The one that runs is not disturbed.
    world.create("");
}

#[test]
fn the_socket_is_for_the_owner_and_the_group() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new();
    let mode = |path: &str| {
        let meta = std::fs::metadata(world.path(path)).unwrap();
        meta.permissions().mode() & 0o777
    };
    assert_eq!(mode("run/straked.sock"), 0o660);
    assert_eq!(mode("state/inventory.sqlite"), 0o600);
    assert_eq!(mode("state/vms"), 0o700);
}
