//! Finds the kernel that a disk image boots: what `boot.from = "disk"` means.
//!
//! No firmware and no boot loader of the guest is run. Instead its configuration is read, as the
//! boot loader would read it, and the kernel, initial RAM disk and command line of the default
//! entry are taken. In this order, on each ext2/3/4 file system of the disk, and the first that
//! can be used wins:
//!
//! 1. extlinux (`extlinux.conf`, `syslinux.cfg`);
//! 2. Boot Loader Specification entries (`loader/entries/*.conf`);
//! 3. GRUB (`grub.cfg`), of whose language as much is run as generated files need;
//! 4. `/vmlinuz` and `/initrd.img`;
//! 5. the newest `vmlinuz-*` with its initial RAM disk.
//!
//! An entry without `root=` gets one, made of the identity of the file system that looks like the
//! root.
//!
//! # A hostile disk
//! Everything here was written by a guest. Sizes are bounded before they are allocated (the limits
//! stand beside the code that keeps them), names are resolved with a bounded number of steps, and
//! what a configuration says is only ever used to choose files of the same disk. The file system
//! reader (`ext4-view`) returns errors for damage, but a file system made for it can keep it busy
//! for ever, with an extent tree whose branches all lead to the same leaf. So the search runs on a
//! thread of its own, `boot-disk`, which owns the reader; [`find`] waits for it with a deadline.
//! After the deadline the thread's reads fail; should it still not end, it is left behind, and ends
//! with the process, which has nothing to boot anyway. A panic in it is an observation here.

mod bls;
mod candidate;
mod extlinux;
mod fallback;
mod grub;
mod partitions;
mod reader;
mod version;
mod volume;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use strake_observe::{Observation, OsContext, Result, Task};

use crate::observations::{DiskSearchEnded, NoBootableSystem};

pub use reader::ReadAt;

use candidate::Candidate;
use reader::Disk;
use volume::Volume;

/// How long the search may take. Reading some 100 MiB of kernel and initial RAM disk takes a
/// second; a slow store may need some more.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a disk boots.
#[derive(Clone, PartialEq, Eq)]
pub struct DiskBoot {
    /// The kernel file.
    pub kernel: Vec<u8>,
    /// The initial RAM disk.
    pub initrd: Option<Vec<u8>>,
    /// The command line.
    pub cmdline: String,
    /// Where it was found, for people: the configuration file, the entry and the partition.
    pub entry: String,
}

impl std::fmt::Debug for DiskBoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskBoot")
            .field("kernel", &self.kernel.len())
            .field("initrd", &self.initrd.as_ref().map(Vec::len))
            .field("cmdline", &self.cmdline)
            .field("entry", &self.entry)
            .finish()
    }
}

/// Finds the kernel that the disk boots by default.
///
/// # Errors
/// [`NoBootableSystem`], caused by what was wrong with each partition and entry;
/// [`DiskSearchEnded`] if the disk's structures keep the search busy for too long.
pub fn find(disk: Box<dyn ReadAt>) -> Result<DiskBoot> {
    find_within(disk, DEADLINE)
}

fn find_within(disk: Box<dyn ReadAt>, limit: Duration) -> Result<DiskBoot> {
    let deadline = Instant::now() + limit;
    let (answer, result) = channel();
    std::thread::Builder::new()
        .name("boot-disk".to_owned())
        .spawn(move || {
            let found = search(&Disk::new(disk, deadline));
            // Nobody waits any more after the deadline.
            let _ = answer.send(found);
        })
        .os("start a thread", "boot-disk")?;
    // A search that ends because its reads fail after the deadline still says more than we could.
    match result.recv_timeout(limit + limit / 4) {
        Ok(found) => found,
        Err(RecvTimeoutError::Timeout) => Err(ended("it took too long")),
        Err(RecvTimeoutError::Disconnected) => {
            Err(ended("the disk's file system made its reader panic"))
        }
    }
}

fn ended(how: &str) -> Observation {
    DiskSearchEnded {
        how: how.to_owned(),
    }
    .into()
}

/// The kinds of boot configuration, in the order in which they are tried. Each lists what it would
/// boot from a volume, best first.
const METHODS: &[fn(&Volume, &mut Task) -> Vec<Candidate>] = &[
    extlinux::candidates,
    bls::candidates,
    grub::candidates,
    fallback::links,
    fallback::newest,
];

fn search(disk: &Disk) -> Result<DiskBoot> {
    let mut task = Task::begin("find a kernel on the disk");
    let parts = match partitions::read(disk) {
        Ok(parts) => parts,
        Err(seen) => {
            task.saw(seen);
            return Err(task.fail(NoBootableSystem {
                looked_at: "its partition table cannot be read".to_owned(),
            }));
        }
    };
    let mut looked_at = Vec::new();
    let mut volumes = Vec::new();
    for part in parts {
        let name = part.name();
        match Volume::open(disk, part, &mut task) {
            Ok(volume) => {
                looked_at.push(format!("nothing to boot on {name}"));
                volumes.push(volume);
            }
            Err(seen) => {
                looked_at.push(format!("no ext2/3/4 on {name}"));
                task.saw(seen);
            }
        }
    }
    for volume in &volumes {
        for method in METHODS {
            for candidate in method(volume, &mut task) {
                if let Some(found) = task.attempt(candidate.read(volume, &volumes)) {
                    task.succeed();
                    return Ok(found);
                }
            }
        }
    }
    if looked_at.is_empty() {
        looked_at.push("it is empty".to_owned());
    }
    Err(task.fail(NoBootableSystem {
        looked_at: looked_at.join(", "),
    }))
}

#[cfg(test)]
mod tests;
