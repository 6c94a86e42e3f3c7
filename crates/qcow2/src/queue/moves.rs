//! Moves: writes to clusters that the image does not have for itself yet. First what is around the
//! data is read from where it is now, then all of it is written, then linked.

use std::sync::Arc;

use strake_block::{Buffer, Operation};
use strake_observe::{Observation, Result};

use super::{Job, Part, Queue, Source, bytes_of};
use crate::layer::{Layer, Place, is_zero, read_place, resolve};
use crate::memory::{Memory, part};
use crate::num::us;
use crate::plan::Reserved;
use crate::state::Epoch;

/// Up to so much data is read over, rather than around.
const MERGE_BYTES: u64 = 16 * 1024;

#[derive(Debug)]
pub(super) struct Move {
    pub(super) job: usize,
    pub(super) reserved: Reserved,
    /// Where the write begins in the file, and what it writes.
    host: u64,
    buffers: Vec<Buffer>,
    /// What the buffers point into that is not the guest's.
    _memory: Vec<Memory>,
    /// Reads in flight.
    pub(super) flying: usize,
    pub(super) failed: Option<Observation>,
}

impl Queue {
    /// Starts to write `len` bytes to reserved clusters.
    pub(super) fn begin_move(
        &mut self,
        index: usize,
        job: &mut Job,
        reserved: Reserved,
        (len, source): (u64, Source),
    ) -> Result<()> {
        let top = Arc::clone(&self.shared.top);
        let bits = top.cluster_bits;
        let offset = job.request.offset + job.cursor;
        let start = reserved.first << bits;
        let end = (reserved.first + reserved.run.count) << bits;
        let (head, tail) = (offset - start, end - (offset + len));
        let host = reserved.run.first << bits;
        let (memory, buffers) = bytes_of(job, len, source);
        let mut the_move = Move {
            job: index,
            host,
            buffers,
            _memory: memory.into_iter().collect(),
            flying: 0,
            failed: None,
            reserved,
        };
        let layers = self.shared.layers();
        let mut read = Vec::new();
        let planned = (|| {
            let zero = the_move.reserved.run.zero
                && is_zero(&layers, 0, start, head)?
                && is_zero(&layers, 0, offset + len, tail)?;
            if zero {
                // The file has zeroes there already.
                the_move.host += head;
                return Ok(());
            }
            if head > 0 && tail > 0 && len <= MERGE_BYTES {
                // One read over the data too costs less than two.
                let mut memory = Memory::new(us(end - start));
                read.extend(around(&layers, start, &mut memory)?);
                let all = [memory.buffer()];
                let data = std::mem::take(&mut the_move.buffers);
                the_move.buffers = part(&all, 0, head);
                the_move.buffers.extend(data);
                the_move.buffers.extend(part(&all, head + len, tail));
                the_move._memory.push(memory);
                return Ok(());
            }
            if head > 0 {
                let mut memory = Memory::new(us(head));
                read.extend(around(&layers, start, &mut memory)?);
                the_move.buffers.insert(0, memory.buffer());
                the_move._memory.push(memory);
            }
            if tail > 0 {
                let mut memory = Memory::new(us(tail));
                read.extend(around(&layers, offset + len, &mut memory)?);
                the_move.buffers.push(memory.buffer());
                the_move._memory.push(memory);
            }
            Ok(())
        })();
        if let Err(seen) = planned {
            top.unlink(&the_move.reserved);
            return Err(seen);
        }
        let of = self.moves.insert(the_move);
        let mut flying = 0;
        for (layer, host, epoch, buffers) in read {
            let Some(layer) = layers.get(layer) else {
                continue;
            };
            let what = Part::Around { of, _epoch: epoch };
            match self.hand(layer, what, Operation::Read, (host, buffers)) {
                Ok(()) => flying += 1,
                Err(seen) => {
                    if let Some(the_move) = self.moves.get_mut(of) {
                        the_move.failed.get_or_insert(seen);
                    }
                }
            }
        }
        if let Some(the_move) = self.moves.get_mut(of) {
            the_move.flying = flying;
        }
        if flying == 0 {
            // The job is not in its place while it is planned: its failure goes the direct way.
            if let Some(seen) = self.write_move(of) {
                if let Some(the_move) = self.moves.remove(of) {
                    top.unlink(&the_move.reserved);
                }
                return Err(seen);
            }
        }
        Ok(())
    }

    /// Everything around it is there: writes the content of a move. Gives the failure, if any.
    pub(super) fn write_move(&mut self, of: usize) -> Option<Observation> {
        let the_move = self.moves.get_mut(of)?;
        if let Some(seen) = the_move.failed.take() {
            return Some(seen);
        }
        let what = (the_move.host, the_move.buffers.clone());
        let layer = Layer::Qcow(Arc::clone(&self.shared.top));
        self.hand(&layer, Part::Content { of }, Operation::Write, what)
            .err()
    }

    pub(super) fn move_ended(&mut self, of: usize, result: Result<()>) {
        let Some(Move { job, reserved, .. }) = self.moves.remove(of) else {
            return;
        };
        let top = &self.shared.top;
        let linked = match result {
            Ok(()) => top.link(reserved),
            Err(seen) => {
                top.unlink(&reserved);
                Err(seen)
            }
        };
        self.part_ended(job, linked);
    }
}

/// A read from a layer's file.
type Wanted = (usize, u64, Epoch, Vec<Buffer>);

/// Fills memory with what the disk has at `at`; what queues are to read is given back.
fn around(layers: &[Layer], at: u64, memory: &mut Memory) -> Result<Vec<Wanted>> {
    let len = memory.bytes().len() as u64;
    let mut wanted = Vec::new();
    let mut done = 0;
    while done < len {
        let (place, count) = resolve(layers, 0, at + done, len - done)?;
        if let Place::Data { layer, host, epoch } = place {
            let buffers = part(&[memory.buffer()], done, count);
            wanted.push((layer, host, epoch, buffers));
        } else if let Some(room) = memory.bytes_mut().get_mut(us(done)..us(done + count)) {
            read_place(layers, &place, room)?;
        }
        done += count;
    }
    Ok(wanted)
}
