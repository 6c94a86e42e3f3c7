//! Which clusters of the file are in use: a table of blocks of counts.

use std::collections::BTreeSet;
use std::ops::Range;

use strake_observe::Result;

use crate::num::{be64, bytes, entries, us};
use crate::tables::{PIECE, Table, Tables};
use crate::{Damaged, Full, Header, Store};

/// Bits of a block's place in a table entry.
const OFFSET: u64 = 0xffff_ffff_ffff_fe00;

/// Beyond this no offset can be expressed in an L2 entry.
const MAX_OFFSET: u64 = 1 << 56;

/// Blocks kept in memory, in bytes: 256 GiB of file with the usual clusters.
const CACHED_BYTES: u64 = 8 * 1024 * 1024;

/// The counts of one file.
#[derive(Debug)]
pub(crate) struct Refcounts {
    order: u32,
    cluster_bits: u32,
    /// Where the table is, and its entries: where each block is.
    pub(crate) offset: u64,
    pub(crate) table: Vec<u64>,
    /// Pieces of the table with changes, by their number.
    pub(crate) changed: BTreeSet<usize>,
    pub(crate) blocks: Tables,
    /// No free cluster is before it.
    cursor: u64,
    /// Clusters from here on were never written: they read as zeroes.
    untouched: u64,
    /// Never given out, whatever their count says: the header and the tables of the tables.
    pub(crate) kept: Vec<Range<u64>>,
}

/// Clusters that were allocated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// They read as zeroes.
    pub(crate) zero: bool,
}

impl Refcounts {
    pub(crate) fn load(store: &dyn Store, header: &Header) -> Result<Self> {
        let cluster = header.cluster();
        let mut table = vec![0; us(u64::from(header.table_clusters) * cluster)];
        store.read_at(header.table_offset, &mut table)?;
        let limit = us((CACHED_BYTES / cluster).max(4));
        let untouched = if store.grows() {
            store.len()?.div_ceil(cluster)
        } else {
            u64::MAX
        };
        Ok(Self {
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            offset: header.table_offset,
            table: entries(&table),
            changed: BTreeSet::new(),
            blocks: Tables::new(limit),
            cursor: 0,
            untouched,
            kept: Vec::new(),
        })
    }

    /// How much of the file was ever used, in bytes, if it is known.
    pub(crate) fn end_of_use(&self) -> Option<u64> {
        (self.untouched != u64::MAX).then(|| self.untouched << self.cluster_bits)
    }

    /// How many clusters one block counts.
    pub(crate) fn per_block(&self) -> u64 {
        (8u64 << self.cluster_bits) >> self.order
    }

    fn place(&self, cluster: u64) -> (usize, u64) {
        let per_block = self.per_block();
        (us(cluster / per_block), cluster % per_block)
    }

    /// The block with that index, if the table has it.
    fn block(&mut self, store: &dyn Store, index: usize) -> Result<Option<&mut Table>> {
        let host = self.table.get(index).copied().unwrap_or(0) & OFFSET;
        if host == 0 {
            return Ok(None);
        }
        if self.blocks.get(index).is_none() {
            if !host.is_multiple_of(1 << self.cluster_bits) || host >= MAX_OFFSET {
                let what = format!("its refcount block {index} is not at a cluster");
                let path = store.path().to_owned();
                return Err(Damaged { path, what }.into());
            }
            let mut bytes = vec![0; 1 << self.cluster_bits];
            store.read_at(host, &mut bytes)?;
            self.blocks.insert(index, Table::loaded(host, bytes));
        }
        Ok(self.blocks.get(index))
    }

    fn read(block: &Table, order: u32, index: u64) -> u64 {
        let bit = index << order;
        let at = us(bit / 8);
        let byte = u64::from(block.bytes.get(at).copied().unwrap_or(0));
        match order {
            0..=2 => (byte >> (bit % 8)) & ((1 << (1 << order)) - 1),
            3 => byte,
            _ => {
                let width = 1usize << (order - 3);
                let field = block.bytes.get(at..at + width).unwrap_or_default();
                field
                    .iter()
                    .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
            }
        }
    }

    fn write(block: &mut Table, order: u32, index: u64, count: u64) {
        let bit = index << order;
        let at = us(bit / 8);
        match order {
            0..=2 => {
                let mask = ((1u64 << (1 << order)) - 1) << (bit % 8);
                let byte = u64::from(block.bytes.get(at).copied().unwrap_or(0));
                let byte = (byte & !mask) | (count << (bit % 8) & mask);
                let [.., low] = byte.to_be_bytes();
                block.change(at, &[low]);
            }
            _ => {
                let width = 1usize << (order - 3);
                let field = count.to_be_bytes();
                block.change(at, field.get(8 - width..).unwrap_or_default());
            }
        }
    }

    pub(crate) fn count(&mut self, store: &dyn Store, cluster: u64) -> Result<u64> {
        let (index, within) = self.place(cluster);
        let order = self.order;
        let block = self.block(store, index)?;
        Ok(block.map_or(0, |block| Self::read(block, order, within)))
    }

    fn set(&mut self, store: &dyn Store, cluster: u64, count: u64) -> Result<()> {
        let (index, within) = self.place(cluster);
        let order = self.order;
        if let Some(block) = self.block(store, index)? {
            Self::write(block, order, within, count);
        }
        Ok(())
    }

    /// One reference less. Says whether it is free now.
    pub(crate) fn release(&mut self, store: &dyn Store, cluster: u64) -> Result<bool> {
        let count = self.count(store, cluster)?;
        if count == 0 {
            let path = store.path().to_owned();
            let what = format!("cluster {cluster} is in use but counted as free");
            return Err(Damaged { path, what }.into());
        }
        self.set(store, cluster, count - 1)?;
        if count == 1 {
            self.cursor = self.cursor.min(cluster);
        }
        Ok(count == 1)
    }

    /// Up to `most` free clusters in a row, at least one, counted as used from now on.
    pub(crate) fn allocate(&mut self, store: &dyn Store, most: u64) -> Result<Run> {
        let first = self.next_free(store, self.cursor)?;
        let mut count = 1;
        self.set(store, first, 1)?;
        self.cursor = first + 1;
        while count < most && !self.blockless(first + count) {
            if self.count(store, first + count)? != 0 || self.is_kept(first + count) {
                break;
            }
            self.set(store, first + count, 1)?;
            count += 1;
            self.cursor = first + count;
        }
        let zero = first >= self.untouched;
        if self.untouched != u64::MAX {
            self.untouched = self.untouched.max(first + count);
        }
        Ok(Run { first, count, zero })
    }

    fn blockless(&self, cluster: u64) -> bool {
        let (index, _) = self.place(cluster);
        self.table.get(index).copied().unwrap_or(0) & OFFSET == 0
    }

    fn is_kept(&self, cluster: u64) -> bool {
        self.kept.iter().any(|kept| kept.contains(&cluster))
    }

    fn next_free(&mut self, store: &dyn Store, from: u64) -> Result<u64> {
        let mut cluster = from;
        loop {
            if cluster + 1 >= MAX_OFFSET >> self.cluster_bits {
                let why = "its file would be larger than the format allows".to_owned();
                let path = store.path().to_owned();
                return Err(Full { path, why }.into());
            }
            let (index, within) = self.place(cluster);
            if self.blockless(cluster) {
                // What no block counts is free. The block takes the first cluster that it counts,
                // or this one if the search began behind that.
                self.add_block(store, index, cluster)?;
                cluster += 1;
                continue;
            }
            let order = self.order;
            let (per_block, mut free) = (self.per_block(), None);
            if let Some(block) = self.block(store, index)? {
                free = (within..per_block).find(|at| Self::read(block, order, *at) == 0);
            }
            match free {
                Some(at) => {
                    cluster = index as u64 * per_block + at;
                    if !self.is_kept(cluster) {
                        return Ok(cluster);
                    }
                    cluster += 1;
                }
                None => cluster = (index as u64 + 1) * per_block,
            }
        }
    }

    /// A new block, in the cluster `at` that it counts itself.
    fn add_block(&mut self, store: &dyn Store, index: usize, at: u64) -> Result<()> {
        if index >= self.table.len() {
            return Err(Full {
                path: store.path().to_owned(),
                why: "its refcount table is full".to_owned(),
            }
            .into());
        }
        let host = at << self.cluster_bits;
        let mut block = Table::new(host, vec![0; 1 << self.cluster_bits]);
        let within = at % self.per_block();
        Self::write(&mut block, self.order, within, 1);
        self.blocks.insert(index, block);
        if let Some(entry) = self.table.get_mut(index) {
            *entry = host;
        }
        self.changed.insert(index * 8 / us(PIECE));
        if self.untouched != u64::MAX {
            self.untouched = self.untouched.max(at + 1);
        }
        Ok(())
    }

    /// Makes the table larger: a new one at the end of the file, with the blocks that count it.
    /// Nothing else may be dirty. Gives the header that refers to it and the clusters of the old
    /// table; the caller writes the header and then releases them.
    pub(crate) fn grow(&mut self, store: &dyn Store, header: &Header) -> Result<(Header, Run)> {
        let cluster = 1u64 << self.cluster_bits;
        let old = Run {
            first: self.offset >> self.cluster_bits,
            count: u64::from(header.table_clusters),
            zero: false,
        };
        let clusters = u64::from(header.table_clusters) * 2 + 1;
        // Behind everything: the first cluster that the old table cannot count.
        let per_block = self.per_block();
        let first = self.table.len() as u64 * per_block;
        let mut table = self.table.clone();
        table.resize(us(clusters * cluster / 8), 0);
        // Blocks for the table and for themselves, in front of it.
        let mut blocks = 1;
        while blocks * per_block < blocks + clusters {
            blocks += 1;
        }
        let end = first + blocks + clusters;
        if end >= MAX_OFFSET >> self.cluster_bits {
            let why = "its file would be larger than the format allows".to_owned();
            let path = store.path().to_owned();
            return Err(Full { path, why }.into());
        }
        store.set_len(store.len()?.max(end << self.cluster_bits))?;
        for number in 0..blocks {
            let host = (first + number) << self.cluster_bits;
            let mut block = Table::loaded(host, vec![0; us(cluster)]);
            let from = first + number * per_block;
            for counted in from..(from + per_block).min(end) {
                Self::write(&mut block, self.order, counted - from, 1);
            }
            store.write_at(host, &block.bytes)?;
            let index = us(first / per_block + number);
            if let Some(entry) = table.get_mut(index) {
                *entry = host;
            }
        }
        let offset = (first + blocks) << self.cluster_bits;
        store.write_at(offset, &bytes(&table))?;
        store.sync()?;
        let mut header = header.clone();
        header.table_offset = offset;
        header.table_clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        self.table = table;
        self.offset = offset;
        if self.untouched != u64::MAX {
            self.untouched = self.untouched.max(end);
        }
        Ok((header, old))
    }

    /// The end of the last cluster in use, in bytes, as far as the blocks tell.
    pub(crate) fn end(&mut self, store: &dyn Store) -> Result<u64> {
        let per_block = self.per_block();
        let order = self.order;
        for index in (0..self.table.len()).rev() {
            if let Some(block) = self.block(store, index)? {
                let last = (0..per_block)
                    .rev()
                    .find(|at| Self::read(block, order, *at) != 0);
                if let Some(last) = last {
                    let end = index as u64 * per_block + last + 1;
                    return Ok(end.saturating_mul(1 << self.cluster_bits));
                }
            }
        }
        Ok(0)
    }

    /// The piece of the table with that number, for a flush.
    pub(crate) fn piece(&self, number: usize) -> (u64, Vec<u8>) {
        let per_piece = us(PIECE / 8);
        let start = number * per_piece;
        let end = (start + per_piece).min(self.table.len());
        let part = self.table.get(start..end).unwrap_or_default();
        (self.offset + (start * 8) as u64, bytes(part))
    }
}

/// The entries of an L1 table, from the file.
pub(crate) fn load_l1(store: &dyn Store, header: &Header) -> Result<Vec<u64>> {
    let mut table = vec![0; us(u64::from(header.l1_entries) * 8)];
    store.read_at(header.l1_offset, &mut table)?;
    Ok(table.chunks_exact(8).map(|entry| be64(entry, 0)).collect())
}
