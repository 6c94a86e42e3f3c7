//! Raw images: a regular file or a block device.
//!
//! * `probe`: what the descriptor is and which alignment its accesses need;
//! * `queue`: requests on their way through the ring; `job`: the steps that each takes;
//! * `locks`: changes smaller than a device's block;
//! * `aligned`: bounce memory.

mod aligned;
mod discard;
mod failures;
mod job;
mod locks;
mod probe;
mod queue;

#[cfg(test)]
mod step_tests;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::SeekFrom;
use strake_observe::{OsContext, Result};

pub(crate) use aligned::Aligned;
use aligned::PAGE;
pub(crate) use failures::{Failure, failed};

use self::failures::Call;
use self::locks::RangeLocks;
use self::probe::{Alignment, Backing};
use self::queue::RawQueue;
use crate::{Access, BadRequest, Event, Image, ImageQueue, NotAnImage, Operation};

/// How much [`RawImage::read_at`] reads at once.
const SYNC_PIECE: u64 = 256 * 1024;

/// The shortest allocated range that is told, but for the end of the file.
const LEAST_RANGE: u64 = 64 * 1024;

/// The size of a file whose end is not known: the largest file of Linux, in whole pages.
const GROWING_BYTES: u64 = (i64::MAX as u64) & !(PAGE as u64 - 1);

/// The zeroes that are written where a file system cannot zero a range.
const ZERO_BYTES: u64 = 256 * 1024;

/// A raw image: byte N of the disk is byte N of the file.
#[derive(Debug)]
pub struct RawImage {
    file: Arc<RawFile>,
}

/// What the queues of an image share.
#[derive(Debug)]
struct RawFile {
    fd: Arc<OwnedFd>,
    path: String,
    size: u64,
    /// Of the file when it was opened: `size`, and what is left of a last sector.
    length: u64,
    access: Access,
    backing: Backing,
    alignment: Alignment,
    locks: RangeLocks,
    /// What the file system turned out not to do; it is not asked again.
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
}

impl RawImage {
    /// The image behind an open descriptor; `path` is for observations only. O_DIRECT is used if
    /// the descriptor has it, else the page cache.
    ///
    /// A file whose length is not a multiple of the device's block grows to one for the moment in
    /// which its last sectors are written, and is cut back before the write has ended.
    ///
    /// # Errors
    /// When it is neither a regular file nor a block device, or too small.
    pub fn from_fd(fd: OwnedFd, path: impl Into<String>, access: Access) -> Result<Self> {
        let path = path.into();
        let (backing, size, length) = probe::identify(&fd, &path)?;
        let alignment = probe::alignment(&fd, backing, &path)?;
        if alignment.memory > PAGE as u64 || alignment.offset > job::BOUNCE_BYTES / 2 {
            let what = format!(
                "on a device that wants accesses aligned to {} bytes of memory and {} of the disk",
                alignment.memory, alignment.offset
            );
            return Err(NotAnImage { path, what }.into());
        }
        Ok(Self {
            file: Arc::new(RawFile {
                fd: Arc::new(fd),
                path,
                size,
                length,
                access,
                backing,
                alignment,
                locks: RangeLocks::default(),
                no_punch: AtomicBool::new(false),
                no_zero_range: AtomicBool::new(false),
            }),
        })
    }

    /// A file that grows while it is in use, because an image format keeps its data in it: requests
    /// may lie anywhere, and the caller sees to it that the file reaches as far as they do.
    ///
    /// # Errors
    /// As [`from_fd`](Self::from_fd).
    pub fn growing(fd: OwnedFd, path: impl Into<String>, access: Access) -> Result<Self> {
        let mut image = Self::from_fd(fd, path, access)?;
        if let Some(file) = Arc::get_mut(&mut image.file) {
            file.size = GROWING_BYTES;
            file.length = GROWING_BYTES;
        }
        Ok(image)
    }

    /// Another descriptor of the same open file, which has its lock as well.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn descriptor(&self) -> Result<OwnedFd> {
        self.file.fd.try_clone().os("dup", &self.file.path)
    }

    /// What offsets and lengths in the file are best multiples of, in bytes.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.file.alignment.offset
    }

    /// The same image with a stricter alignment, for tests of devices that are not at hand.
    #[cfg(test)]
    pub(crate) fn with_alignment(mut self, memory: u64, offset: u64) -> Self {
        if let Some(file) = Arc::get_mut(&mut self.file) {
            file.alignment = Alignment { memory, offset };
        }
        self
    }
}

impl RawFile {
    fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    fn bad_request(&self, op: Operation, offset: u64, length: u64) -> BadRequest {
        BadRequest {
            path: self.path.clone(),
            operation: op.name().to_owned(),
            offset,
            length,
            size: self.size,
        }
    }

    /// Reads `data` from `offset` through aligned memory.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let len = data.len() as u64;
        if !self.contains(offset, len) {
            return Err(self.bad_request(Operation::Read, offset, len).into());
        }
        let read_failed = |errno| {
            let failure = Failure::new(Call::ReadAtOnce, errno);
            failed(Operation::Read, &self.path, offset, len, failure)
        };
        let align = self.alignment.offset;
        let mut memory = Aligned::new(usize::try_from(SYNC_PIECE).unwrap_or(0));
        let mut done = 0usize;
        while done < data.len() {
            let at = offset + done as u64;
            let start = at - at % align;
            let skip = usize::try_from(at - start).unwrap_or(0);
            let want = (offset + len).next_multiple_of(align) - start;
            let want = usize::try_from(want.min(SYNC_PIECE)).unwrap_or(0);
            let Some(room) = memory.bytes_mut().get_mut(..want) else {
                break;
            };
            let got = match rustix::io::pread(&self.fd, room, start) {
                Ok(got) => got,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    let errno = error.raw_os_error();
                    return Err(read_failed(errno));
                }
            };
            let (Some(from), Some(to)) = (memory.bytes().get(skip..got), data.get_mut(done..))
            else {
                // The file ended before the image's size: somebody truncated it.
                return Err(read_failed(libc::EIO));
            };
            let count = from.len().min(to.len());
            if count == 0 {
                return Err(read_failed(libc::EIO));
            }
            for (to, from) in to.iter_mut().zip(from) {
                *to = *from;
            }
            done += count;
        }
        Ok(())
    }

    /// A write of whole blocks has reached the byte `end`: takes back what it made the file longer,
    /// which whoever opens it next would take for a part of the disk.
    fn cut_back(&self, end: u64) -> std::result::Result<(), Failure> {
        if end <= self.length || self.backing == Backing::BlockDevice {
            return Ok(());
        }
        let failed = |error: rustix::io::Errno| Failure::new(Call::Truncate, error.raw_os_error());
        let now = rustix::fs::fstat(&self.fd).map_err(failed)?.st_size;
        // Not by us if it is longer still: leave it.
        if u64::try_from(now) != Ok(end) {
            return Ok(());
        }
        // The range is held alone (see `locks`), so no other write of ours is about these bytes.
        rustix::fs::ftruncate(&self.fd, self.length).map_err(failed)
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        if from >= self.size {
            return Ok(None);
        }
        if self.backing == Backing::BlockDevice {
            return Ok(Some(from..self.size));
        }
        let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // A file system that does not tell.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => from,
            Err(error) => return Err(error).os("lseek(SEEK_DATA)", &self.path),
        };
        if start >= self.size {
            return Ok(None);
        }
        let end = match rustix::fs::seek(&self.fd, SeekFrom::Hole(start)) {
            Ok(end) => end.min(self.size),
            Err(_) => self.size,
        };
        // A file that changes between the two calls can give an empty range: take it as one block.
        let end = end.max(start.saturating_add(LEAST_RANGE).min(self.size));
        Ok(Some(start.max(from)..end))
    }
}

impl Image for RawImage {
    fn path(&self) -> &str {
        &self.file.path
    }

    fn size(&self) -> u64 {
        self.file.size
    }

    fn access(&self) -> Access {
        self.file.access
    }

    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        Ok(Box::new(RawQueue::new(&self.file, depth, event)?))
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.file.read_at(offset, data)
    }

    fn flush(&self) -> Result<()> {
        rustix::fs::fdatasync(&self.file.fd).map_err(|error| {
            failed(
                Operation::Flush,
                &self.file.path,
                0,
                0,
                Failure::usual(Operation::Flush, error.raw_os_error()),
            )
        })
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.file.allocated(from)
    }

    fn is_removed(&self) -> Result<bool> {
        if self.file.backing == Backing::BlockDevice {
            return Ok(false);
        }
        let stat = rustix::fs::fstat(&self.file.fd).os("fstat", &self.file.path)?;
        Ok(stat.st_nlink == 0)
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn files(&self) -> Result<Vec<OwnedFd>> {
        let file = self.file.fd.try_clone().os("dup", &self.file.path)?;
        Ok(vec![file])
    }
}

impl RawFile {
    /// Zeroes to write from.
    fn zeroes() -> Arc<Aligned> {
        static ZEROES: OnceLock<Arc<Aligned>> = OnceLock::new();
        Arc::clone(
            ZEROES.get_or_init(|| Arc::new(Aligned::new(usize::try_from(ZERO_BYTES).unwrap_or(0)))),
        )
    }

    fn lacks(flag: &AtomicBool) -> bool {
        flag.load(Ordering::Relaxed)
    }
}
