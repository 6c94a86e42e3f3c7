//! What a pass copies, chunk by chunk.
//!
//! A chunk is planned at the moment at which the copier has room for it, so that a block that is
//! written again until then is copied once. Planning a chunk clears the bits of its blocks; they
//! are read after that (see `bitmap.rs`).

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use strake_observe::Result;

use super::kept::Known;
use super::overlay::{Has, Overlay};
use crate::{BLOCK_BYTES, DirtyBitmap, Image};

/// The most that is copied at once. Large enough that devices reach their sequential speed, small
/// enough that a guest's request behind one chunk waits a millisecond or so.
pub(crate) const CHUNK_BYTES: u64 = 1024 * 1024;

/// The most that is zeroed at once: a device that has to write the zeroes must not make a
/// cancellation wait.
const ZERO_BYTES: u64 = 16 * 1024 * 1024;

/// Clean blocks between two dirty ones that are copied along: reading one more block costs less
/// than one more request.
const GAP_BLOCKS: u64 = 1;

/// What is to be done with a range of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// Read it and write it. `wanted` bytes of it had to be; the rest lies between them.
    Copy { offset: u64, len: u64, wanted: u64 },
    /// The source has nothing there, the destination may have: make it zeroes.
    Zero { offset: u64, len: u64 },
}

impl Chunk {
    /// How many bytes it moves.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Copy { len, .. } => *len,
            Self::Zero { .. } => 0,
        }
    }
}

/// The chunks of one pass, in ascending order.
pub(crate) trait Plan {
    /// The next chunk, of `most` bytes at most (a power of two, [`BLOCK_BYTES`] to [`CHUNK_BYTES`]);
    /// none when the pass is complete.
    fn next(&mut self, most: u64) -> Result<Option<Chunk>>;

    /// Everything that is to be copied before this was planned or is marked.
    fn frontier(&self) -> u64 {
        u64::MAX
    }
}

/// What a destination holds before the first pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fresh {
    /// It reads as zeroes everywhere.
    Yes,
    /// Anything.
    No,
}

/// Of what a first pass is about.
#[derive(Debug)]
pub(crate) enum Of {
    /// All of an image. What has nothing there is made zeroes, unless the destination is fresh.
    Image(Arc<dyn Image>, Fresh),
    /// What a layer has itself. All else is at the destination.
    Layer(Arc<dyn Overlay>),
}

/// The first pass: what is allocated.
#[derive(Debug)]
pub(crate) struct FirstPass {
    of: Of,
    bitmap: Arc<DirtyBitmap>,
    size: u64,
    /// What an earlier run of the job has copied, and what nobody has changed since.
    known: Known,
    data: Data,
    at: u64,
    ahead: VecDeque<Ahead>,
}

/// What the first pass does with data. Holes are made zeroes either way, unless they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    Copy,
    /// Marks it as what is to be copied.
    Mark,
}

#[derive(Debug)]
enum Ahead {
    Hole(Range<u64>),
    Data(Range<u64>),
}

impl FirstPass {
    pub(crate) fn new(of: Of, bitmap: Arc<DirtyBitmap>, size: u64) -> Self {
        Self {
            of,
            bitmap,
            size,
            known: Known::default(),
            data: Data::Copy,
            at: 0,
            ahead: VecDeque::new(),
        }
    }

    /// Leaves out what an earlier run of the job has copied. Only of whole images.
    pub(crate) fn without(mut self, known: &Known) -> Self {
        if matches!(self.of, Of::Image(..)) {
            self.known = known.clone();
        }
        self
    }

    /// From here on data is not copied any more but marked in the bitmap, for a mirror to copy.
    pub(crate) fn only_mark(&mut self) {
        self.data = Data::Mark;
    }

    /// Looks for what comes next. Data is taken in whole blocks, so that a block is either copied or
    /// a hole.
    fn look(&mut self) -> Result<()> {
        if self.at >= self.size {
            return Ok(());
        }
        let (limit, known) = self.known.run(self.at, self.size);
        if known {
            self.at = limit;
            return Ok(());
        }
        let (found, fresh) = match &self.of {
            Of::Image(source, fresh) => (source.allocated(self.at)?, *fresh),
            Of::Layer(layer) => match layer.has(self.at)? {
                // Only whole blocks of zeroes: beside them may be what the layer does not have.
                Some((range, Has::Zeroes)) => match self.whole(&range) {
                    Some(zeroes) => {
                        let first = range.start - range.start % BLOCK_BYTES;
                        if first < zeroes.start {
                            self.ahead
                                .push_back(Ahead::Data(first.max(self.at)..zeroes.start));
                        }
                        self.at = zeroes.end;
                        self.ahead.push_back(Ahead::Hole(zeroes));
                        return Ok(());
                    }
                    None => (Some(range.start..(range.start + 1)), Fresh::Yes),
                },
                Some((range, Has::Data)) => (Some(range), Fresh::Yes),
                None => (None, Fresh::Yes),
            },
        };
        let found = found.filter(|range| range.start < limit && range.start < range.end);
        let (start, end) = match found {
            Some(range) => {
                let start = range.start - range.start % BLOCK_BYTES;
                (
                    start.max(self.at),
                    range.end.next_multiple_of(BLOCK_BYTES).min(limit),
                )
            }
            None => (limit, limit),
        };
        if self.at < start && fresh == Fresh::No {
            self.ahead.push_back(Ahead::Hole(self.at..start));
        }
        if start < end {
            self.ahead.push_back(Ahead::Data(start..end));
        }
        self.at = end;
        Ok(())
    }

    /// The whole blocks within a range, if there are any.
    fn whole(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let end = range.end.min(self.size);
        let start = range.start.next_multiple_of(BLOCK_BYTES);
        let end = if end == self.size {
            end
        } else {
            end - end % BLOCK_BYTES
        };
        (start < end).then_some(start..end)
    }
}

impl Plan for FirstPass {
    fn next(&mut self, most: u64) -> Result<Option<Chunk>> {
        let ahead = loop {
            while self.ahead.is_empty() && self.at < self.size {
                self.look()?;
            }
            match self.ahead.pop_front() {
                None => return Ok(None),
                Some(Ahead::Data(data)) if self.data == Data::Mark => {
                    self.bitmap.mark(data.start, data.end - data.start);
                }
                Some(ahead) => break ahead,
            }
        };
        match ahead {
            // The bits of a hole stay as they are: what the guest writes into it from now on is
            // marked and copied by a later pass.
            Ahead::Hole(hole) => {
                let end = hole.end.min(hole.start + ZERO_BYTES);
                if end < hole.end {
                    self.ahead.push_front(Ahead::Hole(end..hole.end));
                }
                Ok(Some(Chunk::Zero {
                    offset: hole.start,
                    len: end - hole.start,
                }))
            }
            Ahead::Data(data) => {
                let end = data.end.min(data.start - data.start % most + most);
                if end < data.end {
                    self.ahead.push_front(Ahead::Data(end..data.end));
                }
                for block in data.start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
                    let _ = self.bitmap.take(block);
                }
                let len = end - data.start;
                Ok(Some(Chunk::Copy {
                    offset: data.start,
                    len,
                    wanted: len,
                }))
            }
        }
    }

    fn frontier(&self) -> u64 {
        match self.ahead.front() {
            Some(Ahead::Hole(range) | Ahead::Data(range)) => range.start,
            None => self.at,
        }
    }
}

/// A later pass: what was marked since.
#[derive(Debug)]
pub(crate) struct DirtyPass<'a> {
    bitmap: &'a DirtyBitmap,
    size: u64,
    at: u64,
    /// Blocks to leave for the last pass, if any.
    leave: Option<&'a DirtyBitmap>,
    /// What this pass copies is noted here.
    copied: Option<&'a DirtyBitmap>,
}

impl<'a> DirtyPass<'a> {
    pub(crate) fn new(
        bitmap: &'a DirtyBitmap,
        size: u64,
        leave: Option<&'a DirtyBitmap>,
        copied: Option<&'a DirtyBitmap>,
    ) -> Self {
        Self {
            bitmap,
            size,
            at: 0,
            leave,
            copied,
        }
    }

    fn wanted(&self, block: u64) -> bool {
        self.bitmap.is_marked(block) && !self.leave.is_some_and(|leave| leave.is_marked(block))
    }
}

impl Plan for DirtyPass<'_> {
    fn next(&mut self, most: u64) -> Result<Option<Chunk>> {
        let first = loop {
            let Some(block) = self.bitmap.next_marked(self.at) else {
                return Ok(None);
            };
            if self.wanted(block) {
                break block;
            }
            self.at = block + 1;
        };
        let most = first + most / BLOCK_BYTES;
        let mut end = first + 1;
        let mut look = end;
        while look < most.min(self.bitmap.blocks()) && look - end <= GAP_BLOCKS {
            if self.wanted(look) {
                end = look + 1;
            }
            look += 1;
        }
        let mut wanted = 0;
        for block in first..end {
            if self.bitmap.take(block) {
                wanted += self.bitmap.block_len(block);
                if let Some(copied) = self.copied {
                    copied.mark(block * BLOCK_BYTES, 1);
                }
            }
        }
        self.at = end;
        let offset = first * BLOCK_BYTES;
        Ok(Some(Chunk::Copy {
            offset,
            len: (end * BLOCK_BYTES).min(self.size) - offset,
            wanted,
        }))
    }
}

/// The pass of a mirror: what is marked. The bits are cleared when the copier has its turn.
#[derive(Debug)]
pub(crate) struct MirrorPass<'a> {
    bitmap: &'a DirtyBitmap,
    size: u64,
    at: u64,
}

impl<'a> MirrorPass<'a> {
    pub(crate) fn new(bitmap: &'a DirtyBitmap, size: u64) -> Self {
        Self {
            bitmap,
            size,
            at: 0,
        }
    }
}

impl Plan for MirrorPass<'_> {
    fn next(&mut self, most: u64) -> Result<Option<Chunk>> {
        let Some(first) = self.bitmap.next_marked(self.at) else {
            return Ok(None);
        };
        let blocks = most / BLOCK_BYTES;
        let most = (first - first % blocks + blocks).min(self.bitmap.blocks());
        let mut wanted = 0;
        let mut end = first;
        let mut look = first;
        while look < most && look - end <= GAP_BLOCKS {
            if self.bitmap.is_marked(look) {
                wanted += self.bitmap.block_len(look);
                end = look + 1;
            }
            look += 1;
        }
        self.at = end;
        let offset = first * BLOCK_BYTES;
        Ok(Some(Chunk::Copy {
            offset,
            len: (end * BLOCK_BYTES).min(self.size) - offset,
            wanted,
        }))
    }
}

/// How many bytes the first pass has before it.
pub(crate) fn allocated_bytes(source: &dyn Image, size: u64, known: &Known) -> Result<u64> {
    let mut sum = 0;
    let mut at = 0;
    while at < size {
        let (limit, skip) = known.run(at, size);
        if skip {
            at = limit;
            continue;
        }
        let Some(range) = source.allocated(at)?.filter(|it| it.start < size) else {
            break;
        };
        let end = range.end.min(limit);
        sum += end.saturating_sub(range.start.max(at));
        // A hole up to a range that is known may end in it.
        at = end.max(at + 1).max(range.start.min(limit));
    }
    Ok(sum)
}
