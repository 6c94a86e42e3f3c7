//! Memory that requests read into and write from: the server's own, and a disk's buffers.
//!
//! All `unsafe` of the crate is in here and in the two places that give these buffers to a queue.
#![allow(unsafe_code)]

use strake_block::Buffer;

/// What O_DIRECT wants buffers to be aligned to at most.
const PAGE_BYTES: usize = 4096;

/// How many bytes of unused buffers are kept.
const KEPT_BYTES: usize = 8 * 1024 * 1024;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// Page-aligned memory.
#[derive(Default)]
pub(crate) struct Pages {
    pages: Vec<Page>,
    len: usize,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pages({})", self.len)
    }
}

impl Pages {
    fn new(len: usize) -> Self {
        Self {
            pages: vec![Page([0; PAGE_BYTES]); len.div_ceil(PAGE_BYTES)],
            len,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        let start = self.pages.as_ptr().cast::<u8>();
        // SAFETY: `len` bytes of initialised pages, borrowed with `self`; `u8` has no alignment.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let start = self.pages.as_mut_ptr().cast::<u8>();
        // SAFETY: as in `bytes`, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }

    /// All of it as a request's buffer.
    ///
    /// # Safety
    /// The pages must be kept, and neither be read nor changed, until the request was reaped or
    /// its queue dropped. They may be moved: the memory is on the heap.
    pub(crate) unsafe fn buffer(&mut self) -> Buffer {
        // SAFETY: promised by the caller.
        unsafe { Buffer::new(self.pages.as_mut_ptr().cast(), self.len) }
    }
}

/// Buffers of one connection: those that are not in use are kept for the next request, as far as
/// that is little memory. What a buffer held before is never sent: it is filled as a whole, or
/// thrown away.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    kept: Vec<Pages>,
    kept_bytes: usize,
}

impl Pool {
    /// A buffer of `len` bytes.
    pub(crate) fn take(&mut self, len: usize) -> Pages {
        let wanted = len.div_ceil(PAGE_BYTES);
        // Not one that wastes more than three quarters.
        let fits = |pages: &Pages| (wanted..=wanted.saturating_mul(4)).contains(&pages.pages.len());
        match self.kept.iter().rposition(fits) {
            Some(at) => {
                let mut pages = self.kept.swap_remove(at);
                self.kept_bytes -= pages.pages.len() * PAGE_BYTES;
                pages.len = len;
                pages
            }
            None => Pages::new(len),
        }
    }

    /// Takes a buffer back.
    pub(crate) fn give(&mut self, pages: Pages) {
        let bytes = pages.pages.len() * PAGE_BYTES;
        if bytes > 0 && self.kept_bytes + bytes <= KEPT_BYTES {
            self.kept_bytes += bytes;
            self.kept.push(pages);
        }
    }
}

/// The buffers of a disk's request, seen as one range of bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scattered(Vec<Buffer>);

impl Scattered {
    pub(crate) fn new(buffers: Vec<Buffer>) -> Self {
        Self(buffers)
    }

    /// The `len` bytes from `skip` on, as a range of its own.
    pub(crate) fn part(&self, skip: usize, len: usize) -> Self {
        let mut parts = Vec::new();
        self.each(skip, len, |start, count, _| {
            // SAFETY: a piece of a buffer, under the promise of whoever made that.
            parts.push(unsafe { Buffer::new(start, count) });
        });
        Self(parts)
    }

    /// Calls `piece` with the memory of each piece of the range (start, length, and where in the
    /// range it is).
    fn each(&self, skip: usize, len: usize, mut piece: impl FnMut(*mut u8, usize, usize)) {
        let mut skip = skip;
        let mut done = 0;
        for buffer in &self.0 {
            if done == len {
                break;
            }
            if skip >= buffer.len() {
                skip -= buffer.len();
                continue;
            }
            let count = (buffer.len() - skip).min(len - done);
            // SAFETY: `skip` is less than the buffer's length.
            let start = unsafe { (buffer.address() as *mut u8).add(skip) };
            piece(start, count, done);
            done += count;
            skip = 0;
        }
    }

    /// Copies the bytes from `skip` on to `to`.
    pub(crate) fn copy_to(&self, skip: usize, to: &mut [u8]) {
        self.each(skip, to.len(), |start, count, at| {
            if let Some(to) = to.get_mut(at..at + count) {
                // SAFETY: the maker of the buffer promised that it is readable until the request
                // has ended; `to` is our own memory, so the two do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(start, to.as_mut_ptr(), count) }
            }
        });
    }

    /// Copies `from` to the bytes from `skip` on.
    pub(crate) fn copy_from(&self, skip: usize, from: &[u8]) {
        self.each(skip, from.len(), |start, count, at| {
            if let Some(from) = from.get(at..at + count) {
                // SAFETY: as in `copy_to`, for writing.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), start, count) }
            }
        });
    }

    /// Makes the `len` bytes from `skip` on zero.
    pub(crate) fn zero(&self, skip: usize, len: usize) {
        self.each(skip, len, |start, count, _| {
            // SAFETY: as in `copy_from`.
            unsafe { std::ptr::write_bytes(start, 0, count) }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_ranges() {
        let mut memory = [[0u8; 3], [0u8; 3], [0u8; 3]];
        let [one, two, three] = &mut memory;
        // SAFETY: the arrays live to the end of the test.
        let all = Scattered::new(unsafe {
            vec![
                Buffer::new(one.as_mut_ptr(), 3),
                Buffer::new(two.as_mut_ptr(), 3),
                Buffer::new(three.as_mut_ptr(), 3),
            ]
        });
        all.copy_from(0, b"abcdefghi");
        let mut out = [0u8; 5];
        all.copy_to(2, &mut out);
        assert_eq!(&out, b"cdefg");
        let part = all.part(2, 5);
        part.zero(1, 2);
        part.copy_from(4, b"X");
        let mut out = [0u8; 9];
        all.copy_to(0, &mut out);
        assert_eq!(&out, b"abc\0\0fXhi");
        // What is beyond the end is left alone.
        all.copy_from(7, b"12345");
        all.zero(9, 5);
        let mut out = [7u8; 4];
        all.copy_to(7, &mut out);
        assert_eq!(&out, b"12\x07\x07");
    }

    #[test]
    fn a_pool_gives_what_was_asked_for() {
        let mut pool = Pool::default();
        let mut first = pool.take(5000);
        assert_eq!(first.bytes().len(), 5000);
        first.bytes_mut().fill(1);
        pool.give(first);
        let again = pool.take(4096);
        assert_eq!(again.len(), 4096);
        assert_eq!(again.bytes().as_ptr() as usize % PAGE_BYTES, 0);
        assert_eq!(pool.take(100_000).bytes().len(), 100_000);
        assert_eq!(pool.take(0).bytes().len(), 0);
    }
}
