//! The gate that every request passes.
//!
//! Requests enter and leave; the migration closes the gate, waits for those inside, does what must
//! not overlap with any request, and opens it. One word holds both facts, so that no request can
//! slip in between "closed" and "nobody inside":
//!
//! ```text
//!   bit 31      closed
//!   bits 0..31  requests inside
//! ```
//!
//! * `enter` adds 1 unless the word says closed (compare-and-swap, acquire: what the closer did
//!   while the gate was closed is visible to whoever enters afterwards).
//! * `leave` subtracts 1 (release: what the request did is visible to the closer). The one that
//!   leaves a closed gate empty takes the lock and notifies, so the closer, which checks under the
//!   lock, cannot miss it.
//! * `open` clears the bit; *then* whoever opened wakes the queues. A queue that found the gate
//!   closed is woken after the bit was cleared, and clears its own event *before* it tries again:
//!   no wake-up is lost. `tests/models.rs` checks this under random interleavings.

use std::time::{Duration, Instant};

use crate::sync::{AtomicU32, Condvar, Mutex, Ordering};

const CLOSED: u32 = 1 << 31;

/// See the module.
#[derive(Debug)]
pub(crate) struct Gate {
    state: AtomicU32,
    lock: Mutex<()>,
    empty: Condvar,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU32::new(0),
            lock: Mutex::new(()),
            empty: Condvar::new(),
        }
    }

    /// Enters, unless it is closed.
    #[must_use]
    pub(crate) fn enter(&self) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            if state & CLOSED != 0 {
                return false;
            }
            match self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }

    /// Leaves.
    pub(crate) fn leave(&self) {
        let before = self.state.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before & !CLOSED != 0, "left a gate without having entered");
        if before == CLOSED | 1 {
            let _held = self.lock.lock();
            self.empty.notify_all();
        }
    }

    /// Closes it: nobody enters from now on.
    pub(crate) fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Waits until nobody is inside; false if `limit` passed before.
    #[must_use]
    pub(crate) fn drained(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let Ok(mut held) = self.lock.lock() else {
            return false;
        };
        loop {
            if self.inside() == 0 {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            match self.empty.wait_timeout(held, left) {
                Ok((again, _)) => held = again,
                Err(_) => return false,
            }
        }
    }

    /// Opens it. The caller then wakes everyone who may have found it closed.
    pub(crate) fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::AcqRel);
    }

    /// Whether it is closed.
    #[must_use]
    pub(crate) fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }

    /// How many are inside.
    #[must_use]
    pub(crate) fn inside(&self) -> u32 {
        self.state.load(Ordering::Acquire) & !CLOSED
    }
}
