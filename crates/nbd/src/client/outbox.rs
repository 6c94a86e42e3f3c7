//! What the users of a connection hand to its thread.
//!
//! Each thing that is sent is either taken by the thread, or given back when the connection is
//! lost, or refused because it was lost before: always one of them, and never two. The thread
//! clears its wake-up *before* it takes, and users signal it *after* they sent, so none is missed.

use std::sync::PoisonError;

use strake_observe::Observation;

use crate::sync::{Mutex, MutexGuard};

/// Why the thread is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Nobody uses the connection any more.
    Closed,
    /// It is of no more use.
    GivenUp(&'static str),
}

#[derive(Debug)]
struct Inside<T> {
    waiting: Vec<T>,
    end: Option<End>,
    lost: Option<Observation>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Outbox<T>(Mutex<Inside<T>>);

impl<T> Outbox<T> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Inside {
            waiting: Vec::new(),
            end: None,
            lost: None,
        }))
    }

    /// Nothing under the lock can panic half way through a change.
    fn lock(&self) -> MutexGuard<'_, Inside<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends all of `things`; the thread has to be woken then. If the connection is lost they stay
    /// the caller's, and it is told why.
    pub(crate) fn send(&self, things: &mut Vec<T>) -> Option<Observation> {
        let mut inside = self.lock();
        if inside.lost.is_none() {
            inside.waiting.append(things);
        }
        inside.lost.clone()
    }

    /// Tells the thread to end; it has to be woken then.
    pub(crate) fn end(&self, end: End) {
        self.lock().end.get_or_insert(end);
    }

    /// The thread takes what was sent, and learns whether it is to end.
    pub(crate) fn take(&self, to: &mut impl Extend<T>) -> Option<End> {
        let mut inside = self.lock();
        to.extend(inside.waiting.drain(..));
        inside.end
    }

    /// The thread ends: what was sent and not taken.
    pub(crate) fn lose(&self, why: Observation) -> Vec<T> {
        let mut inside = self.lock();
        inside.lost.get_or_insert(why);
        std::mem::take(&mut inside.waiting)
    }
}
