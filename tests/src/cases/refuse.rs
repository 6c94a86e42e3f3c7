//! What cannot be done is refused with a tree that names the thing, and nothing changes.

use std::fs;

use crate::check;
use crate::failure::Outcome;
use crate::host::Host;
use crate::place;
use crate::process::Ran;
use crate::runner::Test;
use crate::vm::{DISK, Shape, Vm};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "refuses-bad-specs",
        run: bad_specs,
    },
    Test {
        name: "refuses-without-kvm",
        run: no_kvm,
    },
    Test {
        name: "refuses-what-is-no-kernel",
        run: no_kernel,
    },
    Test {
        name: "refuses-an-image-in-use",
        run: image_in_use,
    },
];

/// The command failed, its complaints name these things, and say what can be done.
fn refused(ran: Ran, names: &[&str]) -> Outcome<String> {
    let said = ran.ended_with(1)?;
    for name in names {
        check!(
            said.contains(name),
            "the complaint does not name '{name}':\n{said}"
        );
    }
    check!(
        said.contains("remedy:"),
        "the complaint has no remedy:\n{said}"
    );
    Ok(said)
}

fn bad_specs(name: &str) -> Outcome {
    let host = Host::start(name)?;
    let file = host.folder().join("bad.toml");
    let shown = file.display().to_string();
    let good = Vm::new("vm", 1, Shape::default()).spec();
    for (spec, names) in [
        (good.replace("cpus = 1", "cpus = 99"), vec!["cpus", "99"]),
        (
            good.replace("[boot]", "colour = \"red\"\n[boot]"),
            vec!["colour"],
        ),
        (good.replace("256M", "a lot"), vec!["a lot"]),
        (
            good.replace("a:vm-root.raw", "../../etc/shadow"),
            vec!["../../etc/shadow"],
        ),
        (
            good.replace("cpus = 1\n", "cpus = 1\ncpus = 2\n"),
            vec!["duplicate key"],
        ),
    ] {
        fs::write(&file, spec)?;
        let said = refused(host.strake(&["create", "vm", "-f", &shown])?, &names)?;
        check!(
            said.contains(&shown),
            "the complaint does not name the file:\n{said}"
        );
    }
    let left = host.json(&["ps"])?;
    check!(
        left.as_array().is_some_and(Vec::is_empty),
        "a refused VM is there: {left}"
    );
    Ok(())
}

fn no_kvm(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    host.kill_daemon();
    host.start_daemon_with(&["--kvm", "/dev/no-kvm-here"], &[])?;
    let vm = Vm::new("vm", 1, Shape::default());
    vm.create(&host)?;
    refused(
        host.strake(&["start", "vm"])?,
        &["/dev/no-kvm-here", "ENOENT"],
    )?;
    check!(
        vm.state(&host)? == "stopped",
        "a VM without KVM is {}",
        vm.state(&host)?
    );
    Ok(())
}

fn no_kernel(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let fake = host.folder().join("vmlinuz");
    fs::write(&fake, "a kernel in name only\n".repeat(4096))?;
    let fake = fake.display().to_string();
    let mut vm = Vm::new("vm", 1, Shape::default());
    vm.boot_with(format!("from = \"kernel\"\nkernel = \"{fake}\"\n"));
    vm.create(&host)?;
    refused(host.strake(&["start", "vm"])?, &[&fake])?;
    check!(
        vm.state(&host)? == "stopped",
        "a VM without a kernel is {}",
        vm.state(&host)?
    );
    // A disk without anything to boot is refused too.
    let mut empty = Vm::new("empty", 2, Shape::default());
    empty.boot_with("from = \"disk\"\n".to_owned());
    empty.create(&host)?;
    refused(host.strake(&["start", "empty"])?, &[DISK])?;
    // The same VM starts once its kernel is one.
    fs::copy(place::kernel(), &fake)?;
    vm.start(&mut host)?;
    vm.force_off(&host)
}

/// Two VMs never share a writable image, and the lock goes with its holder.
fn image_in_use(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let shape = Shape {
        nic: false,
        ..Shape::default()
    };
    let first = Vm::new("first", 1, shape.clone());
    first.create(&host)?;
    first.start(&mut host)?;
    let image = first.image(&host)?.display().to_string();
    let second = Vm::new(
        "second",
        2,
        Shape {
            image: Some(image.clone()),
            ..shape
        },
    );
    // Refused when it is created or, at the latest, when it would start.
    let file = host.folder().join("second.toml");
    fs::write(&file, second.spec())?;
    let created = host.strake(&["create", "second", "-f", &file.display().to_string()])?;
    if created.status != 0 {
        refused(created, &[&image])?;
    } else {
        refused(host.strake(&["start", "second"])?, &[&image])?;
    }
    // Neither can another host take it: the lock is on the file itself.
    let mut other = Host::start(&format!("{name}-other"))?;
    other.kill_daemon();
    other.start_daemon(&[])?;
    let third = Vm::new(
        "third",
        3,
        Shape {
            image: Some(image.clone()),
            nic: false,
            ..Shape::default()
        },
    );
    let file = other.folder().join("third.toml");
    fs::write(&file, third.spec())?;
    let created = other.strake(&["create", "third", "-f", &file.display().to_string()])?;
    if created.status == 0 {
        refused(other.strake(&["start", "third"])?, &[&image])?;
        first.force_off(&host)?;
        third.start(&mut other)?;
        third.force_off(&other)?;
    } else {
        refused(created, &[&image])?;
        first.force_off(&host)?;
    }
    Ok(())
}
