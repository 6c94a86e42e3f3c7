//! Live migration of a disk: our `dirty` method beside QEMU's background mirror.
//!
//! Both sides export the same image over vhost-user-blk to the same client, which writes random
//! 4 KiB blocks with 32 in flight, and move it to a fresh sparse file on the same device; ours and
//! theirs in turn, at each load. What counts is how long it takes (against the time of reading and
//! writing as much, measured in the same run), what the guest keeps of its speed meanwhile, how
//! long nothing of the guest ends at the switch-over, and whether the destination holds every
//! acknowledged write.

mod client;
mod disk;
mod qsd;
mod serve;
mod table;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use strake_api::job::{JobId, MigrationLimits, MigrationStatus, Phase};
use strake_block::{Access, Image, LiveDisk, Migration, RawImage, SwitchHooks};
use strake_observe::{OsContext, Result};

use self::client::{Client, Load, Trace};
use self::disk::Expected;
use self::qsd::{Mirrored, Qsd};
use self::serve::Server;

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    Quick,
    Full,
}

/// What is run.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) extent: Extent,
    pub(crate) dir: Option<PathBuf>,
    pub(crate) size: u64,
    pub(crate) rounds: u32,
    /// How long the client writes before the migration begins.
    warm_up: Duration,
    /// When a migration that does not converge is given up.
    patience: Duration,
}

impl Settings {
    pub(crate) fn new(extent: Extent) -> Self {
        let (size, rounds, warm_up, patience) = match extent {
            Extent::Quick => (1 << 30, 3, 2, 20),
            Extent::Full => (4 << 30, 5, 5, 40),
        };
        Self {
            extent,
            dir: None,
            size,
            rounds,
            warm_up: Duration::from_secs(warm_up),
            patience: Duration::from_secs(patience),
        }
    }
}

const LOADS: [Load; 4] = [Load::Idle, Load::Paced(1000), Load::Paced(4000), Load::Max];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Strake,
    Peer,
}

/// One migration.
#[derive(Debug)]
pub(crate) struct Sample {
    side: Side,
    load: Load,
    /// Seconds of reading the image and of writing as much, measured in the same round.
    copy_limit: f64,
    /// Seconds until the disk ran on the destination; none if it did not get there.
    total: Option<f64>,
    why: Option<String>,
    before_iops: f64,
    during_iops: f64,
    before_latency_ms: Option<f64>,
    during_latency_ms: Option<f64>,
    worst_ms: Option<f64>,
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
    let mut builder = tempfile::Builder::new();
    builder.prefix("strake-bench-");
    let dir = match &settings.dir {
        Some(dir) => builder.tempdir_in(dir),
        None => builder.tempdir(),
    };
    let dir = dir.os("mkdir", "the bench's directory")?;
    let peer = qsd::version();
    match &peer {
        Ok(version) => println!("peer: {version}, blockdev-mirror, copy-mode background"),
        Err(seen) => println!("peer: {seen}"),
    }
    println!(
        "disk: {} MiB in {}; 4 KiB random writes, {} in flight",
        settings.size >> 20,
        dir.path().display(),
        client::DEPTH
    );
    let on = dir.path().join("disk-0.raw");
    let expected = disk::fill(&on, settings.size)?;
    let mut stage = Stage {
        dir: dir.path().to_path_buf(),
        size: settings.size,
        on,
        number: 0,
        expected,
    };
    let mut samples = Vec::new();
    for round in 1..=settings.rounds {
        let scratch = stage.dir.join("scratch.raw");
        let (read, write) = disk::copy_limit(&stage.on, &scratch, settings.size)?;
        let copy_limit = (read + write).as_secs_f64();
        println!(
            "\nround {round} of {}: copy limit {copy_limit:.2} s (read {:.2} s, write {:.2} s)",
            settings.rounds,
            read.as_secs_f64(),
            write.as_secs_f64()
        );
        for load in LOADS {
            for side in [Side::Strake, Side::Peer] {
                if side == Side::Peer && peer.is_err() {
                    continue;
                }
                let sample = measure(&mut stage, settings, side, load, copy_limit)?;
                table::line(&sample);
                samples.push(sample);
            }
        }
    }
    table::report(settings, &samples, peer.err().map(|seen| seen.to_string())).print();
    Ok(())
}

/// One migration of one side under one load.
fn measure(
    stage: &mut Stage,
    settings: &Settings,
    side: Side,
    load: Load,
    copy_limit: f64,
) -> Result<Sample> {
    let to = stage.next()?;
    let from = stage.on.clone();
    let run = match side {
        Side::Strake => ours(stage, settings, &to, load)?,
        Side::Peer => theirs(stage, settings, &to, load)?,
    };
    if run.outcome.is_ok() {
        stage.moved(to);
    } else {
        let _ = std::fs::remove_file(&to);
    }
    debug_assert!(run.outcome.is_ok() || stage.on == from);
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
        worst_ms: run.trace.worst_ms(run.began, run.ended),
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
    note: String,
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

fn ours(stage: &mut Stage, settings: &Settings, to: &Path, load: Load) -> Result<Run> {
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
        MigrationLimits::default(),
        hooks,
    )?;
    let mut outcome = Err("the job ended without a switch-over".to_owned());
    loop {
        if asks.recv_timeout(Duration::from_millis(2)).is_ok() {
            migration.decide(true);
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
        outcome = Ok((ended.checked_sub(pause).unwrap_or(ended), ended));
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
        server.join();
    }
    disk.flush()?;
    let note = format!(
        "{} passes, gate closed {:.1} ms",
        status.passes.len(),
        status.pause_ms.unwrap_or(0.0)
    );
    Ok(Run {
        trace,
        began,
        ended,
        outcome,
        note,
    })
}

fn theirs(stage: &mut Stage, settings: &Settings, to: &Path, load: Load) -> Result<Run> {
    let socket = stage.dir.join("qsd.sock");
    let mut qsd = Qsd::start(&stage.dir, &stage.on, to, &socket)?;
    let client = client(stage, &socket, load)?;
    if client.is_some() {
        std::thread::sleep(settings.warm_up);
    }
    let began = Instant::now();
    let mirrored = qsd.mirror(settings.patience)?;
    let ended = Instant::now();
    if client.is_some() {
        std::thread::sleep(Duration::from_millis(300));
    }
    let trace = end(stage, client)?;
    qsd.stop()?;
    let outcome = match mirrored {
        Mirrored::Done { asked, done } => Ok((asked, done)),
        Mirrored::Not(why) => Err(why),
    };
    Ok(Run {
        trace,
        began,
        ended,
        outcome,
        note: String::new(),
    })
}
