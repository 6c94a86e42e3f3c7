//! The data path without a migration: a live disk behind vhost-user-blk and the peer's export of the
//! same image, each in a process of its own, used in turn by the same client. What counts is how many
//! requests of 4 KiB end in a second, with one and with 32 in flight, and how much CPU time the
//! server's process spends for each (the kernel's on its behalf included).
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use strake_observe::{OsContext, Result};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

use super::client::{Random, Shared};
use super::disk::BLOCK;
use super::qsd::Qsd;
use super::{Extent, Settings};
use crate::observations::{ClientFailed, StepFailed};
use crate::report::{Better, Row, median, rounded};
use crate::signals::ends_with_us;

const PEER: &str = "qemu-storage-daemon";

/// What is not counted at the begin of each measurement.
const WARM_UP: Duration = Duration::from_millis(500);

/// How long a server may take until it listens.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Read,
    Write,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What is measured of each side.
const SHAPES: [(Op, usize); 4] = [
    (Op::Read, 1),
    (Op::Write, 1),
    (Op::Read, 32),
    (Op::Write, 32),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Strake,
    Peer,
}

/// One measurement.
#[derive(Debug)]
struct Sample {
    side: Side,
    shape: (Op, usize),
    iops: f64,
    latency_us: f64,
    cpu_us: f64,
}

/// Measures both sides in turn and gives the rows. The disk is at rest and stays where it is; what it
/// holds does not matter afterwards.
pub(super) fn run(settings: &Settings, image: &Path, dir: &Path, peer: bool) -> Result<Vec<Row>> {
    let (rounds, time) = match settings.extent {
        Extent::Quick => (3, Duration::from_secs(2)),
        Extent::Full => (7, Duration::from_secs(8)),
    };
    println!(
        "\ndata path: 4 KiB requests, {rounds} rounds of {} s",
        time.as_secs()
    );
    let mut samples = Vec::new();
    let mut sides = vec![Side::Strake];
    if peer {
        sides.push(Side::Peer);
    }
    for _ in 0..rounds {
        for shape in SHAPES {
            for side in &sides {
                let sample = measure(*side, shape, image, dir, settings.size, time)?;
                println!(
                    "  {:6} {:5} qd{:<2}  {:8.0} IOPS  {:7.1} us  {:5.2} us of CPU each",
                    match side {
                        Side::Strake => "strake",
                        Side::Peer => "peer",
                    },
                    shape.0.name(),
                    shape.1,
                    sample.iops,
                    sample.latency_us,
                    sample.cpu_us
                );
                samples.push(sample);
            }
            // Whoever comes first finds another device than whoever comes second.
            sides.rotate_left(1);
        }
    }
    Ok(rows(&samples, rounds))
}

fn rows(samples: &[Sample], rounds: u32) -> Vec<Row> {
    type Of = fn(&Sample) -> f64;
    let metrics: [(&str, &str, Better, Of); 3] = [
        ("iops", "IOPS", Better::Higher, |it| it.iops),
        ("latency_us", "us", Better::Lower, |it| it.latency_us),
        ("cpu_us_per_io", "us", Better::Lower, |it| it.cpu_us),
    ];
    let mut rows = Vec::new();
    for (op, depth) in SHAPES {
        for (name, unit, better, of) in metrics {
            let values = |side| {
                let own: Vec<f64> = samples
                    .iter()
                    .filter(|it| it.side == side && it.shape == (op, depth))
                    .map(of)
                    .collect();
                median(&own).map(rounded)
            };
            let peer_value = values(Side::Peer);
            rows.push(Row {
                metric: format!("path_{}_qd{depth}_{name}", op.name()),
                unit,
                better,
                strake: values(Side::Strake),
                dirty: None,
                mirror: None,
                peer: peer_value.map(|_| PEER),
                peer_value,
                second_peer: None,
                second_peer_value: None,
                // At least as good as the peer in the same run.
                target: peer_value,
                runs: rounds,
                why: None,
            });
        }
    }
    rows
}

/// A server in a process of its own.
enum Server {
    Ours(Child),
    Theirs(Qsd),
}

impl Server {
    fn start(side: Side, image: &Path, dir: &Path, socket: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        if side == Side::Peer {
            return Qsd::serving(dir, image, socket).map(Self::Theirs);
        }
        let own = std::env::current_exe().os("readlink", "/proc/self/exe")?;
        let mut command = Command::new(&own);
        ends_with_us(&mut command);
        let child = command
            .arg("serve-disk")
            .args([image, socket])
            .stdin(Stdio::piped())
            .spawn()
            .os("execve", own.display())?;
        Ok(Self::Ours(child))
    }

    fn pid(&self) -> u32 {
        match self {
            Self::Ours(child) => child.id(),
            Self::Theirs(qsd) => qsd.pid(),
        }
    }

    fn stop(self) -> Result<()> {
        match self {
            Self::Ours(mut child) => {
                drop(child.stdin.take());
                child.wait().os("wait", "our server").map(drop)
            }
            Self::Theirs(qsd) => qsd.stop(),
        }
    }
}

/// CPU time of a process and its kernel's work for it, in clock ticks of 10 ms.
fn cpu(pid: u32) -> Result<Duration> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let text = std::fs::read_to_string(&path).os("read", path.display())?;
    // The name, in parentheses, may hold anything.
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let rate = rustix::param::clock_ticks_per_second().max(1);
    Ok(Duration::from_nanos(
        ticks.saturating_mul(1_000_000_000 / rate),
    ))
}

fn measure(
    side: Side,
    shape: (Op, usize),
    image: &Path,
    dir: &Path,
    size: u64,
    time: Duration,
) -> Result<Sample> {
    let socket = dir.join("path.sock");
    let server = Server::start(side, image, dir, &socket)?;
    let end = Instant::now() + PATIENCE;
    while !socket.exists() {
        if Instant::now() > end {
            return Err(StepFailed {
                step: "measure the data path".to_owned(),
                reason: "a server does not listen".to_owned(),
            }
            .into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = server.pid();
    let used = drive(&socket, shape, size, time, &mut || cpu(pid))?;
    server.stop()?;
    let seconds = used.took.as_secs_f64();
    let count = used.count.max(1) as f64;
    Ok(Sample {
        side,
        shape,
        iops: used.count as f64 / seconds,
        latency_us: used.waited.as_secs_f64() * 1e6 / count,
        cpu_us: used.cpu.as_secs_f64() * 1e6 / count,
    })
}

struct Used {
    count: u64,
    took: Duration,
    /// The latencies of all of them together.
    waited: Duration,
    cpu: Duration,
}

fn failed(step: &str, reason: impl std::fmt::Display) -> strake_observe::Observation {
    ClientFailed {
        step: step.to_owned(),
        reason: reason.to_string(),
    }
    .into()
}

/// Keeps `shape`'s number of requests in flight.
fn drive(
    socket: &Path,
    (op, depth): (Op, usize),
    size: u64,
    time: Duration,
    cpu: &mut dyn FnMut() -> Result<Duration>,
) -> Result<Used> {
    let mut memory = Shared::new(depth * BLOCK)?;
    // A driver without flushes would be promised that each write is durable when it ends.
    let features = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | 1 << virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
    let path = socket.display().to_string();
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(&path, features).map_err(|error| failed("connect", error))?);
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(transport.as_mut(), 1, 128)
        .map_err(|error| failed("set up its queue", error))?;
    let queue = queues
        .first_mut()
        .ok_or_else(|| failed("set up its queue", "there is none"))?;
    let (start, len, fd) = memory.parts();
    transport
        .map_mem_region(start, len, fd, 0)
        .map_err(|error| failed("share its memory", error))?;
    queue.set_used_notif_enabled(true);
    let kick = transport.get_submission_notifier(0);
    let call = transport.get_completion_fd(0);
    let blocks = usize::try_from(size / BLOCK as u64).unwrap_or(1);
    let mut random = Random::new();
    let mut began = vec![Instant::now(); depth];
    let mut idle: Vec<usize> = (0..depth).collect();
    let start = Instant::now();
    let mut counted = None;
    let mut used = Used {
        count: 0,
        took: Duration::ZERO,
        waited: Duration::ZERO,
        cpu: Duration::ZERO,
    };
    loop {
        let now = Instant::now();
        match counted {
            None if now - start >= WARM_UP => {
                counted = Some((now, cpu()?));
                used.count = 0;
                used.waited = Duration::ZERO;
            }
            Some((since, before)) if now - since >= time => {
                used.took = now - since;
                used.cpu = cpu()?.saturating_sub(before);
                break;
            }
            _ => {}
        }
        let submitted = !idle.is_empty();
        for slot in idle.drain(..) {
            let offset = (random.below(blocks) * BLOCK) as u64;
            if let Some(place) = began.get_mut(slot) {
                *place = now;
            }
            let at = memory.block(slot).as_mut_ptr();
            // SAFETY: the slot's memory is shared with the server and nobody else touches it before
            // the completion; it is unmapped after the last one.
            let queued = unsafe {
                match op {
                    Op::Read => queue.read_raw(offset, at, BLOCK, slot),
                    Op::Write => queue.write_raw(offset, at, BLOCK, slot),
                }
            };
            queued.map_err(|error| failed("queue a request", error))?;
        }
        if submitted && queue.avail_notif_needed() {
            kick.notify().map_err(|error| failed("kick", error))?;
        }
        wait(&call)?;
        let now = Instant::now();
        for completion in queue.completions() {
            if completion.ret != 0 {
                return Err(failed(op.name(), format!("status {}", completion.ret)));
            }
            let slot = completion.context;
            used.count += 1;
            used.waited += began.get(slot).map_or(Duration::ZERO, |began| now - *began);
            idle.push(slot);
        }
    }
    // What is still in flight has the memory.
    let end = Instant::now() + PATIENCE;
    while idle.len() < depth && Instant::now() < end {
        wait(&call)?;
        idle.extend(queue.completions().map(|completion| completion.context));
    }
    Ok(used)
}

fn wait(call: &virtio_driver::EventFd) -> Result<()> {
    // SAFETY: the descriptor lives as long as `call`.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(call.as_raw_fd()) };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let limit = rustix::event::Timespec::try_from(Duration::from_millis(20)).ok();
    match poll(&mut fds, limit.as_ref()) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
        Ok(_) => call
            .read()
            .map(drop)
            .map_err(|error| failed("read its event", error)),
        Err(error) => Err(error).os("poll", "the client's event"),
    }
}
