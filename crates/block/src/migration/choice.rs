//! Method `auto`: when passes are given up for mirroring.
//!
//! Passes leave the guest alone and cost what the guest dirties meanwhile: if it dirties the share
//! `q` of what is copied in the same time, all passes together take `1 / (1 - q)` of the first one.
//! Mirroring takes one pass whatever the guest does, but each of the guest's writes to what is copied
//! already becomes two. So passes are right until `q` makes them long.

use std::time::{Duration, Instant};

use strake_api::job::MethodReason;

use super::pace::rate;

/// The share of the copy's speed at which the guest dirties blocks, in percent, from which on
/// mirroring is better: all passes together would take a third more than the first.
const TOO_FAST_PERCENT: u64 = 25;

/// How much of the first pass must be done before it is judged, in percent, and how long it must
/// have lasted. What is dirtied until then is copied twice.
const LEAST_PERCENT: u64 = 5;
const LEAST_TIME: Duration = Duration::from_millis(200);

/// Judges the first pass while it runs.
#[derive(Debug)]
pub(crate) struct Judge {
    began: Instant,
    planned: u64,
    /// What was copied and what was dirty when it began.
    before: (u64, u64),
}

impl Judge {
    /// Of a pass over `planned` bytes.
    pub(crate) fn new(began: Instant, planned: u64) -> Self {
        Self {
            began,
            planned,
            before: (0, 0),
        }
    }

    /// Begins anew, after a time in which nothing was copied.
    pub(crate) fn anew(&mut self, now: Instant, copied: u64, dirty: u64) {
        self.began = now;
        self.before = (copied, dirty);
    }

    /// Why to give up the passes, if there is a reason: `copied` bytes are copied by now, and
    /// `dirty` ones are dirty.
    pub(crate) fn look(&self, now: Instant, copied: u64, dirty: u64) -> Option<MethodReason> {
        let (copied, dirty) = (
            copied.saturating_sub(self.before.0),
            dirty.saturating_sub(self.before.1),
        );
        let time = now.saturating_duration_since(self.began);
        let enough = u128::from(self.planned) * u128::from(LEAST_PERCENT) / 100;
        if time < LEAST_TIME || u128::from(copied) < enough || copied == 0 {
            return None;
        }
        let too_fast = u128::from(copied) * u128::from(TOO_FAST_PERCENT) / 100;
        (u128::from(dirty) > too_fast).then(|| MethodReason::WritesTooFast {
            write_rate: rate(dirty, time),
            copy_rate: rate(copied, time),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn passes_are_given_up_once_it_is_clear_that_they_are_long() {
        let began = Instant::now();
        let judge = Judge::new(began, 1000 * MIB);
        let at = |ms| began + Duration::from_millis(ms);
        // Too early to tell.
        assert_eq!(judge.look(at(199), 100 * MIB, 90 * MIB), None);
        assert_eq!(judge.look(at(300), 49 * MIB, 49 * MIB), None);
        // A quarter is not too much; a bit more is.
        assert_eq!(judge.look(at(1000), 100 * MIB, 25 * MIB), None);
        assert_eq!(
            judge.look(at(1000), 100 * MIB, 26 * MIB),
            Some(MethodReason::WritesTooFast {
                write_rate: 26 * MIB,
                copy_rate: 100 * MIB,
            })
        );
    }

    #[test]
    fn what_was_written_while_nothing_was_copied_does_not_count() {
        let began = Instant::now();
        let mut judge = Judge::new(began, 1000 * MIB);
        let at = |ms| began + Duration::from_millis(ms);
        assert!(judge.look(at(9000), 100 * MIB, 900 * MIB).is_some());
        judge.anew(at(9000), 100 * MIB, 900 * MIB);
        assert_eq!(judge.look(at(9100), 160 * MIB, 960 * MIB), None);
        assert_eq!(judge.look(at(9500), 200 * MIB, 925 * MIB), None);
        assert!(judge.look(at(9500), 200 * MIB, 926 * MIB).is_some());
    }

    #[test]
    fn nothing_overflows() {
        let began = Instant::now();
        let later = began + Duration::from_secs(1);
        let judge = Judge::new(began, 0);
        assert_eq!(judge.look(later, 0, 0), None);
        assert!(judge.look(later, 1, u64::MAX).is_some());
        let judge = Judge::new(began, u64::MAX);
        assert!(judge.look(later, u64::MAX, u64::MAX).is_some());
        assert!(judge.look(began, u64::MAX, u64::MAX).is_none());
    }
}
