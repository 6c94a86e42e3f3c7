//! Jobs that are taken up again: after `kill -9` at any instant, and after the end of the VM.
//!
//! The test runs itself as the process to be killed: a guest that notes in a file what it issued and
//! what was acknowledged, and a migration that keeps its progress. Afterwards whatever the kept file claims must be
//! the same on both sides, and the job that goes on from it must end with every write.
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
use std::time::{Duration, Instant};

use common::{Guest, Habit, Job, Random, create, dir, open, stamp, verify};
use strake_api::job::{
    Ceiling, JobId, LimitsChange, Method, MigrationLimits, MigrationStatus, Phase,
};
use strake_block::{
    Buffer, Fault, FaultImage, FaultOn, Image, Keep, LiveDisk, Migration, Operation, Request,
    SwitchHooks,
};

const SIZE: u64 = 32 << 20;
/// The smallest region that is claimed.
const REGION: u64 = 1 << 20;
/// Where the guest writes all the time.
const HOT: u64 = 4 << 20;
const PIECE: usize = 4096;
const DEPTH: usize = 8;

const DIRECTORY: &str = "STRAKE_TEST_KEPT";
const METHOD: &str = "STRAKE_TEST_METHOD";

fn method(name: &str) -> Method {
    match name {
        "dirty" => Method::Dirty,
        "mirror" => Method::Mirror,
        _ => Method::Auto,
    }
}

fn limits(method: Method, rate: Option<u64>) -> MigrationLimits {
    MigrationLimits {
        pause_ms: 10_000,
        bytes_per_second: rate,
        method,
        ..MigrationLimits::default()
    }
}

struct Started {
    job: Job,
    disk: Arc<LiveDisk>,
}

fn file(directory: &Path, name: &str) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(directory.join(name))
        .unwrap()
}

fn start(
    disk: &Arc<LiveDisk>,
    directory: &Path,
    to: &Arc<dyn Image>,
    keep: Keep,
    limits: MigrationLimits,
) -> strake_observe::Result<Job> {
    let (hooks, asked) = common::Hooks::new();
    let migration = Migration::start_kept(
        Arc::clone(disk),
        Arc::clone(to),
        file(directory, "journal"),
        keep,
        JobId("job-1".into()),
        limits,
        Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
    )?;
    Ok(Job {
        migration,
        hooks,
        asked,
    })
}

/// Not a test by itself: the process that is killed.
#[test]
fn the_process_to_be_killed() {
    let Some(directory) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let directory = Path::new(&directory);
    let method = method(&std::env::var(METHOD).unwrap());
    let disk = LiveDisk::new("root", open(&directory.join("a.raw")));
    let again = directory.join("b.raw").exists();
    let (to, keep) = if again {
        (
            open(&directory.join("b.raw")),
            Keep::Again(file(directory, "kept")),
        )
    } else {
        let to = create(&directory.join("b.raw"), SIZE);
        (to, Keep::In(file(directory, "kept")))
    };
    // An earlier run's claims are relied on before the guest begins.
    let job = start(&disk, directory, &to, keep, limits(method, Some(8 << 20))).unwrap();
    let ledger = file(directory, "ledger");
    let guest = {
        let disk = Arc::clone(&disk);
        std::thread::spawn(move || write_for_ever(&disk, &ledger))
    };
    job.hooks
        .no_daemon
        .store(true, std::sync::atomic::Ordering::Relaxed);
    println!("@copying");
    std::io::stdout().flush().unwrap();
    guest.join().unwrap();
}

/// Writes pieces, each with a number of its own, and notes both ends of each write: in a few places, and
/// rarely anywhere.
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
    let mut number = u64::from(std::process::id()) << 32;
    let mut last_cold = Instant::now();
    loop {
        for slot in 0..DEPTH {
            let mut piece = random.below(HOT / PIECE as u64);
            if last_cold.elapsed() > Duration::from_millis(150) {
                last_cold = Instant::now();
                piece = random.below(SIZE / PIECE as u64);
            }
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
        std::thread::sleep(Duration::from_millis(1));
        queue
            .reap(&mut |tag, result| {
                result.unwrap();
                let (piece, number) = doing[tag as usize].take().unwrap();
                note(piece, 1, number);
            })
            .unwrap();
    }
}

fn prepared() -> tempfile::TempDir {
    let dir = dir();
    let mut data = vec![0u8; SIZE as usize];
    for (sector, bytes) in data.chunks_mut(512).enumerate() {
        stamp(sector as u64, 1, bytes);
    }
    std::fs::write(dir.path().join("a.raw"), &data).unwrap();
    let ones: Vec<u8> = (0..SIZE / PIECE as u64 * 2)
        .flat_map(|_| 1u64.to_le_bytes())
        .collect();
    std::fs::write(dir.path().join("ledger"), ones).unwrap();
    dir
}

/// Runs the process and kills it after so long.
fn run_and_kill(directory: &Path, method: &str, after: Duration) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_process_to_be_killed", "--nocapture"])
        .env(DIRECTORY, directory)
        .env(METHOD, method)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let found = lines
        .map_while(Result::ok)
        .any(|line| line.ends_with("@copying"));
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(found, "{method}: it ended before");
}

/// What the file claims, region by region.
fn claimed(directory: &Path) -> Vec<bool> {
    let bytes = std::fs::read(directory.join("kept")).unwrap_or_default();
    let newest = bytes
        .chunks(32 * 1024)
        .filter_map(|slot| {
            let len = u32::from_le_bytes(slot.get(12..16)?.try_into().ok()?) as usize;
            let sequence = u64::from_le_bytes(slot.get(16..24)?.try_into().ok()?);
            let head: serde_json::Value = serde_json::from_slice(slot.get(32..32 + len)?).ok()?;
            Some((sequence, head["claimed"].as_str()?.to_owned()))
        })
        .max();
    let digits = newest.map_or_else(String::new, |(_, digits)| digits);
    let byte = |at: usize| u8::from_str_radix(digits.get(at * 2..at * 2 + 2)?, 16).ok();
    (0..(SIZE / REGION) as usize)
        .map(|number| byte(number / 8).is_some_and(|byte| byte >> (number % 8) & 1 == 1))
        .collect()
}

/// What is claimed is the same on both sides.
fn claims_are_true(directory: &Path) -> u64 {
    let (a, b) = (
        open(&directory.join("a.raw")),
        open(&directory.join("b.raw")),
    );
    let claimed = claimed(directory);
    let mut left = vec![0u8; REGION as usize];
    let mut right = left.clone();
    let mut bytes = 0;
    for (number, _) in claimed.iter().enumerate().filter(|(_, claimed)| **claimed) {
        let at = number as u64 * REGION;
        a.read_at(at, &mut left).unwrap();
        b.read_at(at, &mut right).unwrap();
        assert!(left == right, "region {number} is claimed and differs");
        bytes += REGION;
    }
    bytes
}

/// Each sector holds the last acknowledged write or one that was issued after it; what it holds is
/// what is to be found from now on.
fn content(directory: &Path) -> common::Expected {
    let ledger = std::fs::read(directory.join("ledger")).unwrap();
    let number = |at: usize| u64::from_le_bytes(ledger[at..at + 8].try_into().unwrap());
    let image = open(&directory.join("a.raw"));
    let mut expected = Vec::new();
    let mut data = vec![0u8; PIECE];
    for piece in 0..SIZE / PIECE as u64 {
        let (issued, told) = (number(piece as usize * 16), number(piece as usize * 16 + 8));
        image.read_at(piece * PIECE as u64, &mut data).unwrap();
        for sector in data.chunks(512) {
            let found = u64::from_le_bytes(sector[8..16].try_into().unwrap());
            assert!(
                found == told || found == issued,
                "piece {piece}: {found}, {told}, {issued}"
            );
            expected.push(found);
        }
    }
    expected
}

/// The job goes on with another guest and ends with every write.
fn goes_on(directory: &Path, method: Method) -> MigrationStatus {
    let expected = content(directory);
    let disk = LiveDisk::new("root", open(&directory.join("a.raw")));
    let to = open(&directory.join("b.raw"));
    let keep = Keep::Again(file(directory, "kept"));
    let job = start(&disk, directory, &to, keep, limits(method, None)).unwrap();
    let habit = Habit {
        per_second: Some(500),
        ..Habit::MIXED
    };
    let guest = Guest::start(&disk, expected, habit);
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    std::thread::sleep(Duration::from_millis(50));
    let expected = guest.stop();
    assert_eq!(disk.image().path(), to.path());
    verify(to.as_ref(), &expected);
    status
}

fn killed(name: &str) {
    let mut any = 0;
    for after_ms in [0, 700, 1500, 2600, 3400, 5200] {
        let dir = prepared();
        run_and_kill(dir.path(), name, Duration::from_millis(after_ms));
        let mut bytes = claims_are_true(dir.path());
        if after_ms % 200 == 0 && claimed_file(dir.path()) {
            // Taken up again and killed again.
            run_and_kill(dir.path(), name, Duration::from_millis(1800));
            bytes = claims_are_true(dir.path());
        }
        if !claimed_file(dir.path()) {
            continue; // It had not begun to keep anything.
        }
        let status = goes_on(dir.path(), method(name));
        any += bytes;
        if method(name) != Method::Mirror {
            // Only what was not claimed is copied anew.
            assert_eq!(status.passes[0].planned_bytes, SIZE - bytes, "{status:?}");
        }
    }
    assert!(any > 0, "nothing was ever claimed");
}

fn claimed_file(directory: &Path) -> bool {
    std::fs::metadata(directory.join("kept")).is_ok_and(|meta| meta.len() > 0)
}

#[test]
fn dirty_passes_go_on_after_a_kill() {
    killed("dirty");
}

#[test]
fn a_mirroring_goes_on_after_a_kill() {
    killed("mirror");
}

#[test]
fn a_job_by_choice_goes_on_after_a_kill() {
    killed("auto");
}

/// A disk with a guest on a job that keeps its progress and copies slowly.
fn begun(dir: &tempfile::TempDir, method: Method) -> (Started, Arc<FaultImage>, Guest) {
    let source = open(&dir.path().join("a.raw"));
    let to = FaultImage::new(create(&dir.path().join("b.raw"), SIZE));
    let disk = LiveDisk::new("root", source);
    let image = Arc::clone(&to) as Arc<dyn Image>;
    let keep = Keep::In(file(dir.path(), "kept"));
    let job = start(
        &disk,
        dir.path(),
        &image,
        keep,
        limits(method, Some(12 << 20)),
    )
    .unwrap();
    let guest = Guest::start(
        &disk,
        vec![1; (SIZE / 512) as usize],
        Habit {
            per_second: Some(20),
            ..Habit::SMALL
        },
    );
    (Started { job, disk }, to, guest)
}

fn until(mut met: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !met() {
        assert!(Instant::now() < end, "waited in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_vm_that_ends_interrupts_its_job_which_goes_on_in_the_next_run() {
    for method in [Method::Dirty, Method::Mirror] {
        let dir = prepared();
        let (begun, to, guest) = begun(&dir, method);
        until(|| claimed(dir.path()).contains(&true));
        let expected = guest.stop();
        begun.job.migration.interrupt().unwrap();
        let status = begun.job.migration.join();
        assert_eq!(status.phase, Phase::Interrupted, "{status:?}");
        drop((begun, to));
        let bytes = claims_are_true(dir.path());
        assert!(bytes > 0);
        // A ledger of what the guest has left, for `goes_on`.
        let ledger: Vec<u8> = expected
            .chunks(8)
            .flat_map(|piece| {
                let number = piece[0].to_le_bytes();
                [number, number].concat()
            })
            .collect();
        std::fs::write(dir.path().join("ledger"), ledger).unwrap();
        goes_on(dir.path(), method);
    }
}

#[test]
fn whatever_else_ends_a_job_leaves_nothing_to_believe() {
    for end in ["cancel", "fail", "refuse"] {
        let dir = prepared();
        let (begun, to, guest) = begun(&dir, Method::Dirty);
        until(|| claimed(dir.path()).contains(&true));
        match end {
            "cancel" => begun.job.migration.cancel().unwrap(),
            "fail" => to.add(Fault::failing(FaultOn::Change, libc::EIO)),
            _ => begun.job.migration.set(&LimitsChange {
                bytes_per_second: Some(Ceiling::Unlimited),
                ..LimitsChange::default()
            }),
        }
        let status = begun.job.finish(false);
        assert!(
            matches!(status.phase, Phase::Failed | Phase::Cancelled),
            "{status:?}"
        );
        assert!(!claimed(dir.path()).contains(&true), "{end}");
        // The guest goes on everywhere.
        let writes = guest.writes.load(std::sync::atomic::Ordering::Relaxed);
        until(|| guest.writes.load(std::sync::atomic::Ordering::Relaxed) > writes + 50);
        verify(begun.disk.image().as_ref(), &guest.stop());
    }
}

#[test]
fn what_was_kept_of_another_job_or_is_damaged_is_refused() {
    let dir = prepared();
    let disk = LiveDisk::new("root", open(&dir.path().join("a.raw")));
    let to = create(&dir.path().join("b.raw"), SIZE);
    for bytes in [vec![], vec![7; 100_000]] {
        std::fs::write(dir.path().join("kept"), bytes).unwrap();
        let keep = Keep::Again(file(dir.path(), "kept"));
        let seen = start(&disk, dir.path(), &to, keep, limits(Method::Dirty, None))
            .err()
            .unwrap();
        let known = seen
            .find("block.kept-damaged")
            .or(seen.find("block.journal-damaged"));
        assert!(known.is_some(), "{seen}");
    }
    // The disk is free for another one.
    let job = start(
        &disk,
        dir.path(),
        &to,
        Keep::Nothing,
        limits(Method::Dirty, None),
    )
    .unwrap();
    assert_eq!(job.finish(true).phase, Phase::Completed);
}

#[test]
fn a_job_that_cannot_keep_anything_goes_on_without() {
    let dir = prepared();
    std::fs::write(dir.path().join("kept"), b"").unwrap();
    let source = open(&dir.path().join("a.raw"));
    let disk = LiveDisk::new("root", source);
    let to = create(&dir.path().join("b.raw"), SIZE);
    // Open for reading only: every write of it fails.
    let keep = Keep::In(File::open(dir.path().join("kept")).unwrap());
    let job = start(&disk, dir.path(), &to, keep, limits(Method::Dirty, None)).unwrap();
    let guest = Guest::start(&disk, vec![1; (SIZE / 512) as usize], Habit::SMALL);
    let status = job.finish(true);
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
    assert!(status.kept.is_none());
    let writes = guest.writes.load(std::sync::atomic::Ordering::Relaxed);
    until(|| guest.writes.load(std::sync::atomic::Ordering::Relaxed) > writes + 50);
    verify(disk.image().as_ref(), &guest.stop());
}
