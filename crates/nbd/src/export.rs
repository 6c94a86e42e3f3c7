//! What a server serves.

use std::fmt::Debug;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use strake_block::{DiskQueue, LiveDisk, Request};
use strake_observe::Result;

/// Whether clients may write.
pub use strake_block::Access;

/// A disk that a server can serve: shared by all connections to it.
pub trait Export: Send + Sync + Debug {
    /// Its size in bytes, a multiple of 512. It never changes.
    fn size(&self) -> u64;

    /// Whether clients may write.
    fn access(&self) -> Access;

    /// Words for people, shown by `nbdinfo`.
    fn description(&self) -> String;

    /// A queue for one connection, with at most `depth` requests at the device.
    ///
    /// # Errors
    /// When the host's I/O engine cannot be set up.
    fn open_queue(&self, depth: u32) -> Result<Box<dyn ExportQueue>>;

    /// The first range at or after `from` that may hold something else than zeroes; none if all
    /// the rest reads as zeroes.
    ///
    /// # Errors
    /// When the storage fails.
    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>>;
}

/// One connection's way to its export. Requests are of whole sectors and within the export.
///
/// Dropping it waits for what is in flight: no buffer is touched afterwards.
pub trait ExportQueue: Send + Debug {
    /// Readable when [`reap`](Self::reap) has something to do.
    fn event(&self) -> BorrowedFd<'_>;

    /// Takes a request; [`push`](Self::push) starts it.
    fn submit(&mut self, request: Request);

    /// Starts what was submitted.
    ///
    /// # Errors
    /// When the engine is broken.
    fn push(&mut self) -> Result<()>;

    /// Hands out what has ended, by its tag.
    ///
    /// # Errors
    /// When the engine is broken.
    fn reap(&mut self, done: &mut dyn FnMut(u64, Result<()>)) -> Result<()>;
}

impl ExportQueue for DiskQueue {
    fn event(&self) -> BorrowedFd<'_> {
        self.event()
    }

    fn submit(&mut self, request: Request) {
        self.submit(request);
    }

    fn push(&mut self) -> Result<()> {
        self.push()
    }

    fn reap(&mut self, done: &mut dyn FnMut(u64, Result<()>)) -> Result<()> {
        self.reap(done)
    }
}

/// A live disk as an export: its image can be migrated while clients use it. A switch-over is one
/// slow request for them.
#[derive(Debug, Clone)]
pub struct LiveExport {
    disk: Arc<LiveDisk>,
    access: Access,
}

impl LiveExport {
    /// Serves `disk` with the access that it has itself.
    #[must_use]
    pub fn new(disk: Arc<LiveDisk>) -> Self {
        let access = match disk.read_only() {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        Self { disk, access }
    }

    /// The same, only for reading.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.access = Access::ReadOnly;
        self
    }
}

impl Export for LiveExport {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn access(&self) -> Access {
        self.access
    }

    fn description(&self) -> String {
        format!("disk '{}' served by strake", self.disk.name())
    }

    fn open_queue(&self, depth: u32) -> Result<Box<dyn ExportQueue>> {
        Ok(Box::new(self.disk.queue(depth)?))
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        // A disk is never larger than its image; an image may be larger than its disk.
        let size = self.disk.size();
        let found = self.disk.image().allocated(from)?;
        Ok(found
            .map(|range| range.start..range.end.min(size))
            .filter(|range| range.start < size))
    }
}
