//! Where a byte of the guest is.

use std::ops::Range;

use strake_observe::Result;

use crate::num::us;
use crate::state::{COPIED, Epoch, OFFSET, Qcow, State};

const COMPRESSED: u64 = 1 << 62;
pub(crate) const ZERO: u64 = 1;

/// What one layer says about a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Nothing: ask the layer below.
    Unallocated,
    /// It reads as zeroes; a cluster may be kept for it.
    Zero { host: Option<u64>, copied: bool },
    /// It is in the file, from this offset on.
    Data { host: u64, copied: bool },
    /// One cluster of it is compressed in the file.
    Packed { host: u64, bytes: u64 },
}

impl State {
    /// What an L2 entry says.
    pub(crate) fn decode(&self, entry: u64) -> Result<Mapping> {
        let bits = self.header.cluster_bits;
        let copied = entry & COPIED != 0;
        if entry & COMPRESSED != 0 {
            let split = 62 - (bits - 8);
            let host = entry & ((1 << split) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> split) + 1;
            let bytes = sectors * 512 - host % 512;
            return Ok(Mapping::Packed { host, bytes });
        }
        let host = entry & OFFSET;
        if !host.is_multiple_of(self.header.cluster()) {
            let what = format!("an L2 entry ({entry:#x}) does not refer to a cluster");
            return Err(self.damaged(what).into());
        }
        if entry & ZERO != 0 {
            if self.header.version < 3 {
                let what = "it uses zero clusters, which its version does not have".to_owned();
                return Err(self.damaged(what).into());
            }
            let host = (host != 0).then_some(host);
            return Ok(Mapping::Zero { host, copied });
        }
        if host == 0 {
            return Ok(Mapping::Unallocated);
        }
        if self.is_kept(host) {
            let what = format!("an L2 entry ({entry:#x}) refers to the image's own tables");
            return Err(self.damaged(what).into());
        }
        Ok(Mapping::Data { host, copied })
    }

    /// What this layer says about the byte at `offset`, and for how many of the `len` bytes from
    /// there it says the same (in a row, for data). At least one byte, if `len` is not zero.
    pub(crate) fn map(&mut self, offset: u64, len: u64) -> Result<(Mapping, u64)> {
        let bits = self.header.cluster_bits;
        let cluster = offset >> bits;
        let within = offset & ((1 << bits) - 1);
        let (index, first) = self.place(cluster);
        let in_table = 1usize << self.table_bits();
        let Some(table) = self.table(index)? else {
            let rest = ((in_table - first) as u64) << bits;
            return Ok((Mapping::Unallocated, len.min(rest - within)));
        };
        // The entries that can matter, so that the table is not borrowed while they are decoded.
        let wanted = us((within + len).div_ceil(1 << bits)).clamp(1, in_table - first);
        let start = table.entry(first);
        let mut same = 1;
        while same < wanted && follows(start, table.entry(first + same), same as u64, bits) {
            same += 1;
        }
        let mapping = match self.decode(start)? {
            Mapping::Data { host, copied } => Mapping::Data {
                host: host + within,
                copied,
            },
            Mapping::Packed { host, bytes } => {
                same = 1;
                Mapping::Packed { host, bytes }
            }
            other => other,
        };
        Ok((mapping, len.min(((same as u64) << bits) - within)))
    }
}

/// Whether the entry `steps` behind another continues its mapping.
fn follows(start: u64, next: u64, steps: u64, bits: u32) -> bool {
    if start & COMPRESSED != 0 {
        return false;
    }
    let host = start & OFFSET;
    if start & ZERO != 0 || host == 0 {
        // Only the flags count; zero clusters with and without one of their own are told apart.
        return next & !OFFSET == start & !OFFSET && (next & OFFSET == 0) == (host == 0);
    }
    next == start + (steps << bits)
}

impl Qcow {
    /// As [`State::map`], with the epoch that keeps the answer true for reading.
    pub(crate) fn map(&self, offset: u64, len: u64) -> Result<(Mapping, u64, Epoch)> {
        let mut state = self.lock();
        let (mapping, len) = state.map(offset, len)?;
        Ok((mapping, len, std::sync::Arc::clone(&state.epoch)))
    }

    /// The first range at or after `from` about which this layer says anything, and what: data,
    /// or else zeroes.
    pub(crate) fn told(&self, from: u64) -> Result<Option<(Range<u64>, Told)>> {
        let size = self.size();
        let mut at = from;
        let mut found: Option<(Range<u64>, Told)> = None;
        while at < size {
            let (mapping, len) = self.lock().map(at, size - at)?;
            let told = match mapping {
                Mapping::Unallocated => None,
                Mapping::Zero { .. } => Some(Told::Zeroes),
                Mapping::Data { .. } | Mapping::Packed { .. } => Some(Told::Data),
            };
            match (&mut found, told) {
                (None, Some(told)) => found = Some((at..at + len, told)),
                (Some((range, known)), Some(told)) if *known == told => range.end = at + len,
                (Some(_), _) => break,
                (None, None) => {}
            }
            at += len;
        }
        Ok(found)
    }
}

/// What a layer says about a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Data,
    Zeroes,
}
