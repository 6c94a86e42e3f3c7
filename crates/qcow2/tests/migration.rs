//! A disk migrates between raw and qcow2, back and forth, while its guest writes without pause.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "../../block/tests/common/mod.rs"]
mod guest;

use std::sync::Arc;

use common::{check, content, dir, make, open, peers};
use guest::{Guest, Habit, Job, verify};
use strake_api::job::{MigrationLimits, Phase};
use strake_block::{Image, LiveDisk};
use strake_qcow2::{CreateOptions, Format};

fn back_and_forth(size: u64, count: u32, habit: Habit, bits: u32) {
    let dir = dir();
    let base = dir.path().join("base");
    std::fs::File::create(&base).unwrap().set_len(size).unwrap();
    let path = dir.path().join("a.qcow2");
    let options = CreateOptions::new(size).cluster_bits(bits);
    make(&path, &options.backing("base", Format::Raw));
    let qcow2: Arc<dyn Image> = open(&path);
    let images = [guest::create(&dir.path().join("b.raw"), size), qcow2];
    let disk = LiveDisk::new("root", Arc::clone(&images[0]));
    let expected = vec![0u64; usize::try_from(size / 512).unwrap()];
    let guest = Guest::start(&disk, expected, habit);
    for number in 1..=count {
        let to = usize::try_from(number % 2).unwrap();
        let limits = MigrationLimits {
            pause_ms: 10_000,
            ..MigrationLimits::default()
        };
        let job = Job::start(&disk, &images[to], limits).unwrap();
        assert!(job.asked(), "{:?}", job.migration.status());
        guest::same(images[1 - to].as_ref(), images[to].as_ref(), size);
        job.migration.decide(true);
        let status = job.migration.join();
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
    }
    let on = usize::try_from(count % 2).unwrap();
    let expected = guest.stop();
    verify(images[on].as_ref(), &expected);
    if on == 1 {
        images[1].flush().unwrap();
        let data = common::read_all(images[1].as_ref());
        drop((disk, images));
        check(&path);
        assert!(content(&path) == data);
    }
}

#[test]
fn no_sector_is_lost_between_raw_and_qcow2() {
    if !peers() {
        return;
    }
    back_and_forth(16 << 20, 9, Habit::SMALL, 16);
    back_and_forth((8 << 20) + 5 * 512, 9, Habit::MIXED, 12);
    back_and_forth((8 << 20) + 5 * 512, 8, Habit::MIXED, 18);
}
