//! What is kept of a disk.

use std::collections::HashMap;

/// Bytes of a page, and of the blocks that it is compared with.
pub const PAGE: u64 = 4096;

/// Bytes of a disk that share a generation.
pub const REGION: u64 = 64 << 10;

/// Blocks of a region.
pub(crate) const REGION_BLOCKS: u64 = REGION / PAGE;

/// A disk that the store knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskId(pub(crate) u32);

#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) name: String,
    /// Of each region.
    pub(crate) generations: Vec<u32>,
    /// Writes under way, by region.
    pub(crate) writing: HashMap<u64, u32>,
    /// Pages whose only home is here, by region.
    pub(crate) relied: HashMap<u64, u32>,
}

impl Disk {
    pub(crate) fn new(name: &str, bytes: u64) -> Self {
        let regions = bytes
            .div_ceil(REGION)
            .min(crate::words::BLOCKS_MAX / REGION_BLOCKS);
        Self {
            name: name.to_owned(),
            generations: vec![0; usize::try_from(regions).unwrap_or(0)],
            writing: HashMap::new(),
            relied: HashMap::new(),
        }
    }

    pub(crate) fn generation(&self, region: u64) -> Option<u32> {
        let index = usize::try_from(region).ok()?;
        self.generations.get(index).copied()
    }
}

/// The regions that a range of bytes touches.
pub(crate) fn regions(offset: u64, len: u64) -> std::ops::Range<u64> {
    if len == 0 {
        return 0..0;
    }
    offset / REGION..offset.saturating_add(len).div_ceil(REGION)
}

pub(crate) fn add(counts: &mut HashMap<u64, u32>, region: u64) {
    let count = counts.entry(region).or_insert(0);
    *count = count.saturating_add(1);
}

/// Takes one away; at none the entry goes.
pub(crate) fn sub(counts: &mut HashMap<u64, u32>, region: u64) {
    if let Some(count) = counts.get_mut(&region) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(&region);
        }
    }
}
