//! A writer that knows what it wrote.
//!
//! Each 512-byte sector that is written says where it belongs, in which run and by which write of
//! that run it was written, and the rest of it follows from those three ([`sector`]). So a sector
//! that is lost, stale, misplaced, torn or damaged is told from a good one by looking at it, given
//! what was acknowledged last for its place. That knowledge is one number for each 4 KiB block
//! ([`map`]): never written, zeroes, or the number of the last acknowledged write.
//!
//! # Threads of a run
//! * `--threads` writers. The disk is divided into chunks of 1 MiB; chunk `n` belongs to writer
//!   `n mod threads` alone, which writes, discards, reads and checks in its chunks one operation
//!   at a time. So there never are two operations on a block at once, whose outcome would be
//!   undefined.
//! * the main thread prints progress, waits for the end, and every few seconds makes a checkpoint.
//! * one that reads standard input for the word `stop`.
//!
//! # What is shared
//! The map: one atomic number for each block, stored (release) by its writer after the write was
//! acknowledged, loaded (acquire) by the main thread for checkpoints. A checkpoint loads all
//! numbers, *then* flushes the disk, *then* writes what it loaded to one of two places at the end
//! of the disk. So whatever is killed at whatever instant, the newest whole map on the disk names
//! writes that were acknowledged before a completed flush, and the disk must still have those or
//! newer ones. A run that ends in order leaves a map that is exact.

pub mod device;
pub mod map;
pub mod run;
pub mod sector;
pub mod verify;

/// The unit of writes, and of the map.
pub const BLOCK: u64 = 4096;
/// [`BLOCK`] for lengths in memory.
pub const BLOCK_LEN: usize = 4096;
/// What belongs to one writer.
pub const CHUNK_BLOCKS: u64 = 256;
/// Chunks whose number leaves this remainder when divided by 4 are where discards happen.
pub const DISCARD_CHUNK: u64 = 3;

/// Whether discards may happen to a block.
#[must_use]
pub const fn in_discard_area(block: u64) -> bool {
    block / CHUNK_BLOCKS % 4 == DISCARD_CHUNK
}

#[cfg(test)]
mod tests;
