//! How long the guest's reads and writes take.
//!
//! A copy beside the guest gives way by this (`migration/neighbour.rs`). What it was before the copy
//! has to be known too, so some requests are always measured; all of them are while a copy runs, so that
//! slow guests give an answer as well. A flush counts for nothing: how long it takes is about what
//! came before it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// One request in so many is measured while nothing is copied: asking for the time twice costs more
/// than all else that is counted.
const SAMPLED: u32 = 16;

/// By how much one request moves the mean of the last ones: 1 in so many.
const WEIGHT: u64 = 64;

/// See the module. The counters are on their own: whoever reads them needs no moment at which all are
/// right, and two workers that change the mean at once lose one of their requests.
#[derive(Debug, Default)]
pub(super) struct Meter {
    nanos: AtomicU64,
    count: AtomicU64,
    mean: AtomicU64,
    all: AtomicBool,
}

impl Meter {
    /// Whether request number `number` of a queue is measured.
    pub(super) fn wants(&self, number: u32) -> bool {
        number.is_multiple_of(SAMPLED) || self.all.load(Ordering::Relaxed)
    }

    /// Whether all requests are measured from now on.
    pub(super) fn all(&self, all: bool) {
        self.all.store(all, Ordering::Relaxed);
    }

    pub(super) fn took(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
        let mean = match self.mean.load(Ordering::Relaxed) {
            0 => nanos,
            mean => mean - mean / WEIGHT + nanos / WEIGHT,
        };
        self.mean.store(mean, Ordering::Relaxed);
    }

    /// The mean of the last requests, if there were any.
    pub(super) fn mean(&self) -> Option<Duration> {
        match self.mean.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    /// The time of all measured requests, in nanoseconds, and their number. Both wrap.
    pub(super) fn measured(&self) -> (u64, u64) {
        let count = self.count.load(Ordering::Relaxed);
        (self.nanos.load(Ordering::Relaxed), count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_follows_the_last_requests() {
        let meter = Meter::default();
        assert_eq!(meter.mean(), None);
        for _ in 0..10 {
            meter.took(Duration::from_micros(100));
        }
        assert_eq!(meter.mean(), Some(Duration::from_micros(100)));
        assert_eq!(meter.measured(), (1_000_000, 10));
        for _ in 0..1000 {
            meter.took(Duration::from_micros(500));
        }
        let mean = meter.mean().unwrap();
        assert!((490..=500).contains(&mean.as_micros()), "{mean:?}");
    }

    #[test]
    fn few_requests_are_measured_until_all_are() {
        let meter = Meter::default();
        let wanted = |meter: &Meter| (0..160).filter(|number| meter.wants(*number)).count();
        assert_eq!(wanted(&meter), 10);
        meter.all(true);
        assert_eq!(wanted(&meter), 160);
    }
}
