//! How fast a copy goes and how fast it may go.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The throughput is that of the last second of copying.
const WINDOW: Duration = Duration::from_secs(1);

/// Measures a copier and holds it to its rate.
///
/// Only time in which something was being copied counts for the throughput: what a rate limit made
/// it wait, or what passed between two passes, says nothing about how long the last blocks take.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: Option<u64>,
    /// When the next chunk may start.
    next: Option<Instant>,
    /// Time spent and bytes copied, newest last.
    samples: VecDeque<(Duration, u64)>,
    spent: Duration,
    bytes: u64,
}

impl Pace {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.filter(|rate| *rate > 0),
            next: None,
            samples: VecDeque::new(),
            spent: Duration::ZERO,
            bytes: 0,
        }
    }

    /// How long the next chunk has to wait; none if it may start.
    pub(crate) fn wait(&self, now: Instant) -> Option<Duration> {
        self.next
            .map(|next| next.saturating_duration_since(now))
            .filter(|wait| !wait.is_zero())
    }

    /// A chunk of `len` bytes starts now.
    pub(crate) fn start(&mut self, now: Instant, len: u64) {
        if let Some(rate) = self.bytes_per_second {
            let nanos = u128::from(len) * 1_000_000_000 / u128::from(rate);
            let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            // What was not used before is not saved up: a limit is a limit at any time.
            self.next = now.max(self.next.unwrap_or(now)).checked_add(takes);
        }
    }

    /// `len` bytes were copied in `spent` of copying time.
    pub(crate) fn copied(&mut self, spent: Duration, len: u64) {
        self.samples.push_back((spent, len));
        self.spent += spent;
        self.bytes += len;
        while let Some((oldest, len)) = self.samples.front().copied() {
            if self.spent.saturating_sub(oldest) < WINDOW {
                break;
            }
            self.samples.pop_front();
            self.spent = self.spent.saturating_sub(oldest);
            self.bytes -= len;
        }
    }

    /// Bytes per second over the last second of copying; 0 before anything was copied.
    pub(crate) fn throughput(&self) -> u64 {
        rate(self.bytes, self.spent)
    }
}

/// Bytes per second.
pub(crate) fn rate(bytes: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos();
    if nanos == 0 {
        return 0;
    }
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_throughput_is_that_of_the_last_second() {
        let mut pace = Pace::new(None);
        assert_eq!(pace.throughput(), 0);
        for _ in 0..100 {
            pace.copied(Duration::from_millis(100), 1000);
        }
        assert_eq!(pace.throughput(), 10_000);
        for _ in 0..10 {
            pace.copied(Duration::from_millis(100), 100);
        }
        assert_eq!(pace.throughput(), 1000);
    }

    #[test]
    fn a_limit_spaces_the_chunks() {
        let mut pace = Pace::new(Some(1000));
        let start = Instant::now();
        assert_eq!(pace.wait(start), None);
        pace.start(start, 500);
        assert_eq!(pace.wait(start), Some(Duration::from_millis(500)));
        pace.start(start, 500);
        assert_eq!(pace.wait(start), Some(Duration::from_secs(1)));
        let later = start + Duration::from_secs(10);
        assert_eq!(pace.wait(later), None);
        pace.start(later, 500);
        assert_eq!(pace.wait(later), Some(Duration::from_millis(500)));
    }
}
