//! What is in flight, noted where it outlives this process.
//!
//! A device takes requests out of a ring in one order and completes them in another, so after its
//! death the ring alone does not tell which of them were done. The front-end therefore keeps a piece
//! of memory for the device (a memfd, `GET_INFLIGHT_FD`) and hands it to the next one
//! (`SET_INFLIGHT_FD`). The layout is the protocol's for split rings; all of it is little-endian:
//!
//! ```text
//!  per ring, 64-byte aligned:
//!   0 features u64 │ 8 version u16 │ 10 entries u16 │ 12 last head u16 │ 14 used index u16
//!  16 … an entry of 16 bytes per descriptor:
//!     0 in flight u8 │ 6 next u16 │ 8 counter u64
//! ```
//!
//! | step of a completion | after a death right here |
//! | --- | --- |
//! | *last head* := head | in flight, used index as before: done again |
//! | used ring, used index in guest memory | the two used indices differ: the last head is done |
//! | in flight := 0, *used index* := that of the ring | done |
//!
//! A request that is done twice does no harm: its guest has not heard of the first time, so it has
//! not given anybody reason to write there in between.
//!
//! The front-end can write there too. Whatever is found is held against the size of the ring.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use super::regions::map_file;

const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;

const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_HEAD_AT: usize = 12;
const USED_AT: usize = 14;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The memory for all rings of a device.
#[derive(Debug, Clone)]
pub(super) struct Area {
    mapping: Arc<MmapRegion<()>>,
    rings: u16,
    entries: u16,
}

/// Bytes for one ring.
fn ring_bytes(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGNMENT)
}

impl Area {
    /// How large an area must be.
    pub(super) fn bytes(rings: u16, entries: u16) -> u64 {
        (ring_bytes(entries) * usize::from(rings)) as u64
    }

    /// A new memfd for an area, whose size nobody can change.
    pub(super) fn create(rings: u16, entries: u16) -> std::io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create("strake-inflight", flags)?;
        ftruncate(&fd, Self::bytes(rings, entries))?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(fd)
    }

    /// The area in `file`, which a front-end kept.
    pub(super) fn open(file: File, offset: u64, rings: u16, entries: u16) -> Result<Self, String> {
        let bytes = usize::try_from(Self::bytes(rings, entries)).unwrap_or(usize::MAX);
        let mapping = map_file(file, offset, bytes)
            .map_err(|reason| format!("its record of what is in flight: {reason}"))?;
        Ok(Self {
            mapping: Arc::new(mapping),
            rings,
            entries,
        })
    }

    /// The part of the ring `index` of `size` entries, and which of its requests were in flight when
    /// the device before died, in the order in which it took them. `used` is the ring's used index.
    pub(super) fn ring(
        &self,
        index: u16,
        size: u16,
        used: u16,
    ) -> Result<(Journal, Vec<u16>), String> {
        if index >= self.rings || size > self.entries {
            return Err("its record of what is in flight is too small".to_owned());
        }
        let mut journal = Journal {
            mapping: Arc::clone(&self.mapping),
            at: ring_bytes(self.entries) * usize::from(index),
            size,
            counter: 0,
        };
        let unfinished = journal
            .recover(used)
            .ok_or("its record of what is in flight makes no sense")?;
        Ok((journal, unfinished))
    }
}

/// The record of one ring. Written by the ring's worker alone.
#[derive(Debug)]
pub(crate) struct Journal {
    mapping: Arc<MmapRegion<()>>,
    at: usize,
    size: u16,
    /// Of the next request.
    counter: u64,
}

impl Journal {
    /// A request was taken out of the ring.
    pub(crate) fn begin(&mut self, head: u16) {
        let Some(entry) = self.entry(head) else {
            return;
        };
        self.put(entry + COUNTER, self.counter.to_le());
        self.counter = self.counter.wrapping_add(1);
        self.put(entry, 1u8);
    }

    /// A request is about to be completed.
    pub(crate) fn completing(&mut self, head: u16) {
        let last: u16 = self.get(LAST_HEAD_AT).unwrap_or(0);
        if let Some(entry) = self.entry(head) {
            self.put(entry + NEXT, last);
            self.put(LAST_HEAD_AT, head.to_le());
        }
    }

    /// A request was completed; the used index is in guest memory.
    pub(crate) fn completed(&mut self, head: u16, used: u16) {
        if let Some(entry) = self.entry(head) {
            self.put(entry, 0u8);
            self.put(USED_AT, used.to_le());
        }
    }

    fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        let version: u16 = self.get(VERSION_AT)?;
        if u16::from_le(version) == 0 {
            // New: all zeroes.
            self.put(VERSION_AT, VERSION.to_le());
            self.put(ENTRIES_AT, self.size.to_le());
            self.put(USED_AT, used.to_le());
            return Some(Vec::new());
        }
        let entries: u16 = self.get(ENTRIES_AT)?;
        if u16::from_le(version) != VERSION || u16::from_le(entries) != self.size {
            return None;
        }
        let noted = u16::from_le(self.get(USED_AT)?);
        // Completed and not noted so any more: one at most, as it is done here; other devices note
        // them in batches.
        let mut head = u16::from_le(self.get(LAST_HEAD_AT)?);
        for _ in 0..used.wrapping_sub(noted).min(self.size) {
            let entry = self.entry(head)?;
            self.put(entry, 0u8);
            head = u16::from_le(self.get(entry + NEXT)?);
        }
        self.put(USED_AT, used.to_le());
        let mut unfinished = Vec::new();
        for head in 0..self.size {
            let entry = self.entry(head)?;
            if self.get::<u8>(entry)? == 1 {
                let counter = u64::from_le(self.get(entry + COUNTER)?);
                unfinished.push((counter, head));
            }
        }
        unfinished.sort_unstable();
        self.counter = unfinished
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(unfinished.into_iter().map(|(_, head)| head).collect())
    }

    /// Where the entry of a head is, within the ring's part.
    fn entry(&self, head: u16) -> Option<usize> {
        (head < self.size).then(|| HEADER + ENTRY * usize::from(head))
    }

    fn slice(&self) -> Option<VolatileSlice<'_, ()>> {
        let bytes = HEADER + ENTRY * usize::from(self.size);
        self.mapping.get_slice(self.at, bytes).ok()
    }

    fn put<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        // Release: in the order in which it is written here, also relative to the rings.
        let stored = self
            .slice()
            .map(|slice| slice.store(value, at, Ordering::Release));
        debug_assert!(matches!(stored, Some(Ok(()))));
    }

    fn get<T: vm_memory::AtomicAccess>(&self, at: usize) -> Option<T> {
        self.slice()?.load(at, Ordering::Acquire).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(file: &File) -> Area {
        Area::open(file.try_clone().unwrap(), 0, 2, 8).unwrap()
    }

    #[test]
    fn what_was_in_flight_is_found_in_its_order() {
        let file = File::from(Area::create(2, 8).unwrap());
        let (mut journal, unfinished) = area(&file).ring(1, 8, 0).unwrap();
        assert!(unfinished.is_empty());
        for head in [5, 2, 7] {
            journal.begin(head);
        }
        journal.completing(2);
        journal.completed(2, 1);
        journal.begin(2);
        let (_, unfinished) = area(&file).ring(1, 8, 1).unwrap();
        assert_eq!(unfinished, [5, 7, 2]);
        let (_, others) = area(&file).ring(0, 8, 0).unwrap();
        assert!(others.is_empty());
    }

    #[test]
    fn a_death_at_each_step_of_a_completion() {
        for (step, used, expected) in [(0, 0, vec![3, 4]), (1, 1, vec![4]), (2, 1, vec![4])] {
            let file = File::from(Area::create(2, 8).unwrap());
            let (mut journal, _) = area(&file).ring(0, 8, 0).unwrap();
            journal.begin(3);
            journal.begin(4);
            journal.completing(3);
            if step == 2 {
                journal.completed(3, 1);
            }
            let (_, unfinished) = area(&file).ring(0, 8, used).unwrap();
            assert_eq!(unfinished, expected, "step {step}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let file = File::from(Area::create(2, 8).unwrap());
        assert!(area(&file).ring(2, 8, 0).is_err());
        assert!(area(&file).ring(0, 16, 0).is_err());
        let (journal, _) = area(&file).ring(0, 8, 0).unwrap();
        journal.put(LAST_HEAD_AT, 100u16);
        assert!(area(&file).ring(0, 8, 1).is_err());
        assert!(Area::open(File::open("/dev/null").unwrap(), 0, 2, 8).is_err());
        assert!(Area::open(file, 0, 200, 1024).is_err(), "a file too short");
    }
}
