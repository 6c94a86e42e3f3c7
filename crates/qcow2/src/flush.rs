//! In which order changes reach the disk.
//!
//! ```text
//!   data, refcount blocks, new L2 tables    (nothing refers to any of it yet)
//!   -- sync --
//!   refcount table                          (refers to refcount blocks)
//!   -- sync, if it changed --
//!   L2 tables, L1 table                     (refer to data and to L2 tables)
//!   -- sync --
//!   what is not referred to any longer is counted as free, in memory
//! ```
//!
//! So a table on the disk never refers to anything that is not there, or not counted as in use;
//! what a crash leaves counted but unused is lost space, nothing else. One flush per file runs at
//! a time; it writes what it copied under the lock at its start, while requests go on.

use std::collections::VecDeque;
use std::sync::Arc;

use strake_block::Access;
use strake_observe::Result;

use crate::num::{bytes, us};
use crate::state::{Batch, Epoch, Qcow, State};
use crate::tables::PIECE;

type Piece = (u64, Vec<u8>);

/// A flush on its way.
#[derive(Debug)]
pub(crate) struct FlushRun {
    qcow: Arc<Qcow>,
    stages: VecDeque<Stage>,
    /// L2 tables and blocks that nothing on the disk refers to before the last stages.
    new: (Vec<usize>, Vec<usize>),
    batch: Option<(Epoch, Vec<u64>)>,
    ended: bool,
}

#[derive(Debug)]
enum Stage {
    /// What nothing refers to.
    Unreferred(Vec<Piece>),
    /// The refcount table.
    Counts(Vec<Piece>),
    /// L2 and L1 tables.
    References(Vec<Piece>),
}

/// What a flush needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Everything that was written must be made durable, then it goes on.
    Sync,
    Done,
}

impl FlushRun {
    /// Begins a flush, unless one is running: then the caller waits for a wake-up.
    pub(crate) fn begin(qcow: &Arc<Qcow>) -> Result<Option<Self>> {
        let mut state = qcow.lock();
        if state.flushing {
            return Ok(None);
        }
        state.release_batches()?;
        let mut run = Self {
            qcow: Arc::clone(qcow),
            stages: VecDeque::new(),
            new: (Vec::new(), Vec::new()),
            batch: None,
            ended: false,
        };
        run.collect(&mut state);
        state.flushing = true;
        Ok(Some(run))
    }

    fn collect(&mut self, state: &mut State) {
        let mut first = Vec::new();
        let mut counts = Vec::new();
        if let Some(refs) = state.refs.as_mut() {
            let taken = refs.blocks.take();
            for (index, piece) in taken.new {
                self.new.1.push(index);
                first.push(piece);
            }
            first.extend(taken.known);
            for number in std::mem::take(&mut refs.changed) {
                counts.push(refs.piece(number));
            }
        }
        let taken = state.l2.take();
        for (index, piece) in taken.new {
            self.new.0.push(index);
            first.push(piece);
        }
        let mut references = taken.known;
        let per_piece = us(PIECE / 8);
        for number in std::mem::take(&mut state.l1_changed) {
            let start = number * per_piece;
            let end = (start + per_piece).min(state.l1.len());
            let part = state.l1.get(start..end).unwrap_or_default();
            references.push((state.header.l1_offset + (start * 8) as u64, bytes(part)));
        }
        self.stages.push_back(Stage::Unreferred(first));
        if !counts.is_empty() {
            self.stages.push_back(Stage::Counts(counts));
        }
        if !references.is_empty() {
            self.stages.push_back(Stage::References(references));
        }
        if !state.freed.is_empty() {
            let epoch = std::mem::replace(&mut state.epoch, Arc::new(()));
            self.batch = Some((epoch, std::mem::take(&mut state.freed)));
        }
    }

    /// Does what can be done without waiting for the disk's cache.
    pub(crate) fn step(&mut self) -> Result<Next> {
        let Some(stage) = self.stages.pop_front() else {
            self.end();
            return Ok(Next::Done);
        };
        let pieces = match stage {
            Stage::Unreferred(pieces) => pieces,
            Stage::Counts(pieces) => {
                // From here on something may refer to the blocks.
                self.new.1.clear();
                pieces
            }
            Stage::References(pieces) => {
                self.new.0.clear();
                pieces
            }
        };
        for (at, bytes) in pieces {
            self.qcow.store.write_at(at, &bytes)?;
        }
        Ok(Next::Sync)
    }

    fn end(&mut self) {
        let mut state = self.qcow.lock();
        state.l2.written();
        if let Some(refs) = state.refs.as_mut() {
            refs.blocks.written();
        }
        if let Some((epoch, clusters)) = self.batch.take() {
            state.batches.push_back(Batch { epoch, clusters });
        }
        state.flushing = false;
        self.ended = true;
        self.qcow.wake(&mut state);
    }
}

impl Drop for FlushRun {
    /// It failed, or its queue is gone: everything that it took is to be written again.
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let mut state = self.qcow.lock();
        let (tables, blocks) = &self.new;
        state.l2.not_written(tables);
        let l1_pieces = (state.l1.len() * 8).div_ceil(us(PIECE));
        state.l1_changed.extend(0..l1_pieces);
        if let Some(refs) = state.refs.as_mut() {
            refs.blocks.not_written(blocks);
            let pieces = (refs.table.len() * 8).div_ceil(us(PIECE));
            refs.changed.extend(0..pieces);
        }
        if let Some((epoch, clusters)) = self.batch.take() {
            // They are still referred to by the disk. Batches are released in their order, so an
            // empty one keeps the later one that will hold them from going before its time.
            state.freed.extend(clusters);
            state.batches.push_back(Batch {
                epoch,
                clusters: Vec::new(),
            });
        }
        state.flushing = false;
        self.qcow.wake(&mut state);
    }
}

impl Qcow {
    /// Flushes in the calling thread.
    pub(crate) fn flush(self: &Arc<Self>) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        let mut run = loop {
            if let Some(run) = FlushRun::begin(self)? {
                break run;
            }
            let state = self.lock();
            if state.flushing {
                drop(self.wait(state));
            }
        };
        while run.step()? == Next::Sync {
            self.store.sync()?;
        }
        Ok(())
    }

    /// Whether anything is to be written.
    pub(crate) fn is_dirty(&self) -> bool {
        let state = self.lock();
        let refs = state.refs.as_ref();
        state.l2.any_dirty()
            || !state.l1_changed.is_empty()
            || !state.freed.is_empty()
            || refs.is_some_and(|refs| !refs.changed.is_empty() || refs.blocks.any_dirty())
    }
}
