//! The pager: keeps what a guest has in the host's memory below a limit.
//!
//! ```text
//!   vCPUs, device threads ──fault──▶ userfaultfd ──▶ fault thread ──▶ CONTINUE / ZEROPAGE
//!        │                                             │    ▲             reads: io_uring, O_DIRECT,
//!        │ Transfers::begin … end                      ▼    │ room        straight into the memfd
//!        ▼                                         page table of ours (table.rs)
//!   counts of transfers ───────────looked at──────────▶│    ▲
//!                                                   evictor: zap, look, write, punch
//! ```
//!
//! Guest memory is a memfd that is mapped twice: for the guest and the devices, watched by a
//! userfaultfd, and for the pager itself, not watched ([`crate::window`]). Only the fault thread
//! maps pages for the guest, so what [`table`] says of a page is true, without asking the kernel;
//! the kernel is only asked which pages were written.
//!
//! # Whose copy counts
//!
//! | the page is | its content is |
//! | --- | --- |
//! | mapped, staged, fresh, leaving | in the memfd; what its backing holds counts only if the kernel says that it was not written |
//! | going | in both, the same |
//! | out | where its backing says: a slot, the tier, a disk's block |
//! | coming | as before; the one who has it decides |
//!
//! All of it is lost with the VM: a monitor that is killed takes the guest with it, and its swap
//! file begins anew.
//!
//! # Devices
//!
//! The kernel holds on to the pages of a transfer (O_DIRECT, io_uring), not to addresses. A page
//! that is punched out meanwhile is another page afterwards, and what the transfer wrote is lost.
//! So whoever passes guest memory to the kernel counts it before and until the end:
//! [`Transfers::begin`]. Plain accesses through the mapping need no such care.

mod ahead;
mod evict;
mod fault;
mod shared;
mod table;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strake_observe::{Because, Observation, OsContext, Result};

use crate::observations::{LimitRefused, PagerFailed};
use crate::pagemap::Pagemap;
use crate::swap::SwapFile;
use crate::swap::tier::Tier;
use crate::uffd::{Uffd, UffdAccess};
use crate::window::{Page, Window};
use crate::{GuestRam, PAGE, Slot};
use evict::Evictor;
use fault::Handler;
use shared::{Ask, Counters, Event, Health, Shared, count, lock, runs};
pub(crate) use table::BACKING_MAX;
use table::{Backing, State, Table};

/// How long a discard, or the record of a read, waits for a page that somebody works on. What is not
/// discarded stays as it is, as under a device that ignores the request; what is not recorded is
/// written like any other page.
const BUSY: Duration = Duration::from_millis(100);

/// The least limit: what a transfer of a device and the evictor's own chunks need.
pub const LIMIT_LEAST: u64 = 8 << 20;

/// Is told when the guest must stand because its memory cannot be had, and when it can.
pub trait Watcher: Send + Sync {
    /// Somebody waits for a page that cannot be had now. The pager goes on trying.
    fn stalled(&self, cause: Observation);

    /// Everybody has what he waited for.
    fn recovered(&self);
}

/// Knows which pages equal a block of a disk, and can read it.
///
/// A page is named here by [`Pager::record_equal`] while it is known to equal its block. When it is
/// to leave, it is only relied upon if [`DiskCopies::rely`] says so, and from then until
/// [`DiskCopies::release`] the block must stay as it is: whoever wants to write to it brings the
/// page back first ([`Pager::bring`]).
pub trait DiskCopies: Send + Sync {
    /// The page leaves memory without being written: its block is its only copy from now on.
    /// Whether that holds.
    fn rely(&self, page: usize) -> bool;

    /// The block is not the page's only copy any more.
    fn release(&self, page: usize);

    /// The page does not equal the block any more, or nobody knows.
    fn forget(&self, page: usize);

    /// Reads the block of a page that is relied upon.
    ///
    /// # Errors
    /// It cannot be read: the guest waits.
    fn fetch(&self, page: usize, content: &mut Page) -> Result<()>;
}

/// What a pager works with.
pub struct PagerConfig {
    /// The most bytes of guest memory in the host's.
    pub limit: u64,
    /// Where pages go.
    pub swap: Option<SwapFile>,
    /// The most bytes of compressed pages in memory.
    pub tier: u64,
    /// Who knows of disks' blocks.
    pub disks: Option<Arc<dyn DiskCopies>>,
    /// Who hears that the guest must wait.
    pub watcher: Arc<dyn Watcher>,
    /// Where the userfaultfd comes from.
    pub uffd: UffdAccess,
    /// This process's page tables.
    pub pagemap: Pagemap,
}

impl std::fmt::Debug for PagerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PagerConfig")
            .field("limit", &self.limit)
            .field("swap", &self.swap)
            .field("tier", &self.tier)
            .finish_non_exhaustive()
    }
}

/// What the pager has done, and how things are.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PagerStats {
    /// The most bytes of guest memory in the host's.
    pub limit_bytes: u64,
    /// Bytes of guest memory in the host's.
    pub resident_bytes: u64,
    /// Bytes of the swap file in use.
    pub swap_used_bytes: u64,
    /// Bytes that the swap file may hold.
    pub swap_size_bytes: u64,
    /// Pages in the compressed tier.
    pub compressed_pages: u64,
    /// Bytes that they take.
    pub compressed_bytes: u64,
    /// Bytes of the pager's own bookkeeping.
    pub metadata_bytes: u64,
    /// Faults that got a zero page.
    pub faults_zero: u64,
    /// Faults that found their page still in memory.
    pub faults_cached: u64,
    /// Faults that had to be read.
    pub faults_read: u64,
    /// Pages that were read.
    pub pages_read: u64,
    /// Pages that were evicted.
    pub evictions: u64,
    /// Of those, pages that their slot still held.
    pub evictions_unwritten: u64,
    /// Of those, pages that a disk's block held.
    pub evictions_disk: u64,
    /// Of those, zero pages.
    pub evictions_zero: u64,
    /// Pages written to the swap file.
    pub pages_written: u64,
    /// Pages that went to the compressed tier.
    pub pages_compressed: u64,
    /// Pages that were taken back on their way out.
    pub rescued: u64,
    /// Times that a page stayed because of a transfer.
    pub kept_for_transfer: u64,
    /// Pages that the guest gave back.
    pub discarded: u64,
    /// Transfers from the swap file or a disk that failed or gave something wrong.
    pub read_errors: u64,
    /// Transfers to the swap file that failed.
    pub write_errors: u64,
    /// Whether somebody waits for a page that cannot be had.
    pub stalled: bool,
}

/// Keeps a guest's memory below a limit. Dropped after whoever touches the memory has ended: pages
/// that are not in memory are gone with it.
pub struct Pager {
    shared: Arc<Shared>,
    transfers: Transfers,
    handler: Option<JoinHandle<()>>,
    evictor: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

impl Pager {
    /// Begins to keep `ram` below a limit. What is in it stays as it is.
    ///
    /// # Errors
    /// [`LimitRefused`]; [`PagerFailed`] with what the host cannot do.
    pub fn attach(ram: &GuestRam, config: PagerConfig) -> Result<Self> {
        check_limit(config.limit)?;
        let failed = |step: &str| PagerFailed {
            step: step.to_owned(),
        };
        let slots: Vec<(u64, u64, u64)> = ram
            .slots()
            .iter()
            .map(|slot| (slot.offset, slot.size, slot.host_addr))
            .collect();
        let window = ram
            .memfd()
            .and_then(|memfd| Window::map(memfd, ram.size(), &slots))
            .because_of(|| failed("mapping guest memory"))?;
        let uffd = Uffd::new(config.uffd).because_of(|| failed("making a userfaultfd"))?;
        let table = Table::new(window.pages());
        for (first, pages) in window.parts() {
            uffd.register(window.span(first, pages))
                .because_of(|| failed("watching guest memory"))?;
            window
                .zap(first, pages)
                .os("madvise", "guest memory")
                .because_of(|| failed("unmapping guest memory"))?;
        }
        // From here on nobody reaches guest memory without a fault, which waits.
        let held = window
            .held()
            .os("lseek", "guest memory")
            .because_of(|| failed("looking at guest memory"))?;
        let mut resident = 0;
        for (first, pages) in held {
            for page in first..first + pages {
                if table.claim(page, State::Empty, |_| true).is_some() {
                    table.settle(page, State::Staged, Backing::None);
                    resident += 1;
                }
            }
        }
        let shared = Arc::new(Shared {
            table,
            window: Arc::new(window),
            uffd,
            pagemap: config.pagemap,
            swap: config.swap,
            tier: Mutex::new(Tier::new(config.tier)),
            disks: config.disks,
            watcher: config.watcher,
            resident: AtomicU64::new(resident),
            limit: AtomicU64::new(config.limit / PAGE),
            stuck: AtomicBool::new(false),
            stop_evictor: AtomicBool::new(false),
            stop_handler: AtomicBool::new(false),
            event: Event::new()?,
            ask: Mutex::new(Ask::default()),
            asked: Condvar::new(),
            health: Mutex::new(Health::default()),
            evicting: Mutex::new(None),
            evicted: Condvar::new(),
            counters: Counters::default(),
        });
        let handler = Handler::new(Arc::clone(&shared)).because_of(|| failed("reading"))?;
        let evictor = Evictor::new(Arc::clone(&shared)).because_of(|| failed("writing"))?;
        let mut pager = Self {
            transfers: Transfers(Some(Arc::new(Counted {
                shared: Arc::clone(&shared),
                slots: ram.slots().to_vec(),
            }))),
            shared,
            handler: None,
            evictor: None,
        };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .os("spawn a thread", name)
                .because_of(|| failed("starting its threads"))
        };
        pager.handler = Some(spawn("pager-fault", Box::new(move || handler.run()))?);
        pager.evictor = Some(spawn("pager-evict", Box::new(move || evictor.run()))?);
        pager.shared.ask_for_room();
        Ok(pager)
    }

    /// How devices count their transfers.
    #[must_use]
    pub fn transfers(&self) -> Transfers {
        self.transfers.clone()
    }

    /// Sets the limit. If it falls, memory follows soon.
    ///
    /// # Errors
    /// [`LimitRefused`].
    pub fn set_limit(&self, bytes: u64) -> Result<()> {
        check_limit(bytes)?;
        self.shared.limit.store(bytes / PAGE, Ordering::SeqCst);
        self.shared.ask_for_room();
        self.shared.event.signal();
        Ok(())
    }

    /// The guest needs what is in these bytes no more: they are zero from now on, in memory and
    /// elsewhere. Pages that are only partly covered, or under transfer, stay as they are.
    pub fn discard(&self, gpa: u64, len: u64) {
        let shared = &self.shared;
        let Some((first, pages)) = self.whole_pages(gpa, len) else {
            return;
        };
        let end = first + pages;
        for chunk in first / evict::CHUNK..end.div_ceil(evict::CHUNK) {
            let _held = shared.hold_evictor(chunk);
            let start = first.max(chunk * evict::CHUNK);
            let end = end.min((chunk + 1) * evict::CHUNK);
            let mut taken = Vec::new();
            for page in start..end {
                let found = self.when_idle(page, || shared.table.begin_discard(page));
                taken.extend(found.map(|(state, backing)| (page, state, backing)));
            }
            self.discard_taken(&taken);
        }
        shared.event.signal();
    }

    fn discard_taken(&self, taken: &[(usize, State, Backing)]) {
        let shared = &self.shared;
        let resident: Vec<usize> = taken
            .iter()
            .filter(|(_, state, _)| state.resident())
            .map(|(page, ..)| *page)
            .collect();
        let mut stays = Vec::new();
        for (first, len) in runs(&resident) {
            // Unmapped first: a transfer that begins now faults, and the fault waits.
            let zapped = shared.window.zap(first, len).is_ok();
            let idle: Vec<usize> = (first..first + len)
                .filter(|page| zapped && !shared.table.in_transfer(*page))
                .collect();
            let mut gone = Vec::new();
            for (first, len) in runs(&idle) {
                if shared.window.punch(first, len).is_ok() {
                    gone.extend(first..first + len);
                }
            }
            stays.extend((first..first + len).filter(|page| gone.binary_search(page).is_err()));
        }
        for (page, state, backing) in taken {
            if stays.binary_search(page).is_ok() {
                // Mapped says nothing that is not so; and it keeps what its mark tells.
                shared.table.settle(*page, State::Mapped, *backing);
                continue;
            }
            shared.release(*page, *state, *backing);
            if state.resident() {
                shared.resident.fetch_sub(1, Ordering::SeqCst);
            }
            count(&shared.counters.discarded, 1);
            shared.table.settle(*page, State::Empty, Backing::None);
        }
    }

    /// Pages now equal blocks of a disk that a device has just read into them, under a transfer of
    /// its own that has not ended: `record` is called for each page that will be known if it
    /// changes. To be called before the guest is told of the read.
    pub fn record_equal(&self, gpa: u64, len: u64, mut record: impl FnMut(usize)) {
        let shared = &self.shared;
        let Some((first, pages)) = self.whole_pages(gpa, len) else {
            return;
        };
        let mut taken = Vec::new();
        for page in first..first + pages {
            let claim = || {
                [State::Mapped, State::Staged]
                    .into_iter()
                    .find_map(|state| shared.table.claim(page, state, |_| true))
            };
            if shared.table.transfers(page) == 1
                && let Some(old) = self.when_idle(page, claim)
            {
                taken.push((page, old));
            }
        }
        let numbers: Vec<usize> = taken.iter().map(|(page, _)| *page).collect();
        let mut armed = Vec::new();
        for (first, len) in runs(&numbers) {
            if shared.uffd.arm(shared.window.span(first, len)).is_ok() {
                armed.extend(first..first + len);
            }
        }
        for (page, old) in taken {
            // The mark spoke of the old backing until now: it is dropped in any case. Another
            // transfer may have begun before the page was armed, and end after.
            shared.release(page, State::Mapped, old);
            let equal = armed.binary_search(&page).is_ok() && shared.table.transfers(page) == 1;
            let backing = if equal {
                record(page);
                Backing::Disk
            } else {
                Backing::None
            };
            shared.table.settle(page, State::Mapped, backing);
        }
        shared.event.signal();
    }

    /// Brings a page into memory, waiting until it is there: its block is about to change.
    pub fn bring(&self, page: usize) {
        // One that is leaving is taken back by the fault; one that is mapped is not disturbed.
        self.shared.window.touch(page);
    }

    /// Tries at once what failed before.
    pub fn retry(&self) {
        self.shared.ask_for_room();
        self.shared.asked.notify_all();
        self.shared.event.signal();
    }

    /// Empties segments of the swap file that hold little and gives their room back. Says how many
    /// slots were moved or given up.
    pub fn compact(&self) -> u64 {
        let mut ask = lock(&self.shared.ask);
        let (before, moved) = (ask.compacted, ask.moved);
        ask.compact = true;
        self.shared.asked.notify_all();
        while ask.compacted == before && !self.shared.stop_evictor.load(Ordering::SeqCst) {
            ask = self
                .shared
                .asked
                .wait(ask)
                .unwrap_or_else(PoisonError::into_inner);
        }
        ask.moved - moved
    }

    /// How things are.
    #[must_use]
    pub fn stats(&self) -> PagerStats {
        let shared = &self.shared;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (used, size, slots) = shared.swap.as_ref().map_or((0, 0, 0), |swap| {
            let slots = swap.slots();
            (slots.used(), slots.capacity(), slots.memory())
        });
        let (entries, bytes) = {
            let tier = shared.tier();
            (tier.entries(), tier.bytes())
        };
        let counters = &shared.counters;
        PagerStats {
            limit_bytes: shared.limit() * PAGE,
            resident_bytes: shared.resident() * PAGE,
            swap_used_bytes: used * PAGE,
            swap_size_bytes: size * PAGE,
            compressed_pages: entries,
            compressed_bytes: bytes,
            metadata_bytes: (shared.table.len() * 6 + slots) as u64,
            faults_zero: read(&counters.zero_faults),
            faults_cached: read(&counters.cached_faults),
            faults_read: read(&counters.read_faults),
            pages_read: read(&counters.read_pages),
            evictions: read(&counters.evicted),
            evictions_unwritten: read(&counters.evicted_unwritten),
            evictions_disk: read(&counters.evicted_to_disk_copy),
            evictions_zero: read(&counters.evicted_zero),
            pages_written: read(&counters.written_pages),
            pages_compressed: read(&counters.compressed_pages),
            rescued: read(&counters.rescued),
            kept_for_transfer: read(&counters.kept_for_transfer),
            discarded: read(&counters.discarded),
            read_errors: read(&counters.read_errors),
            write_errors: read(&counters.write_errors),
            stalled: lock(&shared.health).stalled,
        }
    }

    /// Takes a page as soon as nobody works on it. Not if it cannot be taken, or that lasts.
    fn when_idle<T>(&self, page: usize, take: impl Fn() -> Option<T>) -> Option<T> {
        let mut until = None;
        loop {
            if let Some(taken) = take() {
                return Some(taken);
            }
            let (state, _) = self.shared.table.look(page);
            let now = Instant::now();
            if !matches!(state, State::Going | State::Coming)
                || now > *until.get_or_insert(now + BUSY)
            {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// The pages that lie wholly in a range of the guest's addresses.
    fn whole_pages(&self, gpa: u64, len: u64) -> Option<(usize, usize)> {
        let counted = self.transfers.0.as_ref()?;
        let start = gpa.checked_next_multiple_of(PAGE)?;
        let end = gpa.checked_add(len)? / PAGE * PAGE;
        let (first, pages) = counted.pages(start, end.checked_sub(start)?)?;
        (pages > 0).then_some((first, pages))
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let shared = &self.shared;
        {
            let _ask = lock(&shared.ask);
            shared.stop_evictor.store(true, Ordering::SeqCst);
            shared.asked.notify_all();
        }
        if let Some(thread) = self.evictor.take() {
            let _ = thread.join();
        }
        shared.stop_handler.store(true, Ordering::SeqCst);
        shared.event.signal();
        if let Some(thread) = self.handler.take() {
            let _ = thread.join();
        }
    }
}

/// Counts transfers that the kernel makes into or out of guest memory. Without a pager it does
/// nothing.
#[derive(Clone, Default)]
pub struct Transfers(Option<Arc<Counted>>);

impl std::fmt::Debug for Transfers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Transfers").field(&self.0.is_some()).finish()
    }
}

struct Counted {
    shared: Arc<Shared>,
    slots: Vec<Slot>,
}

impl Counted {
    /// The pages that a range of the guest's addresses touches. `None` if it is not RAM.
    fn pages(&self, gpa: u64, len: u64) -> Option<(usize, usize)> {
        let end = gpa.checked_add(len)?;
        let slot = self
            .slots
            .iter()
            .find(|slot| (slot.gpa..slot.gpa + slot.size).contains(&gpa))?;
        if end > slot.gpa + slot.size {
            return None;
        }
        let first = (slot.offset + (gpa - slot.gpa)) / PAGE;
        let last = (slot.offset + (end - slot.gpa)).div_ceil(PAGE);
        Some((
            usize::try_from(first).ok()?,
            usize::try_from(last.saturating_sub(first)).ok()?,
        ))
    }
}

impl Transfers {
    /// A transfer of these bytes is about to begin: their pages stay in memory, once they are, until
    /// the value is dropped. Bytes outside of RAM are passed over.
    #[must_use]
    pub fn begin(&self, gpa: u64, len: u64) -> InTransfer {
        let Some(counted) = &self.0 else {
            return InTransfer(None);
        };
        let Some((first, pages)) = counted.pages(gpa, len) else {
            return InTransfer(None);
        };
        for page in first..first + pages {
            counted.shared.table.begin_transfer(page);
        }
        InTransfer(Some((Arc::clone(counted), first, pages)))
    }
}

/// A transfer that was begun; it ends when this is dropped.
pub struct InTransfer(Option<(Arc<Counted>, usize, usize)>);

impl std::fmt::Debug for InTransfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InTransfer").finish_non_exhaustive()
    }
}

impl Drop for InTransfer {
    fn drop(&mut self) {
        if let Some((counted, first, pages)) = self.0.take() {
            for page in first..first + pages {
                counted.shared.table.end_transfer(page);
            }
        }
    }
}

fn check_limit(limit: u64) -> Result<()> {
    if limit < LIMIT_LEAST {
        return Err(LimitRefused {
            limit,
            least: LIMIT_LEAST,
        }
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
