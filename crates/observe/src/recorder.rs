//! The flight recorder: the last observations of this process.

use std::collections::VecDeque;
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use crate::{Observation, Ring};

/// How many observations a process keeps. The oldest go first.
pub const RECORDER_CAPACITY: usize = 1024;

/// Whether an observation still stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum State {
    /// The task that met it failed.
    Open,
    /// The task that met it succeeded in spite of it.
    Cleared {
        /// The name of that task.
        by: String,
    },
}

/// One entry of the flight recorder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// Grows by one for each entry of this process; a gap means that older ones were dropped.
    pub seq: u64,
    /// Whether it still stands.
    #[serde(flatten)]
    pub state: State,
    /// What was seen.
    pub observation: Observation,
}

/// A bounded memory of observations, open and cleared.
pub struct FlightRecorder {
    inner: Mutex<Inner>,
    watcher: OnceLock<Watcher>,
    ring: OnceLock<Ring>,
}

/// What is called after each record, in the thread that recorded. It must not wait.
pub type Watcher = Box<dyn Fn() + Send + Sync>;

impl std::fmt::Debug for FlightRecorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlightRecorder")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Inner {
    next: u64,
    entries: VecDeque<Recorded>,
}

static RECORDER: FlightRecorder = FlightRecorder::new();

/// The flight recorder of this process.
#[must_use]
pub fn recorder() -> &'static FlightRecorder {
    &RECORDER
}

impl Default for FlightRecorder {
    fn default() -> Self {
        Self::new()
    }
}

impl FlightRecorder {
    /// An empty recorder.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                next: 1,
                entries: VecDeque::new(),
            }),
            watcher: OnceLock::new(),
            ring: OnceLock::new(),
        }
    }

    /// Calls `watcher` after each record from now on: for whoever passes records on to another
    /// process. Only the first call counts.
    pub fn watch(&self, watcher: Watcher) {
        let _ = self.watcher.set(watcher);
    }

    /// Keeps every open observation in `ring` too, from now on. Only the first call counts.
    pub fn outlive(&self, ring: Ring) {
        let _ = self.ring.set(ring);
    }

    /// Keeps an observation that somebody else hands on in the ring alone, if there is one.
    pub fn keep(&self, seen: &Observation) {
        if let Some(ring) = self.ring.get() {
            ring.keep(seen);
        }
    }

    /// Keeps one observation and returns its sequence number.
    pub fn record(&self, observation: Observation, state: State) -> u64 {
        if state == State::Open {
            self.keep(&observation);
        }
        // The recorder is used while things fail: a poisoned lock must not add a panic.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = inner.next;
        inner.next += 1;
        if inner.entries.len() == RECORDER_CAPACITY {
            inner.entries.pop_front();
        }
        inner.entries.push_back(Recorded {
            seq,
            state,
            observation,
        });
        drop(inner);
        if let Some(watcher) = self.watcher.get() {
            watcher();
        }
        seq
    }

    /// What was recorded after the sequence number `after` (0 for all), oldest first.
    #[must_use]
    pub fn since(&self, after: u64) -> Vec<Recorded> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner
            .entries
            .iter()
            .filter(|entry| entry.seq > after)
            .cloned()
            .collect()
    }
}
