//! How fast a guest gets requests through.
//!
//! For each limit there is a point in time, `free`, at which all that was admitted so far has been
//! paid for. A request is admitted while that point is no more than [`BURST`] ahead, and moves it by
//! its own cost: after a pause a guest gets a tenth of a second's worth at once, and in the long run
//! never more than the limit. A request that costs more than the burst is not split: it is admitted
//! like any other, and those behind it wait for longer.
//!
//! Who is not admitted waits *outside* of the gate, so a switch-over never waits for a limit. The
//! worker must not sleep, so a thread of the disk wakes its event when it is worth trying again. It
//! begins with the first limit and ends with the disk:
//!
//! ```text
//!  worker:  admit? ── no ──▶ (when, event) ──▶ pacer's list ──▶ sleeps until the first ──▶ signals
//! ```
//!
//! One lock guards the two points and the list; nobody waits for anything while holding it, except
//! the pacer on its condition variable. A disk without limits takes no lock at all.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use strake_api::control::DiskLimits;
use strake_observe::{OsContext, Result};

use super::disk::QueueShared;
use crate::Operation;

/// How far ahead of what is paid for a guest may be.
const BURST: Duration = Duration::from_millis(100);

/// The limits of a disk.
#[derive(Debug, Default)]
pub(super) struct Rate {
    on: AtomicBool,
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    limits: DiskLimits,
    requests: Paid,
    bytes: Paid,
    waiting: Vec<(Instant, Weak<QueueShared>)>,
    paced: bool,
    end: bool,
}

/// When all that was admitted has been paid for; never, if nothing was.
#[derive(Debug, Default, Clone, Copy)]
struct Paid(Option<Instant>);

impl Paid {
    /// How long until something may be admitted; none if now.
    fn wait(self, now: Instant) -> Option<Duration> {
        let ahead = self.0?.saturating_duration_since(now);
        ahead.checked_sub(BURST).filter(|wait| !wait.is_zero())
    }

    fn pay(&mut self, now: Instant, cost: Duration) {
        let from = self.0.map_or(now, |free| free.max(now));
        self.0 = Some(from.checked_add(cost).unwrap_or(from));
    }
}

/// What `amount` costs at `limit` per second.
fn cost(amount: u64, limit: Option<u64>) -> Duration {
    let Some(limit) = limit else {
        return Duration::ZERO;
    };
    let nanos = u128::from(amount) * 1_000_000_000 / u128::from(limit.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

impl State {
    fn admit(&mut self, now: Instant, bytes: u64) -> Option<Duration> {
        let wait = self.requests.wait(now).max(self.bytes.wait(now));
        if wait.is_none() {
            let DiskLimits { iops, bandwidth } = self.limits;
            self.requests.pay(now, cost(1, iops));
            self.bytes.pay(now, cost(bytes, bandwidth));
        }
        wait
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change under this lock is a single step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pacer's life.
    fn pace(&self) {
        let mut state = self.lock();
        while !state.end {
            let now = Instant::now();
            state.waiting.retain(|(when, queue)| {
                if *when > now {
                    return queue.strong_count() > 0;
                }
                if let Some(queue) = queue.upgrade() {
                    queue.event.signal();
                }
                false
            });
            let first = state.waiting.iter().map(|(when, _)| *when).min();
            state = match first {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(when) => {
                    let left = when.saturating_duration_since(now);
                    self.changed
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}

impl Rate {
    /// Whether a request may start now. If not, the queue's event is signalled when it is worth
    /// asking again.
    pub(super) fn admits(&self, op: Operation, bytes: u64, queue: &Arc<QueueShared>) -> bool {
        if !self.on.load(Ordering::Acquire) || op == Operation::Flush {
            return true;
        }
        let bytes = match op {
            Operation::Read | Operation::Write => bytes,
            // They move no data.
            Operation::Flush | Operation::Discard { .. } | Operation::WriteZeroes { .. } => 0,
        };
        let mut state = self.inner.lock();
        let now = Instant::now();
        let Some(wait) = state.admit(now, bytes) else {
            return true;
        };
        let when = now.checked_add(wait).unwrap_or(now);
        let me = Arc::downgrade(queue);
        match state
            .waiting
            .iter_mut()
            .find(|(_, known)| known.ptr_eq(&me))
        {
            Some(entry) => entry.0 = when,
            None => state.waiting.push((when, me)),
        }
        drop(state);
        self.inner.changed.notify_one();
        false
    }

    pub(super) fn limits(&self) -> DiskLimits {
        self.inner.lock().limits
    }

    /// Sets other limits; who waits for the old ones tries again at once.
    pub(super) fn set(&self, disk: &str, limits: DiskLimits) -> Result<()> {
        let limited = limits != DiskLimits::default();
        let mut state = self.inner.lock();
        if limited && !state.paced {
            let inner = Arc::clone(&self.inner);
            std::thread::Builder::new()
                .name(format!("pace-{disk}"))
                .spawn(move || inner.pace())
                .os("clone", "the thread that paces a disk")?;
            state.paced = true;
        }
        state.limits = limits;
        (state.requests, state.bytes) = (Paid::default(), Paid::default());
        self.on.store(limited, Ordering::Release);
        let now = Instant::now();
        for (when, _) in &mut state.waiting {
            *when = now;
        }
        drop(state);
        self.inner.changed.notify_one();
        Ok(())
    }
}

impl Drop for Rate {
    fn drop(&mut self) {
        self.inner.lock().end = true;
        self.inner.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However requests come, at any time no more was admitted than the limits allow: what the
        /// passed time and one burst pay for, and one request that may be larger.
        #[test]
        fn never_more_than_the_limit(
            iops in proptest::option::of(10..5000_u64),
            bandwidth in proptest::option::of(65536..(64_u64 << 20)),
            steps in proptest::collection::vec((0..50_000_u64, 1..256_u64), 1..300),
        ) {
            let limits = DiskLimits { iops, bandwidth };
            let mut state = State { limits, ..State::default() };
            let start = Instant::now();
            let mut now = start;
            let (mut requests, mut bytes) = (0_u64, 0_u64);
            for (micros, sectors) in steps {
                now += Duration::from_micros(micros);
                let len = sectors * 512;
                // What is told to wait is admitted after that wait, and not before.
                if let Some(wait) = state.admit(now, len) {
                    prop_assert!(state.admit(now + wait / 2, len).is_some() || wait.as_nanos() < 2);
                    now += wait;
                    prop_assert_eq!(state.admit(now, len), None);
                }
                requests += 1;
                bytes += len;
                let seconds = (now - start + BURST).as_secs_f64();
                if let Some(iops) = iops {
                    prop_assert!(requests as f64 <= seconds * iops as f64 + 1.01);
                }
                if let Some(bandwidth) = bandwidth {
                    let most = seconds * bandwidth as f64 + len as f64 * 1.01;
                    prop_assert!(bytes as f64 <= most);
                }
            }
        }
    }
}
