//! Storage that fills up, goes away or fails in the middle of a migration: the guest stays on its
//! source, the client gets the whole tree, and the next attempt works.
//!
//! Failing devices are made of the kernel's device mapper: a disk whose table is swapped for one
//! with `error` targets.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::check;
use crate::failure::{Failure, Outcome, While};
use crate::host::Host;
use crate::load::{self, Stamps, verify_image};
use crate::place;
use crate::process::{self, Running, sh, wait_until};
use crate::runner::Test;
use crate::vm::{Shape, Vm};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "destination-full-before",
        run: full_before,
    },
    Test {
        name: "destination-fills-up",
        run: fills_up,
    },
    Test {
        name: "destination-removed",
        run: removed,
    },
    Test {
        name: "destination-fails",
        run: destination_fails,
    },
    Test {
        name: "source-fails",
        run: source_fails,
    },
];

const QUICK: Duration = Duration::from_secs(60);

/// A guest under a light load, whose disk has some 48 MiB allocated.
fn loaded(host: &mut Host) -> Outcome<(Vm, Stamps)> {
    let vm = Vm::boot(host, Shape::default())?;
    load::fill(vm.guest(), 48)?;
    let stamps = Stamps::start(vm.guest(), "--rate 50 --no-discard")?;
    Ok((vm, stamps))
}

/// The migration fails with a tree that has these words, and the guest goes on at its source.
fn fails_at_source(
    host: &Host,
    vm: &Vm,
    stamps: &Stamps,
    client: Running,
    source: &Path,
    words: &[&str],
) -> Outcome {
    let said = client.wait(Duration::from_secs(120))?.ended_with(1)?;
    for word in words {
        check!(said.contains(word), "the tree lacks '{word}':\n{said}");
    }
    check!(
        vm.image(host)? == source,
        "the disk moved to {}",
        vm.image(host)?.display()
    );
    check!(
        vm.state(host)? == "running",
        "the VM is {}",
        vm.state(host)?
    );
    stamps.go_on()
}

fn ends_well(host: &Host, vm: &Vm, stamps: Stamps) -> Outcome {
    vm.migrate(host, "b")?;
    stamps.go_on()?;
    stamps.end()?;
    vm.shut_down(host)?;
    verify_image(&vm.image(host)?).map(drop)
}

/// A store without room is refused before a byte is copied.
fn full_before(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let small = place::store("small").join(name);
    host.add_store("small", &small)?;
    fill(&small, 40)?;
    let (vm, stamps) = loaded(&mut host)?;
    let source = vm.image(&host)?;
    let client = vm.migrate_in_background(&host, "small", &[])?;
    fails_at_source(&host, &vm, &stamps, client, &source, &["small", "remedy"])?;
    let left: Vec<_> = fs::read_dir(&small)?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    check!(left == ["filler"], "a refused migration left {left:?}");
    ends_well(&host, &vm, stamps)
}

/// A store that somebody else fills while the copy runs.
fn fills_up(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let small = place::store("small").join(name);
    host.add_store("small", &small)?;
    let vm = Vm::boot(
        &mut host,
        Shape {
            disk: "32M",
            ..Shape::default()
        },
    )?;
    load::fill(vm.guest(), 28)?;
    let stamps = Stamps::start(vm.guest(), "--rate 50 --no-discard")?;
    let source = vm.image(&host)?;
    let client = vm.migrate_in_background(&host, "small", &["--rate", "2M"])?;
    destination_appears(&small)?;
    fill(&small, 64)?;
    fails_at_source(&host, &vm, &stamps, client, &source, &["ENOSPC"])?;
    fs::remove_file(small.join("filler"))?;
    vm.migrate(&host, "small")?;
    ends_well(&host, &vm, stamps)
}

/// The destination's folder is removed while the copy runs.
fn removed(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let (vm, stamps) = loaded(&mut host)?;
    let source = vm.image(&host)?;
    let client = vm.migrate_in_background(&host, "b", &["--rate", "8M"])?;
    destination_appears(&host.store("b"))?;
    fs::remove_dir_all(host.store("b"))?;
    fails_at_source(&host, &vm, &stamps, client, &source, &["remedy"])?;
    fs::create_dir_all(host.store("b"))?;
    ends_well(&host, &vm, stamps)
}

/// The destination's device fails while the copy runs.
fn destination_fails(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let device = Mapped::make(name, 128)?;
    sh(&["mke2fs", "-q", "-t", "ext4", "-m", "0", &device.path()])?;
    let folder = place::at(&format!("/stores/{name}"));
    fs::create_dir_all(&folder)?;
    let _mounted = Mounted::mount(&device.path(), &folder)?;
    host.add_store("failing", &folder.join("store"))?;
    let (vm, stamps) = loaded(&mut host)?;
    let source = vm.image(&host)?;
    let client = vm.migrate_in_background(&host, "failing", &["--rate", "4M"])?;
    destination_appears(&folder.join("store"))?;
    device.fail_from(0)?;
    fails_at_source(&host, &vm, &stamps, client, &source, &["EIO"])?;
    ends_well(&host, &vm, stamps)
}

/// A part of the source's device cannot be read.
fn source_fails(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let device = Mapped::make(name, 64)?;
    let vm = Vm::boot(
        &mut host,
        Shape {
            image: Some(device.path()),
            ..Shape::default()
        },
    )?;
    // The guest's own data keeps clear of what will fail; so must its checkpoints at the disk's end.
    let options = "--rate 50 --limit 16M --no-discard --checkpoint 0";
    let stamps = Stamps::start(vm.guest(), options)?;
    device.fail_from(32)?;
    let client = vm.migrate_in_background(&host, "b", &[])?;
    let source = PathBuf::from(device.path());
    fails_at_source(
        &host,
        &vm,
        &stamps,
        client,
        &source,
        &["EIO", &device.path(), "remedy"],
    )?;
    device.mend()?;
    ends_well(&host, &vm, stamps)
}

fn destination_appears(folder: &Path) -> Outcome {
    wait_until("the copy has begun", QUICK, || {
        Ok(fs::read_dir(folder)?.next().is_some())
    })?;
    std::thread::sleep(Duration::from_millis(500));
    Ok(())
}

/// Takes so many MiB of a folder's file system, or all there is.
fn fill(folder: &Path, mebibytes: u32) -> Outcome {
    let file = folder.join("filler").display().to_string();
    let command = format!("dd if=/dev/zero of={file} bs=1M count={mebibytes} conv=fsync; true");
    sh(&["sh", "-c", &command]).map(drop)
}

/// A block device made by the device mapper over a loop device. Gone when dropped.
#[derive(Debug)]
struct Mapped {
    name: String,
    backing: PathBuf,
    looped: String,
    sectors: u64,
}

impl Mapped {
    fn make(name: &str, mebibytes: u64) -> Outcome<Self> {
        let backing = place::store("a").join(format!("{name}.backing"));
        let file = fs::File::create(&backing)?;
        file.set_len(mebibytes << 20)?;
        let looped = sh(&["losetup", "-f"])?.trim().to_owned();
        sh(&["losetup", &looped, &backing.display().to_string()])?;
        let device = Self {
            name: format!("strake-{name}"),
            backing,
            looped,
            sectors: mebibytes << 11,
        };
        device.dmsetup(&[
            "create",
            &device.name,
            "--table",
            &device.table(device.sectors),
        ])?;
        Ok(device)
    }

    fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    /// All from here on, in MiB, fails.
    fn fail_from(&self, mebibytes: u64) -> Outcome {
        self.swap(&self.table(mebibytes << 11))
    }

    fn mend(&self) -> Outcome {
        self.swap(&self.table(self.sectors))
    }

    fn table(&self, good: u64) -> String {
        let mut table = String::new();
        if good > 0 {
            table.push_str(&format!("0 {good} linear {} 0\n", self.looped));
        }
        if good < self.sectors {
            table.push_str(&format!("{good} {} error\n", self.sectors - good));
        }
        table
    }

    fn swap(&self, table: &str) -> Outcome {
        // Not flushed: what is under way meets the new table, as with a device that dies.
        self.dmsetup(&["suspend", "--noflush", "--nolockfs", &self.name])?;
        self.dmsetup(&["load", &self.name, "--table", table])?;
        self.dmsetup(&["resume", &self.name])
    }

    fn dmsetup(&self, arguments: &[&str]) -> Outcome {
        let (verb, rest) = arguments
            .split_first()
            .ok_or_else(|| Failure::new("no verb"))?;
        // There is no udev in the lab, and none is waited for elsewhere.
        let words = [&["dmsetup", verb, "--noudevsync", "--noudevrules"], rest].concat();
        sh(&words).doing(format!("dmsetup {verb}"))?;
        // Where no udev does, the node under /dev/mapper is made this way.
        sh(&["dmsetup", "mknodes"])?;
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.dmsetup(&["remove", "--force", &self.name]);
        let _ = sh(&["losetup", "-d", &self.looped]);
        let _ = fs::remove_file(&self.backing);
    }
}

/// A mounted file system. Unmounted when dropped.
#[derive(Debug)]
struct Mounted(PathBuf);

impl Mounted {
    fn mount(device: &str, at: &Path) -> Outcome<Self> {
        sh(&["mount", "-t", "ext4", device, &at.display().to_string()])?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let at = self.0.display().to_string();
        let _ = process::sh(&["umount", "-l", &at]);
        let _ = fs::remove_dir(&self.0);
    }
}
