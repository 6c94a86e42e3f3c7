//! PAGEMAP_SCAN: which pages of a range were not written since they were write-protected.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use strake_observe::{OsContext, Result};

use crate::uffd::Span;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const WRITTEN: u64 = 1 << 1;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;

/// Ranges that one call returns.
const BATCH: usize = 64;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    inverted: u64,
    mask: u64,
    any_of: u64,
    returned: u64,
}

/// This process's page tables, to be looked at.
#[derive(Debug)]
pub struct Pagemap(OwnedFd);

impl Pagemap {
    /// Opens this process's own.
    ///
    /// # Errors
    /// There is no `/proc`, or it may not be looked at.
    pub fn open() -> Result<Self> {
        let path = "/proc/self/pagemap";
        let file = std::fs::File::open(path).os("open", path)?;
        Ok(Self(file.into()))
    }

    /// One that was opened elsewhere, for this process.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The ranges of `span` that are mapped, or were when they were zapped, and were not written
    /// since they were armed.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn clean(&self, span: Span, each: &mut dyn FnMut(Span)) -> io::Result<()> {
        // Mapped pages are "present", zapped ones have left a mark that counts as "swapped"; a
        // page that was written before its zap has left none.
        let end = span.start + span.len;
        let mut start = span.start;
        while start < end {
            let mut regions = [Region::default(); BATCH];
            let mut arg = Scan {
                size: size_of::<Scan>() as u64,
                start,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: BATCH as u64,
                inverted: WRITTEN,
                mask: WRITTEN,
                any_of: PRESENT | SWAPPED,
                returned: PRESENT | SWAPPED | WRITTEN,
                ..Scan::default()
            };
            // SAFETY: the argument is what the call takes, and the vector that it points to is as
            // long as it says; both live over the call.
            let found = unsafe {
                libc::ioctl(
                    self.0.as_raw_fd(),
                    PAGEMAP_SCAN,
                    std::ptr::from_mut(&mut arg),
                )
            };
            let Ok(found) = usize::try_from(found) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            for region in regions.iter().take(found) {
                each(Span {
                    start: region.start,
                    len: region.end - region.start,
                });
            }
            if arg.walk_end <= start {
                break;
            }
            start = arg.walk_end;
        }
        Ok(())
    }
}
