//! The compressed tier: pages that are evicted into memory, as long as its limit lets them.
//!
//! Entries live in an arena of fixed-size cells, chained as needed: no entry moves, nothing
//! fragments, and the limit is exact. A page that does not compress to three quarters goes to the
//! swap file.

use crate::window::Page;

/// Bytes of a page.
const PAGE: usize = size_of::<Page>();

/// Bytes of a cell, of which the last four name the next one.
const CELL: usize = 256;
const ROOM: usize = CELL - 4;

/// The most that a page may take.
const WORTH: usize = PAGE * 3 / 4;

const END: u32 = u32::MAX;

/// Why a page is not in the tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It does not compress well.
    Incompressible,
    /// The limit is reached.
    Full,
}

/// What an entry says is not a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken;

pub(crate) struct Tier {
    arena: Vec<u8>,
    /// The first free cell.
    free: u32,
    cells: u32,
    used: u32,
    entries: u64,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tier")
            .field("entries", &self.entries)
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

impl Tier {
    pub(crate) fn new(limit: u64) -> Self {
        let cells = usize::try_from(limit).unwrap_or(usize::MAX) / CELL;
        Self {
            arena: Vec::new(),
            free: END,
            cells: u32::try_from(cells)
                .unwrap_or(u32::MAX)
                .min(crate::pager::BACKING_MAX - 1),
            used: 0,
            entries: 0,
            scratch: vec![0; lz4_flex::block::get_maximum_output_size(PAGE)],
        }
    }

    /// Bytes in use.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.used) * CELL as u64
    }

    /// Pages that it holds.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Whether it can take anything at all.
    pub(crate) fn is_full(&self) -> bool {
        self.used + u32::try_from(WORTH.div_ceil(ROOM)).unwrap_or(1) > self.cells
    }

    /// Takes a page; gives its entry.
    pub(crate) fn store(&mut self, page: &Page) -> Result<u32, Refused> {
        if self.is_full() {
            return Err(Refused::Full);
        }
        // The first two bytes are the length.
        let mut scratch = std::mem::take(&mut self.scratch);
        let len = scratch
            .get_mut(..)
            .and_then(|room| lz4_flex::block::compress_into(page, room).ok());
        let entry = match len {
            Some(len) if len <= WORTH => self.put(scratch.get(..len).unwrap_or_default()),
            _ => Err(Refused::Incompressible),
        };
        self.scratch = scratch;
        entry
    }

    fn put(&mut self, data: &[u8]) -> Result<u32, Refused> {
        let length = u16::try_from(data.len()).unwrap_or(u16::MAX).to_le_bytes();
        let first = self.cell().ok_or(Refused::Full)?;
        let mut at = first;
        let head = data.len().min(ROOM - 2);
        let (begin, mut rest) = data.split_at_checked(head).unwrap_or((data, &[]));
        self.fill(at, &length, begin);
        while !rest.is_empty() {
            let Some(next) = self.cell() else {
                self.set_next(at, END);
                self.free_chain(first);
                return Err(Refused::Full);
            };
            self.set_next(at, next);
            let (now, later) = rest
                .split_at_checked(rest.len().min(ROOM))
                .unwrap_or((rest, &[]));
            self.fill(next, &[], now);
            at = next;
            rest = later;
        }
        self.set_next(at, END);
        self.entries += 1;
        Ok(first)
    }

    /// Copies an entry's page out.
    pub(crate) fn load(&self, entry: u32, page: &mut Page) -> Result<(), Broken> {
        let mut data = Vec::with_capacity(WORTH + ROOM);
        let mut at = entry;
        while at != END {
            let cell = self.get(at).ok_or(Broken)?;
            data.extend_from_slice(cell.get(..ROOM).ok_or(Broken)?);
            if data.len() > WORTH + 2 * ROOM {
                return Err(Broken);
            }
            at = self.next(at).ok_or(Broken)?;
        }
        let (length, rest) = data.split_first_chunk().ok_or(Broken)?;
        let length = usize::from(u16::from_le_bytes(*length));
        let packed = rest.get(..length).ok_or(Broken)?;
        let done = lz4_flex::block::decompress_into(packed, page).map_err(|_| Broken)?;
        if done == PAGE { Ok(()) } else { Err(Broken) }
    }

    /// Gives an entry's memory back.
    pub(crate) fn free(&mut self, entry: u32) {
        self.entries = self.entries.saturating_sub(1);
        self.free_chain(entry);
    }

    fn free_chain(&mut self, first: u32) {
        let mut at = first;
        while at != END {
            let next = self.next(at).unwrap_or(END);
            self.set_next(at, self.free);
            self.free = at;
            self.used = self.used.saturating_sub(1);
            at = next;
        }
    }

    fn cell(&mut self) -> Option<u32> {
        if self.used >= self.cells {
            return None;
        }
        let cell = if self.free == END {
            let cell = u32::try_from(self.arena.len() / CELL).ok()?;
            self.arena.resize(self.arena.len() + CELL, 0);
            cell
        } else {
            let cell = self.free;
            self.free = self.next(cell)?;
            cell
        };
        self.used += 1;
        Some(cell)
    }

    fn get(&self, cell: u32) -> Option<&[u8]> {
        let start = cell as usize * CELL;
        self.arena.get(start..start + CELL)
    }

    fn fill(&mut self, cell: u32, head: &[u8], data: &[u8]) {
        let start = cell as usize * CELL;
        if let Some(room) = self.arena.get_mut(start..start + ROOM) {
            for (to, from) in room.iter_mut().zip(head.iter().chain(data)) {
                *to = *from;
            }
        }
    }

    fn next(&self, cell: u32) -> Option<u32> {
        let (_, next) = self.get(cell)?.split_last_chunk()?;
        Some(u32::from_le_bytes(*next))
    }

    fn set_next(&mut self, cell: u32, next: u32) {
        let start = cell as usize * CELL + ROOM;
        if let Some(at) = self.arena.get_mut(start..start + 4) {
            at.copy_from_slice(&next.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn page(seed: u8, noise: usize) -> Page {
        let mut page = [seed; 4096];
        let mut state = u32::from(seed) + 1;
        for byte in page.iter_mut().take(noise) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = state.to_le_bytes()[3];
        }
        page
    }

    proptest! {
        /// Against a map: what was stored comes back, the limit holds, nothing leaks.
        #[test]
        fn a_tier_is_a_map(steps in prop::collection::vec(
            (any::<u8>(), 0usize..4096, any::<bool>(), any::<usize>()), 1..150)) {
            const LIMIT: u64 = 32 << 10;
            let mut tier = Tier::new(LIMIT);
            let mut model: HashMap<u32, Page> = HashMap::new();
            for (seed, noise, remove, pick) in steps {
                if remove && !model.is_empty() {
                    let entry = *model.keys().nth(pick % model.len()).unwrap();
                    model.remove(&entry);
                    tier.free(entry);
                } else if let Ok(entry) = tier.store(&page(seed, noise)) {
                    prop_assert!(model.insert(entry, page(seed, noise)).is_none());
                }
                prop_assert!(tier.bytes() <= LIMIT);
                prop_assert_eq!(tier.entries(), model.len() as u64);
                for (entry, content) in &model {
                    let mut found = [0; 4096];
                    prop_assert_eq!(tier.load(*entry, &mut found), Ok(()));
                    prop_assert!(found == *content);
                }
            }
            for entry in model.keys() {
                tier.free(*entry);
            }
            prop_assert_eq!(tier.bytes(), 0);
        }
    }

    #[test]
    fn noise_is_refused() {
        let mut tier = Tier::new(1 << 20);
        assert_eq!(tier.store(&page(1, 4096)), Err(Refused::Incompressible));
        assert_eq!(tier.bytes(), 0);
    }
}
