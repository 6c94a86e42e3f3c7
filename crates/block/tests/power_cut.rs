//! A power cut at any instant of a migration, with any part of the devices' caches lost: the image
//! that the binding names holds everything whose flush the guest was told of. See `common::cache` for how
//! every instant and every subset is covered.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    unsafe_code,
    missing_docs
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::cache::{Book, Cached};
use common::{Job, Random, SECTOR, stamp};
use strake_api::job::{Method, MigrationLimits, Phase};
use strake_block::{Buffer, Image, LiveDisk, Operation, Request};

const SECTORS: usize = 4096;
const MOST: usize = 64;
const DEPTH: usize = 12;

/// What is under way in one of the guest's slots.
enum Doing {
    Change(u64, usize, usize),
    Flush(u64),
}

/// Writes, zeroes and flushes until it is told to stop; never two changes of a sector at a time.
fn guest(disk: &Arc<LiveDisk>, book: &Arc<Book>, stop: &AtomicBool, seed: u64) {
    let mut queue = disk.queue(DEPTH as u32).unwrap();
    let mut memory = vec![0u8; (DEPTH + 1) * MOST * SECTOR];
    let skew = memory.as_ptr().align_offset(4096);
    let mut random = Random::new(seed);
    let mut doing: Vec<Option<Doing>> = (0..DEPTH).map(|_| None).collect();
    let mut number = 1;
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        for slot in 0..DEPTH {
            if stopping || doing[slot].is_some() {
                continue;
            }
            let kind = random.below(12);
            if kind == 0 {
                doing[slot] = Some(Doing::Flush(book.now()));
                queue.submit(Request {
                    tag: slot as u64,
                    op: Operation::Flush,
                    offset: 0,
                    buffers: Vec::new(),
                });
                continue;
            }
            let count = 1 + random.below(MOST as u64) as usize;
            let first = random.below((SECTORS - count) as u64) as usize;
            let busy = doing.iter().flatten().any(|other| match other {
                Doing::Change(_, from, len) => *from < first + count && first < from + len,
                Doing::Flush(_) => false,
            });
            if busy {
                continue;
            }
            number += 1;
            let (op, value, buffers) = if kind == 1 {
                let len = (count * SECTOR) as u64;
                let unmap = random.below(2) == 0;
                (Operation::WriteZeroes { len, unmap }, 0, Vec::new())
            } else {
                let bytes = &mut memory[skew + slot * MOST * SECTOR..][..count * SECTOR];
                for (at, sector) in bytes.chunks_mut(SECTOR).enumerate() {
                    stamp((first + at) as u64, number, sector);
                }
                // SAFETY: the slot's memory is not touched until its request has ended, and
                // outlives the queue's last request, for which the loop waits.
                let buffer = unsafe { Buffer::new(bytes.as_mut_ptr(), bytes.len()) };
                (Operation::Write, number, vec![buffer])
            };
            let id = book.guest_issues(first, &vec![value; count]);
            doing[slot] = Some(Doing::Change(id, first, count));
            queue.submit(Request {
                tag: slot as u64,
                op,
                offset: (first * SECTOR) as u64,
                buffers,
            });
        }
        queue.push().unwrap();
        if stopping && doing.iter().all(Option::is_none) {
            return;
        }
        std::thread::sleep(Duration::from_micros(100));
        queue
            .reap(&mut |tag, result| {
                result.unwrap();
                match doing[tag as usize].take().unwrap() {
                    Doing::Change(id, first, count) => book.guest_is_told(id, first, count),
                    Doing::Flush(issued_at) => book.guest_has_flushed(issued_at),
                }
            })
            .unwrap();
    }
}

/// Migrations to and fro: committed, refused, cancelled.
fn cut_at_any_instant(method: Method) {
    for seed in 1..=6 {
        let book = Book::new(SECTORS);
        let first: Arc<dyn Image> = Cached::new(&book, 0, 1);
        let disk = LiveDisk::new("root", first);
        let stop = Arc::new(AtomicBool::new(false));
        // Not scoped: if the test fails at the closed gate, nobody waits for the guest.
        let guest = {
            let (disk, book, stop) = (Arc::clone(&disk), Arc::clone(&book), Arc::clone(&stop));
            std::thread::spawn(move || guest(&disk, &book, &stop, seed + 100))
        };
        let mut random = Random::new(seed);
        let mut on = 0;
        for _ in 0..6 {
            let to = 1 - on;
            book.forget(to);
            let destination: Arc<dyn Image> = Cached::new(&book, to, 0);
            let limits = MigrationLimits {
                pause_ms: 10_000,
                method,
                ..MigrationLimits::default()
            };
            let job = Job::start(&disk, &destination, limits).unwrap();
            let commit = match random.below(6) {
                0 => {
                    std::thread::sleep(Duration::from_millis(random.below(20)));
                    // Too late is as well: then it ends like the others.
                    let _ = job.migration.cancel();
                    true
                }
                1 => false,
                _ => true,
            };
            if job.asked() {
                book.asked();
                if commit {
                    on = to;
                }
                book.decided(on);
                job.migration.decide(commit);
            }
            let status = job.migration.join();
            assert!(status.phase != Phase::Completed || on == to, "{status:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        guest.join().unwrap();
        assert!(book.checks() > 100, "the guest did nothing");
    }
}

#[test]
fn no_power_cut_during_a_dirty_migration_loses_what_was_flushed() {
    cut_at_any_instant(Method::Dirty);
}

#[test]
fn no_power_cut_during_a_mirroring_loses_what_was_flushed() {
    cut_at_any_instant(Method::Mirror);
}

#[test]
fn no_power_cut_during_a_migration_by_choice_loses_what_was_flushed() {
    cut_at_any_instant(Method::Auto);
}
