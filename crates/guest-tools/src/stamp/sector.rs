//! One stamped sector.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..8 | `STRKSTMP` |
//! | 8..16 | the run |
//! | 16..24 | its own number on the disk |
//! | 24..32 | the number of the write |
//! | 32..504 | pseudo-random bytes that follow from the three |
//! | 504..512 | checksum of all before |
//!
//! Numbers are little-endian.

use std::fmt;

use crate::random::{Random, mix};

/// The size of a sector.
pub const SECTOR: usize = 512;
/// Sectors of a block.
pub const PER_BLOCK: u64 = 8;

const MAGIC: u64 = u64::from_le_bytes(*b"STRKSTMP");
const CHECKSUM_AT: usize = SECTOR - 8;

/// What a sector says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The run that wrote it.
    pub run: u64,
    /// Its number on the disk.
    pub sector: u64,
    /// The number of the write, from [`FIRST_WRITE`](super::map::FIRST_WRITE) on.
    pub write: u64,
}

/// What is wrong with a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Zeroes where a stamp was expected.
    Lost,
    /// Something where zeroes were expected.
    NotZero,
    /// No stamp at all.
    Foreign,
    /// A stamp whose bytes do not fit it.
    Damaged {
        /// What it claims to be.
        stamp: Stamp,
    },
    /// A good stamp of another run.
    OtherRun {
        /// Which one.
        run: u64,
    },
    /// A good stamp of another place.
    Misplaced {
        /// Whose it is.
        sector: u64,
    },
    /// A good stamp of an earlier write.
    Stale {
        /// Which one.
        write: u64,
    },
    /// A good stamp of a write that was never acknowledged.
    Unacknowledged {
        /// Which one.
        write: u64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost => write!(f, "lost: it is zeroes"),
            Self::NotZero => write!(f, "not zeroes after a discard"),
            Self::Foreign => write!(f, "foreign: it has no stamp"),
            Self::Damaged { stamp } => write!(
                f,
                "damaged: the checksum does not fit (claims sector {} write {})",
                stamp.sector, stamp.write
            ),
            Self::OtherRun { run } => write!(f, "of another run ({run:#x})"),
            Self::Misplaced { sector } => write!(f, "misplaced: it belongs to sector {sector}"),
            Self::Stale { write } => write!(f, "stale: it is of write {write}"),
            Self::Unacknowledged { write } => {
                write!(f, "of write {write}, which was not acknowledged")
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|from| from.first_chunk())
        .map_or(0, |raw| u64::from_le_bytes(*raw))
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(field) = bytes.get_mut(at..).and_then(|from| from.first_chunk_mut()) {
        *field = value.to_le_bytes();
    }
}

/// A checksum over words: any change of one bit, and any exchange of two words, changes it.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0x5354_5241_4b45, |sum: u64, chunk| {
        let mut raw = [0; 8];
        for (to, from) in raw.iter_mut().zip(chunk) {
            *to = *from;
        }
        mix(sum.rotate_left(7) ^ u64::from_le_bytes(raw))
    })
}

impl Stamp {
    /// Writes the sector into `into`, which has [`SECTOR`] bytes.
    pub fn fill(&self, into: &mut [u8]) {
        put(into, 0, MAGIC);
        put(into, 8, self.run);
        put(into, 16, self.sector);
        put(into, 24, self.write);
        let mut random = Random::new(mix(self.run) ^ mix(self.sector ^ mix(self.write)));
        for at in (32..CHECKSUM_AT).step_by(8) {
            put(into, at, random.word());
        }
        let sum = into.get(..CHECKSUM_AT).map_or(0, checksum);
        put(into, CHECKSUM_AT, sum);
    }

    /// The stamp of a sector.
    ///
    /// # Errors
    /// [`Fault::Lost`], [`Fault::Foreign`] or [`Fault::Damaged`].
    pub fn read(sector: &[u8]) -> Result<Self, Fault> {
        if word(sector, 0) != MAGIC {
            let empty = sector.iter().all(|byte| *byte == 0);
            return Err(if empty { Fault::Lost } else { Fault::Foreign });
        }
        let stamp = Self {
            run: word(sector, 8),
            sector: word(sector, 16),
            write: word(sector, 24),
        };
        let sum = sector.get(..CHECKSUM_AT).map_or(0, checksum);
        if sum == word(sector, CHECKSUM_AT) {
            Ok(stamp)
        } else {
            Err(Fault::Damaged { stamp })
        }
    }

    /// Whether a sector is the one that this stamp describes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, sector: &[u8]) -> Result<(), Fault> {
        let found = Self::read(sector)?;
        if found.run != self.run {
            return Err(Fault::OtherRun { run: found.run });
        }
        if found.sector != self.sector {
            return Err(Fault::Misplaced {
                sector: found.sector,
            });
        }
        match found.write.cmp(&self.write) {
            std::cmp::Ordering::Less => Err(Fault::Stale { write: found.write }),
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => Err(Fault::Unacknowledged { write: found.write }),
        }
    }
}

/// Fills `blocks` (whole blocks, the first at block `first`) with the stamps of one write.
pub fn fill(blocks: &mut [u8], run: u64, first: u64, write: u64) {
    for (sector, into) in (first * PER_BLOCK..).zip(blocks.chunks_exact_mut(SECTOR)) {
        Stamp { run, sector, write }.fill(into);
    }
}
