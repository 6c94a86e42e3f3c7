//! Which slots of the swap file are taken, and the checksum of what is in them.
//!
//! Slots are given out in runs, segment after segment: a fresh segment as long as there is one, as
//! a run of 512 costs one transfer; then the emptiest. A segment that has become empty is fresh
//! again.

use std::hash::Hasher;

use twox_hash::XxHash3_64;

use super::SEGMENT_SLOTS;
use crate::window::Page;

const WORDS: usize = SEGMENT_SLOTS as usize / 64;

/// A run of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u32,
    pub(crate) len: u32,
}

#[derive(Debug, Default)]
struct Segment {
    taken: [u64; WORDS],
    used: u32,
    /// Of each slot; there while a slot is taken.
    sums: Option<Box<[u32; SEGMENT_SLOTS as usize]>>,
    /// Whether the file has room for it.
    backed: bool,
}

impl Segment {
    fn is_taken(&self, slot: u32) -> bool {
        self.taken
            .get(slot as usize / 64)
            .is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    fn set(&mut self, slot: u32, taken: bool) {
        if let Some(word) = self.taken.get_mut(slot as usize / 64) {
            let bit = 1 << (slot % 64);
            if taken {
                *word |= bit;
            } else {
                *word &= !bit;
            }
        }
    }

    /// The first run of free slots from `from` on, at most `most`.
    fn free_run(&self, from: u32, most: u32) -> Option<(u32, u32)> {
        let first = (from..SEGMENT_SLOTS).find(|slot| !self.is_taken(*slot))?;
        let end = (first..SEGMENT_SLOTS.min(first.saturating_add(most)))
            .find(|slot| self.is_taken(*slot))
            .unwrap_or(SEGMENT_SLOTS.min(first.saturating_add(most)));
        Some((first, end - first))
    }
}

/// The slots of a swap file.
#[derive(Debug)]
pub(crate) struct Slots {
    segments: Vec<Segment>,
    /// The segment that is being filled, and the slot from which on.
    filling: Option<(u32, u32)>,
    used: u64,
}

impl Slots {
    pub(crate) fn new(segments: u32) -> Self {
        Self {
            segments: (0..segments).map(|_| Segment::default()).collect(),
            filling: None,
            used: 0,
        }
    }

    /// Slots in use.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// Slots in all.
    pub(crate) fn capacity(&self) -> u64 {
        self.segments.len() as u64 * u64::from(SEGMENT_SLOTS)
    }

    /// Takes a run of at most `most` free slots. `None` if there is none. The segment may lack its
    /// room in the file: see [`Slots::is_backed`].
    pub(crate) fn take(&mut self, most: u32) -> Option<Run> {
        if most == 0 {
            return None;
        }
        let run = self.next_run(most)?;
        let (index, offset) = (run.first / SEGMENT_SLOTS, run.first % SEGMENT_SLOTS);
        let segment = self.segments.get_mut(index as usize)?;
        for slot in offset..offset + run.len {
            segment.set(slot, true);
        }
        segment.used += run.len;
        segment
            .sums
            .get_or_insert_with(|| Box::new([0; SEGMENT_SLOTS as usize]));
        self.used += u64::from(run.len);
        self.filling = Some((index, offset + run.len));
        Some(run)
    }

    fn next_run(&self, most: u32) -> Option<Run> {
        let run_in = |index: u32, from| {
            let (first, len) = self.segments.get(index as usize)?.free_run(from, most)?;
            Some(Run {
                first: index * SEGMENT_SLOTS + first,
                len,
            })
        };
        if let Some(run) = self.filling.and_then(|(index, from)| run_in(index, from)) {
            return Some(run);
        }
        let empty = self.segments.iter().position(|segment| segment.used == 0);
        let next = empty.or_else(|| {
            let (index, segment) = self
                .segments
                .iter()
                .enumerate()
                .min_by_key(|(_, segment)| segment.used)?;
            (segment.used < SEGMENT_SLOTS).then_some(index)
        })?;
        run_in(u32::try_from(next).ok()?, 0)
    }

    /// Gives a slot back. Says whether its segment is empty now.
    pub(crate) fn free(&mut self, slot: u32) -> bool {
        let Some(segment) = self.segments.get_mut((slot / SEGMENT_SLOTS) as usize) else {
            return false;
        };
        let offset = slot % SEGMENT_SLOTS;
        debug_assert!(segment.is_taken(offset), "slot {slot} is free already");
        if !segment.is_taken(offset) {
            return false;
        }
        segment.set(offset, false);
        segment.used -= 1;
        self.used -= 1;
        if segment.used == 0 {
            segment.sums = None;
        }
        segment.used == 0
    }

    /// Whether the file has room for the slot's segment.
    pub(crate) fn is_backed(&self, slot: u32) -> bool {
        self.segments
            .get((slot / SEGMENT_SLOTS) as usize)
            .is_some_and(|segment| segment.backed)
    }

    /// Notes that it has, or has no more.
    pub(crate) fn set_backed(&mut self, slot: u32, backed: bool) {
        if let Some(segment) = self.segments.get_mut((slot / SEGMENT_SLOTS) as usize) {
            segment.backed = backed;
        }
    }

    /// Notes what a slot holds.
    pub(crate) fn set_sum(&mut self, slot: u32, sum: u32) {
        let segment = self.segments.get_mut((slot / SEGMENT_SLOTS) as usize);
        if let Some(sums) = segment.and_then(|segment| segment.sums.as_mut())
            && let Some(at) = sums.get_mut((slot % SEGMENT_SLOTS) as usize)
        {
            *at = sum;
        }
    }

    /// What a slot holds.
    pub(crate) fn sum(&self, slot: u32) -> Option<u32> {
        let segment = self.segments.get((slot / SEGMENT_SLOTS) as usize)?;
        let sums = segment.sums.as_ref()?;
        sums.get((slot % SEGMENT_SLOTS) as usize).copied()
    }

    /// The segments that hold something, but no more than `most` slots: what a compaction empties.
    pub(crate) fn sparse(&self, most: u32) -> Vec<u32> {
        (0..)
            .zip(&self.segments)
            .filter(|(_, segment)| (1..=most).contains(&segment.used))
            .map(|(index, _)| index)
            .collect()
    }

    /// Lets the next run begin a segment that is not one of `avoid`, if possible. Says whether one
    /// was found that has room.
    pub(crate) fn turn_from(&mut self, avoid: &[u32]) -> bool {
        let fits = (0..).zip(&self.segments).find(|(index, segment)| {
            !avoid.contains(index) && segment.backed && (1..SEGMENT_SLOTS).contains(&segment.used)
        });
        let fits = fits.or_else(|| {
            (0..)
                .zip(&self.segments)
                .find(|(index, segment)| !avoid.contains(index) && segment.used == 0)
        });
        self.filling = fits.map(|(index, _)| (index, 0));
        self.filling.is_some()
    }

    /// The empty segments that still have room in the file; they have none any more.
    pub(crate) fn take_empty(&mut self) -> Vec<u32> {
        (0..)
            .zip(&mut self.segments)
            .filter_map(|(index, segment)| {
                (segment.used == 0 && std::mem::take(&mut segment.backed)).then_some(index)
            })
            .collect()
    }

    /// Bytes that this bookkeeping takes.
    pub(crate) fn memory(&self) -> usize {
        let sums = self
            .segments
            .iter()
            .filter(|segment| segment.sums.is_some());
        self.segments.len() * size_of::<Segment>() + sums.count() * SEGMENT_SLOTS as usize * 4
    }
}

/// The checksum of a page in a slot. The slot is part of it: a right page from a wrong place is
/// wrong.
pub(crate) fn checksum(slot: u32, page: &Page) -> u32 {
    let mut hasher = XxHash3_64::with_seed(u64::from(slot));
    hasher.write(page);
    let sum = hasher.finish();
    u32::try_from(sum & u64::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Take(u32),
        Free(usize),
        Sum(usize, u32),
        Turn,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (1u32..700).prop_map(Step::Take),
            4 => any::<usize>().prop_map(Step::Free),
            1 => (any::<usize>(), any::<u32>()).prop_map(|(at, sum)| Step::Sum(at, sum)),
            1 => Just(Step::Turn),
        ];
        prop::collection::vec(step, 1..200)
    }

    proptest! {
        /// Against a map of what was given out: no slot twice, none lost, sums stay with their slot.
        #[test]
        fn slots_are_a_map(steps in steps()) {
            const SEGMENTS: u32 = 4;
            let mut slots = Slots::new(SEGMENTS);
            let mut model: BTreeMap<u32, u32> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Take(most) => match slots.take(most) {
                        Some(run) => {
                            prop_assert!((1..=most).contains(&run.len));
                            prop_assert_eq!(
                                run.first / SEGMENT_SLOTS,
                                (run.first + run.len - 1) / SEGMENT_SLOTS
                            );
                            for slot in run.first..run.first + run.len {
                                prop_assert!(slot < SEGMENTS * SEGMENT_SLOTS);
                                prop_assert!(model.insert(slot, slot ^ 5).is_none());
                                slots.set_sum(slot, slot ^ 5);
                            }
                        }
                        None => prop_assert_eq!(model.len() as u64, slots.capacity()),
                    },
                    Step::Free(pick) if !model.is_empty() => {
                        let slot = *model.keys().nth(pick % model.len()).unwrap();
                        model.remove(&slot);
                        let segment = slot / SEGMENT_SLOTS;
                        let rest = model.keys().any(|other| other / SEGMENT_SLOTS == segment);
                        prop_assert_eq!(slots.free(slot), !rest);
                    }
                    Step::Sum(pick, sum) if !model.is_empty() => {
                        let slot = *model.keys().nth(pick % model.len()).unwrap();
                        model.insert(slot, sum);
                        slots.set_sum(slot, sum);
                    }
                    Step::Turn => {
                        let sparse = slots.sparse(SEGMENT_SLOTS / 2);
                        if slots.turn_from(&sparse)
                            && let Some(run) = slots.take(1)
                        {
                            prop_assert!(!sparse.contains(&(run.first / SEGMENT_SLOTS)));
                            slots.free(run.first);
                        }
                    }
                    Step::Free(_) | Step::Sum(..) => {}
                }
                prop_assert_eq!(slots.used(), model.len() as u64);
                for (slot, sum) in &model {
                    prop_assert_eq!(slots.sum(*slot), Some(*sum));
                }
            }
        }
    }

    #[test]
    fn fresh_segments_come_first() {
        let mut slots = Slots::new(2);
        let first = slots.take(512).unwrap();
        assert_eq!((first.first, first.len), (0, 512));
        slots.free(3);
        assert_eq!(
            slots.take(512),
            Some(Run {
                first: 512,
                len: 512
            })
        );
        assert_eq!(slots.take(9), Some(Run { first: 3, len: 1 }));
        assert_eq!(slots.take(1), None);
    }

    #[test]
    fn a_page_in_a_wrong_slot_has_a_wrong_checksum() {
        let page = [9; 4096];
        assert_ne!(checksum(1, &page), checksum(2, &page));
    }
}
