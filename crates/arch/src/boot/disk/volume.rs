//! One ext2/3/4 file system of the disk, read with bounds.
//!
//! Two things that the reader would believe are checked before it sees them: the superblock's
//! sizes, by which it allocates, and the length of the journal, which it replays into memory. And
//! symbolic links are resolved here, step by step, because the reader would read a link's target
//! whatever its length.

use ext4_view::{Ext4, Ext4Error, FileType};
use strake_observe::{Observation, Result, Task};

use super::partitions::Partition;
use super::reader::{Disk, Window};
use crate::observations::{DiskFileUnusable, JournalSkipped, PartitionUnusable};

/// The largest block size of ext4.
const MOST_BLOCK_SHIFT: u32 = 6;
/// Block groups: 128 TiB with the usual 4 KiB blocks. Some 32 bytes of memory each.
const MOST_GROUPS: u64 = 1 << 20;
/// Blocks of the journal: what `mke2fs` gives the largest file systems.
const MOST_JOURNAL_BLOCKS: u64 = 1 << 18;
/// Where the superblock is, and how long.
const SUPERBLOCK: usize = 1024;
/// The incompatible feature "the journal has to be replayed".
const NEEDS_RECOVERY: u32 = 4;
/// The same limits as Linux's.
const MOST_LINKS: u32 = 40;
const MOST_PATH: usize = 4096;
/// Directory entries that are looked at.
const MOST_ENTRIES: usize = 4096;

/// An open file system.
pub(super) struct Volume {
    pub(super) partition: Partition,
    /// What `root=UUID=` takes.
    pub(super) uuid: String,
    ext4: Ext4,
}

impl Volume {
    pub(super) fn open(disk: &Disk, partition: Partition, task: &mut Task) -> Result<Self> {
        let unusable = |reason: String| PartitionUnusable {
            partition: partition.name(),
            reason,
        };
        let head = disk.up_to(partition.start, 0x11000)?;
        let head = usize::try_from(partition.size)
            .ok()
            .and_then(|size| head.get(..size))
            .unwrap_or(&head);
        if let Some(other) = other_kind(head) {
            return Err(unusable(other.to_owned()).into());
        }
        if let Err(reason) = plausible(disk, &partition, head) {
            return Err(unusable(reason).into());
        }
        let load = |patch| {
            Ext4::load(Box::new(Window {
                disk: disk.clone(),
                start: partition.start,
                size: partition.size,
                patch,
            }))
        };
        let loaded = load(None).or_else(|error| match (&error, without_journal(head)) {
            // The reader replays journals with checksums only. Kernels and their configuration
            // rarely are among the last changes of a guest that stopped without unmounting.
            (Ext4Error::Incompatible(_) | Ext4Error::Corrupt(_), Some(superblock)) => {
                task.saw(JournalSkipped {
                    partition: partition.name(),
                    reason: error.to_string(),
                });
                load(Some((SUPERBLOCK as u64, superblock)))
            }
            _ => Err(error),
        });
        let ext4 = loaded.map_err(|error| {
            let (reason, cause) = explain(&error);
            let seen = Observation::from(unusable(reason));
            cause.into_iter().fold(seen, Observation::because)
        })?;
        Ok(Self {
            uuid: ext4.uuid().to_string(),
            ext4,
            partition,
        })
    }

    pub(super) fn name(&self) -> String {
        self.partition.name()
    }

    /// The whole of a regular file, if there is one at the path.
    pub(super) fn file(&self, path: &str, most: usize) -> Result<Option<Vec<u8>>> {
        let Some(real) = self.resolve(path)? else {
            return Ok(None);
        };
        let bytes = self
            .read(&real, most)
            .map_err(|reason| self.unusable(path, reason))?;
        Ok(Some(bytes))
    }

    /// As [`file`](Self::file), for files that people write; what is not UTF-8 is replaced.
    pub(super) fn text(&self, path: &str) -> Result<Option<String>> {
        const MOST: usize = 4 << 20;
        let bytes = self.file(path, MOST)?;
        Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Whether there is anything at the path.
    pub(super) fn has(&self, path: &str) -> bool {
        self.resolve(path).is_ok_and(|found| found.is_some())
    }

    /// The names in a directory, none if there is no such directory.
    pub(super) fn names(&self, path: &str) -> Result<Vec<String>> {
        let Some(real) = self.resolve(path)? else {
            return Ok(Vec::new());
        };
        let failed = |error: Ext4Error| self.unusable(path, error.into());
        let mut names = Vec::new();
        let entries = match self.ext4.read_dir(real.as_slice()) {
            Ok(entries) => entries,
            Err(Ext4Error::NotADirectory) => return Ok(names),
            Err(error) => return Err(failed(error)),
        };
        for entry in entries.take(MOST_ENTRIES) {
            let entry = entry.map_err(failed)?;
            if let Ok(name) = entry.file_name().as_str()
                && !matches!(name, "." | "..")
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    fn unusable(&self, path: &str, reason: Reason) -> Observation {
        let seen = Observation::from(DiskFileUnusable {
            path: path.to_owned(),
            partition: self.name(),
            reason: reason.text,
        });
        reason.cause.into_iter().fold(seen, Observation::because)
    }

    /// The path without symbolic links; `None` if nothing is there.
    fn resolve(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.walk(path.as_bytes())
            .map_err(|reason| self.unusable(path, reason))
    }

    fn walk(&self, path: &[u8]) -> Result<Option<Vec<u8>>, Reason> {
        // What is still to be walked, the next component last.
        let mut ahead: Vec<Vec<u8>> = Vec::new();
        let push = |ahead: &mut Vec<Vec<u8>>, path: &[u8]| {
            let parts = path.split(|byte| *byte == b'/').rev();
            ahead.extend(
                parts
                    .filter(|part| !part.is_empty() && *part != b".")
                    .map(<[u8]>::to_vec),
            );
        };
        push(&mut ahead, path);
        let mut real: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(part) = ahead.pop() {
            if part == b".." {
                let parent = real.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                real.truncate(parent);
                continue;
            }
            let parent = real.len();
            real.push(b'/');
            real.extend(&part);
            if real.len() > MOST_PATH || ahead.len() > MOST_PATH {
                return Err(Reason::text("the path is too long"));
            }
            let metadata = match self.ext4.symlink_metadata(real.as_slice()) {
                Ok(metadata) => metadata,
                Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            if metadata.file_type() != FileType::Symlink {
                continue;
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(Reason::text("too many symbolic links"));
            }
            if metadata.len() > MOST_PATH as u64 {
                return Err(Reason::text("a symbolic link is too long"));
            }
            let target = self.ext4.read_link(real.as_slice())?;
            let target = target.as_path();
            real.truncate(if target.is_absolute() { 0 } else { parent });
            push(&mut ahead, target.as_ref());
        }
        if real.is_empty() {
            real.push(b'/');
        }
        Ok(Some(real))
    }

    fn read(&self, real: &[u8], most: usize) -> Result<Vec<u8>, Reason> {
        const STEP: usize = 64 << 10;
        let metadata = self.ext4.metadata(real)?;
        if metadata.file_type() != FileType::Regular {
            return Err(Reason::text("it is not a regular file"));
        }
        if metadata.len() > most as u64 {
            return Err(Reason::text(&format!(
                "it has {} bytes, more than {most} are not read",
                metadata.len()
            )));
        }
        let mut file = self.ext4.open(real)?;
        let mut bytes = Vec::new();
        let mut buffer = vec![0; STEP];
        loop {
            let count = file.read_bytes(&mut buffer)?;
            if count == 0 {
                return Ok(bytes);
            }
            bytes.extend(buffer.get(..count).unwrap_or_default());
            if bytes.len() > most {
                return Err(Reason::text("it is longer than its length"));
            }
        }
    }
}

/// Why something in the file system cannot be used.
pub(super) struct Reason {
    text: String,
    cause: Option<Observation>,
}

impl Reason {
    fn text(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            cause: None,
        }
    }
}

impl From<Ext4Error> for Reason {
    fn from(error: Ext4Error) -> Self {
        let (text, cause) = explain(&error);
        Self { text, cause }
    }
}

/// What the reader says, and the failure of the disk itself, if that is the reason.
fn explain(error: &Ext4Error) -> (String, Option<Observation>) {
    let cause = error
        .as_io()
        .and_then(|inner| inner.downcast_ref::<Observation>())
        .cloned();
    match cause {
        Some(cause) => ("the disk could not be read".to_owned(), Some(cause)),
        None => (error.to_string(), None),
    }
}

/// The names of file systems and the like that are not ext4, by their signatures.
fn other_kind(head: &[u8]) -> Option<&'static str> {
    const SIGNATURES: &[(usize, &[u8], &str)] = &[
        (0, b"XFSB", "it is XFS"),
        (0x1_0040, b"_BHRfS_M", "it is Btrfs"),
        (0, b"LUKS\xba\xbe", "it is encrypted (LUKS)"),
        (0x218, b"LVM2 001", "it is an LVM physical volume"),
        (3, b"NTFS", "it is NTFS"),
        (54, b"FAT", "it is FAT"),
        (82, b"FAT32", "it is FAT"),
        (0xff6, b"SWAPSPACE2", "it is swap space"),
        (0, b"hsqs", "it is squashfs"),
        (0x400, b"\x10\x20\xf5\xf2", "it is F2FS"),
        (0x1000, b"\xfc\x4e\x2b\xa9", "it is a RAID member"),
    ];
    if head.get(1080..1082) == Some(b"\x53\xef") {
        return None;
    }
    let found = SIGNATURES
        .iter()
        .find(|(at, bytes, _)| head.get(*at..).is_some_and(|from| from.starts_with(bytes)));
    Some(found.map_or("no ext2/3/4 superblock was found", |(_, _, name)| *name))
}

/// Checks the sizes that the reader allocates by.
fn plausible(disk: &Disk, partition: &Partition, head: &[u8]) -> std::result::Result<(), String> {
    const IS_64BIT: u32 = 0x80;
    const HAS_JOURNAL: u32 = 4;
    const JOURNAL_INODE: u32 = 8;

    let superblock = head
        .get(SUPERBLOCK..2 * SUPERBLOCK)
        .ok_or("it is too small")?;
    let word = |at: usize| u32_at(superblock, at);
    let shift = word(0x18);
    if shift > MOST_BLOCK_SHIFT {
        return Err("its block size is implausible".to_owned());
    }
    let block = 1024_u64 << shift;
    let incompatible = word(0x60);
    let blocks = if incompatible & IS_64BIT == 0 {
        u64::from(word(4))
    } else {
        u64::from(word(4)) | u64::from(word(0x150)) << 32
    };
    if blocks
        .checked_mul(block)
        .is_none_or(|size| size > partition.size)
    {
        return Err("it is larger than its partition".to_owned());
    }
    let per_group = u64::from(word(0x20)).max(1);
    if blocks.div_ceil(per_group) > MOST_GROUPS {
        return Err("it has too many block groups".to_owned());
    }
    if word(0x5c) & HAS_JOURNAL == 0 || incompatible & NEEDS_RECOVERY == 0 {
        return Ok(());
    }
    // The journal is the eighth inode, in the first group's table.
    if word(0xe0) != JOURNAL_INODE {
        return Err("its journal is at an unusual place".to_owned());
    }
    let inode_size = u64::from(word(0x58) & 0xffff);
    let read = |offset: u64, count: usize| {
        partition
            .start
            .checked_add(offset)
            .ok_or_else(|| "its journal is not on it".to_owned())
            .and_then(|at| disk.up_to(at, count).map_err(|seen| seen.to_string()))
    };
    let group = read(block * if shift == 0 { 2 } else { 1 }, 64)?;
    let high = if incompatible & IS_64BIT == 0 {
        0
    } else {
        u64::from(u32_at(&group, 0x28))
    };
    let table = u64::from(u32_at(&group, 8)) | high << 32;
    let inode = table
        .checked_mul(block)
        .and_then(|at| at.checked_add(u64::from(JOURNAL_INODE - 1) * inode_size))
        .ok_or("its journal is not on it")?;
    let inode = read(inode, 128)?;
    let size = u64::from(u32_at(&inode, 4)) | u64::from(u32_at(&inode, 0x6c)) << 32;
    if size.div_ceil(block) > MOST_JOURNAL_BLOCKS {
        return Err("its journal is implausibly large".to_owned());
    }
    Ok(())
}

/// The superblock as if the journal were empty, if it is not and the superblock is sound.
fn without_journal(head: &[u8]) -> Option<Vec<u8>> {
    const FEATURES: usize = 0x60;
    const READ_ONLY_FEATURES: usize = 0x64;
    const CHECKSUMS: u32 = 0x400;
    const CHECKSUM: usize = 0x3fc;
    let mut superblock = head.get(SUPERBLOCK..2 * SUPERBLOCK)?.to_vec();
    let features = u32_at(&superblock, FEATURES);
    let checked = u32_at(&superblock, READ_ONLY_FEATURES) & CHECKSUMS != 0;
    let sum = |superblock: &[u8]| superblock.get(..CHECKSUM).map(crc32c);
    let sound = !checked || sum(&superblock)? == u32_at(&superblock, CHECKSUM);
    if features & NEEDS_RECOVERY == 0 || !sound {
        return None;
    }
    let put = |superblock: &mut Vec<u8>, at: usize, value: u32| {
        if let Some(field) = superblock
            .get_mut(at..)
            .and_then(|from| from.first_chunk_mut())
        {
            *field = value.to_le_bytes();
        }
    };
    put(&mut superblock, FEATURES, features & !NEEDS_RECOVERY);
    let sum = sum(&superblock)?;
    put(&mut superblock, CHECKSUM, sum);
    Some(superblock)
}

/// CRC-32C without the final inversion, as ext4 uses it.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            sum >> 1 ^ if sum & 1 == 1 { POLYNOMIAL } else { 0 }
        })
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|from| from.first_chunk())
        .map_or(0, |raw| u32::from_le_bytes(*raw))
}
