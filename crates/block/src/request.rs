//! What a guest asks of its disk.
#![allow(unsafe_code)]

/// A piece of memory that a request reads into or writes from.
///
/// It is a raw range because guest memory is written by the guest at any time; nothing here makes
/// a reference to it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Buffer(libc::iovec);

// SAFETY: a `Buffer` is an address and a length; whoever made it promised in `Buffer::new` that the
// memory may be accessed from any thread.
unsafe impl Send for Buffer {}
// SAFETY: as above; a shared `Buffer` gives nothing but its address and length.
unsafe impl Sync for Buffer {}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({:p}, {})", self.0.iov_base, self.0.iov_len)
    }
}

impl Buffer {
    /// The `len` bytes from `start`.
    ///
    /// # Safety
    /// The memory must stay mapped, readable (and writable for a read request) until the request
    /// that carries it was reaped or the queue that it was submitted to was dropped. Others may
    /// change it meanwhile; what a write then stores is any mix of old and new bytes.
    #[must_use]
    pub unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> usize {
        self.0.iov_base as usize
    }

    /// The part of it from `skip` on, at most `take` bytes.
    #[must_use]
    pub fn part(&self, skip: usize, take: usize) -> Self {
        let skip = skip.min(self.len());
        Self(libc::iovec {
            // SAFETY: `skip` is at most the length, so the address is within the range or one past.
            iov_base: unsafe { self.0.iov_base.cast::<u8>().add(skip) }.cast(),
            iov_len: (self.len() - skip).min(take),
        })
    }

    /// Copies its bytes to `to`, as many as fit in both, and says how many.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let count = self.len().min(to.len());
        // SAFETY: the maker of the buffer promised that it is readable; `to` is our own memory, so
        // the two do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(self.0.iov_base.cast::<u8>(), to.as_mut_ptr(), count);
        }
        count
    }

    /// Copies `from` into it, as many bytes as fit in both, and says how many.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let count = self.len().min(from.len());
        // SAFETY: as in `copy_to`, for writing.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.0.iov_base.cast::<u8>(), count);
        }
        count
    }
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reads into the buffers.
    Read,
    /// Writes from the buffers.
    Write,
    /// Makes every write that was completed before durable. Takes no buffers and no offset.
    Flush,
    /// Tells that the range is no longer needed; it may read as anything afterwards, zeroes
    /// wherever the image can.
    Discard {
        /// Bytes.
        len: u64,
    },
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// Bytes.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
    },
}

impl Operation {
    /// Whether it may change the image's content.
    #[must_use]
    pub fn changes(self) -> bool {
        match self {
            Self::Read | Self::Flush => false,
            Self::Write | Self::Discard { .. } | Self::WriteZeroes { .. } => true,
        }
    }

    /// Its name for observations.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard { .. } => "discard",
            Self::WriteZeroes { .. } => "write-zeroes",
        }
    }
}

/// One request.
#[derive(Debug, Clone)]
pub struct Request {
    /// The submitter's own name for it, given back when it is reaped.
    pub tag: u64,
    /// What to do.
    pub op: Operation,
    /// Where in the image, in bytes; a multiple of [`SECTOR_BYTES`](crate::SECTOR_BYTES).
    pub offset: u64,
    /// The memory, for [`Operation::Read`] and [`Operation::Write`]; together a multiple of
    /// [`SECTOR_BYTES`](crate::SECTOR_BYTES). Any alignment; aligned memory is faster.
    pub buffers: Vec<Buffer>,
}

impl Request {
    /// How many bytes of the image it is about.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self.op {
            Operation::Read | Operation::Write => self
                .buffers
                .iter()
                .fold(0u64, |sum, buffer| sum.saturating_add(buffer.len() as u64)),
            Operation::Flush => 0,
            Operation::Discard { len } | Operation::WriteZeroes { len, .. } => len,
        }
    }

    /// Whether it is about no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
