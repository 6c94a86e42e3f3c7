//! The three zones of a disk that is being mirrored.
//!
//! ```text
//!   copied          a change goes to source and destination
//!   being copied    a change waits until the copy of its range has ended
//!   not yet copied  a change goes to the source only
//! ```
//!
//! What is not yet copied is what the dirty bitmap marks; the copier goes over it once, from the
//! start to the end. What is being copied is what the copier holds in the table of this module. All
//! else is copied. So there is no cursor to be compared with: a block that must be copied again,
//! for whatever reason, is marked and thereby back in the last zone.
//!
//! Everyone who changes the destination holds the bytes that it changes, alone: a guest's write from
//! before its zone is looked up until both halves of it have ended, the copier from before it clears
//! the bits until the copy has arrived. Hence:
//!
//! * the zone of a block cannot change under a write: only the copier clears bits, and it holds the
//!   block then;
//! * the copier reads when no write of its range is on its way, so a copied block lacks nothing;
//! * two writes of the same bytes reach source and destination in the same order;
//! * a write is either at both, or its blocks are marked, when its range is let go.
//!
//! Turns are given in the order of asking: whoever asks later for an overlapping range waits for
//! whoever asked before, granted or not. A wait is only ever for an earlier one, so there is no
//! circle, and none is overtaken for ever. Nobody blocks in here: who has to wait is woken and asks
//! again.
//!
//! [`Zones::off`] ends the mirroring at any instant. From then on changes need no turn, go to the
//! source only and mark their blocks, and the copier gets no turn any more: what a write had on its
//! way to the destination is of ranges that no copy holds. `tests/models.rs` checks all of this
//! under random interleavings.

use std::sync::Arc;
use std::time::Instant;

use crate::bitmap::{BLOCK_BYTES, DirtyBitmap};
use crate::sync::Mutex;

/// Who can be told to ask again.
pub(crate) trait Wake {
    fn wake(&self);
}

/// A place in the order of turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The range is the ticket's alone, until [`Zones::leave`].
    Now(Ticket),
    /// It will be; the waker is called before that.
    Later(Ticket),
    /// There is no mirroring (any more).
    Off,
}

/// Where a change goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zone {
    /// Nothing of it is copied yet.
    Source,
    /// Some of it is copied.
    Both,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Zones<W> {
    bitmap: Arc<DirtyBitmap>,
    table: Mutex<Table<W>>,
}

#[derive(Debug)]
struct Table<W> {
    on: bool,
    next: u64,
    /// In the order of their tickets.
    holds: Vec<Hold<W>>,
}

#[derive(Debug)]
struct Hold<W> {
    ticket: u64,
    start: u64,
    end: u64,
    /// Who waits, and since when; none once it is granted.
    waits: Option<(Arc<W>, Instant)>,
}

impl<W> Hold<W> {
    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start < end && start < self.end
    }
}

impl<W: Wake> Zones<W> {
    /// Zones of a disk whose blocks to be copied are those that `bitmap` marks.
    pub(crate) fn new(bitmap: Arc<DirtyBitmap>) -> Self {
        Self {
            bitmap,
            table: Mutex::new(Table {
                on: true,
                next: 0,
                holds: Vec::new(),
            }),
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Table<W>) -> T) -> T {
        let mut table = match self.table.lock() {
            Ok(table) => table,
            // Nothing can panic half way through a change of it.
            Err(poisoned) => poisoned.into_inner(),
        };
        act(&mut table)
    }

    /// Asks for a range. `waker` is told when to ask [`again`](Self::again).
    pub(crate) fn enter(&self, offset: u64, len: u64, waker: &Arc<W>) -> Turn {
        let end = offset.saturating_add(len);
        self.with(|table| {
            if !table.on {
                return Turn::Off;
            }
            table.next += 1;
            let ticket = table.next;
            let taken = table.holds.iter().any(|hold| hold.overlaps(offset, end));
            let waits = taken.then(|| (Arc::clone(waker), Instant::now()));
            table.holds.push(Hold {
                ticket,
                start: offset,
                end,
                waits,
            });
            match taken {
                true => Turn::Later(Ticket(ticket)),
                false => Turn::Now(Ticket(ticket)),
            }
        })
    }

    /// Whether it is a ticket's turn by now.
    pub(crate) fn again(&self, ticket: Ticket) -> Turn {
        self.with(|table| {
            let place = table.holds.iter().position(|hold| hold.ticket == ticket.0);
            let Some((earlier, mine)) =
                place.and_then(|place| table.holds.split_at_mut_checked(place))
            else {
                return Turn::Off;
            };
            let Some(mine) = mine.first_mut() else {
                return Turn::Off;
            };
            if earlier
                .iter()
                .any(|hold| hold.overlaps(mine.start, mine.end))
            {
                return Turn::Later(ticket);
            }
            mine.waits = None;
            Turn::Now(ticket)
        })
    }

    /// Lets a range go, granted or not, and wakes those who may have waited for it. False if the
    /// mirroring was ended before: then the range was nobody's.
    pub(crate) fn leave(&self, ticket: Ticket) -> bool {
        let woken: Option<Vec<Arc<W>>> = self.with(|table| {
            let place = table
                .holds
                .iter()
                .position(|hold| hold.ticket == ticket.0)?;
            let left = table.holds.remove(place);
            let later = table.holds.iter().skip(place);
            let waiting = later
                .filter(|hold| hold.overlaps(left.start, left.end))
                .filter_map(|hold| hold.waits.as_ref());
            Some(waiting.map(|(waker, _)| Arc::clone(waker)).collect())
        });
        for waker in woken.iter().flatten() {
            waker.wake();
        }
        woken.is_some()
    }

    /// Where a change of a range goes. For whoever has the turn.
    pub(crate) fn zone(&self, offset: u64, len: u64) -> Zone {
        if self.bitmap.all_marked(offset, len) {
            Zone::Source
        } else {
            Zone::Both
        }
    }

    /// The copier's turn has come: what it reads from now on is the newest.
    pub(crate) fn copies(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        for block in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            let _ = self.bitmap.take(block);
        }
    }

    /// Ends the mirroring.
    pub(crate) fn off(&self) {
        let holds = self.with(|table| {
            table.on = false;
            std::mem::take(&mut table.holds)
        });
        for (waker, _) in holds.into_iter().filter_map(|hold| hold.waits) {
            waker.wake();
        }
    }

    /// Whether there is mirroring.
    pub(crate) fn is_on(&self) -> bool {
        self.with(|table| table.on)
    }

    /// Since when somebody waits for a turn.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        self.with(|table| {
            let since = table.holds.iter().filter_map(|hold| hold.waits.as_ref());
            since.map(|(_, since)| *since).min()
        })
    }
}
