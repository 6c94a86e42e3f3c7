//! Which bytes of a read have come: each exactly once.

use std::collections::BTreeMap;

/// The most pieces that are told apart. A server that answers in smaller and more scattered pieces
/// is refused.
const MAX_PIECES: usize = 65_536;

/// Ranges that never overlap, neighbours merged.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    /// Start to end.
    pieces: BTreeMap<u64, u64>,
    bytes: u64,
}

impl Coverage {
    /// Adds `len` bytes from `start` on; false, and nothing is changed, if a part of them is there
    /// already or there are too many pieces.
    #[must_use]
    pub fn add(&mut self, start: u64, len: u64) -> bool {
        let Some(end) = start.checked_add(len) else {
            return false;
        };
        if len == 0 {
            return true;
        }
        let before = self.pieces.range(..=start).next_back();
        let before = before.map(|(start, end)| (*start, *end));
        let after = self.pieces.range(start..).next();
        let after = after.map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, until)| until > start) || after.is_some_and(|(at, _)| at < end) {
            return false;
        }
        let joins_before = before.filter(|(_, until)| *until == start);
        let joins_after = after.filter(|(at, _)| *at == end);
        if self.pieces.len() >= MAX_PIECES && joins_before.is_none() && joins_after.is_none() {
            return false;
        }
        if let Some((at, _)) = joins_after {
            self.pieces.remove(&at);
        }
        let new_end = joins_after.map_or(end, |(_, until)| until);
        let new_start = joins_before.map_or(start, |(at, _)| at);
        self.pieces.insert(new_start, new_end);
        self.bytes += len;
        true
    }

    /// How many bytes there are.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation)]

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn like_a_bitmap(ranges in proptest::collection::vec((0u64..64, 0u64..20), 0..40)) {
            let mut bitmap = [false; 128];
            let mut coverage = Coverage::default();
            for (start, len) in ranges {
                let range = start as usize..(start + len) as usize;
                let free = bitmap[range.clone()].iter().all(|set| !set);
                prop_assert_eq!(coverage.add(start, len), free);
                if free {
                    bitmap[range].fill(true);
                }
                let count = bitmap.iter().filter(|set| **set).count() as u64;
                prop_assert_eq!(coverage.bytes(), count);
            }
        }
    }

    #[test]
    fn no_overflow() {
        assert!(!Coverage::default().add(u64::MAX, 2));
        assert!(Coverage::default().add(u64::MAX - 2, 2));
    }
}
