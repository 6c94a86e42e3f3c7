//! Making a disk larger.
//!
//! The table at the top moves if it is too small; the size changes last, with one write of the
//! header's sector. What is new reads as zeroes, also where an image below has data.

use std::sync::{Arc, PoisonError};

use strake_block::{Blocking, Image, Operation, SECTOR_BYTES};
use strake_observe::Result;

use crate::BadOption;
use crate::image::Qcow2Image;
use crate::num::{bytes, us};
use crate::refcount::Run;
use crate::state::{Qcow, State, kept, write_header};

impl Qcow2Image {
    /// Makes the disk `size` bytes large. It never becomes smaller.
    ///
    /// # Errors
    /// When it would become smaller or larger than the format allows, or the file system fails.
    pub fn grow(&self, size: u64) -> Result<()> {
        let _changing = self
            .shared
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let top = &self.shared.top;
        let old = top.lock().header.size;
        let bad = |why: &str| BadOption {
            path: self.path().to_owned(),
            why: why.to_owned(),
        };
        if size < old || !size.is_multiple_of(SECTOR_BYTES) {
            return Err(bad("a disk becomes larger only, by whole sectors").into());
        }
        if size == old {
            return Ok(());
        }
        let needed = top.lock().header.l1_needed(size);
        if needed > 4 * 1024 * 1024 {
            return Err(bad("the disk is too large for clusters of this size").into());
        }
        top.flush()?;
        top.grow_l1(us(needed))?;
        {
            let mut state = top.lock();
            top.set_size(&mut state, size);
        }
        let result = self.clear(old, size).and_then(|()| {
            let state = top.lock();
            write_header(&*top.store, &state.header)?;
            top.store.sync()
        });
        if result.is_err() {
            let mut state = top.lock();
            top.set_size(&mut state, old);
        }
        result
    }

    /// Zeroes what the images below would show, and the rest of what was the last cluster.
    fn clear(&self, old: u64, size: u64) -> Result<()> {
        let top = &self.shared.top;
        let layers = self.shared.layers();
        let below = layers.iter().skip(1).map(|layer| layer.size()).max();
        let end = below
            .unwrap_or(0)
            .max(old.next_multiple_of(top.cluster()))
            .min(size);
        let start = old - old % SECTOR_BYTES;
        if end > start {
            let unmap = true;
            let len = end - start;
            Blocking::new(self)?.operate(Operation::WriteZeroes { len, unmap }, start)?;
        }
        top.flush()
    }
}

impl Qcow {
    /// Moves the L1 table to where it has that many entries. Nothing may be dirty in it.
    fn grow_l1(self: &Arc<Self>, entries: usize) -> Result<()> {
        let mut state = self.lock();
        while state.flushing {
            state = self.wait(state);
        }
        if entries <= state.l1.len() {
            return Ok(());
        }
        let clusters = (entries as u64 * 8).div_ceil(self.cluster());
        let run = state.allocate_row(clusters)?;
        let host = run.first << self.cluster_bits;
        state.flushing = true;
        drop(state);
        // No flush runs meanwhile, so that no table refers to the old place.
        let moved = self.move_l1(host, entries, clusters);
        let mut state = self.lock();
        state.flushing = false;
        if moved.is_err() {
            state.give_back(run)?;
        }
        self.wake(&mut state);
        moved
    }

    fn move_l1(&self, host: u64, entries: usize, clusters: u64) -> Result<()> {
        let mut state = self.lock();
        let mut table = state.l1.clone();
        // Whole clusters: what follows is no entry of anything.
        table.resize(us(clusters * self.cluster() / 8), 0);
        // Entries of tables that are not on the disk yet come with the flush that writes them.
        for number in &state.l1_changed {
            let piece = us(crate::tables::PIECE / 8);
            let mut on_disk = vec![0; piece * 8];
            let at = state.header.l1_offset + (number * piece * 8) as u64;
            self.store.read_at(at, &mut on_disk)?;
            for (place, entry) in on_disk.chunks_exact(8).enumerate() {
                let index = number * piece + place;
                if let Some(slot) = table.get_mut(index).filter(|_| index < state.l1.len()) {
                    *slot = crate::num::be64(entry, 0);
                }
            }
        }
        // The counts of its clusters first.
        if let Some(refs) = state.refs.as_mut() {
            let taken = refs.blocks.take();
            let new: Vec<usize> = taken.new.iter().map(|(index, _)| *index).collect();
            let pieces = taken.new.into_iter().map(|(_, piece)| piece);
            let mut result = Ok(());
            for (at, bytes) in pieces.chain(taken.known) {
                result = result.and_then(|()| self.store.write_at(at, &bytes));
            }
            result = result.and_then(|()| self.store.sync());
            for number in refs.changed.clone() {
                let (at, bytes) = refs.piece(number);
                result = result.and_then(|()| self.store.write_at(at, &bytes));
            }
            match &result {
                Ok(()) => {
                    refs.blocks.written();
                    refs.changed.clear();
                }
                Err(_) => refs.blocks.not_written(&new),
            }
            result?;
        }
        self.store.write_at(host, &bytes(&table))?;
        self.store.sync()?;
        let mut header = state.header.clone();
        let old = (header.l1_offset, u64::from(header.l1_entries) * 8);
        header.l1_offset = host;
        header.l1_entries = u32::try_from(entries).unwrap_or(u32::MAX);
        write_header(&*self.store, &header)?;
        self.store.sync()?;
        state.header = header;
        state.l1.resize(entries, 0);
        let kept = kept(&state.header);
        if let Some(refs) = state.refs.as_mut() {
            refs.kept = kept;
        }
        let first = old.0 >> self.cluster_bits;
        let count = old.1.div_ceil(self.cluster());
        state.freed.extend(first..first + count);
        Ok(())
    }
}

impl State {
    /// Exactly that many clusters in a row.
    fn allocate_row(&mut self, count: u64) -> Result<Run> {
        let mut short = Vec::new();
        let row = loop {
            match self.allocate(count) {
                Ok(run) if run.count == count => break Ok(run),
                Ok(run) => short.push(run),
                Err(seen) => break Err(seen),
            }
        };
        for run in short {
            self.give_back(run)?;
        }
        row
    }
}
