//! The store.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use strake_observe::Result;

use crate::disks::{Disk, DiskId, PAGE, REGION_BLOCKS, add, regions, sub};
use crate::observations::TooManyDisks;
use crate::words::{DISKS_MAX, GENERATION_MASK, Said};

/// A place that holds data.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "in", rename_all = "kebab-case")]
pub enum Place {
    /// A page of the guest's memory.
    Page {
        /// Its number.
        page: u64,
    },
    /// A block of 4 KiB of a disk.
    Block {
        /// The disk's name.
        disk: String,
        /// The block's number.
        block: u64,
    },
}

/// A read of a disk that is under way: what its blocks were when it began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    disk: u32,
    first_region: u64,
    generations: Vec<u32>,
}

/// A change of a disk that is under way; to be given back to [`Store::end_write`].
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub struct WriteTicket {
    disk: u32,
    offset: u64,
    len: u64,
}

/// Consecutive blocks of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// The disk.
    pub disk: DiskId,
    /// The first block of 4 KiB.
    pub first: u64,
}

/// How much the store knows, and what it was good for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Pages that equal a block.
    pub equal_pages: u64,
    /// Of those, pages whose only home is their block.
    pub relied_pages: u64,
    /// Pages ever recorded.
    pub recorded: u64,
    /// Times that a page left memory and its block was relied upon instead of a write.
    pub writes_avoided: u64,
    /// Times that a page had to come back because its block was to change.
    pub brought_back: u64,
    /// Bytes of memory that the store takes.
    pub memory_bytes: u64,
}

#[derive(Debug)]
struct Inner {
    words: Vec<u64>,
    /// One bit a page: its block is its only home.
    relied: Vec<u64>,
    disks: Vec<Option<Disk>>,
    counts: Counts,
}

/// Which pages equal which blocks. One lock; each call is one step.
#[derive(Debug)]
pub struct Store(Mutex<Inner>);

impl Store {
    /// For a guest with so many pages, of none of which anything is known.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        Self(Mutex::new(Inner {
            words: vec![0; pages],
            relied: vec![0; pages.div_ceil(64)],
            disks: Vec::new(),
            counts: Counts::default(),
        }))
    }

    /// Gets to know a disk of so many bytes.
    ///
    /// # Errors
    /// [`TooManyDisks`].
    pub fn add_disk(&self, name: &str, bytes: u64) -> Result<DiskId> {
        let mut inner = self.lock();
        let disk = Disk::new(name, bytes);
        // A number is not given out twice: words of a disk that went would speak of the new one.
        let id = u32::try_from(inner.disks.len())
            .ok()
            .filter(|id| *id < DISKS_MAX)
            .ok_or(TooManyDisks { most: DISKS_MAX })?;
        inner.disks.push(Some(disk));
        Ok(DiskId(id))
    }

    /// Forgets a disk: somebody may write to it who does not report here, or it goes. Pages whose
    /// only home it is are returned: they have to come back first, and the call be made again.
    #[must_use]
    pub fn remove_disk(&self, disk: DiskId) -> Vec<usize> {
        let mut inner = self.lock();
        let dependants = inner.dependants(disk.0, None);
        if dependants.is_empty()
            && let Some(place) = inner.disks.get_mut(disk.0 as usize)
        {
            *place = None;
        }
        dependants
    }

    /// A read begins. What it returns is to be kept until the data has arrived.
    #[must_use]
    pub fn begin_read(&self, disk: DiskId, offset: u64, len: u64) -> Reading {
        let inner = self.lock();
        let range = regions(offset, len);
        let first_region = range.start;
        let generations = range
            .map_while(|region| inner.disk(disk.0)?.generation(region))
            .collect();
        Reading {
            disk: disk.0,
            first_region,
            generations,
        }
    }

    /// A page holds what the read brought of a block, and cannot be written from now on without
    /// notice. Whether it was recorded: not if the block changed meanwhile, or is changing.
    pub fn record(&self, reading: &Reading, page: usize, block: u64) -> bool {
        let mut inner = self.lock();
        let region = block / REGION_BLOCKS;
        let before = region
            .checked_sub(reading.first_region)
            .and_then(|index| usize::try_from(index).ok())
            .and_then(|index| reading.generations.get(index))
            .copied();
        let unchanged = inner.disk(reading.disk).is_some_and(|disk| {
            before.is_some()
                && disk.generation(region) == before
                && !disk.writing.contains_key(&region)
        });
        inner.forget(page);
        if let (true, Some(generation)) = (unchanged, before)
            && let Some(word) = inner.words.get_mut(page)
        {
            *word = Said {
                disk: reading.disk,
                block,
                generation: generation & GENERATION_MASK,
            }
            .word();
            inner.counts.recorded += 1;
            return true;
        }
        false
    }

    /// A write, discard or write of zeroes begins. The pages that are returned have no home but the
    /// blocks that it touches: they have to be back in memory before it reaches the disk.
    pub fn begin_write(&self, disk: DiskId, offset: u64, len: u64) -> (WriteTicket, Vec<usize>) {
        let mut inner = self.lock();
        inner.change(disk.0, offset, len);
        let mut relied = false;
        if let Some(found) = inner.disk_mut(disk.0) {
            for region in regions(offset, len) {
                add(&mut found.writing, region);
                relied |= found.relied.contains_key(&region);
            }
        }
        let dependants = if relied {
            inner.dependants(disk.0, Some((offset, len)))
        } else {
            Vec::new()
        };
        inner.counts.brought_back += dependants.len() as u64;
        let ticket = WriteTicket {
            disk: disk.0,
            offset,
            len,
        };
        (ticket, dependants)
    }

    /// It has ended, well or not.
    pub fn end_write(&self, ticket: WriteTicket) {
        let mut inner = self.lock();
        let WriteTicket { disk, offset, len } = ticket;
        // A read that began meanwhile may have seen both.
        inner.change(disk, offset, len);
        if let Some(found) = inner.disk_mut(disk) {
            for region in regions(offset, len) {
                sub(&mut found.writing, region);
            }
        }
    }

    /// Whether the page, if it was not written since it was recorded, equals a block; and which.
    #[must_use]
    pub fn equal(&self, page: usize) -> Option<Blocks> {
        let inner = self.lock();
        let said = inner.valid(page)?;
        Some(Blocks {
            disk: DiskId(said.disk),
            first: said.block,
        })
    }

    /// The page leaves memory unwritten, and was not written since it was recorded. Whether its
    /// block can be its only home: if so it stays as it is until [`Store::release`].
    pub fn rely(&self, page: usize) -> bool {
        let mut inner = self.lock();
        let Some(said) = inner.valid(page) else {
            return false;
        };
        if !inner.is_relied(page) {
            inner.set_relied(page, true);
            if let Some(disk) = inner.disk_mut(said.disk) {
                add(&mut disk.relied, said.block / REGION_BLOCKS);
            }
        }
        inner.counts.writes_avoided += 1;
        true
    }

    /// The page has another home again.
    pub fn release(&self, page: usize) {
        self.lock().release(page);
    }

    /// The page was written, or is no more.
    pub fn page_written(&self, page: usize) {
        self.lock().forget(page);
    }

    /// The block that a page's content is to be read from, if it is relied upon.
    #[must_use]
    pub fn home(&self, page: usize) -> Option<Blocks> {
        let inner = self.lock();
        if !inner.is_relied(page) {
            return None;
        }
        let said = Said::of(*inner.words.get(page)?)?;
        Some(Blocks {
            disk: DiskId(said.disk),
            first: said.block,
        })
    }

    /// Where else the data of a page or block is, as far as it is known: `page_unwritten` says of a
    /// page whether it was not written since it was recorded.
    #[must_use]
    pub fn elsewhere(&self, place: &Place, page_unwritten: &dyn Fn(usize) -> bool) -> Vec<Place> {
        let inner = self.lock();
        let (disk, block, except) = match place {
            Place::Page { page } => {
                let Ok(page) = usize::try_from(*page) else {
                    return Vec::new();
                };
                match inner.valid(page) {
                    Some(said) if inner.is_relied(page) || page_unwritten(page) => {
                        (said.disk, said.block, Some(page))
                    }
                    _ => return Vec::new(),
                }
            }
            Place::Block { disk, block } => {
                let found = (0..)
                    .zip(&inner.disks)
                    .find(|(_, other)| other.as_ref().is_some_and(|other| other.name == *disk));
                match found {
                    Some((id, _)) => (id, *block, None),
                    None => return Vec::new(),
                }
            }
        };
        let mut places = Vec::new();
        if except.is_some()
            && let Some(found) = inner.disk(disk)
        {
            places.push(Place::Block {
                disk: found.name.clone(),
                block,
            });
        }
        for page in 0..inner.words.len() {
            if Some(page) != except
                && inner
                    .valid(page)
                    .is_some_and(|said| said.disk == disk && said.block == block)
                && (inner.is_relied(page) || page_unwritten(page))
            {
                places.push(Place::Page { page: page as u64 });
            }
        }
        places
    }

    /// How much is known.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let inner = self.lock();
        let equal = (0..inner.words.len()).filter(|page| inner.valid(*page).is_some());
        let relied = inner.relied.iter().map(|word| u64::from(word.count_ones()));
        let disks: usize = inner
            .disks
            .iter()
            .flatten()
            .map(|disk| disk.generations.len() * 4 + (disk.writing.len() + disk.relied.len()) * 24)
            .sum();
        Counts {
            equal_pages: equal.count() as u64,
            relied_pages: relied.sum(),
            memory_bytes: (inner.words.len() * 8 + inner.relied.len() * 8 + disks) as u64,
            ..inner.counts
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn set_generation(&self, disk: DiskId, region: usize, generation: u32) {
        if let Some(at) = self
            .lock()
            .disk_mut(disk.0)
            .and_then(|disk| disk.generations.get_mut(region))
        {
            *at = generation;
        }
    }
}

impl Inner {
    fn disk(&self, disk: u32) -> Option<&Disk> {
        self.disks.get(disk as usize)?.as_ref()
    }

    fn disk_mut(&mut self, disk: u32) -> Option<&mut Disk> {
        self.disks.get_mut(disk as usize)?.as_mut()
    }

    /// What the page's word says, if it still holds.
    fn valid(&self, page: usize) -> Option<Said> {
        let said = Said::of(*self.words.get(page)?)?;
        let disk = self.disk(said.disk)?;
        let region = said.block / REGION_BLOCKS;
        // A page that is relied upon is valid until it is released: its block waits for it.
        let holds = disk.generation(region)? & GENERATION_MASK == said.generation
            && !disk.writing.contains_key(&region);
        holds.then_some(said)
    }

    fn is_relied(&self, page: usize) -> bool {
        self.relied
            .get(page / 64)
            .is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    fn set_relied(&mut self, page: usize, relied: bool) {
        if let Some(word) = self.relied.get_mut(page / 64) {
            let bit = 1 << (page % 64);
            if relied {
                *word |= bit;
            } else {
                *word &= !bit;
            }
        }
    }

    fn release(&mut self, page: usize) {
        if !self.is_relied(page) {
            return;
        }
        self.set_relied(page, false);
        let said = self.words.get(page).and_then(|word| Said::of(*word));
        if let Some(said) = said
            && let Some(disk) = self.disk_mut(said.disk)
        {
            sub(&mut disk.relied, said.block / REGION_BLOCKS);
        }
    }

    fn forget(&mut self, page: usize) {
        self.release(page);
        if let Some(word) = self.words.get_mut(page) {
            *word = 0;
        }
    }

    /// Raises the generations of a range.
    fn change(&mut self, disk: u32, offset: u64, len: u64) {
        let mut round = Vec::new();
        if let Some(found) = self.disk_mut(disk) {
            for region in regions(offset, len) {
                let index = usize::try_from(region).unwrap_or(usize::MAX);
                if let Some(generation) = found.generations.get_mut(index) {
                    *generation = generation.wrapping_add(1);
                    if *generation & GENERATION_MASK == 0 {
                        round.push(region);
                    }
                }
            }
        }
        // Generations that come round would make old words true again. Words of pages that are
        // relied upon stay: they say where the page is.
        for region in round {
            for page in 0..self.words.len() {
                let said = self.words.get(page).and_then(|word| Said::of(*word));
                if said
                    .is_some_and(|said| said.disk == disk && said.block / REGION_BLOCKS == region)
                    && !self.is_relied(page)
                {
                    self.forget(page);
                }
            }
        }
    }

    /// The pages whose only home is the disk, or a range of it.
    fn dependants(&self, disk: u32, range: Option<(u64, u64)>) -> Vec<usize> {
        let touches = |block: u64| {
            range.is_none_or(|(offset, len)| {
                let start = block * PAGE;
                start < offset.saturating_add(len) && offset < start + PAGE
            })
        };
        (0..)
            .zip(&self.relied)
            .filter(|(_, word)| **word != 0)
            .flat_map(|(index, word)| {
                let index: usize = index;
                (0..64)
                    .filter(move |bit| word >> bit & 1 == 1)
                    .map(move |bit| index * 64 + bit)
            })
            .filter(|page| {
                let said = self.words.get(*page).and_then(|word| Said::of(*word));
                said.is_some_and(|said| said.disk == disk && touches(said.block))
            })
            .collect()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
