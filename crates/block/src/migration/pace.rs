//! How fast a copy goes and how fast it may go.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The throughput is that of the last second.
const WINDOW: Duration = Duration::from_secs(1);

/// Measures a copier and holds it to its rate.
///
/// Only time in which something was being copied counts for the throughput: what a rate limit made
/// it wait, or what passed between two passes, says nothing about how long the last blocks take.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: Option<u64>,
    iops: Option<u64>,
    /// When the next chunk may start by the first of them, and by the second.
    next: [Option<Instant>; 2],
    /// Time spent and bytes copied, newest last.
    samples: VecDeque<(Duration, u64)>,
    spent: Duration,
    bytes: u64,
}

impl Pace {
    pub(crate) fn new(bytes_per_second: Option<u64>, iops: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.filter(|rate| *rate > 0),
            iops: iops.filter(|rate| *rate > 0),
            next: [None; 2],
            samples: VecDeque::new(),
            spent: Duration::ZERO,
            bytes: 0,
        }
    }

    /// Other limits from now on.
    pub(crate) fn set(&mut self, bytes_per_second: Option<u64>, iops: Option<u64>) {
        self.bytes_per_second = bytes_per_second.filter(|rate| *rate > 0);
        self.iops = iops.filter(|rate| *rate > 0);
        // Whoever waits by a limit of one byte per second would wait for days.
        self.next = [None; 2];
    }

    /// How long the next chunk has to wait; none if it may start.
    pub(crate) fn wait(&self, now: Instant) -> Option<Duration> {
        let next = self.next.iter().flatten().max()?;
        Some(next.saturating_duration_since(now)).filter(|wait| !wait.is_zero())
    }

    /// A chunk of `len` bytes starts now.
    pub(crate) fn start(&mut self, now: Instant, len: u64) {
        let [bytes, _] = &mut self.next;
        spend(bytes, now, self.bytes_per_second, len);
    }

    /// So many requests are made.
    pub(crate) fn request(&mut self, now: Instant, count: u64) {
        let [_, requests] = &mut self.next;
        spend(requests, now, self.iops, count);
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

fn spend(next: &mut Option<Instant>, now: Instant, rate: Option<u64>, units: u64) {
    if let Some(rate) = rate {
        let nanos = u128::from(units) * 1_000_000_000 / u128::from(rate);
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // What was not used before is not saved up: a limit is a limit at any time.
        *next = now.max(next.unwrap_or(now)).checked_add(takes);
    }
}

/// What an operator sees: how fast the job really goes, whatever it waits for.
#[derive(Debug)]
pub(crate) struct Meter {
    /// When how many bytes were copied, newest last. The first is where the measured time begins;
    /// its bytes do not count any more.
    samples: VecDeque<(Instant, u64)>,
    bytes: u64,
}

impl Meter {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            samples: VecDeque::from([(now, 0)]),
            bytes: 0,
        }
    }

    /// `len` bytes were copied by now.
    pub(crate) fn copied(&mut self, now: Instant, len: u64) {
        if len > 0 {
            self.samples.push_back((now, len));
            self.bytes += len;
        }
    }

    /// Bytes per second over the last second.
    pub(crate) fn rate(&mut self, now: Instant) -> u64 {
        while let Some((at, len)) = self.samples.get(1).copied() {
            if now.saturating_duration_since(at) < WINDOW {
                break;
            }
            self.samples.pop_front();
            self.bytes -= len;
        }
        self.samples.front().map_or(0, |(since, _)| {
            rate(self.bytes, now.saturating_duration_since(*since))
        })
    }
}

/// How long a guest must have done nothing to count as idle.
const IDLE: Duration = Duration::from_millis(50);

/// How long none of a guest's requests may end until it counts as starved. Large requests of ours
/// can keep small ones of the guest from the device for much longer.
const STARVED: Duration = Duration::from_millis(10);

/// The copier stands still for a starved guest one part of so many of its time at most: it may not
/// be the copier that the guest waits for.
const STANDING_PART: u32 = 4;

/// How a guest uses its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Usage {
    Idle,
    Busy,
    Starved,
}

/// Sees how the guest uses its disk.
#[derive(Debug)]
pub(crate) struct Watch {
    began: Instant,
    ended: u64,
    /// When the guest last had a request.
    active: Instant,
    /// When a request last ended, or there was none.
    served: Instant,
    /// When this was last asked while the guest was starved.
    starved: Option<Instant>,
    /// For how long it was, all in all.
    stood: Duration,
}

impl Watch {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            began: now,
            ended: 0,
            active: now,
            served: now,
            starved: None,
            stood: Duration::ZERO,
        }
    }

    /// `ended` requests have ended by now, `inside` are at the device.
    pub(crate) fn look(&mut self, now: Instant, (ended, inside): (u64, u32)) -> Usage {
        if inside > 0 || ended != self.ended {
            self.active = now;
        }
        if inside == 0 || ended != self.ended {
            self.served = now;
        }
        self.ended = ended;
        if let Some(since) = self.starved.take() {
            self.stood += now.saturating_duration_since(since);
        }
        let may_stand = self.stood * STANDING_PART <= now.saturating_duration_since(self.began);
        if now.saturating_duration_since(self.served) >= STARVED && may_stand {
            self.starved = Some(now);
            Usage::Starved
        } else if now.saturating_duration_since(self.active) >= IDLE {
            Usage::Idle
        } else {
            Usage::Busy
        }
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
        let mut pace = Pace::new(None, None);
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
    fn the_meter_counts_every_moment() {
        let start = Instant::now();
        let mut meter = Meter::new(start);
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(meter.rate(start), 0);
        // 1000 bytes every 100 ms, however little of that was copying.
        for number in 1..=50 {
            meter.copied(at(number * 100), 1000);
            assert_eq!(meter.rate(at(number * 100)), 10_000);
        }
        // Then nothing.
        assert_eq!(meter.rate(at(5500)), 5000 * 1000 / 1000);
        assert_eq!(meter.rate(at(9000)), 0);
        // After a long while the first bytes count for all of it.
        meter.copied(at(15_000), 1000);
        assert_eq!(meter.rate(at(15_000)), 100);
    }

    #[test]
    fn a_guest_is_idle_after_a_while_without_requests() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        assert_eq!(watch.look(start, (7, 0)), Usage::Busy);
        assert_eq!(watch.look(start + IDLE / 2, (7, 0)), Usage::Busy);
        assert_eq!(watch.look(start + IDLE, (7, 0)), Usage::Idle);
        assert_eq!(watch.look(start + IDLE, (7, 1)), Usage::Busy);
        assert_eq!(watch.look(start + IDLE * 3 / 2, (8, 0)), Usage::Busy);
        assert_eq!(watch.look(start + IDLE * 3, (8, 0)), Usage::Idle);
    }

    #[test]
    fn a_guest_is_starved_when_nothing_ends_but_the_copier_goes_on() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        let mut stood = 0;
        let (millis, mut ended) = (1000, 0);
        for at in 0..millis {
            // For half of the time a request ends every 5 ms.
            if at < millis / 2 && at % 5 == 0 {
                ended += 1;
            }
            match watch.look(start + Duration::from_millis(at), (ended, 1)) {
                Usage::Starved => stood += 1,
                usage => assert_eq!(usage, Usage::Busy),
            }
            assert!(at > millis / 2 || stood == 0);
        }
        assert!((millis / 5..=millis / 4 + 1).contains(&stood), "{stood}");
        assert_eq!(
            watch.look(start + Duration::from_millis(millis), (ended + 1, 1)),
            Usage::Busy
        );
    }

    #[test]
    fn a_limit_spaces_the_chunks() {
        let mut pace = Pace::new(Some(1000), None);
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

    #[test]
    fn the_stricter_limit_counts_and_a_new_one_at_once() {
        let mut pace = Pace::new(Some(1000), Some(10));
        let start = Instant::now();
        pace.start(start, 500);
        pace.request(start, 20);
        assert_eq!(pace.wait(start), Some(Duration::from_secs(2)));
        pace.start(start, 4500);
        assert_eq!(pace.wait(start), Some(Duration::from_secs(5)));
        pace.set(None, Some(1));
        assert_eq!(pace.wait(start), None);
        pace.start(start, u64::MAX);
        assert_eq!(pace.wait(start), None);
        pace.request(start, 3);
        assert_eq!(pace.wait(start), Some(Duration::from_secs(3)));
    }
}
