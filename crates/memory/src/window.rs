//! The pager's own mapping of the memfd, beside the guest's.
//!
//! It is not watched by the userfaultfd, so the pager reads and writes pages here that the guest
//! cannot see: a page is filled here before it is mapped for the guest, and written out from here
//! after it was unmapped. Reading a page here that the memfd does not hold would put a zero page
//! there; who reads knows that it holds it.
//!
//! Content is copied, never borrowed: a page may be handed back to the guest, which then writes to
//! it, while somebody here still looks at it. Whoever copies finds out afterwards and drops what he
//! has.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::FallocateFlags;
use strake_observe::{OsContext, Result};

use crate::PAGE;
use crate::uffd::Span;

/// The content of one page.
pub type Page = [u8; 4096];

/// The memfd, its guest mapping and the pager's own.
#[derive(Debug)]
pub(crate) struct Window {
    memfd: OwnedFd,
    base: NonNull<u8>,
    pages: usize,
    /// Where the guest's mapping has which part of the memfd: first page, pages, address.
    guest: Vec<(usize, usize, u64)>,
}

// SAFETY: an address of memory that lives as long as the value, accessed by copies only.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Maps all of the memfd, whose guest mapping consists of `guest`: offset, bytes, address.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn map(memfd: OwnedFd, size: u64, guest: &[(u64, u64, u64)]) -> Result<Self> {
        let bytes = usize::try_from(size).unwrap_or(usize::MAX);
        // SAFETY: a new mapping at an address that the kernel picks.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                memfd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).os("mmap", "the pager's view of guest memory");
        }
        let base = NonNull::new(base.cast())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
            .os("mmap", "the pager's view of guest memory")?;
        let index = |bytes: u64| usize::try_from(bytes / PAGE).unwrap_or(usize::MAX);
        Ok(Self {
            memfd,
            base,
            pages: index(size),
            guest: guest
                .iter()
                .map(|(offset, bytes, address)| (index(*offset), index(*bytes), *address))
                .collect(),
        })
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// The page that the guest's mapping has at `address`.
    pub(crate) fn page_at(&self, address: u64) -> Option<usize> {
        self.guest.iter().find_map(|(first, pages, start)| {
            let index = usize::try_from(address.checked_sub(*start)? / PAGE).ok()?;
            (index < *pages).then_some(first + index)
        })
    }

    /// Where the guest's mapping has `count` pages from `page` on, which must lie in one part.
    pub(crate) fn span(&self, page: usize, count: usize) -> Span {
        let start = self
            .guest
            .iter()
            .find(|(first, pages, _)| (*first..first + pages).contains(&page))
            .map_or(0, |(first, _, start)| start + (page - first) as u64 * PAGE);
        Span {
            start,
            len: count as u64 * PAGE,
        }
    }

    /// The parts of the guest's mapping: first page, pages.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.guest.iter().map(|(first, pages, _)| (*first, *pages))
    }

    /// The address of `count` pages from `page` on, for a transfer by the kernel. `None` if there
    /// are not so many.
    pub(crate) fn address(&self, page: usize, count: usize) -> Option<*mut u8> {
        (page.checked_add(count)? <= self.pages)
            // SAFETY: within the mapping.
            .then(|| unsafe { self.base.as_ptr().add(page * 4096) })
    }

    /// Copies a page out.
    pub(crate) fn read(&self, page: usize, into: &mut Page) {
        if let Some(from) = self.address(page, 1) {
            // SAFETY: both are 4096 bytes, and they do not overlap. The guest may write meanwhile,
            // which the module comment speaks of; bytes are copied, nothing is made of them.
            unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), 4096) }
        }
    }

    /// Copies a page in.
    pub(crate) fn write(&self, page: usize, from: &Page) {
        if let Some(into) = self.address(page, 1) {
            // SAFETY: both are 4096 bytes and do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, 4096) }
        }
    }

    /// Unmaps pages from the guest; they stay in the memfd, and pages that were clean are marked.
    pub(crate) fn zap(&self, page: usize, count: usize) -> io::Result<()> {
        let span = self.span(page, count);
        if span.start == 0 {
            return Ok(());
        }
        // SAFETY: the range is a part of the guest's mapping of the memfd, of which no reference
        // exists; its content stays in the memfd.
        let done = unsafe {
            libc::madvise(
                span.start as *mut libc::c_void,
                usize::try_from(span.len).unwrap_or(0),
                libc::MADV_DONTNEED,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Reads a byte of a page as the guest would, waiting for it if it is not in memory.
    pub(crate) fn touch(&self, page: usize) {
        let span = self.span(page, 1);
        if span.start != 0 {
            // SAFETY: a byte of the guest's mapping, which lives as long as the pager; what it is
            // does not matter.
            unsafe { std::ptr::read_volatile(span.start as *const u8) };
        }
    }

    /// Takes pages out of the memfd.
    pub(crate) fn punch(&self, page: usize, count: usize) -> io::Result<()> {
        Ok(rustix::fs::fallocate(
            self.memfd.as_fd(),
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            page as u64 * PAGE,
            count as u64 * PAGE,
        )?)
    }

    /// The runs of pages that the memfd holds: first page, pages.
    pub(crate) fn held(&self) -> io::Result<Vec<(usize, usize)>> {
        use rustix::fs::SeekFrom;
        let size = self.pages as u64 * PAGE;
        let mut runs = Vec::new();
        let mut at = 0;
        while at < size {
            let start = match rustix::fs::seek(self.memfd.as_fd(), SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let end = rustix::fs::seek(self.memfd.as_fd(), SeekFrom::Hole(start))?.min(size);
            let first = usize::try_from(start / PAGE).unwrap_or(0);
            let last = usize::try_from(end.div_ceil(PAGE)).unwrap_or(0);
            runs.push((first, last - first));
            at = end;
        }
        Ok(runs)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: our own mapping; rings that transfer into it hold an `Arc` of this value.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.pages * 4096);
        }
    }
}
