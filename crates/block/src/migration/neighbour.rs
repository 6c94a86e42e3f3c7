//! How much a copy has on its way beside a guest.
//!
//! The disk measures how long the guest's reads and writes take (`live/latency.rs`). Every few
//! milliseconds the copy compares their mean with a target, and has a quarter less on its way when they
//! take longer, a little more when they take clearly less. So it finds what the devices can bear, be
//! they one or two, fast or slow.
//!
//! By itself the target is twice what the guest's requests took before the copy began: then a guest
//! that does all it can keeps about half. It is never below [`LEAST_TARGET`]: the copy would have to
//! make its requests so small that devices lose their speed over it. A copy that finds its own target has
//! one whole chunk on its way at least; one that was told a target goes down to [`LEAST_CHUNK`] and
//! stands still for most of its time if that is not enough.

use std::time::{Duration, Instant};

use strake_api::job::{Latency, LatencySeen};

use super::copier::{Allowance, Room};
use super::pace::{Usage, Watch};
use super::plan::CHUNK_BYTES;

/// See the module.
const LEAST_TARGET: Duration = Duration::from_millis(2);

/// See the module.
const LEAST_CHUNK: u64 = 64 * 1024;

/// What it begins with: one chunk is read while one is written.
const FIRST_WINDOW: u64 = 2 * CHUNK_BYTES;

/// More on its way made no copy faster.
const LARGEST_WINDOW: u64 = 6 * CHUNK_BYTES;

/// By how much it grows.
const STEP: u64 = CHUNK_BYTES / 4;

/// Chunks on their way beside a guest.
const SLOTS: usize = 16;

/// How long it measures at least, and of how many requests.
const PERIOD: Duration = Duration::from_millis(10);
const SAMPLES: u64 = 8;

/// How long it measures at most if there are fewer.
const LONG_PERIOD: Duration = Duration::from_millis(100);

/// How long it stands still, of each period and this, when the smallest chunks are too much.
const STAND: Duration = Duration::from_millis(30);

/// What the disk has measured so far: the time of all requests, in nanoseconds, and their number.
pub(crate) type Measured = (u64, u64);

/// See the module.
#[derive(Debug)]
pub(crate) struct Neighbour {
    latency: Latency,
    before: Option<Duration>,
    now: Option<Duration>,
    watch: Watch,
    window: u64,
    since: Instant,
    seen: Measured,
    stands_until: Option<Instant>,
}

impl Neighbour {
    /// `before` is what the guest's requests took until now, if it made any.
    pub(crate) fn new(now: Instant, latency: Latency, before: Option<Duration>) -> Self {
        Self {
            latency,
            before,
            now: None,
            watch: Watch::new(now),
            window: FIRST_WINDOW,
            since: now,
            seen: (0, 0),
            stands_until: None,
        }
    }

    /// Another target from now on.
    pub(crate) fn aim(&mut self, latency: Latency) {
        self.latency = latency;
        self.stands_until = None;
        self.window = self.window.max(self.least());
    }

    fn target(&self) -> Option<Duration> {
        match self.latency {
            Latency::Any => None,
            Latency::Us(us) => Some(Duration::from_micros(us)),
            Latency::Auto => Some(
                self.before
                    .map_or(LEAST_TARGET, |it| LEAST_TARGET.max(it * 2)),
            ),
        }
    }

    fn least(&self) -> u64 {
        match self.latency {
            Latency::Us(_) => LEAST_CHUNK,
            Latency::Any | Latency::Auto => CHUNK_BYTES,
        }
    }

    /// What the guest gets, for an operator.
    pub(crate) fn seen(&self) -> Option<LatencySeen> {
        let us = |it: Duration| u64::try_from(it.as_micros()).unwrap_or(u64::MAX);
        Some(LatencySeen {
            now_us: us(self.now?),
            before_us: self.before.map_or(0, us),
            target_us: self.target().map(us),
        })
    }

    /// A pass begins, or goes on after a rest: what was measured meanwhile says nothing of the copy.
    pub(crate) fn begin(&mut self, now: Instant, measured: Measured) {
        self.since = now;
        self.seen = measured;
    }

    /// What may be on its way now.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        activity: (u64, u32),
        measured: Measured,
    ) -> Allowance {
        let usage = self.watch.look(now, activity);
        let Some(target) = self.target() else {
            return Allowance::regardless(Room::BesideGuest);
        };
        if usage == Usage::Idle {
            self.now = None;
            self.stands_until = None;
            self.begin(now, measured);
            return self.allowance(LARGEST_WINDOW);
        }
        if self.stands_until.is_some_and(|until| now < until) {
            return Allowance::NOTHING;
        }
        if self.stands_until.take().is_some() {
            self.begin(now, measured);
        }
        self.measure(now, measured, target);
        if usage == Usage::Starved || self.stands_until.is_some() {
            return Allowance::NOTHING;
        }
        self.allowance(self.window)
    }

    fn measure(&mut self, now: Instant, measured: Measured, target: Duration) {
        let time = measured.0.wrapping_sub(self.seen.0);
        let count = measured.1.wrapping_sub(self.seen.1);
        let passed = now.saturating_duration_since(self.since);
        let enough = passed >= PERIOD && count >= SAMPLES;
        if !enough && (passed < LONG_PERIOD || count == 0) {
            return;
        }
        let mean = Duration::from_nanos(time.checked_div(count).unwrap_or(0));
        self.begin(now, measured);
        self.now = Some(mean);
        if mean > target {
            let least = self.least();
            if self.window <= least && matches!(self.latency, Latency::Us(_)) {
                self.stands_until = now.checked_add(STAND);
            }
            self.window = (self.window / 4 * 3).max(least);
        } else if mean < target / 5 * 4 {
            self.window = (self.window + STEP).min(LARGEST_WINDOW);
        }
    }

    fn allowance(&self, bytes: u64) -> Allowance {
        // One is read while one is written, as long as that leaves large ones.
        let chunk = match bytes {
            CHUNK_BYTES.. => CHUNK_BYTES,
            _ => (bytes / 2)
                .next_power_of_two()
                .clamp(LEAST_CHUNK, CHUNK_BYTES),
        };
        Allowance {
            bytes,
            slots: SLOTS,
            chunk,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest whose requests take `base` and so much more for each MiB that the copy has on its way.
    fn settles(
        latency: Latency,
        before_us: u64,
        base_us: u64,
        per_mib_us: u64,
    ) -> (Neighbour, u64) {
        let start = Instant::now();
        let before = Some(Duration::from_micros(before_us));
        let mut neighbour = Neighbour::new(start, latency, before);
        let (mut measured, mut ended) = ((0, 0), 0);
        let mut allowed = 0;
        for ms in 0..2000u64 {
            let now = start + Duration::from_millis(ms);
            let allowance = neighbour.look(now, (ended, 1), measured);
            let takes_us = base_us + allowance.bytes * per_mib_us / CHUNK_BYTES;
            for _ in 0..4 {
                measured = (measured.0 + takes_us * 1000, measured.1 + 1);
                ended += 1;
            }
            if ms >= 1000 {
                allowed += allowance.bytes;
            }
        }
        (neighbour, allowed / 1000)
    }

    #[test]
    fn a_device_that_bears_it_is_used() {
        let (neighbour, bytes) = settles(Latency::Auto, 100, 100, 10);
        assert_eq!(bytes, LARGEST_WINDOW);
        assert_eq!(neighbour.seen().unwrap().now_us, 160);
    }

    #[test]
    fn the_copy_finds_what_keeps_the_target() {
        // 2 ms are reached with 3.8 MiB.
        let (neighbour, bytes) = settles(Latency::Auto, 100, 100, 500);
        assert!(
            (2 * CHUNK_BYTES..4 * CHUNK_BYTES).contains(&bytes),
            "{bytes}"
        );
        let seen = neighbour.seen().unwrap();
        assert_eq!((seen.before_us, seen.target_us), (100, Some(2000)));
        assert!(seen.now_us < 2200, "{seen:?}");
    }

    #[test]
    fn a_copy_by_itself_has_a_chunk_on_its_way_whatever_the_guest_gets() {
        let (_, bytes) = settles(Latency::Auto, 1000, 50_000, 0);
        assert_eq!(bytes, CHUNK_BYTES);
        let (_, bytes) = settles(Latency::Any, 1000, 50_000, 50_000);
        assert_eq!(bytes, LARGEST_WINDOW);
    }

    #[test]
    fn a_copy_that_is_told_a_target_gives_way_but_goes_on() {
        let (_, bytes) = settles(Latency::Us(300), 100, 100, 1000);
        assert!((LEAST_CHUNK..CHUNK_BYTES / 2).contains(&bytes), "{bytes}");
        // It cannot be reached: a quarter of the time is left.
        let (_, bytes) = settles(Latency::Us(50), 100, 100, 0);
        let quarter = LEAST_CHUNK / 4;
        assert!((quarter / 2..=quarter * 2).contains(&bytes), "{bytes}");
    }

    #[test]
    fn beside_an_idle_guest_the_copy_is_fast() {
        let start = Instant::now();
        let mut neighbour = Neighbour::new(start, Latency::Us(1), None);
        let allowance = neighbour.look(start + Duration::from_secs(1), (0, 0), (0, 0));
        assert_eq!(allowance.bytes, LARGEST_WINDOW);
        assert!(neighbour.seen().is_none());
    }
}
