//! `kill -9` in every phase of each method: the image that the binding names holds every write that
//! was acknowledged.
//!
//! The test runs itself as the process to be killed: a guest that notes in a file what it issued and
//! what was acknowledged, and a migration whose "inventory" is a file that exists once the
//! transaction is done.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    unsafe_code,
    missing_docs
)]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{Job, Random, create, dir, open, stamp};
use strake_api::job::{Method, MigrationLimits};
use strake_block::{Buffer, Image, LiveDisk, Operation, Request, journal};

const SIZE: u64 = 16 << 20;
const PIECE: usize = 4096;
const PIECES: u64 = SIZE / PIECE as u64;
const DEPTH: usize = 16;

/// Where the process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// So many milliseconds after the start of the copy.
    Copying(u64),
    Asked,
    Committed,
    Decided,
}

const DIRECTORY: &str = "STRAKE_TEST_KILL";
const METHOD: &str = "STRAKE_TEST_METHOD";

/// Not a test by itself: the process that is killed.
#[test]
fn the_process_to_be_killed() {
    let Some(directory) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let directory = Path::new(&directory);
    let method = match std::env::var(METHOD).unwrap().as_str() {
        "dirty" => Method::Dirty,
        "mirror" => Method::Mirror,
        _ => Method::Auto,
    };
    let disk = LiveDisk::new("root", open(&directory.join("a.raw")));
    let to = create(&directory.join("b.raw"), SIZE);
    let ledger = File::options()
        .write(true)
        .open(directory.join("ledger"))
        .unwrap();
    let guest = {
        let disk = Arc::clone(&disk);
        std::thread::spawn(move || write_for_ever(&disk, &ledger))
    };
    let journal = File::create(directory.join("journal")).unwrap();
    let limits = MigrationLimits {
        pause_ms: 10_000,
        bytes_per_second: Some(24 << 20),
        method,
        ..MigrationLimits::default()
    };
    let (hooks, asked) = common::Hooks::new();
    let job = Job::start_with(&disk, &to, limits, (hooks, asked), journal).unwrap();
    say("copying");
    assert!(job.asked(), "{:?}", job.migration.status());
    say("asked");
    std::thread::sleep(Duration::from_millis(50));
    File::create(directory.join("committed")).unwrap();
    say("committed");
    std::thread::sleep(Duration::from_millis(50));
    job.migration.decide(true);
    say("decided");
    guest.join().unwrap();
}

fn say(what: &str) {
    println!("@{what}");
    std::io::stdout().flush().unwrap();
}

/// Writes pieces, each with a number of its own, and notes both ends of each write.
fn write_for_ever(disk: &Arc<LiveDisk>, ledger: &File) {
    let mut queue = disk.queue(DEPTH as u32).unwrap();
    let mut memory = vec![0u8; (DEPTH + 1) * PIECE];
    let skew = memory.as_ptr().align_offset(PIECE);
    let mut random = Random::new(u64::from(std::process::id()));
    let mut doing: Vec<Option<(u64, u64)>> = vec![None; DEPTH];
    let note = |piece: u64, half: u64, number: u64| {
        let at = piece * 16 + half * 8;
        ledger.write_all_at(&number.to_le_bytes(), at).unwrap();
    };
    let mut number = 1;
    loop {
        for slot in 0..DEPTH {
            let piece = random.below(PIECES);
            let busy = doing.iter().flatten().any(|(other, _)| *other == piece);
            if doing[slot].is_some() || busy {
                continue;
            }
            number += 1;
            note(piece, 0, number);
            let bytes = &mut memory[skew + slot * PIECE..][..PIECE];
            for (at, sector) in bytes.chunks_mut(512).enumerate() {
                stamp(piece * 8 + at as u64, number, sector);
            }
            // SAFETY: not touched until the request has ended; the loop never does.
            let buffer = unsafe { Buffer::new(bytes.as_mut_ptr(), PIECE) };
            doing[slot] = Some((piece, number));
            queue.submit(Request {
                tag: slot as u64,
                op: Operation::Write,
                offset: piece * PIECE as u64,
                buffers: vec![buffer],
            });
        }
        queue.push().unwrap();
        std::thread::sleep(Duration::from_micros(200));
        queue
            .reap(&mut |tag, result| {
                result.unwrap();
                let (piece, number) = doing[tag as usize].take().unwrap();
                note(piece, 1, number);
            })
            .unwrap();
    }
}

fn killed(method: &str, at: At) {
    let dir = dir();
    let source = create(&dir.path().join("a.raw"), SIZE);
    drop(source);
    let mut data = vec![0u8; SIZE as usize];
    for (sector, bytes) in data.chunks_mut(512).enumerate() {
        stamp(sector as u64, 1, bytes);
    }
    std::fs::write(dir.path().join("a.raw"), &data).unwrap();
    let ones: Vec<u8> = (0..PIECES * 2).flat_map(|_| 1u64.to_le_bytes()).collect();
    std::fs::write(dir.path().join("ledger"), ones).unwrap();

    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_process_to_be_killed", "--nocapture"])
        .env(DIRECTORY, dir.path())
        .env(METHOD, method)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (word, wait) = match at {
        At::Copying(ms) => ("@copying", ms),
        At::Asked => ("@asked", 0),
        At::Committed => ("@committed", 0),
        At::Decided => ("@decided", 30),
    };
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut found = false;
    for line in lines {
        // The harness may have begun a line before.
        if line.unwrap().ends_with(word) {
            found = true;
            break;
        }
    }
    std::thread::sleep(Duration::from_millis(wait));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(found, "{method} {at:?}: it ended before");

    let committed = dir.path().join("committed").exists();
    match at {
        At::Copying(_) => {}
        At::Asked => assert!(!committed, "too slow to be killed in time"),
        At::Committed | At::Decided => assert!(committed),
    }
    let name = if committed { "b.raw" } else { "a.raw" };
    let ledger = std::fs::read(dir.path().join("ledger")).unwrap();
    holds(open(&dir.path().join(name)).as_ref(), &ledger, method, at);
    match journal::read(&mut File::open(dir.path().join("journal")).unwrap()) {
        Ok(record) => assert!(!record.phase.is_final() || at == At::Decided, "{record:?}"),
        // Killed before the job's thread had begun it.
        Err(seen) => assert!(matches!(at, At::Copying(_)), "{seen}"),
    }
}

/// Each sector holds the last acknowledged write or one that was issued after it.
fn holds(image: &dyn Image, ledger: &[u8], method: &str, at: At) {
    let number = |at: usize| u64::from_le_bytes(ledger[at..at + 8].try_into().unwrap());
    let mut data = vec![0u8; PIECE];
    let mut want = [0u8; 512];
    for piece in 0..PIECES {
        let (issued, told) = (number(piece as usize * 16), number(piece as usize * 16 + 8));
        image.read_at(piece * PIECE as u64, &mut data).unwrap();
        for (index, sector) in data.chunks(512).enumerate() {
            let found = u64::from_le_bytes(sector[8..16].try_into().unwrap());
            stamp(piece * 8 + index as u64, found, &mut want);
            assert!(
                sector == want && (found == told || found == issued),
                "{method} {at:?}: piece {piece} of {} holds write {found}; {told} was acknowledged, {issued} issued",
                image.path()
            );
        }
    }
}

fn in_every_phase(method: &str) {
    for at in [
        At::Copying(0),
        At::Copying(100),
        At::Copying(300),
        At::Copying(500),
        At::Asked,
        At::Committed,
        At::Decided,
    ] {
        killed(method, at);
    }
}

#[test]
fn a_dirty_migration_that_is_killed_loses_nothing() {
    in_every_phase("dirty");
}

#[test]
fn a_mirroring_that_is_killed_loses_nothing() {
    in_every_phase("mirror");
}

#[test]
fn a_migration_by_choice_that_is_killed_loses_nothing() {
    in_every_phase("auto");
}
