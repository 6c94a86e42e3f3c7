//! Every kind of damage is found and named, and nothing else is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::device::{Access, Aligned, Device};
use super::map::{FIRST_WRITE, Layout, Saved, State, UNTOUCHED, ZEROES};
use super::run::{Discards, Plan, run};
use super::sector::{Fault, SECTOR, Stamp};
use super::verify::{Report, Strictness};
use super::*;

const RUN: u64 = 0xabcd;

fn written(block: u64, write: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_LEN];
    sector::fill(&mut bytes, RUN, block, write);
    bytes
}

fn exact(bytes: &[u8], block: u64, known: u64) -> Report {
    verify::block(bytes, RUN, block, known, Strictness::Exact)
}

fn at_least(bytes: &[u8], block: u64, known: u64) -> Report {
    verify::block(bytes, RUN, block, known, Strictness::AtLeast)
}

#[test]
fn a_good_block_is_good() {
    let bytes = written(5, 7);
    let report = exact(&bytes, 5, 7);
    assert_eq!((report.stamped, report.bad, report.torn), (8, 0, 0));
    assert_eq!(exact(&bytes, 5, UNTOUCHED), Report::default());
    assert_eq!(exact(&[0; BLOCK_LEN], 5, ZEROES).zeroes, 8);
    let stamp = Stamp::read(&bytes[3 * SECTOR..4 * SECTOR]).unwrap();
    assert_eq!((stamp.run, stamp.sector, stamp.write), (RUN, 43, 7));
}

#[test]
fn any_changed_bit_is_damage() {
    for bit in 0..SECTOR * 8 {
        let mut bytes = written(5, 7);
        bytes[SECTOR + bit / 8] ^= 1 << (bit % 8);
        let report = exact(&bytes, 5, 7);
        assert_eq!((report.bad, report.stamped), (1, 7), "bit {bit}");
        assert_eq!(report.faults[0].sector, 41);
        let fault = report.faults[0].fault;
        assert!(
            matches!(fault, Fault::Damaged { .. } | Fault::Foreign),
            "{fault}"
        );
    }
}

#[test]
fn every_kind_of_wrong_sector_has_its_name() {
    let old = exact(&written(5, 6), 5, 7);
    assert_eq!(old.bad, 8);
    assert_eq!(old.faults[0].fault, Fault::Stale { write: 6 });
    assert_eq!(old.torn, 0, "all of it is old");
    let new = exact(&written(5, 8), 5, 7);
    assert_eq!(new.faults[0].fault, Fault::Unacknowledged { write: 8 });
    let elsewhere = exact(&written(6, 7), 5, 7);
    assert_eq!(elsewhere.faults[0].fault, Fault::Misplaced { sector: 48 });
    assert_eq!(exact(&[0; BLOCK_LEN], 5, 7).faults[0].fault, Fault::Lost);
    assert_eq!(exact(&[1; BLOCK_LEN], 5, 7).faults[0].fault, Fault::Foreign);
    assert_eq!(
        exact(&written(5, 7), 5, ZEROES).faults[0].fault,
        Fault::NotZero
    );
    let other = verify::block(&written(5, 7), RUN + 1, 5, 7, Strictness::Exact);
    assert_eq!(other.faults[0].fault, Fault::OtherRun { run: RUN });
    let text = old.faults[0].to_string();
    assert_eq!(
        text,
        "sector 40 (byte 20480): stale: it is of write 6, expected write 7"
    );
}

#[test]
fn a_torn_write_is_told_from_an_old_one() {
    for split in 1..8 {
        let mut bytes = written(5, 7);
        bytes[split * SECTOR..].copy_from_slice(&written(5, 6)[split * SECTOR..]);
        let report = exact(&bytes, 5, 7);
        assert_eq!((report.torn, report.bad), (1, 8 - split as u64));
        // The part that is new may be the part that was not acknowledged.
        assert_eq!(exact(&bytes, 5, 6).torn, 1);
        // After a crash the new part may be there or not, the acknowledged one has to be.
        assert_eq!(at_least(&bytes, 5, 6).bad, 0);
        assert_eq!(at_least(&bytes, 5, 7).torn, 1);
    }
}

#[test]
fn after_a_crash_newer_is_fine_and_older_is_not() {
    assert_eq!(at_least(&written(5, 9), 5, 7).bad, 0);
    assert_eq!(at_least(&written(5, 6), 5, 7).bad, 8);
    assert_eq!(at_least(&written(5, FIRST_WRITE), 5, ZEROES).bad, 0);
    assert_eq!(at_least(&[0; BLOCK_LEN], 5, ZEROES).bad, 0);
    let discardable = DISCARD_CHUNK * CHUNK_BLOCKS;
    assert!(in_discard_area(discardable) && !in_discard_area(5));
    assert_eq!(at_least(&[0; BLOCK_LEN], discardable, 7).bad, 0);
    assert_eq!(at_least(&[0; BLOCK_LEN], 5, 7).bad, 8, "no discards there");
    assert_eq!(at_least(&[3; BLOCK_LEN], discardable, 7).bad, 8);
}

fn disk(directory: &Path, bytes: u64) -> std::path::PathBuf {
    let path = directory.join("disk.raw");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

#[test]
fn the_newest_whole_map_counts() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path(), 8 << 20);
    let device = Device::open(&path, Access::Write).unwrap();
    assert!(Saved::read(&device).is_err());
    let layout = Layout::new(device.size(), None).unwrap();
    assert_eq!((layout.all, layout.table, layout.data), (2048, 4, 2038));
    let saved = |generation: u64| Saved {
        run: RUN,
        generation,
        state: State::Checkpoint,
        blocks: (0..layout.data).map(|block| block + generation).collect(),
    };
    for generation in 4..8 {
        saved(generation).write(&device, &layout).unwrap();
        assert_eq!(Saved::read(&device).unwrap(), (saved(generation), layout));
    }
    // The newest, number 7, is in slot 1: tables at 2038 and 2043, headers at 2042 and 2047.
    let file = File::options().read(true).write(true).open(&path).unwrap();
    for at in [2047, 2043] {
        let mut kept = [0; BLOCK_LEN];
        file.read_exact_at(&mut kept, at * BLOCK).unwrap();
        file.write_all_at(&[0xee], at * BLOCK + 9).unwrap();
        file.sync_data().unwrap();
        assert_eq!(Saved::read(&device).unwrap().0, saved(6));
        file.write_all_at(&kept, at * BLOCK).unwrap();
        file.sync_data().unwrap();
    }
    assert_eq!(Saved::read(&device).unwrap().0, saved(7));
    assert!(Layout::new(3 * BLOCK, None).is_none());
}

fn plan(milliseconds: u64) -> Plan {
    Plan {
        threads: 3,
        run: RUN,
        time: Some(Duration::from_millis(milliseconds)),
        limit: None,
        rate: None,
        checkpoint: Some(Duration::from_millis(200)),
        discards: Discards::Yes,
    }
}

fn check(path: &Path) -> (State, Report) {
    let device = Device::open(path, Access::Read).unwrap();
    let (saved, report) = verify::image(&device).unwrap();
    (saved.state, report)
}

#[test]
fn a_run_is_verified_from_outside_and_every_corruption_of_it_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path(), 16 << 20);
    let device = Device::open(&path, Access::Write).unwrap();
    assert!(run(device, plan(700)).unwrap());
    let (state, report) = check(&path);
    assert_eq!((state, report.bad), (State::Complete, 0));
    assert!(report.stamped > 0 && report.zeroes > 0, "{report:?}");

    let device = Device::open(&path, Access::Write).unwrap();
    let (saved, _) = Saved::read(&device).unwrap();
    let find = |wanted: &dyn Fn(u64) -> bool| {
        (0..)
            .zip(&saved.blocks)
            .find(|(_, known)| wanted(**known))
            .map(|(block, known)| (block, *known))
            .unwrap()
    };
    let mut buffer = Aligned::new(BLOCK_LEN);
    let mut spoil = |block: u64, change: &dyn Fn(&mut [u8]), bad: u64| {
        let bytes = buffer.first(BLOCK_LEN);
        device.read(block * BLOCK, bytes).unwrap();
        let kept = bytes.to_vec();
        change(bytes);
        device.write(block * BLOCK, bytes).unwrap();
        let (_, report) = check(&path);
        assert_eq!(report.bad, bad, "{report:?}");
        assert_eq!(report.faults[0].sector / 8, block);
        bytes.copy_from_slice(&kept);
        device.write(block * BLOCK, bytes).unwrap();
        report
    };
    let (block, write) = find(&|known| known > FIRST_WRITE);
    // One bit.
    spoil(block, &|bytes| bytes[100] ^= 4, 1);
    // A lost write, and a torn one.
    let stale = |bytes: &mut [u8]| sector::fill(bytes, RUN, block, write - 1);
    let report = spoil(block, &stale, 8);
    assert_eq!(report.faults[0].fault, Fault::Stale { write: write - 1 });
    let report = spoil(block, &|bytes| stale(&mut bytes[..0x600]), 3);
    assert_eq!(report.torn, 1);
    // A lost discard.
    let (block, _) = find(&|known| known == ZEROES);
    let report = spoil(block, &|bytes| bytes[4095] = 1, 1);
    assert_eq!(report.faults[0].fault, Fault::NotZero);
    assert_eq!(check(&path).1.bad, 0);
}

#[test]
fn a_second_run_does_not_trust_the_first_ones_map() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path(), 16 << 20);
    let mut generations = Vec::new();
    for seed in [1, 2] {
        let device = Device::open(&path, Access::Write).unwrap();
        let plan = Plan {
            run: seed,
            limit: Some(4 << 20),
            rate: Some(2000),
            ..plan(300)
        };
        assert!(run(device, plan).unwrap());
        let device = Device::open(&path, Access::Read).unwrap();
        let (saved, report) = verify::image(&device).unwrap();
        assert_eq!((saved.run, report.bad), (seed, 0));
        assert_eq!(saved.blocks.len(), 1024);
        generations.push(saved.generation);
    }
    assert!(generations[1] > generations[0]);
}

#[test]
fn a_map_of_a_run_that_had_just_begun_checks_nothing_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path(), 8 << 20);
    let device = Device::open(&path, Access::Write).unwrap();
    let layout = Layout::new(device.size(), None).unwrap();
    let begun = Saved {
        run: RUN,
        generation: 1,
        state: State::Begun,
        blocks: Vec::new(),
    };
    begun.write(&device, &Layout { data: 0, ..layout }).unwrap();
    let error = verify::image(&device).unwrap_err();
    assert!(error.to_string().contains("first checkpoint"), "{error}");
}

#[test]
fn a_disk_that_fails_is_bad() {
    // Sealed against writes: every one fails.
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path(), 16 << 20);
    let device = Device::open(&path, Access::Read).unwrap();
    assert!(run(device, plan(100)).is_err());
}
