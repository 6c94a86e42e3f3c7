//! A new, empty image.

use strake_block::SECTOR_BYTES;
use strake_observe::Result;

use crate::header::{ATOMIC, Backing, Header, MAX_NAME};
use crate::num::{put, us};
use crate::{BadOption, Store};

/// The cluster size without a wish: what every tool makes.
const CLUSTER_BITS: u32 = 16;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    size: u64,
    cluster_bits: u32,
    backing: Option<Backing>,
}

impl CreateOptions {
    /// A disk of `size` bytes, rounded up to whole sectors, with clusters of 64 KiB.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_bits: CLUSTER_BITS,
            backing: None,
        }
    }

    /// With clusters of 1 << `bits` bytes: 12 (4 KiB) to 21 (2 MiB).
    #[must_use]
    pub fn cluster_bits(mut self, bits: u32) -> Self {
        self.cluster_bits = bits;
        self
    }

    /// Over another image. The name is relative to the folder of the new one, or absolute.
    #[must_use]
    pub fn backing(mut self, path: impl Into<String>, format: crate::Format) -> Self {
        self.backing = Some(Backing {
            path: path.into(),
            format: Some(format.name().to_owned()),
        });
        self
    }
}

/// Makes an empty image in `store`; what it held is lost. The header is written last and
/// everything is durable when it returns, so that a crash leaves no image or a whole one.
///
/// # Errors
/// When the options contradict each other or the store fails.
pub fn create(store: &dyn Store, options: &CreateOptions) -> Result<()> {
    let bad = |why: &str| BadOption {
        path: store.path().to_owned(),
        why: why.to_owned(),
    };
    let bits = options.cluster_bits;
    if !(12..=21).contains(&bits) {
        return Err(bad("clusters have 4 KiB to 2 MiB").into());
    }
    let cluster = 1u64 << bits;
    let size = options
        .size
        .checked_next_multiple_of(SECTOR_BYTES)
        .filter(|size| *size > 0)
        .ok_or_else(|| bad("the disk has no size"))?;
    let mut header = Header::fresh(bits, size, None);
    let l1_entries = header.l1_needed(size);
    if l1_entries > 4 * 1024 * 1024 {
        return Err(bad("the disk is too large for clusters of this size").into());
    }
    let l1 = (l1_entries * 8).div_ceil(cluster);
    // Room for a table entry for every block that a full image can need.
    let per_block = cluster * 8 / 16;
    let most = size.div_ceil(cluster) + l1_entries + l1 + 2;
    let blocks_most = most.div_ceil(per_block) + most.div_ceil(per_block * per_block) + 2;
    let table = (blocks_most * 8)
        .div_ceil(cluster)
        .min((8 * 1024 * 1024 / cluster).max(1));
    let mut blocks = 1;
    while blocks * per_block < 1 + table + blocks + l1 {
        blocks += 1;
    }
    let end = 1 + table + blocks + l1;
    header.table_offset = cluster;
    header.table_clusters = u32::try_from(table).unwrap_or(u32::MAX);
    header.l1_offset = (1 + table + blocks) * cluster;
    header.l1_entries = u32::try_from(l1_entries).unwrap_or(u32::MAX);

    let mut first = vec![0; us(cluster)];
    if let Some(backing) = &options.backing {
        if backing.path.is_empty() || backing.path.len() > MAX_NAME || backing.path.contains('\0') {
            return Err(bad("the path of its backing file is empty or too long").into());
        }
        put(&mut first, ATOMIC, backing.path.as_bytes());
        header.set_backing(Some(backing.clone()), ATOMIC as u64);
    }
    header.encode_fixed(&mut first);
    let at = us(u64::from(header.header_bytes));
    let extensions = header
        .encode_extensions(ATOMIC - at)
        .ok_or_else(|| bad("its header is too small"))?;
    put(&mut first, at, &extensions);

    if store.grows() {
        store.set_len(0)?;
    }
    store.set_len(end * cluster)?;
    let mut tables = vec![0; us((end - 1) * cluster)];
    for number in 0..blocks {
        let host = (1 + table + number) * cluster;
        put(&mut tables, us(number * 8), &host.to_be_bytes());
    }
    let counts = us(table * cluster);
    for counted in 0..end {
        put(&mut tables, counts + us(counted * 2), &1u16.to_be_bytes());
    }
    store.write_at(0, &vec![0; us(cluster)])?;
    store.write_at(cluster, &tables)?;
    store.sync()?;
    store.write_at(0, &first)?;
    store.sync()
}
