//! Range locks for devices whose blocks are larger than a guest's sectors.
//!
//! A sector-sized write to a 4 KiB block is a read of the block, a change in memory and a write.
//! Any other change of the same block meanwhile would be undone by that write. So on such images,
//! and only there, each change holds its range: shared if it covers whole blocks (the guest itself
//! orders its overlapping writes), alone if it reads and rewrites blocks.
//!
//! Nobody waits in a lock: a queue that cannot have a range keeps the request and is woken by its
//! event when some range is released.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::Event;

/// How a range is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    Shared,
    Alone,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    id: u64,
    start: u64,
    end: u64,
    hold: Hold,
}

#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    held: Vec<Held>,
    waiting: Vec<Weak<Event>>,
}

impl RangeLocks {
    /// Takes the range or, if it is taken, has `event` signalled when one is released.
    pub(crate) fn take(&self, start: u64, end: u64, hold: Hold, event: &Arc<Event>) -> Option<u64> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = inner.held.iter().any(|held| {
            held.start < end
                && start < held.end
                && (held.hold == Hold::Alone || hold == Hold::Alone)
        });
        if taken {
            let known = inner
                .waiting
                .iter()
                .any(|waiting| waiting.as_ptr() == Arc::as_ptr(event));
            if !known {
                inner.waiting.push(Arc::downgrade(event));
            }
            return None;
        }
        inner.next += 1;
        let id = inner.next;
        inner.held.push(Held {
            id,
            start,
            end,
            hold,
        });
        Some(id)
    }

    /// Releases what [`take`](Self::take) gave.
    pub(crate) fn release(&self, id: u64) {
        let waiting = {
            let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            inner.held.retain(|held| held.id != id);
            std::mem::take(&mut inner.waiting)
        };
        for event in waiting.iter().filter_map(Weak::upgrade) {
            event.signal();
        }
    }
}
