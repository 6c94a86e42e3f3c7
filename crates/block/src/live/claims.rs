//! What a crash may rely on: regions of which source and destination are durably the same.
//!
//! A job that is to be taken up again after a crash keeps a map of such *claims* in a file
//! (`migration/kept.rs`). A claim is a promise about the future too: as long as the file says that a
//! region is the same on both sides, no change of it may have reached a device. So a change of a
//! claimed region waits until the file no longer claims it, and that is durable. Regions that the
//! guest changes are not claimed again until it has left them alone for a while: hot ones never make it wait.
//!
//! ```text
//!            left alone        complete, nothing inside     both sides flushed, nobody came
//!    Hot ──────────────► Cold ─────────────────► Candidate ─────────────────► Claimed
//!     ▲                   │ change               │ change                      │ change: it waits
//!     └───────────────────┴──────────────────────┘                             ▼
//!     └──────────────────────── the file no longer says so ─────────────── Releasing
//! ```
//!
//! Threads: the guest's workers ([`Claims::begin`], [`Claims::end`]); the job's ([`Claims::look`]), which
//! is the copier too, so that nothing is planned while it looks; one that flushes and claims
//! ([`Claims::claim`]); one that writes the file ([`Claims::work`], [`Claims::written`]). One lock, a leaf, held
//! for a few regions at a time.
//!
//! Why a claim is true: when a region becomes a candidate no change of it is inside, every earlier
//! one is marked in the dirty bitmap, and none of its blocks is marked, planned or on its way. So all of
//! it was copied, and the copies have ended. The flushes that follow make both sides durable. Any change that
//! begins later makes the region hot, before it is started.

use std::sync::Arc;

use super::zones::Wake;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// The least size of a region.
pub(crate) const LEAST_REGION: u64 = 1024 * 1024;

/// The most regions: their map fits into one small write.
pub(crate) const MOST_REGIONS: u64 = 65_536;

/// Regions that are looked at in one go.
const AT_ONCE: usize = 256;

/// The size of the regions of a disk of `size` bytes: a power of two.
pub(crate) fn region_bytes(size: u64) -> u64 {
    size.div_ceil(MOST_REGIONS)
        .next_power_of_two()
        .max(LEAST_REGION)
}

/// What is known of a region. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Hot,
    Cold,
    Candidate,
    Claimed,
    Releasing,
}

#[derive(Debug, Clone, Copy)]
struct Region {
    /// Changes that have begun and not ended.
    inside: u32,
    state: State,
}

/// Whether a change may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    Now,
    /// The worker is woken when it should ask again.
    Later,
}

/// What the thread of the file is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Work {
    /// The map to be written: one bit for each claimed region.
    pub(crate) map: Vec<u8>,
    /// Regions that are free once that is durable.
    releases: Vec<usize>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Claims<W> {
    region_bytes: u64,
    size: u64,
    table: Mutex<Table<W>>,
    asked: Condvar,
}

#[derive(Debug)]
struct Table<W> {
    regions: Vec<Region>,
    /// Asked for and not yet in the hands of the thread of the file.
    releases: Vec<usize>,
    waiting: Vec<Arc<W>>,
    /// There are new claims to be written.
    claimed: bool,
    /// Nothing is claimed and nobody waits any more.
    off: bool,
}

impl<W: Wake> Claims<W> {
    /// Of a disk of `size` bytes. `map` are the claims that the file holds already.
    pub(crate) fn new(size: u64, map: &[u8]) -> Self {
        let region_bytes = region_bytes(size);
        let count = usize::try_from(size.div_ceil(region_bytes)).unwrap_or(0);
        let is_claimed = |number: usize| {
            map.get(number / 8)
                .is_some_and(|byte| byte >> (number % 8) & 1 == 1)
        };
        let regions = (0..count).map(|number| Region {
            inside: 0,
            state: match is_claimed(number) {
                true => State::Claimed,
                false => State::Cold,
            },
        });
        Self {
            region_bytes,
            size,
            table: Mutex::new(Table {
                regions: regions.collect(),
                releases: Vec::new(),
                waiting: Vec::new(),
                claimed: false,
                off: false,
            }),
            asked: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table<W>> {
        match self.table.lock() {
            Ok(table) => table,
            // Nothing under this lock can panic half way through a change.
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    /// The numbers of the regions that a range touches.
    fn range(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        let number = |at: u64| usize::try_from(at / self.region_bytes).unwrap_or(usize::MAX);
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return 0..0;
        }
        number(offset)..number(end - 1) + 1
    }

    /// A change asks whether it may begin; if not, `waker` is woken when it may be so.
    pub(crate) fn begin(&self, offset: u64, len: u64, waker: &Arc<W>) -> Begin {
        let range = self.range(offset, len);
        let mut table = self.lock();
        let Table {
            regions,
            releases,
            waiting,
            off,
            ..
        } = &mut *table;
        let touched = regions.get_mut(range.clone()).unwrap_or_default();
        let mut free = true;
        if !*off {
            for (number, region) in range.zip(touched.iter_mut()) {
                if region.state == State::Claimed {
                    region.state = State::Releasing;
                    releases.push(number);
                }
                free &= region.state != State::Releasing;
            }
        }
        if !free {
            if !waiting.iter().any(|other| Arc::ptr_eq(other, waker)) {
                waiting.push(Arc::clone(waker));
            }
            self.asked.notify_all();
            return Begin::Later;
        }
        for region in touched {
            region.inside = region.inside.saturating_add(1);
            region.state = State::Hot;
        }
        Begin::Now
    }

    /// A change that had begun has ended, and is marked.
    pub(crate) fn end(&self, offset: u64, len: u64) {
        let range = self.range(offset, len);
        let mut table = self.lock();
        for region in table.regions.get_mut(range).unwrap_or_default() {
            // It is hot since the change began: see `look`.
            debug_assert!(region.inside > 0, "an end without a begin");
            region.inside = region.inside.saturating_sub(1);
        }
    }

    /// Looks for regions that can be claimed: what was left alone since the last look, and of which
    /// `complete` says that all of it was copied. Those that were candidates and not claimed are looked at
    /// anew. Says whether there are any.
    ///
    /// `complete` must be right at the moment at which it is asked, given that every change that
    /// has ended is marked.
    pub(crate) fn look(&self, complete: &mut dyn FnMut(std::ops::Range<u64>) -> bool) -> bool {
        let mut found = false;
        let mut at = 0;
        loop {
            let mut table = self.lock();
            if table.off {
                return false;
            }
            let end = table.regions.len().min(at + AT_ONCE);
            let Some(part) = table
                .regions
                .get_mut(at..end)
                .filter(|part| !part.is_empty())
            else {
                return found;
            };
            for (number, region) in (at as u64..).zip(part) {
                let start = number * self.region_bytes;
                let bytes = start..self.size.min(start + self.region_bytes);
                match region.state {
                    State::Claimed | State::Releasing => {}
                    _ if region.inside > 0 => region.state = State::Hot,
                    State::Hot => region.state = State::Cold,
                    State::Cold | State::Candidate => {
                        region.state = match complete(bytes) {
                            true => State::Candidate,
                            false => State::Cold,
                        };
                        found |= region.state == State::Candidate;
                    }
                }
            }
            at = end;
        }
    }

    /// Both sides were flushed since [`look`](Self::look): what is still a candidate is claimed, and
    /// the file gets to say so.
    pub(crate) fn claim(&self) {
        let mut table = self.lock();
        if table.off {
            return;
        }
        let mut claimed = false;
        for region in &mut table.regions {
            if region.state == State::Candidate {
                region.state = State::Claimed;
                claimed = true;
            }
        }
        table.claimed |= claimed;
        self.asked.notify_all();
    }

    /// Waits for something to be written; none when it is over.
    pub(crate) fn work(&self) -> Option<Work> {
        let mut table = self.lock();
        loop {
            if table.off {
                return None;
            }
            if table.claimed || !table.releases.is_empty() {
                break;
            }
            table = match self.asked.wait(table) {
                Ok(table) => table,
                Err(poisoned) => poisoned.into_inner(),
            };
        }
        table.claimed = false;
        Some(Work {
            map: map(&table.regions),
            releases: std::mem::take(&mut table.releases),
        })
    }

    /// It is durable.
    pub(crate) fn written(&self, work: Work) {
        let mut table = self.lock();
        for number in work.releases {
            if let Some(region) = table.regions.get_mut(number) {
                region.state = State::Hot;
            }
        }
        wake(table);
    }

    /// Nothing is claimed any more, in the file neither: nobody waits from now on.
    pub(crate) fn off(&self) {
        let mut table = self.lock();
        table.off = true;
        self.asked.notify_all();
        wake(table);
    }

    /// How many bytes are claimed.
    pub(crate) fn claimed_bytes(&self) -> u64 {
        let table = self.lock();
        let claimed = table.regions.iter().filter(|it| it.state == State::Claimed);
        (claimed.count() as u64)
            .saturating_mul(self.region_bytes)
            .min(self.size)
    }
}

fn map(regions: &[Region]) -> Vec<u8> {
    let mut map = vec![0u8; regions.len().div_ceil(8)];
    for (number, region) in regions.iter().enumerate() {
        if let (State::Claimed, Some(byte)) = (region.state, map.get_mut(number / 8)) {
            *byte |= 1 << (number % 8);
        }
    }
    map
}

/// Without the lock: whoever is woken may ask at once.
fn wake<W: Wake>(mut table: MutexGuard<'_, Table<W>>) {
    let waiting = std::mem::take(&mut table.waiting);
    drop(table);
    for waker in waiting {
        waker.wake();
    }
}
