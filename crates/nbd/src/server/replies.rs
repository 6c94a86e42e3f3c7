//! How a request's end is told to the client.

use std::ops::Range;
use std::sync::Arc;

use strake_observe::Observation;

use crate::channel::Channel;
use crate::export::Export;
use crate::memory::Pages;
use crate::protocol::transmission::{
    ChunkPayload, Extent, ReplyHead, STATE_HOLE, STATE_ZERO, chunk, data_chunk_head, error,
};
use crate::server::negotiation::ALLOCATION_ID;

/// Zeroes are looked for, and told as holes, in blocks of this size.
const ZERO_BLOCK: u64 = 64 * 1024;

/// The most extents in one answer; a client asks again from where it ends.
const MAX_EXTENTS: usize = 8192;

/// Which kind of replies was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replies {
    Simple,
    Structured,
}

impl Replies {
    /// Success of anything but a read or a status.
    pub(super) fn done(self, channel: &mut Channel, cookie: u64) {
        channel.push(ReplyHead::Simple { error: 0, cookie }.encode());
    }

    /// A read of no byte.
    pub(super) fn nothing_read(self, channel: &mut Channel, cookie: u64) {
        match self {
            Self::Simple => self.done(channel, cookie),
            Self::Structured => channel.push(ChunkPayload::None.encode(cookie, chunk::DONE)),
        }
    }

    /// An error. Structured replies carry the words, whatever the request was.
    pub(super) fn failed(self, channel: &mut Channel, cookie: u64, error: u32, words: &str) {
        channel.push(match self {
            Self::Simple => ReplyHead::Simple { error, cookie }.encode(),
            Self::Structured => ChunkPayload::Error {
                error,
                message: words.to_owned(),
                offset: None,
            }
            .encode(cookie, chunk::DONE),
        });
    }

    /// The data of a read: `range` of the pages is what is at `offset`. Gives the pages back if
    /// nothing of them is sent.
    pub(super) fn data(
        self,
        channel: &mut Channel,
        cookie: u64,
        offset: u64,
        pages: Pages,
        range: Range<usize>,
        whole: bool,
    ) -> Option<Pages> {
        let pages = Arc::new(pages);
        if self == Self::Simple {
            self.done(channel, cookie);
            channel.push_pages(pages, range);
            return None;
        }
        let bytes = pages.bytes().get(range.clone()).unwrap_or(&[]);
        let runs = match whole {
            true => vec![(range.len(), false)],
            false => runs(bytes, offset),
        };
        let mut at = 0;
        let last = runs.len().saturating_sub(1);
        for (index, (count, zero)) in runs.into_iter().enumerate() {
            let flags = if index == last { chunk::DONE } else { 0 };
            let here = offset + at as u64;
            let length = u32::try_from(count).unwrap_or(u32::MAX);
            if zero {
                let offset = here;
                channel.push(ChunkPayload::Hole { offset, length }.encode(cookie, flags));
            } else {
                channel.push(data_chunk_head(cookie, flags, here, length));
                let start = range.start + at;
                channel.push_pages(Arc::clone(&pages), start..start + count);
            }
            at += count;
        }
        Arc::into_inner(pages)
    }
}

/// Lengths of runs of data and of zeroes (true), cut at the blocks of the export.
fn runs(bytes: &[u8], offset: u64) -> Vec<(usize, bool)> {
    let mut runs: Vec<(usize, bool)> = Vec::new();
    let mut rest = bytes;
    let mut at = offset;
    while !rest.is_empty() {
        let block = usize::try_from(ZERO_BLOCK - at % ZERO_BLOCK).unwrap_or(usize::MAX);
        let (block, after) = rest.split_at(block.min(rest.len()));
        let zero = is_zero(block);
        match runs.last_mut() {
            Some((count, was)) if *was == zero => *count += block.len(),
            _ => runs.push((block.len(), zero)),
        }
        at += block.len() as u64;
        rest = after;
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    // The first is zero and each is like the one before: two passes of a fast comparison.
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && bytes.get(..rest.len()) == Some(rest),
    }
}

/// What of the range is allocated, as chunks of extents tell it.
pub(super) fn status(
    export: &dyn Export,
    offset: u64,
    length: u32,
    one: bool,
) -> strake_observe::Result<ChunkPayload> {
    let end = offset + u64::from(length);
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = offset;
    let limit = if one { 1 } else { MAX_EXTENTS };
    let mut add = |until: u64, at: &mut u64, state: u32| -> bool {
        let until = until.min(end);
        if until <= *at {
            return true;
        }
        let length = u32::try_from(until - *at).unwrap_or(u32::MAX);
        let full = extents.len() == limit;
        match extents.last_mut() {
            Some(last) if last.state == state => last.length += length,
            _ if full => return false,
            _ => extents.push(Extent { length, state }),
        }
        *at = until;
        true
    };
    while at < end {
        let (hole_end, data_end) = match export.allocated(at)? {
            Some(range) => (range.start, range.end.max(at + 1)),
            None => (end, end),
        };
        if !add(hole_end, &mut at, STATE_HOLE | STATE_ZERO) || !add(data_end, &mut at, 0) {
            break;
        }
    }
    Ok(ChunkPayload::Status {
        context: ALLOCATION_ID,
        extents,
    })
}

/// Whether the whole range is known to read as zeroes already.
pub(super) fn reads_as_zeroes(export: &dyn Export, offset: u64, length: u32) -> bool {
    let end = offset + u64::from(length);
    match export.allocated(offset) {
        Ok(found) => found.is_none_or(|range| range.start >= end),
        Err(_) => false,
    }
}

/// The protocol's error number for what an export saw.
pub(super) fn error_of(seen: &Observation) -> u32 {
    match errno_in(seen) {
        Some(28 | 122 | 27) => error::ENOSPC,
        Some(1 | 13 | 30) => error::EPERM,
        Some(22) => error::EINVAL,
        Some(12) => error::ENOMEM,
        _ => error::EIO,
    }
}

fn errno_in(seen: &Observation) -> Option<i64> {
    let own = seen.datum("errno").and_then(|errno| errno.as_i64());
    own.or_else(|| seen.causes().iter().find_map(errno_in))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zeroes() {
        let block = usize::try_from(ZERO_BLOCK).unwrap_or(0);
        let mut bytes = vec![0u8; block * 3];
        assert_eq!(runs(&bytes, 0), [(block * 3, true)]);
        bytes[block] = 1;
        assert_eq!(
            runs(&bytes, 0),
            [(block, true), (block, false), (block, true)]
        );
        assert_eq!(
            runs(&bytes[512..], 512),
            [(block - 512, true), (block, false), (block, true)]
        );
        assert_eq!(runs(&[], 0), []);
        assert!(is_zero(&[0, 0]) && !is_zero(&[0, 1]) && !is_zero(&[1, 1]));
    }
}
