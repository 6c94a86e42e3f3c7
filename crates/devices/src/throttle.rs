//! How often a guest may make us report something.
//!
//! A guest can break its rings, or be refused, as often as it likes, and each report takes a place
//! in the flight recorder and goes to the daemon. A few tell the whole story; after a burst there
//! is one per interval, so that what happens days later is still seen.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Reports that pass at once.
const BURST: u32 = 8;
/// After those, one passes per interval.
const INTERVAL: Duration = Duration::from_secs(60);

/// A bound on the reports of one device.
#[derive(Debug)]
pub(crate) struct Throttle(Mutex<(u32, Instant)>);

impl Default for Throttle {
    fn default() -> Self {
        Self(Mutex::new((BURST, Instant::now())))
    }
}

impl Throttle {
    /// Whether one more report may pass.
    pub(crate) fn pass(&self) -> bool {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (left, since) = &mut *state;
        let earned = now.saturating_duration_since(*since).as_secs() / INTERVAL.as_secs();
        if earned > 0 {
            *left = u32::try_from(earned)
                .unwrap_or(BURST)
                .saturating_add(*left)
                .min(BURST);
            *since = now;
        }
        let passes = *left > 0;
        *left = left.saturating_sub(1);
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_one_per_interval() {
        let throttle = Throttle::default();
        let start = Instant::now();
        let passed = (0..100).filter(|_| throttle.pass_at(start)).count();
        assert_eq!(passed, 8);
        let later = start + INTERVAL + Duration::from_secs(1);
        let passed = (0..100).filter(|_| throttle.pass_at(later)).count();
        assert_eq!(passed, 1);
        let much_later = later + INTERVAL * 1000;
        let passed = (0..100).filter(|_| throttle.pass_at(much_later)).count();
        assert_eq!(passed, 8);
    }
}
