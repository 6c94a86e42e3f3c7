use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use strake_observe::Kind;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::observations::{LimitRefused, SwapChecksum, SwapFull, SwapReadFailed, SwapWriteFailed};
use crate::swap::{Owner, Provision, SwapFaults, Transfer};
use crate::{GuestMemory, create_memfd};

const MIB: u64 = 1 << 20;

/// What the watcher heard.
#[derive(Default)]
struct Heard {
    stalls: Mutex<Vec<Observation>>,
    recoveries: AtomicU64,
}

impl Watcher for Heard {
    fn stalled(&self, cause: Observation) {
        lock(&self.stalls).push(cause);
    }

    fn recovered(&self) {
        self.recoveries.fetch_add(1, Ordering::SeqCst);
    }
}

/// A store that fails when told to.
#[derive(Default)]
struct Moody {
    reads: AtomicU64,
    writes: AtomicU64,
    room: AtomicU64,
}

impl SwapFaults for Moody {
    fn fail(&self, transfer: Transfer, _: u64) -> Option<i32> {
        let mood = match transfer {
            Transfer::Read => &self.reads,
            Transfer::Write => &self.writes,
            Transfer::Allocate => &self.room,
        };
        i32::try_from(mood.load(Ordering::SeqCst))
            .ok()
            .filter(|error| *error != 0)
    }
}

fn owner() -> Owner {
    Owner {
        name: "web1".to_owned(),
        uuid: [3; 16],
    }
}

fn swap_at(path: &Path, bytes: u64, faults: Option<Arc<dyn SwapFaults>>) -> SwapFile {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(flags)
            .open(path)
    };
    let file = open(libc::O_DIRECT).or_else(|_| open(0)).unwrap();
    let swap = SwapFile::open(file.into(), "test.swap", &owner(), bytes, Provision::Grown).unwrap();
    match faults {
        Some(faults) => swap.with_faults(faults),
        None => swap,
    }
}

struct Guest {
    pager: Pager,
    heard: Arc<Heard>,
    memory: GuestMemory,
    path: tempfile::TempPath,
    // Last: what is mapped outlives the pager.
    _ram: GuestRam,
}

struct Setup {
    size: u64,
    limit: u64,
    swap: Option<u64>,
    tier: u64,
    faults: Option<Arc<dyn SwapFaults>>,
    disks: Option<Arc<dyn DiskCopies>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            size: 64 * MIB,
            limit: 16 * MIB,
            swap: Some(64 * MIB),
            tier: 0,
            faults: None,
            disks: None,
        }
    }
}

impl Setup {
    /// None where the kernel or the user may not.
    fn build(self) -> Option<Guest> {
        let ram = GuestRam::map(create_memfd("pager", self.size).unwrap(), self.size).unwrap();
        let file = tempfile::Builder::new().tempfile_in(place()).unwrap();
        let path = file.into_temp_path();
        let heard = Arc::new(Heard::default());
        let config = PagerConfig {
            limit: self.limit,
            swap: self.swap.map(|bytes| swap_at(&path, bytes, self.faults)),
            tier: self.tier,
            disks: self.disks,
            watcher: Arc::clone(&heard) as Arc<dyn Watcher>,
            uffd: UffdAccess::Call,
            pagemap: Pagemap::open().unwrap(),
        };
        let pager = match Pager::attach(&ram, config) {
            Ok(pager) => pager,
            Err(seen) => {
                eprintln!("not tried: {seen:?}");
                return None;
            }
        };
        let memory = ram.ram().memory();
        Some(Guest {
            pager,
            heard,
            memory: GuestMemory::clone(&memory),
            path,
            _ram: ram,
        })
    }
}

/// A directory on a disk, where O_DIRECT works.
fn place() -> std::path::PathBuf {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    if std::fs::create_dir_all(&target).is_ok() {
        target
    } else {
        std::env::temp_dir()
    }
}

impl Guest {
    fn write(&self, page: u64, value: u64) {
        // Not compressible: every word another one.
        let mut state = value.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut content = [0; 4096];
        for word in content.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        content[..8].copy_from_slice(&value.to_le_bytes());
        self.memory
            .write_slice(&content, GuestAddress(page * PAGE))
            .unwrap();
    }

    fn check(&self, page: u64, value: u64) {
        let mut state = value.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut content = [0u8; 4096];
        self.memory
            .read_slice(&mut content, GuestAddress(page * PAGE))
            .unwrap();
        for (index, word) in content.chunks_exact(8).enumerate() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let expected = if index == 0 { value } else { state };
            assert_eq!(
                u64::from_le_bytes(word.try_into().unwrap()),
                expected,
                "page {page}, word {index}"
            );
        }
    }

    fn settle(&self) {
        let limit = self.pager.stats().limit_bytes;
        wait("the limit", || self.pager.stats().resident_bytes <= limit);
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_guest_larger_than_its_limit_keeps_its_data() {
    let Some(guest) = Setup::default().build() else {
        return;
    };
    let pages = 48 * MIB / PAGE;
    for page in 0..pages {
        guest.write(page, page + 1);
        assert!(guest.pager.stats().resident_bytes <= 16 * MIB);
    }
    for page in 0..pages {
        guest.check(page, page + 1);
        assert!(guest.pager.stats().resident_bytes <= 16 * MIB);
    }
    let stats = guest.pager.stats();
    assert!(stats.pages_written >= (48 - 16) * MIB / PAGE, "{stats:?}");
    assert!(
        stats.faults_read < stats.pages_read,
        "nothing was read ahead: {stats:?}"
    );
    assert_eq!(stats.read_errors + stats.write_errors, 0);
    assert!(lock(&guest.heard.stalls).is_empty());
}

#[test]
fn what_was_only_read_leaves_without_a_write() {
    let Some(guest) = Setup::default().build() else {
        return;
    };
    let pages = 32 * MIB / PAGE;
    for page in 0..pages {
        guest.write(page, page + 1);
    }
    for _ in 0..2 {
        for page in 0..pages {
            guest.check(page, page + 1);
        }
    }
    let before = guest.pager.stats();
    for _ in 0..3 {
        for page in 0..pages {
            guest.check(page, page + 1);
        }
    }
    let after = guest.pager.stats();
    let evicted = after.evictions - before.evictions;
    let unwritten = after.evictions_unwritten - before.evictions_unwritten;
    assert!(evicted > pages, "{after:?}");
    assert!(unwritten * 10 >= evicted * 9, "{unwritten} of {evicted}");
}

#[test]
fn zero_pages_and_discarded_pages_are_never_written() {
    let Some(guest) = Setup::default().build() else {
        return;
    };
    for page in 0..48 * MIB / PAGE {
        guest
            .memory
            .write_slice(&[0; 4096], GuestAddress(page * PAGE))
            .unwrap();
    }
    guest.settle();
    let stats = guest.pager.stats();
    assert_eq!(stats.pages_written, 0);
    assert!(stats.evictions_zero > 0);

    let Some(guest) = Setup::default().build() else {
        return;
    };
    for page in 0..12 * MIB / PAGE {
        guest.write(page, 7);
    }
    // Partly covered pages at both ends stay.
    guest.pager.discard(PAGE / 2, 12 * MIB - PAGE);
    let stats = guest.pager.stats();
    assert_eq!(stats.discarded, 12 * MIB / PAGE - 2);
    assert_eq!(stats.resident_bytes, 2 * PAGE);
    guest.check(0, 7);
    guest.check(12 * MIB / PAGE - 1, 7);
    let word: u64 = guest.memory.read_obj(GuestAddress(5 * PAGE)).unwrap();
    assert_eq!(word, 0);
}

#[test]
fn a_discarded_page_gives_its_slot_back() {
    let Some(guest) = Setup::default().build() else {
        return;
    };
    for page in 0..48 * MIB / PAGE {
        guest.write(page, page + 1);
    }
    guest.settle();
    assert!(guest.pager.stats().swap_used_bytes > 0);
    guest.pager.discard(0, 48 * MIB);
    // What was on its way out when it was discarded goes a little later.
    wait("the slots", || guest.pager.stats().swap_used_bytes == 0);
    assert_eq!(guest.pager.stats().resident_bytes, 0);
    for page in [0, 100, 12_000] {
        let word: u64 = guest.memory.read_obj(GuestAddress(page * PAGE)).unwrap();
        assert_eq!(word, 0);
    }
}

#[test]
fn compressible_pages_stay_in_memory_up_to_the_tiers_limit() {
    let setup = Setup {
        tier: 4 * MIB,
        ..Setup::default()
    };
    let Some(guest) = setup.build() else {
        return;
    };
    let pages = 40 * MIB / PAGE;
    for page in 0..pages {
        let content = [u8::try_from(page % 251 + 1).unwrap(); 4096];
        guest
            .memory
            .write_slice(&content, GuestAddress(page * PAGE))
            .unwrap();
    }
    guest.settle();
    let stats = guest.pager.stats();
    assert!(
        stats.compressed_pages > 0 && stats.compressed_bytes <= 4 * MIB,
        "{stats:?}"
    );
    for page in 0..pages {
        let mut content = [0u8; 4096];
        guest
            .memory
            .read_slice(&mut content, GuestAddress(page * PAGE))
            .unwrap();
        let expected = u8::try_from(page % 251 + 1).unwrap();
        assert!(content.iter().all(|byte| *byte == expected), "page {page}");
    }
}

#[test]
fn the_limit_can_change_at_any_time() {
    let Some(guest) = Setup::default().build() else {
        return;
    };
    guest.pager.set_limit(64 * MIB).unwrap();
    let pages = 40 * MIB / PAGE;
    for page in 0..pages {
        guest.write(page, page + 9);
    }
    assert_eq!(guest.pager.stats().evictions, 0);
    guest.pager.set_limit(8 * MIB).unwrap();
    guest.settle();
    for page in 0..pages {
        guest.check(page, page + 9);
    }
    let seen = guest.pager.set_limit(MIB).unwrap_err();
    assert_eq!(seen.id(), LimitRefused::ID);
}

#[test]
fn pages_under_transfer_stay() {
    let Some(guest) = Setup::default().build() else {
        return;
    };
    guest.write(0, 1);
    guest.write(1, 2);
    let held = guest.pager.transfers().begin(PAGE, PAGE);
    for page in 2..48 * MIB / PAGE {
        guest.write(page, page);
    }
    guest.settle();
    assert_ne!(guest.pager.shared.table.look(1).0, State::Out);
    assert_eq!(guest.pager.shared.table.look(0).0, State::Out);
    drop(held);
    for page in 2..48 * MIB / PAGE {
        guest.write(page, page);
    }
    guest.settle();
    assert_eq!(guest.pager.shared.table.look(1).0, State::Out);
    guest.check(1, 2);
}

#[test]
fn transfers_of_everything_go_over_the_limit_rather_than_stop() {
    let Some(guest) = Setup::default().build() else {
        return;
    };
    let held = guest.pager.transfers().begin(0, 24 * MIB);
    for page in 0..24 * MIB / PAGE {
        guest.write(page, page + 1);
    }
    assert!(guest.pager.stats().resident_bytes > 16 * MIB);
    drop(held);
    guest.pager.retry();
    guest.settle();
    for page in 0..24 * MIB / PAGE {
        guest.check(page, page + 1);
    }
}

#[test]
fn a_store_that_cannot_be_read_stops_the_guest_until_it_can() {
    let moody = Arc::new(Moody::default());
    let setup = Setup {
        faults: Some(Arc::clone(&moody) as Arc<dyn SwapFaults>),
        ..Setup::default()
    };
    let Some(guest) = setup.build() else {
        return;
    };
    let pages = 40 * MIB / PAGE;
    for page in 0..pages {
        guest.write(page, page + 1);
    }
    moody.reads.store(5, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            for page in 0..pages {
                guest.check(page, page + 1);
            }
        });
        wait("a stall", || !lock(&guest.heard.stalls).is_empty());
        assert_eq!(lock(&guest.heard.stalls)[0].id(), SwapReadFailed::ID);
        assert!(guest.pager.stats().stalled);
        assert!(!reader.is_finished());
        moody.reads.store(0, Ordering::SeqCst);
        guest.pager.retry();
        reader.join().unwrap();
    });
    wait("the recovery", || !guest.pager.stats().stalled);
    assert_eq!(guest.heard.recoveries.load(Ordering::SeqCst), 1);
}

#[test]
fn a_store_that_cannot_be_written_stops_only_who_needs_more() {
    for (room, expected) in [(false, SwapWriteFailed::ID), (true, SwapFull::ID)] {
        let moody = Arc::new(Moody::default());
        let setup = Setup {
            faults: Some(Arc::clone(&moody) as Arc<dyn SwapFaults>),
            ..Setup::default()
        };
        let Some(guest) = setup.build() else {
            return;
        };
        let (mood, error) = if room {
            (&moody.room, 28)
        } else {
            (&moody.writes, 5)
        };
        mood.store(error, Ordering::SeqCst);
        let fits = 14 * MIB / PAGE;
        for page in 0..fits {
            guest.write(page, page + 1);
        }
        for page in 0..fits {
            guest.check(page, page + 1);
        }
        assert!(lock(&guest.heard.stalls).is_empty());
        let pages = 40 * MIB / PAGE;
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for page in fits..pages {
                    guest.write(page, page + 1);
                }
            });
            wait("a stall", || !lock(&guest.heard.stalls).is_empty());
            assert_eq!(lock(&guest.heard.stalls)[0].id(), expected);
            assert!(guest.pager.stats().resident_bytes <= 16 * MIB);
            mood.store(0, Ordering::SeqCst);
            guest.pager.retry();
            writer.join().unwrap();
        });
        for page in 0..pages {
            guest.check(page, page + 1);
        }
        wait("the recovery", || !guest.pager.stats().stalled);
    }
}

#[test]
fn a_full_swap_file_gives_up_copies_first_and_then_stops_the_guest() {
    let setup = Setup {
        swap: Some(16 * MIB),
        ..Setup::default()
    };
    let Some(guest) = setup.build() else {
        return;
    };
    // As much as fits into both.
    let fits = 28 * MIB / PAGE;
    for round in 0..3 {
        for page in 0..fits {
            if round > 0 {
                guest.check(page, page + round);
            }
            guest.write(page, page + round + 1);
        }
    }
    assert!(lock(&guest.heard.stalls).is_empty());
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for page in fits..40 * MIB / PAGE {
                guest.write(page, page + 1);
            }
        });
        wait("a stall", || !lock(&guest.heard.stalls).is_empty());
        assert_eq!(lock(&guest.heard.stalls)[0].id(), SwapFull::ID);
        guest.pager.set_limit(32 * MIB).unwrap();
        writer.join().unwrap();
    });
    for page in 0..fits {
        guest.check(page, page + 3);
    }
}

#[test]
fn a_slot_that_was_changed_is_not_believed() {
    use std::os::unix::fs::FileExt;
    let Some(guest) = Setup::default().build() else {
        return;
    };
    let pages = 40 * MIB / PAGE;
    for page in 0..pages {
        guest.write(page, page + 1);
    }
    guest.settle();
    let victim = (0..usize::try_from(pages).unwrap())
        .find_map(|page| match guest.pager.shared.table.look(page) {
            (State::Out, Backing::Slot(slot)) => Some((page, slot)),
            _ => None,
        })
        .unwrap();
    let offset = SwapFile::piece(0, victim.1, 1).offset + 100;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&guest.path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    let flip = |byte: u8| {
        file.write_all_at(&[byte], offset)
            .and_then(|()| file.sync_all())
    };
    flip(byte[0] ^ 1).unwrap();
    let page = u64::try_from(victim.0).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| guest.check(page, page + 1));
        wait("a stall", || !lock(&guest.heard.stalls).is_empty());
        assert_eq!(lock(&guest.heard.stalls)[0].id(), SwapChecksum::ID);
        assert!(!reader.is_finished());
        // The store is whole again: so is the guest.
        flip(byte[0]).unwrap();
        reader.join().unwrap();
        wait("the recovery", || !guest.pager.stats().stalled);
    });
}

#[test]
fn compaction_moves_what_is_left_and_keeps_it() {
    let Some(guest) = Setup::default().build() else {
        return;
    };
    let pages = 56 * MIB / PAGE;
    for page in 0..pages {
        guest.write(page, page + 1);
    }
    guest.settle();
    // Every segment loses most of its pages.
    for page in (0..pages).filter(|page| page % 8 != 0) {
        guest.pager.discard(page * PAGE, PAGE);
    }
    let moved = guest.pager.compact();
    assert!(moved > 0);
    let stats = guest.pager.stats();
    let swap = guest.pager.shared.swap.as_ref().unwrap();
    let blocks = rustix::fs::fstat(&**swap.fd()).unwrap().st_blocks;
    let stored = u64::try_from(blocks).unwrap() * 512;
    assert!(
        stored <= stats.swap_used_bytes + 6 * MIB,
        "{stored} bytes for {}",
        stats.swap_used_bytes
    );
    for page in (0..pages).step_by(8) {
        guest.check(page, page + 1);
    }
}

#[test]
fn what_is_in_memory_before_the_pager_stays() {
    let size = 32 * MIB;
    let ram = GuestRam::map(create_memfd("pager", size).unwrap(), size).unwrap();
    let memory = ram.ram().memory();
    memory.write_obj(42u64, GuestAddress(20 * PAGE)).unwrap();
    let config = PagerConfig {
        limit: 8 * MIB,
        swap: None,
        tier: 0,
        disks: None,
        watcher: Arc::new(Heard::default()),
        uffd: UffdAccess::Call,
        pagemap: Pagemap::open().unwrap(),
    };
    let Ok(pager) = Pager::attach(&ram, config) else {
        return;
    };
    assert_eq!(pager.stats().resident_bytes, PAGE);
    let word: u64 = memory.read_obj(GuestAddress(20 * PAGE)).unwrap();
    assert_eq!(word, 42);
}

/// Disk copies of a guest's first pages: what a page holds once it is recorded.
#[derive(Default)]
struct Copies {
    content: Mutex<std::collections::HashMap<usize, Box<Page>>>,
    relied: Mutex<std::collections::HashSet<usize>>,
}

impl DiskCopies for Copies {
    fn rely(&self, page: usize) -> bool {
        lock(&self.content).contains_key(&page) && {
            lock(&self.relied).insert(page);
            true
        }
    }

    fn release(&self, page: usize) {
        lock(&self.relied).remove(&page);
    }

    fn forget(&self, page: usize) {
        lock(&self.content).remove(&page);
    }

    fn fetch(&self, page: usize, content: &mut Page) -> Result<()> {
        assert!(lock(&self.relied).contains(&page));
        if let Some(found) = lock(&self.content).get(&page) {
            content.copy_from_slice(&**found);
        }
        Ok(())
    }
}

#[test]
fn a_page_that_a_disk_holds_leaves_without_a_write_and_comes_back_from_it() {
    let copies = Arc::new(Copies::default());
    let setup = Setup {
        disks: Some(Arc::clone(&copies) as Arc<dyn DiskCopies>),
        ..Setup::default()
    };
    let Some(guest) = setup.build() else {
        return;
    };
    let pages = 40 * MIB / PAGE;
    // A device reads the disk into guest memory.
    for page in 0..pages {
        let index = usize::try_from(page).unwrap();
        let held = guest.pager.transfers().begin(page * PAGE, PAGE);
        guest.write(page, page + 1);
        let mut content = Box::new([0; 4096]);
        guest
            .memory
            .read_slice(content.as_mut_slice(), GuestAddress(page * PAGE))
            .unwrap();
        guest.pager.record_equal(page * PAGE, PAGE, |recorded| {
            assert_eq!(recorded, index);
            lock(&copies.content).insert(index, content.clone());
        });
        drop(held);
    }
    guest.settle();
    let stats = guest.pager.stats();
    // A page that the evictor looks at in the very moment is not recorded.
    assert!(stats.pages_written <= pages / 100, "{stats:?}");
    assert!(stats.evictions_disk >= 24 * MIB / PAGE, "{stats:?}");
    // What the guest changes is not the disk's any more.
    for page in (0..pages).step_by(3) {
        guest.write(page, page + 500);
    }
    for _ in 0..2 {
        for page in 0..pages {
            let change = if page % 3 == 0 { 500 } else { 1 };
            guest.check(page, page + change);
        }
    }
    guest.pager.discard(0, 64 * MIB);
    assert!(lock(&copies.relied).is_empty());
}
