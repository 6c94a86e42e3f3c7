//! How a worker's thread and whoever stops it agree.
//!
//! ```text
//!            ask                end (worker, when idle)
//!   RUN ───────────▶ STOP ───────────────────────────▶ ENDED
//!    ▲                │
//!    └────────────────┘
//!        take_back
//! ```
//!
//! One atomic state; every move is a compare-and-exchange, so of two that meet exactly one wins
//! and the other knows that it lost: a request that was taken back never ends a thread, and a
//! thread that has ended is never counted on. The work itself is not published by this state (it
//! travels through spawn and join); acquire and release only keep the looks at it in order with
//! the event that wakes the worker.
//!
//! Takes its atomics from `crate::sync`, so that `tests/models.rs` can compile this file against
//! shuttle's.

use crate::sync::{AtomicU8, Ordering};

const RUN: u8 = 0;
const STOP: u8 = 1;
const ENDED: u8 = 2;

/// The state that a worker and its stopper share.
#[derive(Debug)]
pub(crate) struct Handshake(AtomicU8);

impl Handshake {
    /// Running.
    pub(crate) fn new() -> Self {
        Self(AtomicU8::new(RUN))
    }

    /// Asks the worker to end. Wake it afterwards.
    pub(crate) fn ask(&self) {
        self.shift(RUN, STOP);
    }

    /// Takes the request back. Says whether the worker goes on; otherwise it has ended. Wake it
    /// afterwards.
    pub(crate) fn take_back(&self) -> bool {
        self.shift(STOP, RUN)
    }

    /// Whether the worker is asked to end.
    pub(crate) fn stopping(&self) -> bool {
        self.0.load(Ordering::Acquire) != RUN
    }

    /// The worker ends. Says whether it still may: otherwise the request was taken back.
    pub(crate) fn end(&self) -> bool {
        self.shift(STOP, ENDED)
    }

    fn shift(&self, from: u8, to: u8) -> bool {
        self.0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}
