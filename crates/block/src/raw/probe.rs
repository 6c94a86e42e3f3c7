//! What a descriptor is and how it wants to be accessed.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};
use strake_observe::{Because, OsContext, Result};

use super::aligned::Aligned;
use crate::{NotAnImage, SECTOR_BYTES};

/// What is behind a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    RegularFile,
    BlockDevice,
}

/// What addresses, offsets and lengths must be multiples of; powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of memory.
    pub(crate) memory: u64,
    /// Of offsets and lengths in the file.
    pub(crate) offset: u64,
}

impl Alignment {
    /// Buffered access: anything goes.
    pub(crate) const NONE: Self = Self {
        memory: 1,
        offset: 1,
    };
}

/// The file's kind, its size in whole sectors, and its length in bytes.
pub(crate) fn identify(fd: &OwnedFd, path: &str) -> Result<(Backing, u64, u64)> {
    let not_an_image = |what: &str| NotAnImage {
        path: path.to_owned(),
        what: what.to_owned(),
    };
    let stat = rustix::fs::fstat(fd)
        .os("fstat", path)
        .because_of(|| not_an_image("unreadable"))?;
    let backing = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Backing::RegularFile,
        FileType::BlockDevice => Backing::BlockDevice,
        FileType::Directory => return Err(not_an_image("a directory").into()),
        FileType::CharacterDevice => return Err(not_an_image("a character device").into()),
        FileType::Fifo => return Err(not_an_image("a pipe").into()),
        FileType::Socket => return Err(not_an_image("a socket").into()),
        _ => return Err(not_an_image("neither a file nor a block device").into()),
    };
    let length = match backing {
        Backing::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
        Backing::BlockDevice => {
            rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0)).os("lseek", path)?
        }
    };
    let size = length - length % SECTOR_BYTES;
    if size == 0 {
        return Err(not_an_image("smaller than one sector").into());
    }
    Ok((backing, size, length))
}

/// The alignment that the descriptor's accesses need.
pub(crate) fn alignment(fd: &OwnedFd, backing: Backing, path: &str) -> Result<Alignment> {
    let flags = rustix::fs::fcntl_getfl(fd).os("fcntl", path)?;
    if !flags.contains(OFlags::DIRECT) {
        return Ok(Alignment::NONE);
    }
    if let Some(told) = told(fd) {
        return Ok(told);
    }
    if backing == Backing::BlockDevice {
        let sector = u64::from(rustix::fs::ioctl_blksszget(fd).os("BLKSSZGET", path)?);
        return Ok(Alignment {
            memory: sector,
            offset: sector,
        });
    }
    tried(fd, path)
}

/// What the kernel says itself (since 6.1, by file system).
fn told(fd: &OwnedFd) -> Option<Alignment> {
    let mask = StatxFlags::DIOALIGN;
    let seen = rustix::fs::statx(fd.as_fd(), c"", AtFlags::EMPTY_PATH, mask).ok()?;
    if seen.stx_mask & mask.bits() == 0 {
        return None;
    }
    let memory = u64::from(seen.stx_dio_mem_align);
    let offset = u64::from(seen.stx_dio_offset_align);
    (memory.is_power_of_two() && offset.is_power_of_two()).then_some(Alignment { memory, offset })
}

/// By trying: the smallest read that is not refused.
fn tried(fd: &OwnedFd, path: &str) -> Result<Alignment> {
    let mut memory = Aligned::new(4096);
    let mut last = rustix::io::Errno::INVAL;
    for align in [512usize, 4096] {
        let Some(part) = memory.bytes_mut().get_mut(..align) else {
            break;
        };
        match rustix::io::pread(fd, part, 0) {
            Ok(_) => {
                let align = align as u64;
                return Ok(Alignment {
                    memory: align,
                    offset: align,
                });
            }
            Err(error) => last = error,
        }
    }
    Err(last).os("pread", path).because_of(|| NotAnImage {
        path: path.to_owned(),
        what: "refusing direct reads of 512 and of 4096 bytes".to_owned(),
    })
}
