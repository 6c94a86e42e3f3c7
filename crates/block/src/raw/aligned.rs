//! Memory with an alignment that every device accepts.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use crate::Buffer;

/// The alignment: a page, which satisfies every O_DIRECT requirement that Linux has.
pub(crate) const PAGE: usize = 4096;

/// A page-aligned piece of memory, zeroed at first.
pub(crate) struct Aligned {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory alone, like a `Box<[u8]>`.
unsafe impl Send for Aligned {}
// SAFETY: shared access gives only `&[u8]`.
unsafe impl Sync for Aligned {}

impl std::fmt::Debug for Aligned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Aligned({})", self.layout.size())
    }
}

impl Aligned {
    /// `len` bytes, rounded up to whole pages, one at least.
    pub(crate) fn new(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(PAGE);
        let layout = Layout::from_size_align(len, PAGE).unwrap_or(Layout::new::<[u8; PAGE]>());
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Self { start, layout }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised and of this size.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }

    /// Its first `len` bytes for a request. The caller keeps `self` until the request has ended,
    /// and does not look at the bytes meanwhile.
    pub(crate) fn buffer(&self, len: usize) -> Buffer {
        // SAFETY: within our memory; the ring and the copier, the only callers, own `self` until
        // the request has ended.
        unsafe { Buffer::new(self.start.as_ptr(), len.min(self.layout.size())) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
