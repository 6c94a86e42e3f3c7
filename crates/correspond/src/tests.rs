use std::collections::HashMap;

use proptest::prelude::*;
use strake_observe::Kind;

use super::*;
use crate::REGION;

const PAGES: usize = 6;
const BLOCKS: u64 = 40;

#[derive(Debug, Clone)]
enum Step {
    BeginRead {
        page: usize,
        disk: usize,
        block: u64,
    },
    EndRead(usize),
    BeginWrite {
        disk: usize,
        block: u64,
        count: u64,
    },
    EndWrite(usize),
    PageWritten {
        page: usize,
        told: bool,
    },
    Evict(usize),
    Fault(usize),
    RemoveDisk(usize),
    ComeRound {
        disk: usize,
        block: u64,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let page = 0..PAGES;
    let disk = 0..2usize;
    let block = 0..BLOCKS;
    let step = prop_oneof![
        6 => (page.clone(), disk.clone(), block.clone())
            .prop_map(|(page, disk, block)| Step::BeginRead { page, disk, block }),
        6 => any::<usize>().prop_map(Step::EndRead),
        4 => (disk.clone(), block.clone(), 1..20u64)
            .prop_map(|(disk, block, count)| Step::BeginWrite { disk, block, count }),
        4 => any::<usize>().prop_map(Step::EndWrite),
        2 => (page.clone(), any::<bool>())
            .prop_map(|(page, told)| Step::PageWritten { page, told }),
        5 => page.clone().prop_map(Step::Evict),
        3 => page.prop_map(Step::Fault),
        1 => disk.clone().prop_map(Step::RemoveDisk),
        1 => (disk, block).prop_map(|(disk, block)| Step::ComeRound { disk, block }),
    ];
    prop::collection::vec(step, 1..120)
}

/// What really is where: every write gets a number of its own.
struct World {
    store: Store,
    ids: [DiskId; 2],
    gone: [bool; 2],
    disks: [HashMap<u64, u64>; 2],
    pages: [Option<u64>; PAGES],
    /// Written since it was recorded, seen by the pager alone.
    dirty: [bool; PAGES],
    reads: Vec<(Reading, usize, usize, u64)>,
    writes: Vec<(WriteTicket, usize, u64, u64)>,
    number: u64,
}

impl World {
    fn new() -> Self {
        let store = Store::new(PAGES);
        let ids = ["root", "data"].map(|name| store.add_disk(name, BLOCKS * PAGE).unwrap());
        Self {
            store,
            ids,
            gone: [false; 2],
            disks: [HashMap::new(), HashMap::new()],
            pages: [Some(0); PAGES],
            dirty: [true; PAGES],
            reads: Vec::new(),
            writes: Vec::new(),
            number: 1,
        }
    }

    fn on_disk(&self, disk: usize, block: u64) -> u64 {
        self.disks[disk].get(&block).copied().unwrap_or(0)
    }

    fn next(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    /// The page is in memory afterwards; it may have come from the disk.
    fn fault(&mut self, page: usize) -> u64 {
        if let Some(content) = self.pages[page] {
            return content;
        }
        let home = self
            .store
            .home(page)
            .expect("a page that is gone has a home");
        let disk = self.ids.iter().position(|id| *id == home.disk).unwrap();
        let content = self.on_disk(disk, home.first);
        self.pages[page] = Some(content);
        self.store.release(page);
        content
    }

    fn step(&mut self, step: Step, truth: &mut [u64; PAGES]) {
        match step {
            Step::BeginRead { page, disk, block } => {
                self.fault(page);
                if self.reads.iter().all(|read| read.1 != page) {
                    let reading = self.store.begin_read(self.ids[disk], block * PAGE, PAGE);
                    self.reads.push((reading, page, disk, block));
                }
            }
            Step::EndRead(pick) if !self.reads.is_empty() => {
                let (reading, page, disk, block) = self.reads.remove(pick % self.reads.len());
                self.fault(page);
                let content = self.on_disk(disk, block);
                self.pages[page] = Some(content);
                truth[page] = content;
                self.dirty[page] = !self.store.record(&reading, page, block);
            }
            Step::BeginWrite { disk, block, count } => {
                let last = (block + count).min(BLOCKS);
                let (ticket, back) =
                    self.store
                        .begin_write(self.ids[disk], block * PAGE, (last - block) * PAGE);
                for page in back {
                    self.fault(page);
                }
                // Part of it is there at once.
                let number = self.next();
                self.disks[disk].insert(block, number);
                self.writes.push((ticket, disk, block, last));
            }
            Step::EndWrite(pick) if !self.writes.is_empty() => {
                let (ticket, disk, block, last) = self.writes.remove(pick % self.writes.len());
                for block in block..last {
                    let number = self.next();
                    self.disks[disk].insert(block, number);
                }
                self.store.end_write(ticket);
            }
            Step::PageWritten { page, told } => {
                self.fault(page);
                let number = self.next();
                self.pages[page] = Some(number);
                truth[page] = number;
                self.dirty[page] = true;
                if told {
                    self.store.page_written(page);
                }
            }
            // Nothing that is being read into.
            Step::Evict(page)
                if self.pages[page].is_some()
                    && !self.dirty[page]
                    && self.reads.iter().all(|read| read.1 != page)
                    && self.store.rely(page) =>
            {
                self.pages[page] = None;
            }
            Step::Fault(page) => {
                self.fault(page);
            }
            Step::RemoveDisk(disk) => {
                let back = self.store.remove_disk(self.ids[disk]);
                if back.is_empty() {
                    self.gone[disk] = true;
                }
                for page in back {
                    self.fault(page);
                }
            }
            Step::ComeRound { disk, block } if !self.gone[disk] => {
                // As many changes as there are generations, but one.
                let writing = self.writes.iter().any(|write| write.1 == disk);
                let reading = self.reads.iter().any(|read| read.2 == disk);
                let relied = (0..PAGES).any(|page| self.pages[page].is_none());
                if !writing && !reading && !relied {
                    let region = usize::try_from(block / REGION_BLOCKS).unwrap();
                    for page in 0..PAGES {
                        if self.store.equal(page).is_some_and(|blocks| {
                            blocks.disk == self.ids[disk]
                                && blocks.first / REGION_BLOCKS == region as u64
                        }) {
                            self.dirty[page] = true;
                        }
                    }
                    self.store
                        .set_generation(self.ids[disk], region, GENERATION_MASK - 1);
                }
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever happens in whatever order: what the store says is so, and no page is lost.
    #[test]
    fn what_it_says_is_so(steps in steps()) {
        let mut world = World::new();
        let mut truth = [0; PAGES];
        for step in steps {
            world.step(step, &mut truth);
            for (page, truth) in truth.iter().enumerate() {
                if let Some(content) = world.pages[page] {
                    prop_assert_eq!(content, *truth, "page {} in memory", page);
                } else {
                    let home = world.store.home(page).unwrap();
                    let disk = world.ids.iter().position(|id| *id == home.disk).unwrap();
                    prop_assert_eq!(world.on_disk(disk, home.first), *truth, "page {}", page);
                }
                if !world.dirty[page]
                    && let Some(blocks) = world.store.equal(page)
                {
                    let disk = world.ids.iter().position(|id| *id == blocks.disk).unwrap();
                    prop_assert!(!world.gone[disk]);
                    prop_assert_eq!(world.on_disk(disk, blocks.first), *truth);
                }
            }
            let counts = world.store.counts();
            let gone = world.pages.iter().filter(|page| page.is_none()).count() as u64;
            prop_assert_eq!(counts.relied_pages, gone);
        }
        for (page, truth) in truth.iter().enumerate() {
            prop_assert_eq!(world.fault(page), *truth);
        }
    }
}

fn recorded(store: &Store, disk: DiskId, page: usize, block: u64) {
    let reading = store.begin_read(disk, block * PAGE, PAGE);
    assert!(store.record(&reading, page, block));
}

#[test]
fn places_of_the_same_data_are_found_from_either_side() {
    let store = Store::new(8);
    let disk = store.add_disk("root", 1 << 20).unwrap();
    recorded(&store, disk, 1, 9);
    recorded(&store, disk, 5, 9);
    recorded(&store, disk, 6, 10);
    let block = Place::Block {
        disk: "root".to_owned(),
        block: 9,
    };
    let pages = [1, 5].map(|page| Place::Page { page });
    assert_eq!(store.elsewhere(&block, &|_| true), pages);
    assert_eq!(
        store.elsewhere(&pages[0], &|_| true),
        [block.clone(), pages[1].clone()]
    );
    // One of them was written, which the page tables know.
    assert_eq!(
        store.elsewhere(&block, &|page| page != 5),
        [pages[0].clone()]
    );
    assert!(store.elsewhere(&pages[1], &|page| page != 5).is_empty());
}

#[test]
fn a_write_gets_the_pages_that_rely_on_its_blocks_and_no_others() {
    let store = Store::new(8);
    let disk = store.add_disk("root", 1 << 20).unwrap();
    for (page, block) in [(0, 3), (1, 4), (2, 5), (3, 200)] {
        recorded(&store, disk, page, block);
        assert!(store.rely(page));
    }
    let (ticket, back) = store.begin_write(disk, 4 * PAGE + 512, 512);
    assert_eq!(back, [1]);
    // Its neighbours still are where they were.
    assert_eq!(store.home(0).unwrap().first, 3);
    store.release(1);
    assert!(
        !store.rely(1),
        "a block that is being written is nobody's home"
    );
    store.end_write(ticket);
    assert!(!store.rely(1));
    assert_eq!(store.counts().brought_back, 1);
}

#[test]
fn a_disk_with_dependants_stays_until_they_are_back() {
    let store = Store::new(2);
    let disk = store.add_disk("root", 1 << 20).unwrap();
    recorded(&store, disk, 0, 7);
    recorded(&store, disk, 1, 8);
    assert!(store.rely(0));
    assert_eq!(store.remove_disk(disk), [0]);
    store.release(0);
    assert!(store.remove_disk(disk).is_empty());
    assert_eq!(store.equal(1), None);
    // Its number is not given to another one.
    let other = store.add_disk("root", 1 << 20).unwrap();
    assert_ne!(other, disk);
}

#[test]
fn generations_that_come_round_do_not_make_old_words_true() {
    let store = Store::new(1);
    let disk = store.add_disk("root", 1 << 20).unwrap();
    recorded(&store, disk, 0, 1);
    store.set_generation(disk, 0, GENERATION_MASK);
    let (ticket, _) = store.begin_write(disk, PAGE, PAGE);
    store.end_write(ticket);
    store.set_generation(disk, 0, 0);
    assert_eq!(store.equal(0), None);
}

#[test]
fn memory_is_bounded_and_told() {
    let gib = (1 << 30) / 4096;
    let store = Store::new(gib);
    let disk = store.add_disk("root", 64 << 30).unwrap();
    for page in 0..gib {
        let block = page as u64;
        let reading = store.begin_read(disk, block * PAGE, PAGE);
        store.record(&reading, page, block);
    }
    let bytes = store.counts().memory_bytes;
    let most = (2 << 20) + (2 << 20) / 64 + (64 << 30) / REGION * 4;
    assert!(bytes <= most, "{bytes}");
}

#[test]
fn there_is_an_end_to_disks() {
    let store = Store::new(1);
    for index in 0..DISKS_MAX {
        store.add_disk(&format!("d{index}"), 1 << 20).unwrap();
    }
    let seen = store.add_disk("more", 1 << 20).unwrap_err();
    assert_eq!(seen.id(), TooManyDisks::ID);
}
