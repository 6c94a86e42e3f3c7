//! Buffers in guest memory: the only place of this crate where a guest address becomes a host
//! address.
//!
//! Guest RAM is one static mapping that its `Arc` keeps alive; nothing is unmapped while a guest
//! lives, so no page needs pinning. The guest may write to a buffer at any time, also while the
//! kernel works on it; that is why host ranges are raw addresses and never references.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use strake_block::Buffer;
use strake_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

/// Some byte of a buffer is not in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutsideMemory;

/// A piece of guest memory as a descriptor names it. It need not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes, more than none.
    pub len: u32,
}

/// The readable or the writable half of a descriptor chain, as one row of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers {
    parts: Vec<Part>,
    len: u64,
}

impl Buffers {
    /// Appends a descriptor's buffer.
    pub fn push(&mut self, part: Part) {
        if part.len > 0 {
            self.len = self.len.saturating_add(u64::from(part.len));
            self.parts.push(part);
        }
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The pieces of the `len` bytes from `skip` on, as far as they exist.
    pub fn range(&self, skip: u64, len: u64) -> impl Iterator<Item = Part> + '_ {
        let mut skip = skip;
        let mut left = len;
        self.parts.iter().filter_map(move |part| {
            let passed = skip.min(u64::from(part.len));
            skip -= passed;
            let taken = left.min(u64::from(part.len) - passed);
            left -= taken;
            // A buffer that wraps around is not in RAM and is refused as a whole or from where it
            // is; it must not be passed over.
            let gpa = part.gpa.wrapping_add(passed);
            let len = u32::try_from(taken).ok().filter(|len| *len > 0)?;
            Some(Part { gpa, len })
        })
    }

    /// Copies `data.len()` bytes out, from `skip` on.
    ///
    /// # Errors
    /// [`OutsideMemory`], also if there are not so many bytes.
    pub fn read(
        &self,
        memory: &GuestMemory,
        skip: u64,
        data: &mut [u8],
    ) -> Result<(), OutsideMemory> {
        let mut rest = data;
        for part in self.range(skip, rest.len() as u64) {
            let (now, later) = rest
                .split_at_mut_checked(part.len as usize)
                .ok_or(OutsideMemory)?;
            memory
                .read_slice(now, GuestAddress(part.gpa))
                .map_err(|_| OutsideMemory)?;
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(OutsideMemory)
        }
    }

    /// Copies `data` in, from `skip` on.
    ///
    /// # Errors
    /// [`OutsideMemory`], also if there is not so much room.
    pub fn write(&self, memory: &GuestMemory, skip: u64, data: &[u8]) -> Result<(), OutsideMemory> {
        let mut rest = data;
        for part in self.range(skip, rest.len() as u64) {
            let (now, later) = rest
                .split_at_checked(part.len as usize)
                .ok_or(OutsideMemory)?;
            memory
                .write_slice(now, GuestAddress(part.gpa))
                .map_err(|_| OutsideMemory)?;
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(OutsideMemory)
        }
    }

    /// The bytes from `skip` on, at most `len`, as buffers for the disk.
    ///
    /// # Errors
    /// [`OutsideMemory`].
    pub fn for_disk(
        &self,
        memory: &GuestMemory,
        skip: u64,
        len: u64,
    ) -> Result<Vec<Buffer>, OutsideMemory> {
        self.range(skip, len)
            .map(|part| {
                let range = HostRange::of(memory, part)?;
                // SAFETY: the range is guest RAM, which stays mapped and accessible as long as the
                // worker holds its `Arc` of it; the worker keeps that until its disk queue is
                // dropped (see `blk::worker`, where the order of the fields says so).
                Ok(unsafe { Buffer::new(range.start, range.len) })
            })
            .collect()
    }

    /// The bytes as host ranges.
    ///
    /// # Errors
    /// [`OutsideMemory`].
    pub fn host_ranges(&self, memory: &GuestMemory) -> Result<Vec<HostRange>, OutsideMemory> {
        self.parts
            .iter()
            .map(|part| HostRange::of(memory, *part))
            .collect()
    }
}

/// A piece of guest RAM where this process has it mapped. Only valid while the memory lives that
/// it was made of; it is passed to the kernel and never dereferenced.
#[derive(Debug, Clone, Copy)]
pub struct HostRange {
    start: *mut u8,
    len: usize,
}

// SAFETY: a `HostRange` is an address and a length in memory that any thread may access.
unsafe impl Send for HostRange {}

impl HostRange {
    fn of(memory: &GuestMemory, part: Part) -> Result<Self, OutsideMemory> {
        let len = part.len as usize;
        let slice = memory
            .get_slice(GuestAddress(part.gpa), len)
            .map_err(|_| OutsideMemory)?;
        Ok(Self {
            start: slice.ptr_guard_mut().as_ptr(),
            len,
        })
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn iovec(self) -> libc::iovec {
        libc::iovec {
            iov_base: self.start.cast(),
            iov_len: self.len,
        }
    }
}

/// The descriptor of an event.
pub(crate) fn as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A descriptor of somebody else's as an event that nobody waits for: neither a counter that is full
/// nor one that another reader emptied holds up a worker.
pub(crate) fn nonblocking_event(fd: OwnedFd) -> io::Result<EventFd> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    // SAFETY: the descriptor is owned here and given away; reads and writes of eight bytes are safe
    // on whatever it is.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

/// Most pieces that one system call takes.
pub(crate) const IOVEC_LIMIT: usize = 1024;

/// A list of ranges for one `readv` or `writev`, kept for reuse.
#[derive(Debug, Default)]
pub(crate) struct IoVecs(Vec<libc::iovec>);

// SAFETY: as for `HostRange`.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// `readv` from `file` into guest memory and then into `overflow`.
    ///
    /// The ranges must be of `_memory`, which the borrow keeps alive over the call.
    pub(crate) fn read(
        &mut self,
        file: BorrowedFd<'_>,
        _memory: &GuestMemory,
        ranges: impl Iterator<Item = HostRange>,
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        self.0.clear();
        self.0
            .extend(ranges.take(IOVEC_LIMIT - 1).map(HostRange::iovec));
        if !overflow.is_empty() {
            self.0.push(libc::iovec {
                iov_base: overflow.as_mut_ptr().cast(),
                iov_len: overflow.len(),
            });
        }
        let count = self.count();
        // SAFETY: the list holds ranges of guest RAM, which is mapped over this call, and of
        // `overflow`, which is borrowed exclusively; the count is that of the list.
        let done = unsafe { libc::readv(file.as_raw_fd(), self.0.as_ptr(), count) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// `writev` of guest memory to `file`.
    ///
    /// The ranges must be of `_memory`, which the borrow keeps alive over the call.
    pub(crate) fn write(
        &mut self,
        file: BorrowedFd<'_>,
        _memory: &GuestMemory,
        ranges: impl Iterator<Item = HostRange>,
    ) -> io::Result<usize> {
        self.0.clear();
        self.0
            .extend(ranges.take(IOVEC_LIMIT).map(HostRange::iovec));
        let count = self.count();
        // SAFETY: the list holds ranges of guest RAM, which is mapped over this call; the count is
        // that of the list.
        let done = unsafe { libc::writev(file.as_raw_fd(), self.0.as_ptr(), count) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.0.len()).unwrap_or(0)
    }
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
