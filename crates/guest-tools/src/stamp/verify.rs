//! Checks of what is on the disk against what was acknowledged.

use std::io;

use super::device::{Aligned, Device};
use super::map::{FIRST_WRITE, Saved, State, UNTOUCHED, ZEROES};
use super::sector::{Fault, PER_BLOCK, SECTOR, Stamp};
use super::{BLOCK, BLOCK_LEN, in_discard_area};

/// Faults that are kept with their details; the rest is counted.
pub const KEPT_FAULTS: usize = 20;

/// How exact the map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// Nothing was written since.
    Exact,
    /// Later writes and discards may have followed, whole or in part.
    AtLeast,
}

/// One bad sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bad {
    /// Its number.
    pub sector: u64,
    /// The acknowledged write, or [`ZEROES`].
    pub expected: u64,
    /// What is wrong.
    pub fault: Fault,
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "sector {} (byte {}): {}",
            self.sector,
            self.sector * 512,
            self.fault
        )?;
        match self.expected {
            ZEROES => write!(f, ", expected zeroes"),
            write => write!(f, ", expected write {write}"),
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Sectors whose stamp was right.
    pub stamped: u64,
    /// Sectors that were zeroes, as expected.
    pub zeroes: u64,
    /// How many were bad.
    pub bad: u64,
    /// Blocks of which some sectors were right and others stale or lost.
    pub torn: u64,
    /// The first of the bad ones.
    pub faults: Vec<Bad>,
}

impl Report {
    /// Adds another report.
    pub fn add(&mut self, other: Self) {
        self.stamped += other.stamped;
        self.zeroes += other.zeroes;
        self.bad += other.bad;
        self.torn += other.torn;
        let room = KEPT_FAULTS.saturating_sub(self.faults.len());
        self.faults.extend(other.faults.into_iter().take(room));
    }
}

/// Checks the bytes of one block against what is known of it.
#[must_use]
pub fn block(bytes: &[u8], run: u64, block: u64, known: u64, strictness: Strictness) -> Report {
    let mut report = Report::default();
    if known == UNTOUCHED {
        return report;
    }
    for (sector, bytes) in (block * PER_BLOCK..).zip(bytes.chunks_exact(SECTOR)) {
        let zeroes = bytes.iter().all(|byte| *byte == 0);
        let result = if known == ZEROES {
            match (zeroes, strictness) {
                (true, _) => Ok(()),
                (false, Strictness::Exact) => Err(Fault::NotZero),
                (false, Strictness::AtLeast) => newer(bytes, run, sector, FIRST_WRITE),
            }
        } else {
            match strictness {
                Strictness::Exact => Stamp {
                    run,
                    sector,
                    write: known,
                }
                .check(bytes),
                Strictness::AtLeast if zeroes && in_discard_area(block) => Ok(()),
                Strictness::AtLeast => newer(bytes, run, sector, known),
            }
        };
        match result {
            Ok(()) if zeroes => report.zeroes += 1,
            Ok(()) => report.stamped += 1,
            Err(fault) => {
                report.bad += 1;
                if report.faults.len() < KEPT_FAULTS {
                    report.faults.push(Bad {
                        sector,
                        expected: known,
                        fault,
                    });
                }
            }
        }
    }
    let partial = report.bad > 0 && report.bad < PER_BLOCK;
    let old = report.faults.iter().any(|bad| {
        matches!(
            bad.fault,
            Fault::Stale { .. } | Fault::Lost | Fault::Unacknowledged { .. }
        )
    });
    report.torn = u64::from(partial && old);
    report
}

/// Whether a sector is of the given write or a later one.
fn newer(bytes: &[u8], run: u64, sector: u64, least: u64) -> Result<(), Fault> {
    let expected = Stamp {
        run,
        sector,
        write: least,
    };
    match expected.check(bytes) {
        Err(Fault::Unacknowledged { .. }) => Ok(()),
        other => other,
    }
}

/// Checks all blocks of a disk that were touched.
///
/// # Errors
/// If the disk cannot be read.
pub fn disk(
    device: &Device,
    run: u64,
    blocks: &[u64],
    strictness: Strictness,
) -> io::Result<Report> {
    const STEP: usize = 256;
    let mut report = Report::default();
    let mut buffer = Aligned::new(STEP * BLOCK_LEN);
    for (first, known) in (0..).step_by(STEP).zip(blocks.chunks(STEP)) {
        if known.iter().all(|known| *known == UNTOUCHED) {
            continue;
        }
        let bytes = buffer.first(known.len() * BLOCK_LEN);
        device.read(first * BLOCK, bytes)?;
        for ((number, known), bytes) in (first..).zip(known).zip(bytes.chunks_exact(BLOCK_LEN)) {
            report.add(block(bytes, run, number, *known, strictness));
        }
    }
    Ok(report)
}

/// Checks an image by the newest map that is on it.
///
/// # Errors
/// If it cannot be read, has no map, or only that of a run that had just begun.
pub fn image(device: &Device) -> io::Result<(Saved, Report)> {
    let (saved, _) = Saved::read(device)?;
    let strictness = match saved.state {
        State::Begun => {
            return Err(io::Error::other(
                "the run on it ended before its first checkpoint: nothing can be checked",
            ));
        }
        State::Checkpoint => Strictness::AtLeast,
        State::Complete => Strictness::Exact,
    };
    let report = disk(device, saved.run, &saved.blocks, strictness)?;
    Ok((saved, report))
}
