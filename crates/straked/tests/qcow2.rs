//! Disks that are qcow2, with everything below them: created, started, migrated, refused.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use common::images::{check, content, qemu_img, word};
use common::{DISK, MIGRATE, World};
use serde_json::{Value, json};
use strake_api::image::ImageFormat;
use strake_api::job::Phase;
use strake_api::rest::{Job, Vm};

fn body(world: &World, name: &str, disk: &Value) -> Value {
    let mut body = world.vm_body(name, "");
    body["spec"]["disk"] = json!([disk]);
    body
}

/// A raw base of 1 MiB with an overlay, both in `slow`.
fn chain(world: &World) -> String {
    let base = world.text("slow/base.raw");
    let mut bytes = vec![0; 1 << 20];
    bytes[4096..4102].copy_from_slice(b"before");
    std::fs::write(&base, bytes).unwrap();
    let top = world.text("slow/top.qcow2");
    qemu_img(&[
        "create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &top, "1M",
    ]);
    top
}

fn migrate(world: &World, to: &str, format: Option<&str>) -> Job {
    let mut body = json!({ "to": to, "remove_source": true });
    if let Some(format) = format {
        body["format"] = json!(format);
    }
    let job: Job = world.ok("POST", MIGRATE, &body);
    let job = world.wait_for_job(&job);
    assert_eq!(job.status.phase, Phase::Completed, "{job:?}");
    job
}

#[test]
fn a_new_disk_is_qcow2_if_its_spec_or_its_name_says_so() {
    let world = World::new();
    for (name, file, format, expected) in [
        ("a", "slow:a.qcow2", None, ImageFormat::Qcow2),
        ("b", "slow:b.img", Some("qcow2"), ImageFormat::Qcow2),
        ("c", "slow:c.qcow2", Some("raw"), ImageFormat::Raw),
        ("d", "slow:d.img", None, ImageFormat::Raw),
    ] {
        let mut disk = json!({ "name": "root", "image": file, "size": DISK });
        if let Some(format) = format {
            disk["format"] = json!(format);
        }
        let vm: Vm = world.ok("POST", "/v1/vms", &body(&world, name, &disk));
        assert_eq!(
            (vm.disks[0].format, vm.disks[0].size_bytes),
            (expected, DISK)
        );
        if expected == ImageFormat::Qcow2 {
            check(&vm.disks[0].image);
        }
        world.start(name);
        world.tell(name, "write 4096 before");
        let image = &vm.disks[0].image;
        assert_eq!(word(&world, image, expected.name(), 4096), "before");
    }
}

#[test]
fn a_disk_reads_through_its_chain_and_moves_to_any_format() {
    let world = World::new();
    let top = chain(&world);
    let disk = json!({ "name": "root", "image": "slow:top.qcow2" });
    let vm: Vm = world.ok("POST", "/v1/vms", &body(&world, "web1", &disk));
    assert_eq!(vm.disks[0].size_bytes, 1 << 20);
    let before = std::fs::read(world.path("slow/base.raw")).unwrap();
    world.start("web1");
    world.tell("web1", "write 8192 after!");
    let expected = content(&world, &top, "qcow2");
    assert_eq!(&expected[4096..4102], b"before");
    assert_eq!(&expected[8192..8198], b"after!");
    // The base is nobody's to write, and nobody's to remove.
    let same = json!({ "name": "root", "image": "slow:base.raw" });
    let (status, seen) = world.refused("POST", "/v1/vms", &body(&world, "web2", &same));
    assert_eq!(status, 409, "{seen}");
    assert!(seen.find("host.image-in-use").is_some(), "{seen}");
    // Flattened, to qcow2 as it was; then to raw; and within a datastore to qcow2 again.
    for (to, format, image) in [
        ("fast", None, "fast/top.qcow2"),
        ("slow", Some("raw"), "slow/top.raw"),
        ("slow", Some("qcow2"), "slow/top.qcow2"),
    ] {
        let job = migrate(&world, to, format);
        let image = world.text(image);
        assert_eq!(job.destination, image);
        let now = world.vm("web1").disks.remove(0);
        assert_eq!((&now.image, now.format), (&image, job.format));
        assert_eq!(content(&world, &image, job.format.name()), expected);
        if job.format == ImageFormat::Qcow2 {
            check(&image);
            assert!(!qemu_img(&["info", "-U", &image]).contains("backing file"));
        }
    }
    assert_eq!(world.files("fast"), [""; 0]);
    assert_eq!(world.files("slow"), ["base.raw", "top.qcow2"]);
    assert_eq!(std::fs::read(world.path("slow/base.raw")).unwrap(), before);
    let (_, seen) = world.refused("POST", MIGRATE, &json!({ "to": "slow" }));
    assert!(seen.find("host.same-datastore").is_some(), "{seen}");
    world.stop_by_force("web1");
    world.start("web1");
    world.tell("web1", "write 8192 again!");
    assert_eq!(
        word(&world, &world.text("slow/top.qcow2"), "qcow2", 8192),
        "again!"
    );
}

#[test]
fn chains_that_lead_elsewhere_and_formats_that_lie_are_refused() {
    let world = World::new();
    chain(&world);
    let outside = world.text("secret.raw");
    std::fs::write(&outside, vec![0; 1 << 20]).unwrap();
    let odd = world.text("slow/odd.qcow2");
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &outside, "-F", "raw", &odd,
    ]);
    let padded = std::fs::File::options().write(true).open(&odd).unwrap();
    padded.set_len(256 * 1024).unwrap();
    for (image, format, why) in [
        ("slow:odd.qcow2", "qcow2", "qcow2.outside-of-datastores"),
        ("slow:base.raw", "qcow2", "qcow2.not-qcow2"),
    ] {
        let disk = json!({ "name": "root", "image": image, "format": format });
        let (status, seen) = world.refused("POST", "/v1/vms", &body(&world, "web1", &disk));
        assert_eq!(status, 422, "{seen}");
        assert!(seen.find("host.chain-refused").is_some(), "{seen}");
        assert!(seen.find(why).is_some(), "{seen}");
    }
    // A raw disk is never looked into: the guest may write what it likes to it.
    let disk = json!({ "name": "root", "image": "slow:odd.qcow2", "format": "raw" });
    let size = std::fs::metadata(&odd).unwrap().len();
    let _: Vm = world.ok("POST", "/v1/vms", &body(&world, "web1", &disk));
    world.start("web1");
    assert_eq!(world.vm("web1").disks[0].size_bytes, size);
    // A base that went missing is told at the start.
    let disk = json!({ "name": "root", "image": "slow:top.qcow2" });
    let _: Vm = world.ok("POST", "/v1/vms", &body(&world, "web2", &disk));
    std::fs::remove_file(world.path("slow/base.raw")).unwrap();
    let (_, seen) = world.refused("POST", "/v1/vms/web2/start", &Value::Null);
    assert!(seen.find("qcow2.backing-missing").is_some(), "{seen}");
}
