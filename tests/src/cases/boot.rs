//! Guests boot and find their devices.

use std::process::Command;
use std::time::Duration;

use crate::check;
use crate::failure::{Failure, Outcome};
use crate::guest::Guest;
use crate::host::Host;
use crate::place;
use crate::process::{self, Running};
use crate::runner::Test;
use crate::vm::{BOOT, Shape, Vm};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "boots-with-1-vcpu",
        run: boots_with_1,
    },
    Test {
        name: "boots-with-4-vcpus",
        run: boots_with_4,
    },
    Test {
        name: "virtio-console-works",
        run: virtio_console_works,
    },
    Test {
        name: "boots-debian-from-its-own-disk",
        run: boots_debian,
    },
];

const QUICK: Duration = Duration::from_secs(60);

fn boots_with_1(name: &str) -> Outcome {
    boots(name, 1)
}

fn boots_with_4(name: &str) -> Outcome {
    boots(name, 4)
}

fn boots(name: &str, cpus: u8) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(
        &mut host,
        Shape {
            cpus,
            ..Shape::default()
        },
    )?;
    let guest = vm.guest();
    let seen = guest.sh("nproc", QUICK)?;
    check!(
        seen == cpus.to_string(),
        "the guest sees {seen} vCPUs instead of {cpus}"
    );
    network_works(guest, 1)?;
    disk_works(guest)?;
    let random = guest.sh("head -c 8 /dev/hwrng | wc -c", QUICK)?;
    check!(random == "8", "the entropy device gave {random} bytes");
    let console = host.strake(&["logs", &vm.name])?.good()?;
    check!(
        console.contains("guest: ready"),
        "`strake logs` lacks the guest's words: {console}"
    );
    vm.shut_down(&host)
}

fn network_works(guest: Guest, number: u8) -> Outcome {
    let address = guest.address.to_string();
    process::sh(&["busybox", "ping", "-c", "2", "-W", "10", &address])?;
    guest.sh(&format!("busybox ping -c 2 -W 10 10.77.{number}.1"), QUICK)?;
    // Larger than any packet or ring: segmentation, mergeable buffers, many descriptors.
    let megabyte = guest.sh(
        "head -c 1048576 /dev/zero | tr '\\0' 'x'",
        Duration::from_secs(60),
    )?;
    check!(
        megabyte.len() == 1 << 20,
        "{} bytes of a MiB arrived",
        megabyte.len()
    );
    check!(
        megabyte.bytes().all(|byte| byte == b'x'),
        "the network changed bytes"
    );
    Ok(())
}

fn disk_works(guest: Guest) -> Outcome {
    let size = guest.sh("cat /sys/block/vda/size", QUICK)?;
    check!(
        size == "131072",
        "the guest sees a disk of {size} sectors instead of 64 MiB"
    );
    let sums = guest.sh(
        "dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null
         dd if=/tmp/data of=/dev/vda bs=64k seek=100 conv=fsync 2>/dev/null
         echo 3 >/proc/sys/vm/drop_caches
         dd if=/dev/vda bs=64k skip=100 count=32 2>/dev/null | sha256sum
         sha256sum </tmp/data",
        Duration::from_secs(60),
    )?;
    let mut lines = sums.lines();
    check!(
        lines.next() == lines.next(),
        "what was read from the disk is not what was written:\n{sums}"
    );
    // Discard and write-zeroes reach the image: the blocks read as zeroes.
    guest.sh("blkdiscard -o 6553600 -l 1048576 /dev/vda", QUICK)?;
    let rest = guest.sh(
        "echo 3 >/proc/sys/vm/drop_caches
         dd if=/dev/vda bs=64k skip=100 count=16 2>/dev/null | tr -d '\\0' | wc -c",
        QUICK,
    )?;
    check!(rest == "0", "{rest} bytes were left after a discard");
    Ok(())
}

/// Both consoles speak to the log; what is typed goes to the one that the spec names.
fn virtio_console_works(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let shape = Shape {
        disk: "",
        nic: false,
        ..Shape::default()
    };
    let mut vm = Vm::new("vm", 1, shape);
    vm.boot_with(format!(
        "from = \"kernel\"\nkernel = \"{}\"\ninitrd = \"{}\"\n\
         cmdline = \"console=ttyS0 console=hvc0 quiet panic=-1\"\n",
        place::kernel(),
        place::initrd()
    ));
    let file = host.folder().join("vm.toml");
    std::fs::write(&file, format!("console = \"virtio\"\n{}", vm.spec()))?;
    host.strake(&["create", "vm", "-f", &file.display().to_string()])?
        .good()?;
    vm.start(&mut host)?;
    // The shell runs on the last console that the command line names.
    vm.wait_for_console(&host, "Enter 'help'", BOOT)?;
    let mut terminal = Command::new("sh");
    terminal.args([
        "-c",
        "echo 'echo typed-$((40+2)) on $(tty); echo serial-$((40+3)) >/dev/ttyS0' \
         | strake console vm",
    ]);
    for (key, value) in host.command().get_envs() {
        terminal.env(key, value.unwrap_or_default());
    }
    let terminal = Running::start(&mut terminal)?;
    vm.wait_for_console(&host, "typed-42 on /dev/hvc0", QUICK)?;
    vm.wait_for_console(&host, "serial-43", QUICK)?;
    vm.shut_down(&host)?;
    let said = terminal.wait(QUICK)?.good()?;
    check!(
        said.contains("typed-42") && said.contains("serial-43"),
        "the terminal lacks what the consoles said: {said}"
    );
    Ok(())
}

fn boots_debian(name: &str) -> Outcome {
    let image = place::debian().ok_or_else(|| {
        Failure::new("there is no Debian image: xtask attaches it as /dev/disks/debian")
    })?;
    let mut host = Host::start(name)?;
    let mut vm = Vm::new(
        "debian",
        1,
        Shape {
            cpus: 1,
            memory: "512M",
            disk: "whole",
            image: Some(image.canonicalize()?.display().to_string()),
            ..Shape::default()
        },
    );
    vm.boot_with(format!(
        "from = \"disk\"\ncmdline = \"console=ttyS0 quiet systemd.show_status=no strake.ip={}/24\"\n",
        vm.guest().address
    ));
    vm.create(&host)?;
    vm.start(&mut host)?;
    // A minute of an idle processor's time; on a busy machine the emulator has had an eighth of one.
    vm.wait_for_console(&host, "debian: ready", Duration::from_secs(700))?;
    let guest = vm.guest();
    let seen = guest.sh(
        "cat /proc/1/comm; uname -r; findmnt -no SOURCE,FSTYPE /",
        QUICK,
    )?;
    check!(
        seen.starts_with("systemd"),
        "the first process is not systemd: {seen}"
    );
    check!(
        seen.contains("ext4"),
        "the root is not the image's file system: {seen}"
    );
    network_works(guest, 1)?;
    // systemd-logind sees the power button and ends the guest in order.
    vm.shut_down(&host)
}
