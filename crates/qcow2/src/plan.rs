//! Where a byte of the guest goes: what a write or a zeroing does to the tables.
//!
//! A write to a cluster that the image does not have for itself takes three steps: a cluster of
//! the file is allocated and the guest's cluster is marked as pending; whoever asked writes the
//! whole content there; then it is linked. Nobody sees the new cluster before.

use std::sync::Arc;

use strake_block::Event;
use strake_observe::Result;

use crate::map::{Mapping, ZERO};
use crate::num::us;
use crate::refcount::Run;
use crate::state::{COPIED, Epoch, Qcow, State};

/// Clusters that one request allocates at once, at most.
const MAX_RUN: u64 = 64;

/// Clusters that one step zeroes at most, so that the lock is not held for long.
const MAX_ZEROED: u64 = 8192;

/// Clusters of the guest that are being written to new ones of the file. Ends by
/// [`Qcow::link`] or [`Qcow::unlink`].
#[derive(Debug)]
pub(crate) struct Reserved {
    /// The first cluster of the guest.
    pub(crate) first: u64,
    pub(crate) run: Run,
    /// The cluster of the file was kept for this one of the guest, and is in the tables already.
    reused: bool,
    _epoch: Epoch,
}

/// How a write begins.
#[derive(Debug)]
pub(crate) enum WritePlan {
    /// That many bytes go to this place in the file.
    InPlace { host: u64, len: u64, epoch: Epoch },
    /// They go to new clusters.
    New(Reserved),
    /// Another request is in the way; the event will be signalled.
    Wait,
}

/// How a zeroing begins.
#[derive(Debug)]
pub(crate) enum ZeroPlan {
    /// That many bytes are done.
    Done(u64),
    /// That many bytes at this place in the file are to be zeroed.
    InPlace { host: u64, len: u64, epoch: Epoch },
    /// That many bytes are to be written as zeroes, unless they read as such.
    Write(u64),
    /// Another request is in the way; the event will be signalled.
    Wait,
}

impl Qcow {
    /// Plans the write of `len` bytes at `offset`: for how many is up to the plan.
    pub(crate) fn plan_write(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        event: &Arc<Event>,
    ) -> Result<WritePlan> {
        let bits = self.cluster_bits;
        let first = offset >> bits;
        let mut state = self.lock();
        if state.pending.contains(&first) {
            state.wait_for(event);
            return Ok(WritePlan::Wait);
        }
        let (mapping, same) = state.map(offset, len)?;
        if let Mapping::Data { host, copied: true } = mapping {
            let epoch = Arc::clone(&state.epoch);
            return Ok(WritePlan::InPlace {
                host,
                len: same,
                epoch,
            });
        }
        if state.flushing && state.is_crowded() {
            state.wait_for(event);
            return Ok(WritePlan::Wait);
        }
        let last = (offset + len - 1) >> bits;
        let most = (last - first + 1).min(MAX_RUN);
        match self.reserve(&mut state, first, most) {
            Ok(reserved) => Ok(WritePlan::New(reserved)),
            Err(seen) if State::is_full(&seen) => self.grow_counts(state, event, seen),
            Err(seen) => Err(seen),
        }
    }

    /// The refcount table may be full: makes it larger, once nothing else is being written.
    fn grow_counts(
        self: &Arc<Self>,
        mut state: std::sync::MutexGuard<'_, State>,
        event: &Arc<Event>,
        seen: strake_observe::Observation,
    ) -> Result<WritePlan> {
        if state.flushing {
            state.wait_for(event);
            return Ok(WritePlan::Wait);
        }
        if !state.counts_are_full() {
            return Err(seen);
        }
        drop(state);
        self.grow_table()?;
        event.signal();
        Ok(WritePlan::Wait)
    }

    /// Allocates for up to `most` clusters from `first` on, none of which the image has for
    /// itself alone.
    fn reserve(&self, state: &mut State, first: u64, most: u64) -> Result<Reserved> {
        let (index, within) = state.place(first);
        state.own_table(index)?;
        let bits = self.cluster_bits;
        let (mapping, _) = state.map(first << bits, 1)?;
        let epoch = Arc::clone(&state.epoch);
        if let Mapping::Zero {
            host: Some(host),
            copied: true,
        } = mapping
            && !state.is_kept(host)
        {
            state.pending.insert(first);
            let run = Run {
                first: host >> bits,
                count: 1,
                zero: false,
            };
            return Ok(Reserved {
                first,
                run,
                reused: true,
                _epoch: epoch,
            });
        }
        let in_table = 1u64 << state.table_bits();
        let most = most.min(in_table - within as u64);
        let mut count = 1;
        while count < most {
            let next = first + count;
            let (mapping, _) = state.map(next << bits, 1)?;
            let own = matches!(
                mapping,
                Mapping::Data { copied: true, .. } | Mapping::Zero { host: Some(_), .. }
            );
            if own || state.pending.contains(&next) {
                break;
            }
            count += 1;
        }
        let run = state.allocate(count)?;
        state.pending.extend(first..first + run.count);
        Ok(Reserved {
            first,
            run,
            reused: false,
            _epoch: epoch,
        })
    }

    /// Reserves one cluster if this layer says nothing about it; waits while it is pending. For
    /// jobs in threads of their own.
    pub(crate) fn reserve_unallocated(self: &Arc<Self>, cluster: u64) -> Result<Option<Reserved>> {
        let mut state = self.lock();
        while state.pending.contains(&cluster) {
            state = self.wait(state);
        }
        let (mapping, _) = state.map(cluster << self.cluster_bits, 1)?;
        if mapping != Mapping::Unallocated {
            return Ok(None);
        }
        match self.reserve(&mut state, cluster, 1) {
            Ok(reserved) => Ok(Some(reserved)),
            Err(seen) if State::is_full(&seen) && state.counts_are_full() => {
                drop(state);
                self.grow_table()?;
                self.reserve_unallocated(cluster)
            }
            Err(seen) => Err(seen),
        }
    }

    /// The content is in the file: from now on it is what the guest's clusters read as.
    pub(crate) fn link(&self, reserved: Reserved) -> Result<()> {
        let mut state = self.lock();
        let linked = self.link_all(&mut state, &reserved);
        for cluster in reserved.first..reserved.first + reserved.run.count {
            state.pending.remove(&cluster);
        }
        self.wake(&mut state);
        linked
    }

    fn link_all(&self, state: &mut State, reserved: &Reserved) -> Result<()> {
        let bits = self.cluster_bits;
        for number in 0..reserved.run.count {
            let (index, within) = state.place(reserved.first + number);
            let host = (reserved.run.first + number) << bits;
            state.replace(index, within, host | COPIED, reserved.reused)?;
        }
        Ok(())
    }

    /// The content did not get there: the guest's clusters stay as they were.
    pub(crate) fn unlink(&self, reserved: &Reserved) {
        let mut state = self.lock();
        for cluster in reserved.first..reserved.first + reserved.run.count {
            state.pending.remove(&cluster);
        }
        if !reserved.reused {
            // If the counts cannot be read, the clusters stay counted: space that is lost.
            let _ = state.give_back(reserved.run);
        }
        self.wake(&mut state);
    }

    /// Makes one reserved cluster read as zeroes, instead of linking it.
    pub(crate) fn link_zero(&self, reserved: &Reserved) -> Result<()> {
        let mut state = self.lock();
        let (index, within) = state.place(reserved.first);
        let linked = state.replace(index, within, ZERO, false);
        drop(state);
        self.unlink(reserved);
        linked
    }

    /// Plans how `len` bytes at `offset` are made to read as zeroes. `below` says whether there
    /// is a layer below; `give_back` whether the space may go; a `hint` may be done in part.
    pub(crate) fn plan_zero(
        self: &Arc<Self>,
        (offset, len): (u64, u64),
        (below, give_back, hint): (bool, bool, bool),
        event: &Arc<Event>,
    ) -> Result<ZeroPlan> {
        let bits = self.cluster_bits;
        let cluster = 1u64 << bits;
        let mut state = self.lock();
        let first = offset >> bits;
        if state.pending.contains(&first) || state.flushing && state.is_crowded() {
            state.wait_for(event);
            return Ok(ZeroPlan::Wait);
        }
        let within = offset & (cluster - 1);
        let to_end = offset + len >= state.header.size;
        if within != 0 || len < cluster && !to_end {
            return state.plan_zero_part(offset, len.min(cluster - within), hint);
        }
        let (mapping, same) = state.map(offset, len)?;
        if mapping == Mapping::Unallocated && !below {
            return Ok(ZeroPlan::Done(same));
        }
        if self.version < 3 && below {
            return Ok(match (hint, mapping) {
                (true, _) => ZeroPlan::Done(same),
                (false, Mapping::Data { host, copied: true }) => ZeroPlan::InPlace {
                    host,
                    len: same,
                    epoch: Arc::clone(&state.epoch),
                },
                (false, _) => ZeroPlan::Write(len.min(cluster)),
            });
        }
        let whole = if to_end {
            len.div_ceil(cluster)
        } else {
            len / cluster
        };
        let (index, start) = state.place(first);
        let in_table = (1u64 << state.table_bits()) - start as u64;
        let mut left = whole.min(in_table).min(MAX_ZEROED);
        state.own_table(index)?;
        let mut number = 0;
        while left > 0 && !state.pending.contains(&(first + number)) {
            let entry = if below || !give_back { ZERO } else { 0 };
            let entry = if self.version < 3 { 0 } else { entry };
            let at = start + us(number);
            state.zero_entry(index, at, entry, give_back)?;
            number += 1;
            left -= 1;
        }
        Ok(ZeroPlan::Done(len.min(number << bits)))
    }

    /// Makes the refcount table larger.
    fn grow_table(self: &Arc<Self>) -> Result<()> {
        self.flush()?;
        let mut state = self.lock();
        if state.flushing || !state.counts_are_full() {
            return Ok(());
        }
        state.grow_counts(self)
    }
}

impl State {
    /// Puts an entry into an L2 table. The references of the old one are dropped, but for those
    /// that the new one has too.
    fn replace(&mut self, index: usize, within: usize, entry: u64, reused: bool) -> Result<()> {
        self.own_table(index)?;
        let bits = self.header.cluster_bits;
        let Some(old) = self.table(index)?.map(|table| table.entry(within)) else {
            return Ok(());
        };
        if old == entry {
            return Ok(());
        }
        match self.decode(old)? {
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => {}
            Mapping::Zero {
                host: Some(host), ..
            }
            | Mapping::Data { host, .. } => {
                if !reused {
                    self.freed.push(host >> bits);
                }
            }
            Mapping::Packed { host, bytes } => {
                // Each cluster of the file that it touches has a reference of it.
                self.freed
                    .extend((host >> bits)..=((host + bytes - 1) >> bits));
            }
        }
        if let Some(table) = self.table(index)? {
            table.set_entry(within, entry);
        }
        Ok(())
    }

    fn zero_entry(
        &mut self,
        index: usize,
        within: usize,
        entry: u64,
        give_back: bool,
    ) -> Result<()> {
        let Some(old) = self.table(index)?.map(|table| table.entry(within)) else {
            return Ok(());
        };
        match self.decode(old)? {
            Mapping::Unallocated if entry == 0 => Ok(()),
            Mapping::Zero { .. } if !give_back => Ok(()),
            // Its cluster stays with it, for the next write.
            Mapping::Data { copied: true, .. } if !give_back && entry & ZERO != 0 => {
                self.replace(index, within, old | ZERO, true)
            }
            _ => self.replace(index, within, entry, false),
        }
    }

    /// A part of one cluster.
    fn plan_zero_part(&mut self, offset: u64, len: u64, hint: bool) -> Result<ZeroPlan> {
        Ok(match self.map(offset, len)?.0 {
            Mapping::Zero { .. } => ZeroPlan::Done(len),
            Mapping::Data { host, copied: true } => ZeroPlan::InPlace {
                host,
                len,
                epoch: Arc::clone(&self.epoch),
            },
            // Not worth a cluster.
            _ if hint => ZeroPlan::Done(len),
            _ => ZeroPlan::Write(len),
        })
    }

    fn counts_are_full(&self) -> bool {
        let last =
            |refs: &crate::refcount::Refcounts| refs.table.last().is_some_and(|entry| *entry != 0);
        self.refs.as_ref().is_some_and(last)
    }

    /// Nothing is dirty and no flush is running.
    fn grow_counts(&mut self, qcow: &Qcow) -> Result<()> {
        let store = Arc::clone(&qcow.store);
        let Some(refs) = self.refs.as_mut() else {
            return Ok(());
        };
        if refs.blocks.any_dirty() || !refs.changed.is_empty() {
            return Ok(());
        }
        let (header, old) = refs.grow(&*store, &self.header)?;
        crate::state::write_header(&*store, &header)?;
        store.sync()?;
        refs.kept = crate::state::kept(&header);
        self.header = header;
        self.length = self.length.max(store.len()?);
        self.freed.extend(old.first..old.first + old.count);
        Ok(())
    }
}
