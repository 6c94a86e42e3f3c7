//! One qcow2 file that is open: its tables behind one lock.
//!
//! What a request in flight may rely on, once the lock is released again:
//!
//! * A cluster of the guest that is being allocated is in `pending`: nobody else plans a change of
//!   it, they wait. Until it is linked it reads as before.
//! * A cluster of the file that a request reads or writes stays what it is while the request holds
//!   the *epoch* that it was given: what is freed is counted as free only when everybody who could
//!   still use it has let go (and when a flush has made durable that nothing refers to it).

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use strake_block::{Access, Event};
use strake_observe::Result;

use crate::num::us;
use crate::refcount::{Refcounts, Run, load_l1};
use crate::tables::{Table, Tables};
use crate::{Damaged, Full, Header, NeedsRepair, Store, Unsupported};

/// Where a table or cluster is, in L1 and L2 entries.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Nothing else refers to it, so it may be changed in place.
pub(crate) const COPIED: u64 = 1 << 63;

/// L2 tables kept in memory, in bytes: enough for 256 GiB of disk with the usual clusters.
const CACHED_BYTES: u64 = 32 * 1024 * 1024;

/// By how much a file is made longer at once, at least.
const GROW_BYTES: u64 = 16 * 1024 * 1024;

/// A qcow2 file that is open.
#[derive(Debug)]
pub(crate) struct Qcow {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) access: Access,
    pub(crate) cluster_bits: u32,
    pub(crate) version: u32,
    /// The length of a file that may only be read: what is past it reads as zeroes.
    pub(crate) end: u64,
    size: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

/// Held by whoever reads or writes clusters of the file.
pub(crate) type Epoch = Arc<()>;

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) header: Header,
    pub(crate) l1: Vec<u64>,
    /// Pieces of the L1 table with changes, by their number.
    pub(crate) l1_changed: BTreeSet<usize>,
    pub(crate) l2: Tables,
    /// None if the file may only be read.
    pub(crate) refs: Option<Refcounts>,
    pub(crate) pending: HashSet<u64>,
    /// Clusters of the file to which one reference less is left.
    pub(crate) freed: Vec<u64>,
    pub(crate) batches: VecDeque<Batch>,
    pub(crate) epoch: Epoch,
    pub(crate) flushing: bool,
    /// The length of a file that may be written.
    pub(crate) length: u64,
    waiting: Vec<Weak<Event>>,
    /// Threads in [`Qcow::wait`]: mostly none, and waking nobody costs a system call too.
    sleeping: u32,
}

/// References that are gone from the disk too.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) epoch: Epoch,
    pub(crate) clusters: Vec<u64>,
}

impl Qcow {
    pub(crate) fn open(store: Arc<dyn Store>, access: Access) -> Result<Self> {
        let mut header = Header::read(&*store)?;
        let l1 = load_l1(&*store, &header)?;
        let cluster = header.cluster();
        let mut refs = None;
        let end = store.len()?;
        let mut length = end;
        if access == Access::ReadWrite {
            check_writable(&*store, &header)?;
            if header.autoclear != 0 {
                // What only those who know these features keep right is right no longer.
                header.autoclear = 0;
                write_header(&*store, &header)?;
                store.sync()?;
            }
            if store.grows() {
                length = end.next_multiple_of(cluster);
                store.set_len(length)?;
            }
            let mut loaded = Refcounts::load(&*store, &header)?;
            loaded.kept = kept(&header);
            refs = Some(loaded);
        }
        let limit = us((CACHED_BYTES / cluster).max(8));
        Ok(Self {
            access,
            cluster_bits: header.cluster_bits,
            version: header.version,
            size: AtomicU64::new(header.size),
            end: if access == Access::ReadOnly {
                end
            } else {
                u64::MAX
            },
            state: Mutex::new(State {
                store: Arc::clone(&store),
                header,
                l1,
                l1_changed: BTreeSet::new(),
                l2: Tables::new(limit),
                refs,
                pending: HashSet::new(),
                freed: Vec::new(),
                batches: VecDeque::new(),
                epoch: Arc::new(()),
                flushing: false,
                length,
                waiting: Vec::new(),
                sleeping: 0,
            }),
            changed: Condvar::new(),
            store,
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The size of its disk, in whole sectors.
    pub(crate) fn size(&self) -> u64 {
        let size = self.size.load(Ordering::Acquire);
        size - size % strake_block::SECTOR_BYTES
    }

    /// Changes the size of the disk, in memory.
    pub(crate) fn set_size(&self, state: &mut State, size: u64) {
        state.header.size = size;
        self.size.store(size, Ordering::Release);
    }

    /// Lets everybody who waits for a pending cluster or a flush look again.
    pub(crate) fn wake(&self, state: &mut State) {
        for event in state.waiting.drain(..).filter_map(|event| event.upgrade()) {
            event.signal();
        }
        if state.sleeping > 0 {
            self.changed.notify_all();
        }
    }

    /// Waits for the next [`wake`](Self::wake), in this thread.
    pub(crate) fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.sleeping += 1;
        let mut state = self
            .changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
        state.sleeping -= 1;
        state
    }
}

fn check_writable(store: &dyn Store, header: &Header) -> Result<()> {
    let path = || store.path().to_owned();
    if let Some(why) = header.unclean() {
        let why = why.to_owned();
        return Err(NeedsRepair { path: path(), why }.into());
    }
    if header.cluster() < store.block_bytes() {
        let feature = format!(
            "clusters of {} bytes on a device whose blocks have {}",
            header.cluster(),
            store.block_bytes()
        );
        return Err(Unsupported {
            path: path(),
            feature,
        }
        .into());
    }
    Ok(())
}

/// The clusters of the header and of the two tables at the top.
pub(crate) fn kept(header: &Header) -> Vec<std::ops::Range<u64>> {
    let cluster = header.cluster();
    let range = |at: u64, bytes: u64| {
        let first = at / cluster;
        first..first + bytes.div_ceil(cluster)
    };
    vec![
        0..1,
        range(header.l1_offset, u64::from(header.l1_entries) * 8),
        range(
            header.table_offset,
            u64::from(header.table_clusters) * cluster,
        ),
    ]
}

/// Writes the fixed fields of the header: one sector, so it is the old or the new one.
pub(crate) fn write_header(store: &dyn Store, header: &Header) -> Result<()> {
    let mut first = vec![0; crate::header::ATOMIC];
    store.read_at(0, &mut first)?;
    header.encode_fixed(&mut first);
    store.write_at(0, &first)
}

impl State {
    pub(crate) fn damaged(&self, what: String) -> Damaged {
        let path = self.store.path().to_owned();
        Damaged { path, what }
    }

    /// Has `event` signalled at the next [`Qcow::wake`].
    pub(crate) fn wait_for(&mut self, event: &Arc<Event>) {
        let known = |waiting: &Weak<Event>| waiting.as_ptr() == Arc::as_ptr(event);
        if !self.waiting.iter().any(known) {
            self.waiting.push(Arc::downgrade(event));
        }
    }

    /// The clusters of one L2 table, as a shift.
    pub(crate) fn table_bits(&self) -> u32 {
        self.header.cluster_bits - 3
    }

    /// The L2 table and the index in it of a cluster of the guest.
    pub(crate) fn place(&self, cluster: u64) -> (usize, usize) {
        let bits = self.table_bits();
        (us(cluster >> bits), us(cluster & ((1 << bits) - 1)))
    }

    /// The L2 table with that index, if the image has it.
    pub(crate) fn table(&mut self, index: usize) -> Result<Option<&mut Table>> {
        let host = self.l1.get(index).copied().unwrap_or(0) & OFFSET;
        if host == 0 {
            return Ok(None);
        }
        if self.l2.get(index).is_none() {
            if !host.is_multiple_of(self.header.cluster()) {
                let what = format!("its L2 table {index} is not at a cluster");
                return Err(self.damaged(what).into());
            }
            let mut bytes = vec![0; us(self.header.cluster())];
            self.store.read_at(host, &mut bytes)?;
            self.l2.insert(index, Table::loaded(host, bytes));
        }
        Ok(self.l2.get(index))
    }

    /// The L2 table with that index, made if need be, and the image's own alone.
    pub(crate) fn own_table(&mut self, index: usize) -> Result<()> {
        let entry = self.l1.get(index).copied().unwrap_or(0);
        if entry & OFFSET != 0 && entry & COPIED != 0 {
            return Ok(());
        }
        if index >= self.l1.len() {
            let what = "its L1 table is too small for its disk".to_owned();
            return Err(self.damaged(what).into());
        }
        let bytes = match self.table(index)? {
            Some(table) => table.bytes.clone(),
            None => vec![0; us(self.header.cluster())],
        };
        let run = self.allocate(1)?;
        let host = run.first << self.header.cluster_bits;
        if entry & OFFSET != 0 {
            self.freed
                .push((entry & OFFSET) >> self.header.cluster_bits);
        }
        self.l2.insert(index, Table::new(host, bytes));
        if let Some(entry) = self.l1.get_mut(index) {
            *entry = host | COPIED;
        }
        self.l1_changed.insert(index * 8 / us(crate::tables::PIECE));
        Ok(())
    }

    /// Up to `most` clusters of the file in a row; the file reaches as far.
    pub(crate) fn allocate(&mut self, most: u64) -> Result<Run> {
        self.release_batches()?;
        let store = Arc::clone(&self.store);
        let bits = self.header.cluster_bits;
        let Some(refs) = self.refs.as_mut() else {
            let path = store.path().to_owned();
            let operation = "an allocation".to_owned();
            return Err(strake_block::ReadOnlyDisk { path, operation }.into());
        };
        let run = refs.allocate(&*store, most)?;
        let end = (run.first + run.count) << bits;
        if end > self.length {
            let length = end.next_multiple_of(GROW_BYTES.max(1 << bits));
            let grown = store
                .set_len(length)
                .map(|()| length)
                // The device may have room for this, if not for more.
                .or_else(|_| store.set_len(end).map(|()| end));
            match grown {
                Ok(length) => self.length = length,
                Err(full) => {
                    self.give_back(run)?;
                    return Err(full);
                }
            }
        }
        Ok(run)
    }

    /// Clusters that were allocated and never referred to.
    pub(crate) fn give_back(&mut self, run: Run) -> Result<()> {
        let store = Arc::clone(&self.store);
        if let Some(refs) = self.refs.as_mut() {
            for cluster in run.first..run.first + run.count {
                refs.release(&*store, cluster)?;
            }
        }
        Ok(())
    }

    /// Counts as free what nobody uses any more. Their space goes back to the file system.
    pub(crate) fn release_batches(&mut self) -> Result<()> {
        let store = Arc::clone(&self.store);
        let cluster = self.header.cluster();
        while let Some(batch) = self.batches.front() {
            // The batch's own; new requests were given a later epoch.
            if Arc::strong_count(&batch.epoch) > 1 {
                break;
            }
            let Some(batch) = self.batches.pop_front() else {
                break;
            };
            let Some(refs) = self.refs.as_mut() else {
                break;
            };
            let mut free: Option<std::ops::Range<u64>> = None;
            let mut clusters = batch.clusters;
            clusters.sort_unstable();
            for host in clusters {
                if !refs.release(&*store, host)? {
                    continue;
                }
                let range = host * cluster..(host + 1) * cluster;
                free = match free {
                    Some(free) if free.end == range.start => Some(free.start..range.end),
                    Some(free) => {
                        store.release(free);
                        Some(range)
                    }
                    None => Some(range),
                };
            }
            if let Some(free) = free {
                store.release(free);
            }
        }
        Ok(())
    }

    /// Whether tables with changes should be written before more are changed.
    pub(crate) fn is_crowded(&self) -> bool {
        let refs = self.refs.as_ref();
        self.l2.is_crowded() || refs.is_some_and(|refs| refs.blocks.is_crowded())
    }

    pub(crate) fn is_kept(&self, host: u64) -> bool {
        let cluster = host >> self.header.cluster_bits;
        let refs = self.refs.as_ref();
        refs.is_some_and(|refs| refs.kept.iter().any(|kept| kept.contains(&cluster)))
    }

    /// Whether it failed because the table of refcounts has no more entries.
    pub(crate) fn is_full(seen: &strake_observe::Observation) -> bool {
        seen.is::<Full>()
    }
}
