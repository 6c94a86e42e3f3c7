//! Raw images: a regular file or a block device.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use strake_observe::Result;

use crate::{Access, Event, Image, ImageQueue};

/// A raw image: byte N of the disk is byte N of the file.
#[derive(Debug)]
pub struct RawImage {
    path: String,
    size: u64,
    access: Access,
    fd: Arc<OwnedFd>,
}

impl RawImage {
    /// The image behind an open descriptor; `path` is for observations only. O_DIRECT is used if
    /// the descriptor has it.
    ///
    /// # Errors
    /// When it is neither a regular file nor a block device, or too small.
    pub fn from_fd(fd: OwnedFd, path: impl Into<String>, access: Access) -> Result<Self> {
        let size =
            rustix::fs::fstat(&fd).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        Ok(Self {
            path: path.into(),
            size,
            access,
            fd: Arc::new(fd),
        })
    }
}

impl Image for RawImage {
    fn path(&self) -> &str {
        &self.path
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn access(&self) -> Access {
        self.access
    }

    fn open_queue(&self, _depth: u32, _event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        let _ = &self.fd;
        Err(crate::NoUring {
            reason: "not built yet".into(),
        }
        .into())
    }

    fn read_at(&self, _offset: u64, _data: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        Ok((from < self.size).then_some(from..self.size))
    }

    fn is_removed(&self) -> Result<bool> {
        Ok(false)
    }
}
