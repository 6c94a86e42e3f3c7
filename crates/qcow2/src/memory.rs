//! Page-aligned memory for direct I/O, and guest memory in pieces.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use strake_block::Buffer;

/// Satisfies every O_DIRECT requirement that Linux has.
const PAGE: usize = 4096;

/// A page-aligned piece of memory, zeroed at first.
pub(crate) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
    len: usize,
}

// SAFETY: it owns its memory alone, like a `Box<[u8]>`.
unsafe impl Send for Memory {}
// SAFETY: shared access gives only `&[u8]`.
unsafe impl Sync for Memory {}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({})", self.len)
    }
}

impl Memory {
    pub(crate) fn new(len: usize) -> Self {
        let room = len.max(1).next_multiple_of(PAGE);
        let layout = Layout::from_size_align(room, PAGE).unwrap_or(Layout::new::<[u8; PAGE]>());
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        let len = len.min(layout.size());
        Self { start, layout, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised and at least of this size.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// All of it for a request. The queue, the only caller, keeps `self` until the queue that
    /// has the request has handed it back or was dropped, and does not look at it meanwhile.
    pub(crate) fn buffer(&self) -> Buffer {
        // SAFETY: within our memory, which outlives the request (see above).
        unsafe { Buffer::new(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// The part of a request's memory from `skip` on, `take` bytes.
pub(crate) fn part(buffers: &[Buffer], skip: u64, take: u64) -> Vec<Buffer> {
    let (mut skip, mut take) = (crate::num::us(skip), crate::num::us(take));
    let mut parts = Vec::new();
    for buffer in buffers {
        if take == 0 {
            break;
        }
        if skip >= buffer.len() {
            skip -= buffer.len();
            continue;
        }
        let part = buffer.part(skip, take);
        skip = 0;
        take -= part.len();
        parts.push(part);
    }
    parts
}

/// Fills a request's memory.
pub(crate) fn fill(buffers: &[Buffer], mut from: &[u8]) {
    for buffer in buffers {
        let count = buffer.copy_from(from);
        from = from.get(count..).unwrap_or_default();
    }
}

/// Zeroes a request's memory.
pub(crate) fn clear(buffers: &[Buffer]) {
    const ZEROES: [u8; PAGE] = [0; PAGE];
    for buffer in buffers {
        let mut at = 0;
        while at < buffer.len() {
            at += buffer.part(at, PAGE).copy_from(&ZEROES);
        }
    }
}
