//! The swap file itself.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock, fstat, ftruncate};
use strake_observe::{Because, Observation, OsContext, Result};

use super::header::{HEADER_BYTES, Header, Owner};
use super::ring::Piece;
use super::slots::{Run, Slots};
use super::{DATA_START, SEGMENT_BYTES, SEGMENT_SLOTS};
use crate::PAGE;
use crate::observations::{NotASwapFile, SwapBusy, SwapFull, SwapUnusable};
use crate::pager::BACKING_MAX;

/// When a swap file takes its room on the datastore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provision {
    /// At once: it can never be short of room later.
    Preallocated,
    /// As it is needed.
    Grown,
}

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From the file.
    Read,
    /// To the file.
    Write,
    /// Room for a segment.
    Allocate,
}

/// Lets transfers fail, for tests of whoever depends on a swap file.
pub trait SwapFaults: Send + Sync {
    /// The error number with which a transfer at `offset` of the file ends, instead of its own
    /// result; `None` for its own.
    fn fail(&self, transfer: Transfer, offset: u64) -> Option<i32>;
}

/// A VM's swap file, open and its own.
pub struct SwapFile {
    fd: Arc<OwnedFd>,
    path: String,
    slots: Mutex<Slots>,
    faults: Option<Arc<dyn SwapFaults>>,
}

impl std::fmt::Debug for SwapFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwapFile")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl SwapFile {
    /// Makes `fd`, open for reading and writing, with O_DIRECT where the file system can, the swap
    /// file of `owner` with room for `bytes` of its memory. What is in it is lost. `path` is for
    /// observations.
    ///
    /// # Errors
    /// It holds something else, another VM's memory, or is locked; there is no room for it.
    pub fn open(
        fd: OwnedFd,
        path: &str,
        owner: &Owner,
        bytes: u64,
        provision: Provision,
    ) -> Result<Self> {
        let segments = bytes
            .div_ceil(SEGMENT_BYTES)
            .clamp(1, u64::from(BACKING_MAX / SEGMENT_SLOTS) - 1);
        let segments = u32::try_from(segments).unwrap_or(1);
        flock(&fd, FlockOperation::NonBlockingLockExclusive).map_err(|_| SwapBusy {
            path: path.to_owned(),
        })?;
        let length = u64::try_from(fstat(&fd).os("fstat", path)?.st_size).unwrap_or(0);
        if length > 0 {
            let mut block = Aligned([0; HEADER_BYTES]);
            let mut done = 0;
            while let Some(rest) = block.0.get_mut(done..).filter(|rest| !rest.is_empty()) {
                let count = rustix::io::pread(&fd, rest, done as u64).os("pread", path)?;
                if count == 0 {
                    return Err(NotASwapFile {
                        path: path.to_owned(),
                        reason: "it is shorter than a header".to_owned(),
                    }
                    .into());
                }
                done += count;
            }
            Header::decode(path, &block.0)?.check(path, owner)?;
        }
        let begin = || -> Result<()> {
            let header = Header {
                owner: owner.clone(),
                segments,
            };
            // The header first: a file that was left at any later point is known as its owner's.
            let block = Aligned(header.encode());
            let mut done = 0;
            while let Some(rest) = block.0.get(done..).filter(|rest| !rest.is_empty()) {
                done += rustix::io::pwrite(&fd, rest, done as u64).os("pwrite", path)?;
            }
            // Nothing of an earlier run stays.
            ftruncate(&fd, DATA_START).os("ftruncate", path)?;
            ftruncate(&fd, DATA_START + u64::from(segments) * SEGMENT_BYTES)
                .os("ftruncate", path)?;
            if provision == Provision::Preallocated {
                fallocate(
                    &fd,
                    FallocateFlags::empty(),
                    DATA_START,
                    u64::from(segments) * SEGMENT_BYTES,
                )
                .os("fallocate", path)?;
            }
            rustix::fs::fdatasync(&fd).os("fdatasync", path)
        };
        begin().because_of(|| SwapUnusable {
            path: path.to_owned(),
        })?;
        let mut slots = Slots::new(segments);
        if provision == Provision::Preallocated {
            for segment in 0..segments {
                slots.set_backed(segment * SEGMENT_SLOTS, true);
            }
        }
        Ok(Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
            slots: Mutex::new(slots),
            faults: None,
        })
    }

    /// Whose file `fd` is, and how many bytes of memory it may hold.
    ///
    /// # Errors
    /// It is no swap file.
    pub fn identify(fd: impl AsFd, path: &str) -> Result<(Owner, u64)> {
        let mut block = Aligned([0; HEADER_BYTES]);
        let count = rustix::io::pread(&fd, block.0.as_mut_slice(), 0).os("pread", path)?;
        if count < HEADER_BYTES {
            return Err(NotASwapFile {
                path: path.to_owned(),
                reason: "it is shorter than a header".to_owned(),
            }
            .into());
        }
        let header = Header::decode(path, &block.0)?;
        Ok((header.owner, u64::from(header.segments) * SEGMENT_BYTES))
    }

    /// Lets transfers fail as `faults` says.
    #[must_use]
    pub fn with_faults(mut self, faults: Arc<dyn SwapFaults>) -> Self {
        self.faults = Some(faults);
        self
    }

    pub(crate) fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    pub(crate) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a run of at most `most` slots that have room in the file.
    ///
    /// # Errors
    /// [`SwapFull`], by itself or because of what the store said.
    pub(crate) fn take(&self, most: u32) -> Result<Run> {
        let mut slots = self.slots();
        let Some(run) = slots.take(most) else {
            return Err(SwapFull {
                path: self.path.clone(),
                bytes: slots_bytes(&slots),
            }
            .into());
        };
        if slots.is_backed(run.first) {
            return Ok(run);
        }
        match self.allocate(run.first / SEGMENT_SLOTS) {
            Ok(()) => {
                slots.set_backed(run.first, true);
                Ok(run)
            }
            Err(cause) => {
                for slot in run.first..run.first + run.len {
                    slots.free(slot);
                }
                let full = SwapFull {
                    path: self.path.clone(),
                    bytes: slots_bytes(&slots),
                };
                Err(Observation::from(full).because(cause))
            }
        }
    }

    fn allocate(&self, segment: u32) -> Result<()> {
        let offset = DATA_START + u64::from(segment) * SEGMENT_BYTES;
        if let Some(error) = self.inject(Transfer::Allocate, offset) {
            return Err(std::io::Error::from_raw_os_error(error)).os("fallocate", &self.path);
        }
        match fallocate(&*self.fd, FallocateFlags::empty(), offset, SEGMENT_BYTES) {
            // A file system that cannot allocate finds out when it is written to.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error).os("fallocate", &self.path),
        }
    }

    /// Gives back the room of segments that are empty. Says how many.
    pub(crate) fn release_empty(&self) -> u32 {
        let mut slots = self.slots();
        let empty = slots.take_empty();
        for segment in &empty {
            let offset = DATA_START + u64::from(*segment) * SEGMENT_BYTES;
            // A store that cannot give it back keeps it.
            let _ = fallocate(
                &*self.fd,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                offset,
                SEGMENT_BYTES,
            );
        }
        u32::try_from(empty.len()).unwrap_or(u32::MAX)
    }

    /// Where `count` slots from `slot` on are, for pages from `page` on.
    pub(crate) fn piece(page: usize, slot: u32, count: u32) -> Piece {
        Piece {
            page,
            count,
            offset: DATA_START + u64::from(slot) * PAGE,
        }
    }

    /// The result of a transfer that ended with `result`: an error number if it failed.
    pub(crate) fn judge(
        &self,
        transfer: Transfer,
        piece: Piece,
        result: i32,
    ) -> std::io::Result<()> {
        if let Some(error) = self.inject(transfer, piece.offset) {
            return Err(std::io::Error::from_raw_os_error(error));
        }
        if result < 0 {
            return Err(std::io::Error::from_raw_os_error(-result));
        }
        if result.unsigned_abs() != piece.count * 4096 {
            return Err(std::io::Error::new(
                std::io::ErrorKind::UnexpectedEof,
                "the swap file ends before the slot",
            ));
        }
        Ok(())
    }

    fn inject(&self, transfer: Transfer, offset: u64) -> Option<i32> {
        self.faults
            .as_ref()
            .and_then(|faults| faults.fail(transfer, offset))
    }
}

fn slots_bytes(slots: &Slots) -> u64 {
    slots.used() * PAGE
}

/// Memory that O_DIRECT takes.
#[repr(align(4096))]
struct Aligned([u8; HEADER_BYTES]);

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
