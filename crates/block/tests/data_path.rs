//! The data path at native speed: a guest writes without pause while its disk migrates back and
//! forth a hundred times, and not one sector may be lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use common::{Guest, Habit, Job, create, dir, open, same, two, verify};
use strake_api::job::{Method, MigrationLimits, Phase};
use strake_block::LiveDisk;

/// Migrates `count` times between two files under load and verifies everything.
fn back_and_forth(method: Method, size: u64, count: u32, habit: Habit) {
    let dir = dir();
    let (a, b) = two(&dir);
    let images = [create(&a, size), create(&b, size)];
    let disk = LiveDisk::new("root", Arc::clone(&images[0]));
    let expected = vec![0u64; usize::try_from(size / 512).unwrap()];
    let began = Instant::now();
    let guest = Guest::start(&disk, expected, habit);
    let mut on = 0;
    let mut worst = 0f64;
    for number in 1..=count {
        let to = 1 - on;
        // What is tested is the data: however busy this host is, the last blocks get their time.
        let limits = MigrationLimits {
            pause_ms: 10_000,
            method,
            ..MigrationLimits::default()
        };
        let job = Job::start(&disk, &images[to], limits).unwrap();
        assert!(job.asked(), "{:?}", job.migration.status());
        if number % 10 == 1 {
            // The gate is closed: source and destination hold the same.
            same(images[on].as_ref(), images[to].as_ref(), size);
        }
        // Now and then the inventory refuses.
        let commit = number % 7 != 0;
        job.migration.decide(commit);
        let status = job.migration.join();
        if commit {
            assert_eq!(status.phase, Phase::Completed, "{status:?}");
            on = to;
        } else {
            assert_eq!(status.phase, Phase::Failed);
        }
        if number % 10 != 1 {
            worst = worst.max(status.pause_ms.unwrap());
        }
        assert_eq!(disk.image().path(), images[on].path());
    }
    let writes = guest.writes.load(Ordering::Relaxed);
    let slowest = guest.worst_us.load(Ordering::Relaxed);
    let expected = guest.stop();
    verify(images[on].as_ref(), &expected);
    // And what another reader of the file sees.
    verify(open(if on == 0 { &a } else { &b }).as_ref(), &expected);
    let took = began.elapsed().as_secs_f64();
    println!(
        "{count} migrations of {} MiB in {took:.1} s, {writes} guest writes ({:.0}/s), worst pause {worst:.1} ms, slowest request {:.1} ms",
        size >> 20,
        writes as f64 / took,
        slowest as f64 / 1000.0,
    );
    assert!(writes > u64::from(count), "the guest did nothing");
}

fn small_writes(method: Method) {
    back_and_forth(method, 32 << 20, 100, Habit::SMALL);
}

/// Not a multiple of the copier's block, nor of 4096 bytes.
fn every_sort(method: Method) {
    back_and_forth(method, (8 << 20) + 5 * 512, 20, Habit::MIXED);
}

#[test]
fn a_hundred_dirty_migrations_under_4k_random_writes_lose_no_sector() {
    small_writes(Method::Dirty);
}

#[test]
fn a_hundred_mirrorings_under_4k_random_writes_lose_no_sector() {
    small_writes(Method::Mirror);
}

#[test]
fn a_hundred_migrations_by_choice_under_4k_random_writes_lose_no_sector() {
    small_writes(Method::Auto);
}

#[test]
fn dirty_migrations_under_every_sort_of_request_lose_no_sector() {
    every_sort(Method::Dirty);
}

#[test]
fn mirrorings_under_every_sort_of_request_lose_no_sector() {
    every_sort(Method::Mirror);
}

#[test]
fn migrations_by_choice_under_every_sort_of_request_lose_no_sector() {
    every_sort(Method::Auto);
}
