//! Which blocks were written since they were last copied.
//!
//! One bit per 16 KiB: 8 MiB per TiB of disk. A job has four at most (what was written, what the
//! last pass copied, and in a later pass what it leaves and what it copies), so 32 MiB per TiB. Two
//! sides use one at the same time, without a lock:
//!
//! * whoever *completes* a change marks its blocks, after the change has reached the image and
//!   before anyone is told;
//! * the copier clears a block's bit, *then* reads the block.
//!
//! ```text
//!   guest:   write reaches image ─► mark (release) ─► guest is told
//!   copier:  clear (acquire+release) ─► read the image ─► write the copy
//! ```
//!
//! Both are read-modify-write operations on the same word, so they have one order. If the mark
//! came first, the copier's later read sees the change. If the clear came first, the bit is set
//! afterwards and the block will be copied again. Either way nothing is lost; at worst a block is
//! copied once more than needed. `tests/models.rs` checks this under random interleavings.

use strake_observe::Result;

use crate::NoBitmap;
use crate::sync::{AtomicU64, Ordering};

/// Bytes per bit. It keeps one bitmap of a TiB at 8 MiB. Random writes of 4 KiB make four times
/// less to copy than with 64 KiB, while still smaller blocks would save nothing: below this size a
/// device is busy with the request and not with its data.
pub const BLOCK_BYTES: u64 = 16 * 1024;

const WORD_BITS: u64 = 64;

const WORD_BYTES: u64 = WORD_BITS / 8;

/// See the module.
#[derive(Debug)]
pub struct DirtyBitmap {
    size: u64,
    blocks: u64,
    words: Vec<AtomicU64>,
    /// How many bits are set. It follows the words, so for a moment it may be off, even below zero.
    marked: AtomicU64,
}

/// The words of a bitmap are found by block numbers below `blocks`, so this never fails.
fn index(word: u64) -> usize {
    usize::try_from(word).unwrap_or(usize::MAX)
}

impl DirtyBitmap {
    /// A bitmap for `size` bytes, nothing marked.
    ///
    /// # Errors
    /// When there is no memory for it: it grows with the disk, whose size somebody else chose.
    pub fn new(size: u64) -> Result<Self> {
        let blocks = size.div_ceil(BLOCK_BYTES);
        let count = blocks.div_ceil(WORD_BITS);
        let mut words = Vec::new();
        usize::try_from(count)
            .ok()
            .and_then(|count| words.try_reserve_exact(count).ok())
            .ok_or(NoBitmap {
                bytes: count.saturating_mul(WORD_BYTES),
                size,
            })?;
        words.extend((0..count).map(|_| AtomicU64::new(0)));
        Ok(Self {
            size,
            blocks,
            words,
            marked: AtomicU64::new(0),
        })
    }

    /// How many blocks it has.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The bytes of a block: [`BLOCK_BYTES`], fewer for the last one.
    #[must_use]
    pub fn block_len(&self, block: u64) -> u64 {
        let start = block.saturating_mul(BLOCK_BYTES);
        self.size.saturating_sub(start).min(BLOCK_BYTES)
    }

    /// Marks every block that `len` bytes from `offset` touch.
    pub fn mark(&self, offset: u64, len: u64) {
        if len == 0 || offset >= self.size {
            return;
        }
        let first = offset / BLOCK_BYTES;
        let last = (offset.saturating_add(len).min(self.size) - 1) / BLOCK_BYTES;
        for word in first / WORD_BITS..=last / WORD_BITS {
            let base = word * WORD_BITS;
            let from = first.max(base) - base;
            let to = last.min(base + WORD_BITS - 1) - base;
            let mask = (u64::MAX >> (WORD_BITS - 1 - (to - from))) << from;
            if let Some(word) = self.words.get(index(word)) {
                // Always the read-modify-write, even if the bits are set already: only that
                // orders it against a copier that is just clearing them.
                let before = word.fetch_or(mask, Ordering::AcqRel);
                let new = (mask & !before).count_ones();
                if new > 0 {
                    self.marked.fetch_add(u64::from(new), Ordering::AcqRel);
                }
            }
        }
    }

    /// Clears a block's bit and says whether it was set. The block is read after this.
    #[must_use]
    pub fn take(&self, block: u64) -> bool {
        let mask = 1u64 << (block % WORD_BITS);
        let was = self
            .words
            .get(index(block / WORD_BITS))
            .is_some_and(|word| word.fetch_and(!mask, Ordering::AcqRel) & mask != 0);
        if was {
            self.marked.fetch_sub(1, Ordering::AcqRel);
        }
        was
    }

    /// Whether a block's bit is set.
    #[must_use]
    pub fn is_marked(&self, block: u64) -> bool {
        let mask = 1u64 << (block % WORD_BITS);
        self.words
            .get(index(block / WORD_BITS))
            .is_some_and(|word| word.load(Ordering::Acquire) & mask != 0)
    }

    /// Whether every block that `len` bytes from `offset` touch is marked.
    #[must_use]
    pub fn all_marked(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len).min(self.size);
        (offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).all(|block| self.is_marked(block))
    }

    /// The first marked block at or after `from`.
    #[must_use]
    pub fn next_marked(&self, from: u64) -> Option<u64> {
        let mut word = from / WORD_BITS;
        let mut keep = u64::MAX << (from % WORD_BITS);
        while let Some(bits) = self.words.get(index(word)) {
            let bits = bits.load(Ordering::Acquire) & keep;
            if bits != 0 {
                return Some(word * WORD_BITS + u64::from(bits.trailing_zeros()));
            }
            word += 1;
            keep = u64::MAX;
        }
        None
    }

    /// How many blocks are marked. Exact only while nobody marks.
    #[must_use]
    pub fn marked(&self) -> u64 {
        let marked = self.marked.load(Ordering::Acquire);
        // A bit that was cleared before it was counted.
        if marked > u64::MAX / 2 { 0 } else { marked }
    }

    /// How many bytes the marked blocks have at most.
    #[must_use]
    pub fn marked_bytes(&self) -> u64 {
        self.marked().saturating_mul(BLOCK_BYTES).min(self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_that_finds_no_memory_is_an_observation() {
        let seen = DirtyBitmap::new(u64::MAX).unwrap_err();
        assert!(seen.is::<NoBitmap>(), "{seen}");
    }
}
