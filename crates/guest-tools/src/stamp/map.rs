//! What was acknowledged last for each block, in memory and at the end of the disk.
//!
//! The end of the disk has two slots, so that there is a whole map on it at every instant:
//!
//! ```text
//! | data … | table 0 | header 0 | table 1 | header 1 |
//! ```
//!
//! A header is one block, a table has eight bytes for each block of data. Both maps carry a
//! generation; the newest whole one counts.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::device::{Aligned, Device};
use super::sector::checksum;
use super::{BLOCK, BLOCK_LEN};

/// A block that this run has not touched: anything may be there.
pub const UNTOUCHED: u64 = 0;
/// A block that has to read as zeroes.
pub const ZEROES: u64 = 1;
/// The number of the first write; what is below has a meaning of its own.
pub const FIRST_WRITE: u64 = 2;

const MAGIC: &[u8; 8] = b"STRKMAP1";

/// Where what is on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Blocks of data, from the beginning of the disk.
    pub data: u64,
    /// Blocks of each table.
    pub table: u64,
    /// Blocks of the whole disk.
    pub all: u64,
}

impl Layout {
    /// The layout of a disk of `bytes`, of which only the first `limit` hold data.
    #[must_use]
    pub fn new(bytes: u64, limit: Option<u64>) -> Option<Self> {
        let all = bytes / BLOCK;
        let per_block = BLOCK / 8;
        // Each table is made for all blocks, so that its place does not depend on the limit.
        let table = all.div_ceil(per_block);
        let data = all.checked_sub(2 * (table + 1)).filter(|data| *data > 0)?;
        let data = limit.map_or(data, |limit| data.min(limit / BLOCK));
        (data > 0).then_some(Self { data, table, all })
    }

    fn table_at(&self, slot: u64) -> u64 {
        self.all - (2 - slot) * (self.table + 1)
    }

    fn header_at(&self, slot: u64) -> u64 {
        self.table_at(slot) + self.table
    }
}

/// What a map on a disk is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// A run has begun, and knows nothing yet.
    Begun,
    /// A checkpoint: newer writes may have followed.
    Checkpoint,
    /// The run ended in order: the map is exact.
    Complete,
}

impl State {
    fn code(self) -> u64 {
        match self {
            Self::Begun => 1,
            Self::Checkpoint => 2,
            Self::Complete => 3,
        }
    }

    fn of(code: u64) -> Option<Self> {
        [Self::Begun, Self::Checkpoint, Self::Complete]
            .into_iter()
            .find(|state| state.code() == code)
    }
}

/// A map as it is on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The run that wrote it.
    pub run: u64,
    /// Grows by one with each map of a run.
    pub generation: u64,
    /// What it is good for.
    pub state: State,
    /// One number for each block of data.
    pub blocks: Vec<u64>,
}

/// The map of a run, shared by its threads.
#[derive(Debug)]
pub struct Map(Vec<AtomicU64>);

impl Map {
    /// A map of untouched blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self((0..blocks).map(|_| AtomicU64::new(UNTOUCHED)).collect())
    }

    /// What is known of a block.
    #[must_use]
    pub fn get(&self, block: u64) -> u64 {
        usize::try_from(block)
            .ok()
            .and_then(|index| self.0.get(index))
            .map_or(UNTOUCHED, |known| known.load(Ordering::Acquire))
    }

    /// Notes what is now known of some blocks. Only their writer does.
    pub fn set(&self, first: u64, count: u64, known: u64) {
        for block in first..first + count {
            let index = usize::try_from(block).ok();
            if let Some(slot) = index.and_then(|index| self.0.get(index)) {
                slot.store(known, Ordering::Release);
            }
        }
    }

    /// All of it, at this instant or a little later for each block.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u64> {
        self.0
            .iter()
            .map(|known| known.load(Ordering::Acquire))
            .collect()
    }
}

impl Saved {
    /// Writes it to its slot and flushes. What it names must be durable already.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn write(&self, device: &Device, layout: &Layout) -> io::Result<()> {
        const STEP: usize = 256 * BLOCK_LEN;
        let slot = self.generation % 2;
        let mut bytes: Vec<u8> = self
            .blocks
            .iter()
            .flat_map(|known| known.to_le_bytes())
            .collect();
        let sum = checksum(&bytes);
        bytes.resize(bytes.len().next_multiple_of(BLOCK_LEN), 0);
        let mut buffer = Aligned::new(STEP);
        let mut at = layout.table_at(slot) * BLOCK;
        for part in bytes.chunks(STEP) {
            let into = buffer.first(part.len());
            into.copy_from_slice(part);
            device.write(at, into)?;
            at += part.len() as u64;
        }
        device.flush()?;
        let header = buffer.first(BLOCK_LEN);
        header.fill(0);
        let words = [
            u64::from_le_bytes(*MAGIC),
            self.run,
            self.generation,
            self.state.code(),
            layout.data,
            layout.all,
            sum,
        ];
        for (field, word) in header.chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        let sum = checksum(header.get(..HEADER_SUM_AT).unwrap_or_default());
        if let Some(field) = header.get_mut(HEADER_SUM_AT..HEADER_SUM_AT + 8) {
            field.copy_from_slice(&sum.to_le_bytes());
        }
        device.write(layout.header_at(slot) * BLOCK, header)?;
        device.flush()
    }

    /// The newest whole map of a disk.
    ///
    /// # Errors
    /// If the disk fails, or has no whole map.
    pub fn read(device: &Device) -> io::Result<(Self, Layout)> {
        let none = || io::Error::other("there is no whole map at the end of the disk");
        let layout = Layout::new(device.size(), None).ok_or_else(none)?;
        let mut newest: Option<(Self, Layout)> = None;
        for slot in 0..2 {
            if let Some(found) = Self::read_slot(device, layout, slot)?
                && newest
                    .as_ref()
                    .is_none_or(|(other, _)| found.0.generation > other.generation)
            {
                newest = Some(found);
            }
        }
        newest.ok_or_else(none)
    }

    fn read_slot(device: &Device, layout: Layout, slot: u64) -> io::Result<Option<(Self, Layout)>> {
        let mut buffer = Aligned::new(BLOCK_LEN);
        let header = buffer.first(BLOCK_LEN);
        device.read(layout.header_at(slot) * BLOCK, header)?;
        let word = |at: usize| {
            header
                .get(at..)
                .and_then(|from| from.first_chunk())
                .map_or(0, |raw| u64::from_le_bytes(*raw))
        };
        let sum = checksum(header.get(..HEADER_SUM_AT).unwrap_or_default());
        let state = State::of(word(24));
        let data = word(32);
        let good = header.starts_with(MAGIC)
            && word(HEADER_SUM_AT) == sum
            && data <= layout.data
            && word(40) == layout.all;
        let (true, Some(state)) = (good, state) else {
            return Ok(None);
        };
        let (run, generation, table_sum) = (word(8), word(16), word(48));
        let mut bytes = Vec::new();
        let mut at = layout.table_at(slot) * BLOCK;
        let length = usize::try_from(data * 8).unwrap_or(0);
        while bytes.len() < length {
            let block = buffer.first(BLOCK_LEN);
            device.read(at, block)?;
            bytes.extend_from_slice(block);
            at += BLOCK;
        }
        bytes.truncate(length);
        if checksum(&bytes) != table_sum {
            return Ok(None);
        }
        let blocks = bytes
            .chunks_exact(8)
            .filter_map(|raw| raw.first_chunk())
            .map(|raw| u64::from_le_bytes(*raw))
            .collect();
        let saved = Self {
            run,
            generation,
            state,
            blocks,
        };
        Ok(Some((saved, Layout { data, ..layout })))
    }
}

const HEADER_SUM_AT: usize = 56;
