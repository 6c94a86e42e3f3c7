//! What each page is doing, and who may do what with it: the protocol that keeps eviction, faults,
//! discards and DMA apart.
//!
//! One 32-bit word a page (state, where else its content is) and one 16-bit count of transfers
//! under way. Every change of a word is a compare-and-swap, and a busy state belongs to the one
//! thread that put it there.
//!
//! ```text
//!            fault: zero page            stage (then zap)
//!   Empty ──────────▶ Coming ──▶ Mapped ──────────────▶ Staged ──▶ Leaving ──▶ Going ──▶ Out
//!     ▲                 ▲  ▲       ▲                       │  leave   │   go            │
//!     │ discard         │  │       └───── fault: CONTINUE ─┴──────────┘                 │
//!     └──── Coming ◀────┘  └────────────── fault: read ◀────────────────────────────────┘
//! ```
//!
//! * *Mapped*: in the memfd, and the guest may have it mapped.
//! * *Staged*: in the memfd, unmapped: nobody can write to it without a fault, and a fault costs
//!   one CONTINUE. *Fresh*: the same for a page that was read ahead and not mapped since, so its
//!   content certainly is that of its backing.
//! * *Leaving*: its content is being written. A fault takes it back at once; whoever writes it
//!   finds out when it wants to go on.
//! * *Going* (the evictor's) and *Coming* (the fault thread's or a discard's) are busy: the page is
//!   being punched out, read or mapped. Everyone else waits for the end of it.
//! * *Out*: not in the memfd, its content is what its backing says. *Empty*: not in the memfd, zero.
//!
//! # Why no write is lost
//!
//! Only the owner of *Coming* maps pages, so from the zap that follows [`Table::stage`] until a
//! fault has taken the page back, nobody can begin to write to it. A write by DMA that began before
//! the zap counted the page first ([`Table::begin_transfer`]), and [`Table::go`] looks at the count
//! after the zap: it sees it, or the transfer is over. One that begins later faults, and the fault
//! waits for *Going* to end. So *Going* with a count of none means: the content that was written is
//! the page's last.

use crate::sync::{AtomicU16, AtomicU32, Ordering};

/// What a page is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    /// Zero, and not in the memfd.
    Empty = 0,
    /// In the memfd, perhaps mapped.
    Mapped = 1,
    /// In the memfd, unmapped.
    Staged = 2,
    /// In the memfd, not mapped since it was read.
    Fresh = 3,
    /// In the memfd, unmapped, being written. Whoever punches it out, also after it was taken back,
    /// has to wait until the evictor is done with it, which still reads it.
    Leaving = 4,
    /// Being punched out.
    Going = 5,
    /// Only in its backing.
    Out = 6,
    /// Being brought, mapped or discarded.
    Coming = 7,
}

impl State {
    fn of(word: u32) -> Self {
        match word & 7 {
            0 => Self::Empty,
            1 => Self::Mapped,
            2 => Self::Staged,
            3 => Self::Fresh,
            4 => Self::Leaving,
            5 => Self::Going,
            6 => Self::Out,
            _ => Self::Coming,
        }
    }

    /// Whether the memfd holds the page.
    #[must_use]
    pub(crate) fn resident(self) -> bool {
        !matches!(self, Self::Empty | Self::Out)
    }
}

/// Where else a page's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Backing {
    /// Nowhere.
    None,
    /// In a slot of the swap file.
    Slot(u32),
    /// Compressed in memory.
    Tier(u32),
    /// In the block of a disk that the correspondence store names.
    Disk,
}

/// Slots and entries that a word can name: 512 GiB of pages.
pub(crate) const BACKING_MAX: u32 = 1 << 27;

impl Backing {
    fn of(word: u32) -> Self {
        match (word >> 3) & 3 {
            0 => Self::None,
            1 => Self::Slot(word >> 5),
            2 => Self::Tier(word >> 5),
            _ => Self::Disk,
        }
    }

    fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Slot(index) => 1 << 3 | index << 5,
            Self::Tier(index) => 2 << 3 | index << 5,
            Self::Disk => 3 << 3,
        }
    }
}

fn word(state: State, backing: Backing) -> u32 {
    state as u32 | backing.bits()
}

/// What a fault has to do; the page is *Coming* unless it is `Busy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is zero.
    Zero,
    /// It is in the memfd, with this state and backing before.
    Map(State, Backing),
    /// It is to be read.
    Fill(Backing),
    /// Somebody works on it: come again.
    Busy,
}

/// A count that was too high to be counted; it stays, and the page is never evicted again.
const STUCK: u16 = u16::MAX;

/// The words and counts of all pages. Pages beyond the end do nothing and are always busy.
pub(crate) struct Table {
    words: Box<[AtomicU32]>,
    transfers: Box<[AtomicU16]>,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("pages", &self.words.len())
            .finish_non_exhaustive()
    }
}

impl Table {
    /// So many pages, all empty.
    #[must_use]
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            words: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            transfers: (0..pages).map(|_| AtomicU16::new(0)).collect(),
        }
    }

    /// How many pages there are.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// A page as it is now.
    #[must_use]
    pub(crate) fn look(&self, page: usize) -> (State, Backing) {
        let now = self.load(page);
        (State::of(now), Backing::of(now))
    }

    fn load(&self, page: usize) -> u32 {
        self.words
            .get(page)
            .map_or(State::Coming as u32, |at| at.load(Ordering::SeqCst))
    }

    fn swap(&self, page: usize, from: u32, to: u32) -> bool {
        self.words.get(page).is_some_and(|at| {
            at.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        })
    }

    /// Takes the page for a fault.
    pub(crate) fn begin_fault(&self, page: usize) -> Fault {
        loop {
            let now = self.load(page);
            let (state, backing) = (State::of(now), Backing::of(now));
            let fault = match state {
                State::Going | State::Coming => return Fault::Busy,
                State::Empty => Fault::Zero,
                State::Out => Fault::Fill(backing),
                State::Mapped | State::Staged | State::Fresh | State::Leaving => {
                    Fault::Map(state, backing)
                }
            };
            if self.swap(page, now, word(State::Coming, backing)) {
                return fault;
            }
        }
    }

    /// Takes a page in `state` with a backing that `fits`, to be brought together with another one.
    pub(crate) fn claim(
        &self,
        page: usize,
        state: State,
        fits: impl Fn(Backing) -> bool,
    ) -> Option<Backing> {
        let now = self.load(page);
        let backing = Backing::of(now);
        (State::of(now) == state
            && fits(backing)
            && self.swap(page, now, word(State::Coming, backing)))
        .then_some(backing)
    }

    /// The owner of *Coming* or *Going* is done with the page.
    pub(crate) fn settle(&self, page: usize, state: State, backing: Backing) {
        if let Some(at) = self.words.get(page) {
            let before = at.swap(word(state, backing), Ordering::SeqCst);
            debug_assert!(
                matches!(State::of(before), State::Coming | State::Going),
                "page {page} was {:?}",
                State::of(before)
            );
        }
    }

    /// Names the backing that a mapped page is equal to, in place of the one that it had, which is
    /// returned. `None` if it is not simply mapped.
    pub(crate) fn set_backing(&self, page: usize, backing: Backing) -> Option<Backing> {
        let now = self.load(page);
        (State::of(now) == State::Mapped && self.swap(page, now, word(State::Mapped, backing)))
            .then(|| Backing::of(now))
    }

    /// Takes a mapped page aside. It has to be zapped before [`Table::leave`].
    pub(crate) fn stage(&self, page: usize) -> bool {
        let now = self.load(page);
        State::of(now) == State::Mapped
            && !self.in_transfer(page)
            && self.swap(page, now, word(State::Staged, Backing::of(now)))
    }

    /// Begins to evict a page that is staged or fresh; says which, and its backing.
    pub(crate) fn leave(&self, page: usize) -> Option<(State, Backing)> {
        let now = self.load(page);
        let (state, backing) = (State::of(now), Backing::of(now));
        (matches!(state, State::Staged | State::Fresh)
            && !self.in_transfer(page)
            && self.swap(page, now, word(State::Leaving, backing)))
        .then_some((state, backing))
    }

    /// The content of a page that is leaving has another home: whether it may be punched out. If
    /// so, it is *Going* and the caller's; if not, it was taken back or is under DMA.
    pub(crate) fn go(&self, page: usize, backing: Backing) -> bool {
        let leaving = word(State::Leaving, backing);
        if !self.swap(page, leaving, word(State::Going, backing)) {
            return false;
        }
        if self.in_transfer(page) {
            self.settle(page, State::Staged, backing);
            return false;
        }
        true
    }

    /// A page that was leaving stays, if nobody has taken it back.
    pub(crate) fn stay(&self, page: usize, backing: Backing) {
        self.swap(
            page,
            word(State::Leaving, backing),
            word(State::Staged, backing),
        );
    }

    /// Takes a page to discard it; says what it was. `None` if it is empty, busy or under DMA. The
    /// evictor must not be at it: see [`State::Leaving`].
    pub(crate) fn begin_discard(&self, page: usize) -> Option<(State, Backing)> {
        let now = self.load(page);
        let (state, backing) = (State::of(now), Backing::of(now));
        (!matches!(
            state,
            State::Empty | State::Leaving | State::Going | State::Coming
        ) && !self.in_transfer(page)
            && self.swap(page, now, word(State::Coming, backing)))
        .then_some((state, backing))
    }

    /// Whether a transfer of the page is under way.
    #[must_use]
    pub(crate) fn in_transfer(&self, page: usize) -> bool {
        self.transfers(page) > 0
    }

    /// How many transfers of the page are under way.
    #[must_use]
    pub(crate) fn transfers(&self, page: usize) -> u16 {
        self.transfers
            .get(page)
            .map_or(0, |count| count.load(Ordering::SeqCst))
    }

    /// Counts a transfer into or out of the page, before any of it begins.
    pub(crate) fn begin_transfer(&self, page: usize) {
        self.change(page, |count| count.saturating_add(1));
    }

    /// The transfer is over.
    pub(crate) fn end_transfer(&self, page: usize) {
        self.change(page, |count| {
            if count == STUCK {
                STUCK
            } else {
                count.saturating_sub(1)
            }
        });
    }

    fn change(&self, page: usize, to: impl Fn(u16) -> u16) {
        if let Some(count) = self.transfers.get(page) {
            let mut now = count.load(Ordering::SeqCst);
            while let Err(other) =
                count.compare_exchange_weak(now, to(now), Ordering::SeqCst, Ordering::SeqCst)
            {
                now = other;
            }
        }
    }
}
