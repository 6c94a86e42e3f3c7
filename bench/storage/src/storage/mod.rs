//! Live migration of a disk: our methods beside QEMU's mirror, in its background and its
//! write-blocking mode.
//!
//! All export the same image over vhost-user-blk to the same client, which writes random 4 KiB
//! blocks with 32 in flight, and move it to a fresh sparse file on the same device; in turn, at
//! each load. What counts is how long it takes (against the time of reading and writing as much,
//! measured just before), what the guest keeps of its speed meanwhile, how long nothing of the
//! guest ends at the switch-over, how much is copied, and whether the destination holds every
//! acknowledged write: each sector is looked at after each run. Where the source does not change
//! any more at the end, it and the destination are compared with `qemu-img compare` as well.

mod client;
mod disk;
mod path;
mod qsd;
mod serve;
mod table;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use strake_api::job::{JobId, Method, MigrationLimits, MigrationStatus, Phase};
use strake_block::{Access, Image, LiveDisk, Migration, RawImage, SwitchHooks};
use strake_observe::{OsContext, Result};

use crate::observations::{DataLost, NoRoom, StepFailed};
use crate::signals;

use self::client::{Client, Load, Trace};
use self::disk::Expected;
use self::qsd::{Mirrored, Mode, Qsd};
use self::serve::Server;

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    Quick,
    Full,
}

/// Which part of the bench is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    All,
    /// Migrations under load.
    Migration,
    /// The data path without a migration.
    Path,
}

pub(crate) use serve::process as serve_disk;

/// What is run.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) part: Part,
    pub(crate) extent: Extent,
    pub(crate) dir: Option<PathBuf>,
    pub(crate) size: u64,
    pub(crate) rounds: u32,
    /// Only this one.
    pub(crate) load: Option<String>,
    /// Only these, if any is named.
    pub(crate) sides: Vec<String>,
    /// How long the client writes before the migration begins.
    warm_up: Duration,
    /// When a migration that does not converge is given up.
    patience: Duration,
    /// No round is begun that would end later than this.
    budget: Duration,
}

impl Settings {
    pub(crate) fn new(extent: Extent) -> Self {
        let (size, rounds, warm_up, patience, budget) = match extent {
            Extent::Quick => (1 << 30, 3, 2, 12, 7 * 60),
            Extent::Full => (4 << 30, 5, 5, 40, 4 * 60 * 60),
        };
        Self {
            part: Part::All,
            extent,
            dir: None,
            size,
            rounds,
            load: None,
            sides: Vec::new(),
            warm_up: Duration::from_secs(warm_up),
            patience: Duration::from_secs(patience),
            budget: Duration::from_secs(budget),
        }
    }
}

const LOADS: [Load; 5] = [
    Load::Idle,
    Load::Paced(1000),
    Load::Paced(4000),
    Load::Paced(16_000),
    Load::Max,
];

impl Settings {
    fn loads(&self) -> Result<Vec<Load>> {
        let named = |load: &Load| self.load.as_ref().is_none_or(|name| *name == load.name());
        let loads: Vec<Load> = LOADS.into_iter().filter(named).collect();
        if loads.is_empty() {
            return Err(StepFailed {
                step: "choose a load".to_owned(),
                reason: format!("there is none named {}", self.load.as_deref().unwrap_or("")),
            }
            .into());
        }
        Ok(loads)
    }
}

/// Source, destination and what the copy limit is measured with.
const IMAGES: u64 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Strake(Method),
    Peer(Mode),
}

const SIDES: [Side; 5] = [
    Side::Strake(Method::Auto),
    Side::Strake(Method::Dirty),
    Side::Strake(Method::Mirror),
    Side::Peer(Mode::Background),
    Side::Peer(Mode::WriteBlocking),
];

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Strake(Method::Auto) => "strake-auto",
            Self::Strake(Method::Dirty) => "strake-dirty",
            Self::Strake(Method::Mirror) => "strake-mirror",
            Self::Strake(Method::Snapshot) => "strake-snapshot",
            Self::Peer(Mode::Background) => "peer-background",
            Self::Peer(Mode::WriteBlocking) => "peer-write-blocking",
        }
    }
}

/// One migration.
#[derive(Debug)]
pub(crate) struct Sample {
    side: Side,
    load: Load,
    /// Seconds of reading the image and of writing as much, measured just before.
    copy_limit: f64,
    /// Seconds until the disk ran on the destination; none if it did not get there.
    total: Option<f64>,
    why: Option<String>,
    before_iops: f64,
    during_iops: f64,
    before_latency_ms: Option<f64>,
    during_latency_ms: Option<f64>,
    before_p99_ms: Option<f64>,
    during_p99_ms: Option<f64>,
    worst_ms: Option<f64>,
    /// What was copied, as a share of the least that has to be.
    copied: Option<f64>,
    passes: Option<u32>,
    /// The longest time around the switch-over in which nothing of the guest ended.
    gap_ms: Option<f64>,
    bad_sectors: u64,
    note: String,
}

/// Where the disk is and what it must hold.
struct Stage {
    dir: PathBuf,
    size: u64,
    /// The image that the disk is on.
    on: PathBuf,
    number: u32,
    expected: Expected,
}

impl Stage {
    fn next(&mut self) -> Result<PathBuf> {
        self.number += 1;
        let path = self.dir.join(format!("disk-{}.raw", self.number));
        disk::create(&path, self.size)?;
        Ok(path)
    }

    /// The disk is on `to` now.
    fn moved(&mut self, to: PathBuf) {
        let _ = std::fs::remove_file(&self.on);
        self.on = to;
    }
}

/// Runs the bench and prints its report.
pub(crate) fn run(settings: &Settings) -> Result<()> {
    let began = Instant::now();
    let loads = settings.loads()?;
    let dir = directory(settings)?;
    signals::remove_at_end(dir.path().to_path_buf())?;
    let peer = qsd::at_hand();
    match &peer {
        Ok(version) => println!("peer: {version}, blockdev-mirror"),
        Err(seen) => println!("peer: {seen}"),
    }
    let on = dir.path().join("disk-0.raw");
    let expected = disk::fill(&on, settings.size)?;
    println!(
        "disk: {} MiB, {}; 4 KiB random writes, {} in flight",
        settings.size >> 20,
        if disk::is_direct(&on)? {
            "direct I/O"
        } else {
            "through the page cache, for the file system knows no direct I/O"
        },
        client::DEPTH
    );
    let mut stage = Stage {
        dir: dir.path().to_path_buf(),
        size: settings.size,
        on,
        number: 0,
        expected,
    };
    let sides = SIDES
        .into_iter()
        .filter(|side| matches!(side, Side::Strake(_)) || peer.is_ok())
        .filter(|side| {
            let named = |name: &String| *name == side.name();
            settings.sides.is_empty() || settings.sides.iter().any(named)
        });
    let mut sides: Vec<Side> = sides.collect();
    let mut samples = Vec::new();
    let mut rounds = 0;
    while settings.part != Part::Path && rounds < settings.rounds {
        let round = began.elapsed() / rounds.max(1);
        if rounds > 0 && began.elapsed() + round > settings.budget {
            println!("\nno time for another round");
            break;
        }
        rounds += 1;
        println!("\nround {rounds} of {}", settings.rounds);
        for load in &loads {
            for side in &sides {
                let sample = measure(&mut stage, settings, *side, *load)?;
                table::line(&sample);
                samples.push(sample);
            }
        }
        // Whoever comes first finds another device than whoever comes last.
        sides.rotate_left(1);
    }
    if settings.part != Part::Path && qsd::has_compare() {
        compare_behind_the_gate(&mut stage, settings)?;
    }
    let no_peer = peer.as_ref().err().map(ToString::to_string);
    let mut report = table::report(settings, rounds, &samples, no_peer);
    if settings.part == Part::Path {
        report.rows.clear();
    }
    if settings.part != Part::Migration {
        let rows = path::run(settings, &stage.on, &stage.dir, peer.is_ok())?;
        report.rows.extend(rows);
    }
    report.print();
    let lost: u64 = samples
        .iter()
        .filter(|sample| matches!(sample.side, Side::Strake(_)))
        .map(|sample| sample.bad_sectors)
        .sum();
    if lost > 0 {
        return Err(DataLost {
            sectors: lost,
            side: "strake".to_owned(),
        }
        .into());
    }
    // A bench beside nobody is none.
    peer.map(drop)
}

fn directory(settings: &Settings) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("strake-bench-");
    let dir = match &settings.dir {
        Some(dir) => builder.tempdir_in(dir),
        // Not the usual one, which may be in memory.
        None if std::env::var_os("TMPDIR").is_none() => builder.tempdir_in("/var/tmp"),
        None => builder.tempdir(),
    };
    let dir = dir.os("mkdir", "the bench's directory")?;
    let room = rustix::fs::statvfs(dir.path()).os("statvfs", dir.path().display())?;
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    let needed = settings.size.saturating_mul(IMAGES);
    if free < needed {
        return Err(NoRoom {
            path: dir.path().display().to_string(),
            free,
            needed,
        }
        .into());
    }
    Ok(dir)
}

/// One more migration under load: while the gate is closed, before the commit, source
/// and destination are compared by a tool that is not ours.
fn compare_behind_the_gate(stage: &mut Stage, settings: &Settings) -> Result<()> {
    let load = Load::Paced(4000);
    let to = stage.next()?;
    let method = Method::default();
    let run = ours(stage, settings, &to, load, method, Compare::BehindTheGate)?;
    match run.outcome {
        Ok(_) => stage.moved(to),
        Err(why) => {
            return Err(StepFailed {
                step: "migrate once more, to compare".to_owned(),
                reason: why,
            }
            .into());
        }
    }
    println!("\nqemu-img compare of source and destination behind the closed gate: identical");
    Ok(())
}

/// One migration of one side under one load.
fn measure(stage: &mut Stage, settings: &Settings, side: Side, load: Load) -> Result<Sample> {
    let (read, write) = disk::copy_limit(&stage.on, &stage.dir.join("scratch.raw"), settings.size)?;
    let copy_limit = (read + write).as_secs_f64();
    let to = stage.next()?;
    let run = match side {
        Side::Strake(method) => ours(stage, settings, &to, load, method, Compare::No)?,
        Side::Peer(mode) => theirs(stage, settings, &to, load, mode)?,
    };
    if load == Load::Idle && run.outcome.is_ok() && qsd::has_compare() {
        qsd::compare(&stage.on, &to)?;
    }
    if run.outcome.is_ok() {
        stage.moved(to);
    } else {
        let _ = std::fs::remove_file(&to);
    }
    let bad_sectors = disk::verify(&stage.on, &stage.expected)?;
    let before = run
        .began
        .checked_sub(settings.warm_up * 3 / 4)
        .unwrap_or(run.began);
    let margin = Duration::from_millis(20);
    let (total, why, gap_ms) = match &run.outcome {
        Ok((from, to)) => (
            Some((*to - run.began).as_secs_f64()),
            None,
            run.trace
                .gap_ms(from.checked_sub(margin).unwrap_or(*from), *to + margin),
        ),
        Err(why) => (None, Some(why.clone()), None),
    };
    Ok(Sample {
        side,
        load,
        copy_limit,
        total,
        why,
        before_iops: run.trace.iops(before, run.began),
        during_iops: run.trace.iops(run.began, run.ended),
        before_latency_ms: run.trace.latency_ms(before, run.began),
        during_latency_ms: run.trace.latency_ms(run.began, run.ended),
        before_p99_ms: run.trace.p99_ms(before, run.began),
        during_p99_ms: run.trace.p99_ms(run.began, run.ended),
        worst_ms: run.trace.worst_ms(run.began, run.ended),
        copied: run.copied.map(|bytes| bytes as f64 / settings.size as f64),
        passes: run.passes,
        gap_ms,
        bad_sectors,
        note: run.note,
    })
}

struct Run {
    trace: Trace,
    began: Instant,
    ended: Instant,
    /// From when to when the switch-over took, or why there was none.
    outcome: std::result::Result<(Instant, Instant), String>,
    /// In bytes.
    copied: Option<u64>,
    passes: Option<u32>,
    note: String,
}

/// Whether our migration is looked at before its commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compare {
    No,
    BehindTheGate,
}

/// The client's part of a run: none when idle.
fn client(stage: &mut Stage, socket: &Path, load: Load) -> Result<Option<Client>> {
    if load == Load::Idle {
        return Ok(None);
    }
    let expected = std::mem::take(&mut stage.expected);
    Client::start(socket, expected, load).map(Some)
}

/// Ends the client and takes back what the disk must hold.
fn end(stage: &mut Stage, client: Option<Client>) -> Result<Trace> {
    match client {
        None => Ok(Trace::default()),
        Some(client) => {
            let (trace, expected) = client.stop()?;
            stage.expected = expected;
            Ok(trace)
        }
    }
}

/// The daemon's side of our migration: it always commits, at once.
struct Commit {
    asked: Mutex<Sender<()>>,
}

impl SwitchHooks for Commit {
    fn suspend_vm(&self, _limit: Duration) -> Result<()> {
        Ok(())
    }

    fn resume_vm(&self) {}

    fn can_ask(&self) -> bool {
        true
    }

    fn await_commit(&self, _: &JobId) {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = asked.send(());
    }

    fn ended(&self, _: &MigrationStatus) {}
}

fn image(path: &Path) -> Result<Arc<dyn Image>> {
    let fd = disk::open(path)?.into();
    let name = path.display().to_string();
    Ok(Arc::new(RawImage::from_fd(fd, name, Access::ReadWrite)?))
}

fn ours(
    stage: &mut Stage,
    settings: &Settings,
    to: &Path,
    load: Load,
    method: Method,
    compare: Compare,
) -> Result<Run> {
    let disk = LiveDisk::new("disk", image(&stage.on)?);
    let destination = image(to)?;
    let socket = stage.dir.join("strake.sock");
    let mut server = None;
    if load != Load::Idle {
        server = Some(Server::start(&disk, &socket)?);
    }
    let client = client(stage, &socket, load)?;
    if client.is_some() {
        std::thread::sleep(settings.warm_up);
    }
    let journal = stage.dir.join("job.journal");
    let _ = std::fs::remove_file(&journal);
    let journal = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&journal)
        .os("open", journal.display())?;
    let (asked, asks) = channel();
    let hooks = Arc::new(Commit {
        asked: Mutex::new(asked),
    });
    let began = Instant::now();
    let migration = Migration::start(
        Arc::clone(&disk),
        Arc::clone(&destination),
        journal,
        JobId("bench".to_owned()),
        MigrationLimits {
            method,
            ..MigrationLimits::default()
        },
        hooks,
    )?;
    let mut decided = None;
    let mut outcome = Err("the job ended without a switch-over".to_owned());
    loop {
        if asks.recv_timeout(Duration::from_millis(2)).is_ok() {
            decided = Some(Instant::now());
            let compared = match compare {
                Compare::No => Ok(()),
                Compare::BehindTheGate => qsd::compare(&stage.on, to),
            };
            migration.decide(compared.is_ok());
            if let Err(seen) = compared {
                let _ = migration.join();
                return Err(seen);
            }
        }
        if migration.status().phase.is_final() {
            break;
        }
        if began.elapsed() > settings.patience && migration.cancel().is_ok() {
            outcome = Err(format!("not ready after {} s", settings.patience.as_secs()));
        }
    }
    let status = migration.join();
    let ended = Instant::now();
    let pause = Duration::from_secs_f64(status.pause_ms.unwrap_or(0.0) / 1000.0);
    if status.phase == Phase::Completed {
        let decided = decided.unwrap_or(ended);
        outcome = Ok((decided.checked_sub(pause).unwrap_or(decided), ended));
    } else if let Some(failure) = &status.failure {
        // The cause; what is above it names the files of this run.
        let cause = failure.causes().first().unwrap_or(failure);
        outcome = Err(cause.text().to_owned());
    }
    // The client goes on for a moment: the end of the switch-over is seen by what comes after it.
    if client.is_some() {
        std::thread::sleep(Duration::from_millis(300));
    }
    let trace = end(stage, client)?;
    if let Some(server) = server {
        server.join()?;
    }
    disk.flush()?;
    let used = status.method.as_deref();
    let mirrored = used.map_or(0, |used| used.mirrored_bytes);
    let written = status.passes.iter().map(|pass| pass.written_bytes);
    let copied = written.sum::<u64>() + mirrored;
    let note = format!(
        "gate closed {:.1} ms{}",
        status.pause_ms.unwrap_or(0.0),
        used.map_or(String::new(), |used| format!(
            "; {}: {}",
            used.method.name(),
            used.why
        ))
    );
    Ok(Run {
        trace,
        began,
        ended,
        outcome,
        copied: (status.phase == Phase::Completed).then_some(copied),
        passes: u32::try_from(status.passes.len()).ok(),
        note,
    })
}

fn theirs(
    stage: &mut Stage,
    settings: &Settings,
    to: &Path,
    load: Load,
    mode: Mode,
) -> Result<Run> {
    let socket = stage.dir.join("qsd.sock");
    let mut qsd = Qsd::start(&stage.dir, &stage.on, to, &socket)?;
    let client = client(stage, &socket, load)?;
    if client.is_some() {
        std::thread::sleep(settings.warm_up);
    }
    let began = Instant::now();
    let mirrored = qsd.mirror(mode, settings.patience)?;
    let ended = Instant::now();
    if client.is_some() {
        std::thread::sleep(Duration::from_millis(300));
    }
    let trace = end(stage, client)?;
    qsd.stop()?;
    let (outcome, copied) = match mirrored {
        Mirrored::Done { asked, done, bytes } => (Ok((asked, done)), bytes),
        Mirrored::Not(why) => (Err(why), None),
    };
    Ok(Run {
        trace,
        began,
        ended,
        outcome,
        copied,
        passes: None,
        note: String::new(),
    })
}
