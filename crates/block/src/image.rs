//! The trait of everything that can hold a disk's data.

use std::any::Any;
use std::fmt::Debug;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use strake_observe::Result;

use crate::observations::ImageStays;
use crate::{Event, Request};

/// The unit of a guest's requests.
pub const SECTOR_BYTES: u64 = 512;

/// Whether an image may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It may only be read.
    ReadOnly,
    /// It may be read and written.
    ReadWrite,
}

/// Where a disk's data is.
///
/// An image is shared by the queues of a disk and by a migration's copier. All requests go through
/// queues; what else is here is for the boot (which reads before any queue exists) and for the
/// copier's planning.
pub trait Image: Send + Sync + Debug {
    /// Its name for observations: the path it was opened by.
    fn path(&self) -> &str;

    /// Its size in bytes, a multiple of [`SECTOR_BYTES`].
    fn size(&self) -> u64;

    /// Whether it may be written.
    fn access(&self) -> Access;

    /// A queue on it with at most `depth` requests at the kernel at once (more may be submitted;
    /// they wait). It signals `event` whenever [`ImageQueue::reap`] may have something.
    ///
    /// # Errors
    /// When the host's I/O engine cannot be set up.
    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>>;

    /// Reads at once, in the calling thread. For booting from the image, before the guest runs.
    ///
    /// # Errors
    /// When the range is not within the image or the device fails.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()>;

    /// Makes every completed write durable, in the calling thread.
    ///
    /// # Errors
    /// When the device fails.
    fn flush(&self) -> Result<()>;

    /// The first range at or after `from` that may hold something else than zeroes; none if all
    /// the rest reads as zeroes. Ranges may be larger than what is really allocated.
    ///
    /// # Errors
    /// When the file system fails.
    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>>;

    /// Whether the file's last name was removed: what is written to it then is lost as soon as it
    /// is closed.
    ///
    /// # Errors
    /// When the file system fails.
    fn is_removed(&self) -> Result<bool>;

    /// The open files that it consists of, for another process that opens the same image before this
    /// one closes it. They share locks with this one's. Only one of the two processes works with the
    /// image at a time, and what this one knows of it must be in the files whenever nothing is in
    /// flight.
    ///
    /// # Errors
    /// [`ImageStays`]: this kind of image cannot be given away so.
    fn files(&self) -> Result<Vec<OwnedFd>> {
        Err(ImageStays {
            path: self.path().to_owned(),
        }
        .into())
    }

    /// Itself, for those who know more of its kind than this trait does: who changes the layers of
    /// a disk in use finds them by it. None if there is no more to know.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }
}

/// The end of one request.
#[derive(Debug)]
pub struct Completion {
    /// The submitter's own name for it.
    pub tag: u64,
    /// How it went.
    pub result: Result<()>,
}

/// One submission queue on an image. Owned by one thread at a time.
///
/// Requests of a queue and of different queues run in any order. Dropping a queue waits for what
/// is in flight.
pub trait ImageQueue: Send + Debug {
    /// Takes a request; it is started by the next [`push`](Self::push). Requests that cannot be
    /// done (out of range, read-only) come back as failed completions.
    fn submit(&mut self, request: Request);

    /// Starts what was submitted, with one system call for all of it.
    ///
    /// # Errors
    /// When the engine itself is broken; requests in flight may not come back then.
    fn push(&mut self) -> Result<()>;

    /// Hands out what has ended. Call [`push`](Self::push) afterwards: what was only partly done
    /// goes on with it.
    fn reap(&mut self, done: &mut dyn FnMut(Completion));

    /// How many requests were submitted and not yet reaped.
    fn in_flight(&self) -> usize;
}
