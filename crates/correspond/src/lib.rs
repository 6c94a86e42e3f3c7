//! Which pages of a guest's memory equal which blocks of its disks.
//!
//! A guest that reads a file has the same bytes in its memory and on its disk. Whoever knows that
//! need not write the page to swap, and can read it back from the disk. This store knows it,
//! exactly: what it says is so, or it does not say it.
//!
//! # What it keeps
//!
//! * Forward, for each page of 4 KiB one word of 8 bytes: disk, block, and the block's generation
//!   when the page was read from it.
//! * For each 64 KiB of a disk a generation of 4 bytes, raised whenever anything there may change:
//!   when a write, a discard or a write of zeroes begins, and again when it ends.
//! * For each 64 KiB of a disk that is being written, how many writes are under way; and for each
//!   that is the only home of a page, how many such pages ([`Store::rely`]). Both are small: queue
//!   depth and evicted pages bound them.
//!
//! There is no way back from a block to its pages but to search the pages; that happens only when a
//! block is written that is the only home of a page, and when somebody asks.
//!
//! A word that no longer fits is never cleaned up: its generation is not the block's any more, so it
//! says nothing. The 26 bits of generation in a word come round after 67 million changes of one
//! block; words of that block are removed then.
//!
//! # What it relies on
//!
//! Everyone who changes a disk's data reports it ([`Store::begin_write`] … [`Store::end_write`]);
//! a disk that somebody else can write to is taken out ([`Store::remove_disk`]). Whether a *page*
//! was written since it was recorded, the store does not know: the pager does, from the page tables,
//! and says so ([`Store::page_written`]), or asks only about pages that were not.
//!
//! A disk is what the guest sees, not the files behind it: a migration that switches, a snapshot and
//! a consolidation move its data block for block, and nothing that is said here changes by it.
//!
//! # Order of a guest's read and write
//!
//! ```text
//! read:   begin_read ─▶ transfer ─▶ write-protect the page ─▶ record ─▶ tell the guest
//! write:  begin_write ─▶ bring back pages that rely on the blocks ─▶ transfer ─▶ end_write
//! evict:  unmap ─▶ rely (says yes or no) ─▶ take the page out of memory
//! ```
//! A write that begins before [`Store::rely`] makes it say no; one that begins after is handed the
//! page by [`Store::begin_write`] and waits for it. Both are one step under the store's lock.

mod disks;
pub mod observations;
mod store;
mod words;

pub use disks::{DiskId, PAGE, REGION};
pub use store::{Blocks, Counts, Place, Reading, Store, WriteTicket};
