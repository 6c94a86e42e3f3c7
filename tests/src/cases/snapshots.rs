//! Snapshots of disks that guests use, and disks that are chains of images.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::check;
use crate::failure::{Failure, Outcome, While};
use crate::host::Host;
use crate::load::{Stamps, verify_image};
use crate::place;
use crate::process;
use crate::runner::Test;
use crate::vm::{DISK, Shape, Vm};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "snapshots-under-load-and-consolidates",
        run: under_load,
    },
    Test {
        name: "boots-debian-from-a-chain",
        run: boots_from_a_chain,
    },
];

const QUICK: Duration = Duration::from_secs(60);

/// Work on the VM's disk, with `strake disk`.
fn disk(host: &Host, vm: &Vm, command: &str, more: &[&str]) -> Outcome<String> {
    let ran = host
        .in_background(&[&["disk", command, &vm.name, DISK], more].concat())?
        .wait(Duration::from_secs(180))?;
    ran.good()
        .map_err(|failure| vm.with_logs(host, &failure))
        .doing(format!("disk {command}"))
}

fn qemu_img(arguments: &[&str], image: &Path) -> Outcome<String> {
    let ran = process::run(Command::new("qemu-img").args(arguments).arg(image))?;
    ran.good().doing(format!("qemu-img {arguments:?}"))
}

/// A guest stamps its disk without pause while it is covered twice and made one image again; then
/// it goes back to the first snapshot, which is whole.
fn under_load(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(
        &mut host,
        Shape {
            cpus: 2,
            ..Shape::default()
        },
    )?;
    let base = vm.image(&host)?;
    // A part of a cluster that only the image below has is not worth a cluster of zeroes: a discard of
    // it is a hint that is not taken.
    let stamps = Stamps::start(vm.guest(), "--no-hints")?;
    for snapshot in ["one", "two"] {
        disk(&host, &vm, "snapshot", &[snapshot])?;
        stamps.go_on()?;
    }
    let top = vm.image(&host)?;
    check!(
        top.extension().is_some_and(|end| end == "qcow2"),
        "after two snapshots the disk is on {}",
        top.display()
    );
    disk(&host, &vm, "consolidate", &["--all"])?;
    check!(
        vm.image(&host)? == base,
        "after the consolidation the disk is on {}",
        vm.image(&host)?.display()
    );
    stamps.go_on()?;
    disk(&host, &vm, "snapshot", &["three"])?;
    stamps.go_on()?;
    stamps.end()?;
    vm.shut_down(&host)?;
    // Of the snapshot every sector is of the load's own, of one instant or another of it.
    verify_image(&base)?;
    let top = vm.image(&host)?;
    qemu_img(&["check", "-f", "qcow2"], &top)?;
    let flat = host.folder().join("flat.raw");
    let to = flat.display().to_string();
    let from = top.display().to_string();
    process::sh(&[
        "qemu-img", "convert", "-f", "qcow2", "-O", "raw", &from, &to,
    ])?;
    verify_image(&flat)?;
    disk(&host, &vm, "delete-snapshot", &["three"])?;
    disk(&host, &vm, "consolidate", &[])?;
    check!(vm.image(&host)? == base, "the disk is not one image again");
    process::sh(&[
        "qemu-img",
        "compare",
        "-f",
        "raw",
        "-F",
        "raw",
        &to,
        &base.display().to_string(),
    ])?;
    vm.start(&mut host)?;
    vm.wait_for_guest(&host)?;
    vm.force_off(&host)
}

/// The kernel is found through two overlays, the guest writes to the upper one, and a snapshot of the
/// root file system is one that the guest comes up from.
fn boots_from_a_chain(name: &str) -> Outcome {
    let image = place::debian().ok_or_else(|| {
        Failure::new("there is no Debian image: xtask attaches it as /dev/disks/debian")
    })?;
    let base = image.canonicalize()?;
    let mut host = Host::start(name)?;
    // Only what is in a datastore may be below an image.
    let folder = base.parent().unwrap_or(Path::new("/dev"));
    host.strake(&["datastore", "add", "devices", &folder.display().to_string()])?
        .good()?;
    let store = host.store("a");
    let (middle, top) = (store.join("middle.qcow2"), store.join("top.qcow2"));
    let below = base.display().to_string();
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &below],
        &middle,
    )?;
    qemu_img(
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "middle.qcow2",
        ],
        &top,
    )?;
    let mut vm = Vm::new(
        "debian",
        1,
        Shape {
            memory: "512M",
            disk: "whole",
            image: Some("a:top.qcow2".to_owned()),
            ..Shape::default()
        },
    );
    vm.boot_with(format!(
        "from = \"disk\"\ncmdline = \"console=ttyS0 quiet systemd.show_status=no strake.ip={}/24\"\n",
        vm.guest().address
    ));
    vm.create(&host)?;
    vm.start(&mut host)?;
    vm.wait_for_console(&host, "debian: ready", Duration::from_secs(700))?;
    let guest = vm.guest();
    guest.sh("echo before >/root/word; sync", QUICK)?;
    disk(&host, &vm, "snapshot", &["ready"])?;
    guest.sh("echo after >/root/word; sync", QUICK)?;
    vm.shut_down(&host)?;
    qemu_img(&["check", "-f", "qcow2"], &vm.image(&host)?)?;
    disk(&host, &vm, "revert", &["ready"])?;
    vm.start(&mut host)?;
    vm.wait_for_guest(&host)?;
    let word = guest.sh("cat /root/word", QUICK)?;
    check!(
        word.trim() == "before",
        "after the revert the guest reads '{word}'"
    );
    vm.shut_down(&host)
}
