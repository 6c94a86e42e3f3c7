//! The images: filling, the copy limit, verification. All with O_DIRECT where the file system can.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use strake_observe::{OsContext, Result};

/// The unit of the client's writes.
pub(crate) const BLOCK: usize = 4096;
const SECTOR: usize = 512;
/// A large request, as a plain copy would make it.
const PIECE: usize = 4 << 20;

/// The sequence number of the last acknowledged write of each block.
pub(crate) type Expected = Vec<u32>;

/// Page-aligned memory.
pub(crate) struct Memory {
    bytes: Vec<u8>,
    skew: usize,
    len: usize,
}

impl Memory {
    pub(crate) fn new(len: usize) -> Self {
        let bytes = vec![0u8; len + BLOCK];
        let skew = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, skew, len }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        self.bytes
            .get_mut(self.skew..self.skew + self.len)
            .unwrap_or_default()
    }
}

/// The content of a block after write number `sequence`: each sector holds its own number and that
/// of the write.
pub(crate) fn stamp(block: u64, sequence: u32, into: &mut [u8]) {
    for (at, sector) in into.chunks_mut(SECTOR).enumerate() {
        let number = block * (BLOCK / SECTOR) as u64 + at as u64;
        let mut pair = [0u8; 16];
        for (to, from) in pair.iter_mut().zip(
            number
                .to_le_bytes()
                .into_iter()
                .chain(u64::from(sequence).to_le_bytes()),
        ) {
            *to = from;
        }
        for chunk in sector.chunks_exact_mut(16) {
            chunk.copy_from_slice(&pair);
        }
    }
}

pub(crate) fn open(path: &Path) -> Result<File> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
    };
    open(libc::O_DIRECT)
        .or_else(|_| open(0))
        .os("open", path.display())
}

/// Whether [`open`] gives direct I/O there.
pub(crate) fn is_direct(path: &Path) -> Result<bool> {
    let flags = rustix::fs::fcntl_getfl(open(path)?).os("fcntl", path.display())?;
    Ok(flags.contains(rustix::fs::OFlags::DIRECT))
}

/// A sparse file.
pub(crate) fn create(path: &Path, size: u64) -> Result<File> {
    let _ = std::fs::remove_file(path);
    File::create(path)
        .and_then(|file| file.set_len(size))
        .os("create", path.display())?;
    open(path)
}

/// Writes write number 1 to every block.
pub(crate) fn fill(path: &Path, size: u64) -> Result<Expected> {
    let file = create(path, size)?;
    let blocks = size / BLOCK as u64;
    let mut memory = Memory::new(PIECE);
    let mut at = 0u64;
    while at < size {
        let len = usize::try_from((size - at).min(PIECE as u64)).unwrap_or(0);
        let piece = memory.bytes().get_mut(..len).unwrap_or_default();
        for (index, block) in piece.chunks_mut(BLOCK).enumerate() {
            stamp(at / BLOCK as u64 + index as u64, 1, block);
        }
        file.write_all_at(piece, at).os("pwrite", path.display())?;
        at += len as u64;
    }
    file.sync_all().os("fsync", path.display())?;
    Ok(vec![1; usize::try_from(blocks).unwrap_or(0)])
}

/// How long it takes to read the image once and to write as much once, one large request after
/// the other: what no copy on one device can beat by much.
pub(crate) fn copy_limit(source: &Path, scratch: &Path, size: u64) -> Result<(Duration, Duration)> {
    let from = open(source)?;
    let to = create(scratch, size)?;
    let mut memory = Memory::new(PIECE);
    let mut pass = |write: bool| -> Result<Duration> {
        let began = Instant::now();
        let mut at = 0u64;
        while at < size {
            let len = usize::try_from((size - at).min(PIECE as u64)).unwrap_or(0);
            let piece = memory.bytes().get_mut(..len).unwrap_or_default();
            if write {
                to.write_all_at(piece, at).os("pwrite", scratch.display())?;
            } else {
                from.read_exact_at(piece, at)
                    .os("pread", source.display())?;
            }
            at += len as u64;
        }
        if write {
            to.sync_data().os("fdatasync", scratch.display())?;
        }
        Ok(began.elapsed())
    };
    let read = pass(false)?;
    let write = pass(true)?;
    let _ = std::fs::remove_file(scratch);
    Ok((read, write))
}

/// How many sectors do not hold what was last acknowledged.
pub(crate) fn verify(path: &Path, expected: &Expected) -> Result<u64> {
    let file = open(path)?;
    let mut memory = Memory::new(PIECE);
    let mut want = [0u8; BLOCK];
    let mut bad = 0;
    for (index, part) in expected.chunks(PIECE / BLOCK).enumerate() {
        let first = index * (PIECE / BLOCK);
        let piece = memory
            .bytes()
            .get_mut(..part.len() * BLOCK)
            .unwrap_or_default();
        file.read_exact_at(piece, (first * BLOCK) as u64)
            .os("pread", path.display())?;
        for (at, (sequence, got)) in part.iter().zip(piece.chunks(BLOCK)).enumerate() {
            stamp((first + at) as u64, *sequence, &mut want);
            if got != want {
                bad += got
                    .chunks(SECTOR)
                    .zip(want.chunks(SECTOR))
                    .filter(|(got, want)| got != want)
                    .count() as u64;
            }
        }
    }
    Ok(bad)
}
