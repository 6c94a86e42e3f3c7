//! What the pager's threads and its callers share.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use strake_observe::{Observation, OsContext, Result};

use super::table::{Backing, State, Table};
use super::{DiskCopies, Watcher};
use crate::pagemap::Pagemap;
use crate::swap::SwapFile;
use crate::swap::tier::Tier;
use crate::uffd::Uffd;
use crate::window::{Page, Window};

/// An eventfd.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    pub(crate) fn new() -> Result<Self> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Self)
            .os("eventfd", "the pager")
    }

    pub(crate) fn signal(&self) {
        // It is readable already if the count is at its end.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Counts of what the pager did.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) zero_faults: AtomicU64,
    pub(crate) cached_faults: AtomicU64,
    pub(crate) read_faults: AtomicU64,
    pub(crate) read_pages: AtomicU64,
    pub(crate) evicted: AtomicU64,
    pub(crate) evicted_unwritten: AtomicU64,
    pub(crate) evicted_to_disk_copy: AtomicU64,
    pub(crate) evicted_zero: AtomicU64,
    pub(crate) written_pages: AtomicU64,
    pub(crate) compressed_pages: AtomicU64,
    pub(crate) rescued: AtomicU64,
    pub(crate) kept_for_transfer: AtomicU64,
    pub(crate) read_errors: AtomicU64,
    pub(crate) write_errors: AtomicU64,
    pub(crate) discarded: AtomicU64,
    pub(crate) untouched: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// What the evictor is asked for.
#[derive(Debug, Default)]
pub(crate) struct Ask {
    pub(crate) room: bool,
    pub(crate) compact: bool,
    /// Compactions that have ended.
    pub(crate) compacted: u64,
    /// Slots that they moved.
    pub(crate) moved: u64,
}

/// What keeps the guest from its memory.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// Why nothing can be written out.
    pub(crate) write_trouble: Option<Observation>,
    /// The watcher was told to stop.
    pub(crate) stalled: bool,
}

pub(crate) struct Shared {
    pub(crate) table: Table,
    pub(crate) window: Arc<Window>,
    pub(crate) uffd: Uffd,
    pub(crate) pagemap: Pagemap,
    pub(crate) swap: Option<SwapFile>,
    pub(crate) tier: Mutex<Tier>,
    pub(crate) disks: Option<Arc<dyn DiskCopies>>,
    pub(crate) watcher: Arc<dyn Watcher>,
    /// Pages in the memfd.
    pub(crate) resident: AtomicU64,
    /// The most of them.
    pub(crate) limit: AtomicU64,
    /// Nothing can be evicted because of transfers: faults go over the limit.
    pub(crate) stuck: AtomicBool,
    pub(crate) stop_evictor: AtomicBool,
    pub(crate) stop_handler: AtomicBool,
    /// Wakes the fault thread.
    pub(crate) event: Event,
    pub(crate) ask: Mutex<Ask>,
    pub(crate) asked: Condvar,
    pub(crate) health: Mutex<Health>,
    /// The chunk that the evictor reads through the window just now. Nobody else may punch pages of
    /// it out: to read a page there that the memfd does not hold puts one there. Not even pages that
    /// were taken back: the evictor does not know yet.
    pub(crate) evicting: Mutex<Option<usize>>,
    pub(crate) evicted: Condvar,
    pub(crate) counters: Counters,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("resident", &self.resident)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn tier(&self) -> MutexGuard<'_, Tier> {
        lock(&self.tier)
    }

    pub(crate) fn resident(&self) -> u64 {
        self.resident.load(Ordering::SeqCst)
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Ordering::SeqCst)
    }

    /// What the evictor leaves free below the limit, so that faults seldom wait.
    pub(crate) fn headroom(&self) -> u64 {
        (self.limit() / 16).clamp(64, 2048)
    }

    /// Wakes the evictor if little room is left.
    pub(crate) fn ask_for_room(&self) {
        if self.resident() + self.headroom() / 2 > self.limit() {
            let mut ask = lock(&self.ask);
            if !ask.room {
                ask.room = true;
                self.asked.notify_all();
            }
        }
    }

    /// Waits until the evictor is asked for something, or `limit` has passed.
    pub(crate) fn wait_asked(&self, limit: Duration) -> MutexGuard<'_, Ask> {
        let ask = lock(&self.ask);
        if ask.room || ask.compact || self.stop_evictor.load(Ordering::SeqCst) {
            return ask;
        }
        let (ask, _) = self
            .asked
            .wait_timeout(ask, limit)
            .unwrap_or_else(PoisonError::into_inner);
        ask
    }

    /// A page's content is no longer wanted from there.
    pub(crate) fn release(&self, page: usize, state: State, backing: Backing) {
        match backing {
            Backing::None => {}
            Backing::Slot(slot) => {
                if let Some(swap) = &self.swap {
                    swap.slots().free(slot);
                }
            }
            Backing::Tier(entry) => self.tier().free(entry),
            Backing::Disk => {
                if let Some(disks) = &self.disks {
                    if state == State::Out {
                        disks.release(page);
                    }
                    disks.forget(page);
                }
            }
        }
    }

    /// The evictor begins with a chunk, once nobody discards, or is done with it.
    pub(crate) fn set_evicting(&self, chunk: Option<usize>) {
        *lock(&self.evicting) = chunk;
        self.evicted.notify_all();
    }

    /// Keeps the evictor from all chunks, once it is not at this one.
    pub(crate) fn hold_evictor(&self, chunk: usize) -> MutexGuard<'_, Option<usize>> {
        let mut evicting = lock(&self.evicting);
        while *evicting == Some(chunk) {
            evicting = self
                .evicted
                .wait(evicting)
                .unwrap_or_else(PoisonError::into_inner);
        }
        evicting
    }

    /// Which pages of a range were not written since they were armed.
    pub(crate) fn clean(&self, page: usize, count: usize) -> Vec<bool> {
        let span = self.window.span(page, count);
        let mut clean = vec![false; count];
        let found = self.pagemap.clean(span, &mut |range| {
            let first = usize::try_from((range.start - span.start) / crate::PAGE).unwrap_or(0);
            let len = usize::try_from(range.len / crate::PAGE).unwrap_or(0);
            for at in clean.iter_mut().skip(first).take(len) {
                *at = true;
            }
        });
        if found.is_err() {
            // Not known to be clean: as good as written.
            clean.fill(false);
        }
        clean
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a page is zero.
pub(crate) fn is_zero(page: &Page) -> bool {
    page.chunks_exact(8).all(|word| word == [0; 8])
}

/// The runs of consecutive numbers in a sorted list: first, count.
pub(crate) fn runs(pages: &[usize]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == *page => *count += 1,
            _ => runs.push((*page, 1)),
        }
    }
    runs
}
