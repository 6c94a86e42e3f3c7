//! The cache of L2 tables and of refcount blocks: pieces of the file, one cluster each, that are
//! changed in memory and written by a flush.

use std::collections::HashMap;
use std::ops::Range;

use crate::num::us;

/// Tables are written in pieces of this many bytes, so that direct I/O needs no reading before.
pub(crate) const PIECE: u64 = 4096;

/// One table: its bytes as they are in the file.
#[derive(Debug)]
pub(crate) struct Table {
    /// Where it is in the file.
    pub(crate) host: u64,
    pub(crate) bytes: Vec<u8>,
    /// What was changed and is not yet written, in bytes of the table.
    dirty: Option<Range<usize>>,
    /// Nothing on the disk refers to it yet.
    pub(crate) new: bool,
    /// A flush is writing a copy of it.
    writing: bool,
    used: u64,
}

impl Table {
    pub(crate) fn loaded(host: u64, bytes: Vec<u8>) -> Self {
        Self {
            host,
            bytes,
            dirty: None,
            new: false,
            writing: false,
            used: 0,
        }
    }

    /// One that the file does not have yet.
    pub(crate) fn new(host: u64, bytes: Vec<u8>) -> Self {
        let mut table = Self::loaded(host, bytes);
        table.new = true;
        table.all_dirty();
        table
    }

    pub(crate) fn all_dirty(&mut self) {
        self.dirty = Some(0..self.bytes.len());
    }

    pub(crate) fn change(&mut self, at: usize, to: &[u8]) {
        crate::num::put(&mut self.bytes, at, to);
        let end = (at + to.len()).min(self.bytes.len());
        let dirty = self.dirty.take().unwrap_or(at..end);
        self.dirty = Some(dirty.start.min(at)..dirty.end.max(end));
    }

    pub(crate) fn entry(&self, index: usize) -> u64 {
        crate::num::be64(&self.bytes, index * 8)
    }

    pub(crate) fn set_entry(&mut self, index: usize, entry: u64) {
        self.change(index * 8, &entry.to_be_bytes());
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty.is_some()
    }

    /// What is to be written where, in whole pieces; it counts as clean afterwards.
    fn take(&mut self) -> Option<(u64, Vec<u8>)> {
        let dirty = self.dirty.take()?;
        self.writing = true;
        let piece = us(PIECE);
        let start = dirty.start - dirty.start % piece;
        let end = dirty.end.next_multiple_of(piece).min(self.bytes.len());
        let bytes = self.bytes.get(start..end)?.to_vec();
        Some((self.host + start as u64, bytes))
    }
}

/// Tables by their index in the table above them.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    map: HashMap<usize, Table>,
    /// How many to keep.
    limit: usize,
    clock: u64,
}

/// Dirty pieces, and which tables are new among them.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) new: Vec<(usize, (u64, Vec<u8>))>,
    pub(crate) known: Vec<(u64, Vec<u8>)>,
}

impl Tables {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    pub(crate) fn get(&mut self, index: usize) -> Option<&mut Table> {
        self.clock += 1;
        let table = self.map.get_mut(&index)?;
        table.used = self.clock;
        Some(table)
    }

    /// Puts a table into the cache; the one that was not used for the longest time leaves it if
    /// it is full. Those with changes stay.
    pub(crate) fn insert(&mut self, index: usize, mut table: Table) {
        self.clock += 1;
        table.used = self.clock;
        if self.map.len() >= self.limit {
            let oldest = self
                .map
                .iter()
                .filter(|(_, table)| !table.is_dirty() && !table.writing && !table.new)
                .min_by_key(|(_, table)| table.used)
                .map(|(index, _)| *index);
            if let Some(oldest) = oldest {
                self.map.remove(&oldest);
            }
        }
        self.map.insert(index, table);
    }

    pub(crate) fn any_dirty(&self) -> bool {
        self.map.values().any(Table::is_dirty)
    }

    /// More tables are kept than should be, which only happens while they have changes.
    pub(crate) fn is_crowded(&self) -> bool {
        self.map.len() > self.limit
    }

    /// Takes everything that is to be written.
    pub(crate) fn take(&mut self) -> Taken {
        let mut taken = Taken::default();
        for (index, table) in &mut self.map {
            let new = std::mem::take(&mut table.new);
            if let Some(piece) = table.take() {
                if new {
                    taken.new.push((*index, piece));
                } else {
                    taken.known.push(piece);
                }
            }
        }
        // The order in the file, for the device's sake.
        taken.new.sort_by_key(|(_, (at, _))| *at);
        taken.known.sort_by_key(|(at, _)| *at);
        taken
    }

    /// What was taken has been written.
    pub(crate) fn written(&mut self) {
        for table in self.map.values_mut() {
            table.writing = false;
        }
    }

    /// What was taken may not have been written; `new` are those that nothing refers to still.
    pub(crate) fn not_written(&mut self, new: &[usize]) {
        for (index, table) in &mut self.map {
            if std::mem::take(&mut table.writing) {
                table.all_dirty();
                table.new |= new.contains(index);
            }
        }
    }
}
