//! Something that a disk might boot, and reading it.

use strake_observe::{Observation, Result};

use super::DiskBoot;
use super::volume::Volume;
use crate::observations::BootEntryUnusable;

/// A kernel. Distributions' have 5 to 20 MiB, an uncompressed one up to 100.
const MOST_KERNEL: usize = 256 << 20;
/// All initial RAM disks of an entry together.
const MOST_INITRD: usize = 1 << 30;
/// Initial RAM disks of one entry: microcode, the real one, perhaps one more.
const MOST_INITRDS: usize = 16;
/// A command line. No kernel takes more than 4 KiB.
const MOST_CMDLINE: usize = 64 << 10;

/// What a boot configuration says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Candidate {
    /// For people: the configuration file and the entry's title.
    pub(super) entry: String,
    /// The kernel's path.
    pub(super) kernel: String,
    /// The paths of the initial RAM disks, which are joined.
    pub(super) initrds: Vec<String>,
    /// The command line as the entry has it.
    pub(super) cmdline: String,
    /// The UUID of the file system that the paths are on, if the entry says it.
    pub(super) uuid: Option<String>,
    /// The number of the partition that the paths are on, if the entry says that instead.
    pub(super) partition: Option<u32>,
}

impl Candidate {
    /// Reads what it names. `home` is the volume that the configuration is on.
    pub(super) fn read(&self, home: &Volume, all: &[Volume]) -> Result<DiskBoot> {
        let from = self.volume(home, all);
        let entry = format!("{} on {}", self.entry, home.name());
        let unusable = |reason: String| BootEntryUnusable {
            entry: entry.clone(),
            reason,
        };
        let get = |path: &str, most: usize| match from.file(path, most) {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => Err(Observation::from(unusable(format!(
                "there is no {path} on {}",
                from.name()
            )))),
            Err(seen) => {
                let reason = "a file that it names cannot be read".to_owned();
                Err(Observation::from(unusable(reason)).because(seen))
            }
        };
        if self.initrds.len() > MOST_INITRDS {
            return Err(unusable(format!("it has {} RAM disks", self.initrds.len())).into());
        }
        if self.cmdline.len() > MOST_CMDLINE {
            return Err(unusable("its command line is too long".to_owned()).into());
        }
        let kernel = get(&self.kernel, MOST_KERNEL)?;
        let mut initrd: Option<Vec<u8>> = None;
        for path in &self.initrds {
            let sofar = initrd.get_or_insert_default();
            // Archives that follow each other begin at multiples of four bytes.
            sofar.resize(sofar.len().next_multiple_of(4), 0);
            let more = get(path, MOST_INITRD.saturating_sub(sofar.len()))?;
            sofar.extend(more);
        }
        let cmdline = with_root(&self.cmdline, from, all, initrd.is_some());
        Ok(DiskBoot {
            kernel,
            initrd,
            cmdline,
            entry,
        })
    }

    /// The volume that the paths are on: the one the entry names, the one the configuration is on,
    /// or any that has the kernel.
    fn volume<'a>(&self, home: &'a Volume, all: &'a [Volume]) -> &'a Volume {
        let named = all
            .iter()
            .filter(|volume| match (&self.uuid, self.partition) {
                (Some(uuid), _) => volume.uuid == *uuid,
                (None, some) => some.is_some() && volume.partition.number == some,
            });
        named
            .chain([home])
            .chain(all)
            .find(|volume| volume.has(&self.kernel))
            .unwrap_or(home)
    }
}

/// Adds `root=` if the command line has none.
fn with_root(cmdline: &str, boot: &Volume, all: &[Volume], initrd: bool) -> String {
    let has_root = cmdline
        .split_whitespace()
        .any(|word| word.starts_with("root=") || word.starts_with("nfsroot="));
    if has_root {
        return cmdline.to_owned();
    }
    let looks_like_root = |volume: &&Volume| {
        [
            "/sbin/init",
            "/etc/os-release",
            "/usr/lib/systemd/systemd",
            "/etc/fstab",
        ]
        .iter()
        .any(|path| volume.has(path))
    };
    let root = [boot]
        .into_iter()
        .chain(all)
        .find(looks_like_root)
        .unwrap_or(boot);
    // The kernel itself knows partitions; only an initial RAM disk can look into file systems.
    let device = match &root.partition.uuid {
        _ if initrd => format!("UUID={}", root.uuid),
        Some(partition) => format!("PARTUUID={partition}"),
        None => "/dev/vda".to_owned(),
    };
    let mode = cmdline
        .split_whitespace()
        .any(|word| matches!(word, "ro" | "rw"));
    let mut line = format!("root={device}");
    if !mode {
        line.push_str(" ro");
    }
    if !cmdline.trim().is_empty() {
        line.push(' ');
        line.push_str(cmdline.trim());
    }
    line
}

/// Joins a path from a configuration file to the directory that it is relative to.
pub(super) fn absolute(directory: &str, path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{directory}/{path}")
    }
}
