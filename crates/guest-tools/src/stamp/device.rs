//! The disk: a block device or a file, without and through the page cache.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::ioctl::{Setter, ioctl, opcode};

use super::BLOCK_LEN;

/// What `BLKDISCARD` takes: offset and length in bytes.
type DiscardRange = [u64; 2];
const BLKDISCARD: rustix::ioctl::Opcode = opcode::none(0x12, 119);

/// How the disk is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To be checked.
    Read,
    /// To be written.
    Write,
}

/// A disk that stamps go to.
#[derive(Debug)]
pub struct Device {
    /// Without the page cache, where the file system can.
    direct: File,
    /// Through the page cache.
    cached: File,
    size: u64,
    is_block: bool,
}

impl Device {
    /// Opens a disk.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path, access: Access) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::Write);
        let mut cached = options.open(path)?;
        let flags = i32::try_from(OFlags::DIRECT.bits()).map_err(io::Error::other)?;
        // Some file systems have no direct access; it is a property of the store, not an error.
        let direct = match options.custom_flags(flags).open(path) {
            Ok(direct) => direct,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => cached.try_clone()?,
            Err(error) => return Err(error),
        };
        let size = cached.seek(SeekFrom::End(0))?;
        let is_block = cached.metadata()?.file_type().is_block_device();
        Ok(Self {
            direct,
            cached,
            size,
            is_block,
        })
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn is_block(&self) -> bool {
        self.is_block
    }

    /// Reads without the page cache. Offset, length and memory must be whole blocks.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.direct.read_exact_at(into, offset)
    }

    /// Writes without the page cache.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.direct.write_all_at(from, offset)
    }

    /// Writes through the page cache and waits until it is on the disk.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn write_synced(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.cached.write_all_at(from, offset)?;
        self.cached.sync_data()
    }

    /// Waits until everything that was acknowledged is durable.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn flush(&self) -> io::Result<()> {
        self.direct.sync_data()
    }

    /// Discards a range.
    ///
    /// # Errors
    /// If the disk fails, or has no discard.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        if !self.is_block {
            return self.write_zeroes(offset, length);
        }
        let range: DiscardRange = [offset, length];
        // SAFETY: `BLKDISCARD` reads two 64-bit numbers from the pointer it is given, which
        // `Setter` makes point at `range`, and keeps nothing. What it does to the device is
        // what this function is for.
        unsafe { ioctl(&self.direct, Setter::<BLKDISCARD, DiscardRange>::new(range)) }?;
        Ok(())
    }

    /// Makes a range read as zeroes and gives its space back.
    ///
    /// # Errors
    /// If the disk fails, or cannot.
    pub fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.direct, flags, offset, length)?;
        Ok(())
    }
}

/// Memory for direct access: it begins at a multiple of a block.
#[derive(Debug)]
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
}

impl Aligned {
    /// `length` bytes of zeroes.
    #[must_use]
    pub fn new(length: usize) -> Self {
        let memory = vec![0; length + BLOCK_LEN];
        let start = memory.as_ptr().align_offset(BLOCK_LEN);
        Self { memory, start }
    }

    /// The first `length` bytes, at most as many as there are.
    pub fn first(&mut self, length: usize) -> &mut [u8] {
        let end = (self.start + length).min(self.memory.len());
        self.memory.get_mut(self.start..end).unwrap_or_default()
    }
}
