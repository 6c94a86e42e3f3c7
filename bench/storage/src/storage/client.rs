//! The guest's side: a vhost-user-blk client that writes random 4 KiB blocks, 32 at a time, at a
//! given rate or as fast as it can, and remembers when each write ended.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use strake_observe::{OsContext, Result};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

use super::disk::{BLOCK, Expected, stamp};
use crate::observations::ClientFailed;

/// Writes in flight.
pub(crate) const DEPTH: usize = 32;

/// Entries of the virtqueue: three descriptors per write.
const QUEUE_SIZE: u16 = 128;

/// How long the client waits for an answer of the server before it calls it hung.
const HUNG: Duration = Duration::from_secs(60);

/// How many writes per second are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    Idle,
    Paced(u64),
    Max,
}

impl Load {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Idle => "idle".to_owned(),
            Self::Paced(rate) => rate.to_string(),
            Self::Max => "max".to_owned(),
        }
    }
}

/// The end of one write.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) at: Instant,
    pub(crate) latency: Duration,
}

/// What the client saw.
#[derive(Debug, Default)]
pub(crate) struct Trace(Vec<Ended>);

impl Trace {
    fn within(&self, from: Instant, to: Instant) -> impl Iterator<Item = &Ended> {
        self.0
            .iter()
            .filter(move |ended| ended.at >= from && ended.at <= to)
    }

    /// Writes per second.
    pub(crate) fn iops(&self, from: Instant, to: Instant) -> f64 {
        let count = self.within(from, to).count();
        let time = to.saturating_duration_since(from).as_secs_f64();
        if time > 0.0 { count as f64 / time } else { 0.0 }
    }

    /// The mean latency, in milliseconds.
    pub(crate) fn latency_ms(&self, from: Instant, to: Instant) -> Option<f64> {
        let (count, sum) = self
            .within(from, to)
            .fold((0u32, 0.0), |(count, sum), ended| {
                (count + 1, sum + ended.latency.as_secs_f64())
            });
        (count > 0).then(|| sum * 1000.0 / f64::from(count))
    }

    /// The longest time without the end of any write that touches the window, in milliseconds.
    pub(crate) fn gap_ms(&self, from: Instant, to: Instant) -> Option<f64> {
        self.0
            .windows(2)
            .filter_map(|pair| match pair {
                [before, after] if after.at >= from && before.at <= to => {
                    Some((after.at - before.at).as_secs_f64() * 1000.0)
                }
                _ => None,
            })
            .max_by(f64::total_cmp)
    }

    /// What 99 of 100 writes did not exceed, in milliseconds.
    pub(crate) fn p99_ms(&self, from: Instant, to: Instant) -> Option<f64> {
        let mut all: Vec<Duration> = self.within(from, to).map(|ended| ended.latency).collect();
        all.sort_unstable();
        let at = (all.len() * 99).div_ceil(100).checked_sub(1)?;
        all.get(at).map(|latency| latency.as_secs_f64() * 1000.0)
    }

    /// The longest that one write took, in milliseconds.
    pub(crate) fn worst_ms(&self, from: Instant, to: Instant) -> Option<f64> {
        self.within(from, to)
            .map(|ended| ended.latency.as_secs_f64() * 1000.0)
            .max_by(f64::total_cmp)
    }
}

/// A running client.
#[derive(Debug)]
pub(crate) struct Client {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(Trace, Expected)>>,
}

impl Client {
    /// Connects to the server at `socket` and starts writing.
    pub(crate) fn start(socket: &Path, expected: Expected, load: Load) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let path = socket.display().to_string();
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new()
                .name("client".to_owned())
                .spawn(move || {
                    let mut expected = expected;
                    let trace = drive(&path, &mut expected, load, &stop)?;
                    Ok((trace, expected))
                })
                .os("clone", "the client's thread")?
        };
        Ok(Self { stop, thread })
    }

    /// Ends it: everything in flight comes back, then a flush.
    pub(crate) fn stop(self) -> Result<(Trace, Expected)> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => Err(failed("run", "its thread panicked")),
        }
    }
}

fn failed(step: &str, reason: impl std::fmt::Display) -> strake_observe::Observation {
    ClientFailed {
        step: step.to_owned(),
        reason: reason.to_string(),
    }
    .into()
}

/// Memory that the server can map.
pub(super) struct Shared {
    fd: OwnedFd,
    start: *mut u8,
    len: usize,
}

impl Shared {
    pub(super) fn new(len: usize) -> Result<Self> {
        let fd = memfd_create("client", MemfdFlags::CLOEXEC).os("memfd_create", "client")?;
        rustix::fs::ftruncate(&fd, len as u64).os("ftruncate", "client")?;
        // SAFETY: a new shared mapping of a file of this length, at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).os("mmap", "client");
        }
        Ok(Self {
            fd,
            start: start.cast(),
            len,
        })
    }

    /// Where it is mapped, how large it is, and its descriptor.
    pub(super) fn parts(&self) -> (usize, usize, i32) {
        (self.start as usize, self.len, self.fd.as_raw_fd())
    }

    pub(super) fn block(&mut self, slot: usize) -> &mut [u8] {
        debug_assert!((slot + 1) * BLOCK <= self.len);
        // SAFETY: within the mapping, which lives as long as `self`; the server only reads it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(slot * BLOCK), BLOCK) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unmapped once.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

#[derive(Clone, Copy)]
struct Flying {
    block: usize,
    sequence: u32,
    began: Instant,
}

/// Pseudo-random numbers (xorshift*), the same in every run.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let value = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 24;
        usize::try_from(value).unwrap_or(0) % bound.max(1)
    }
}

fn drive(path: &str, expected: &mut Expected, load: Load, stop: &AtomicBool) -> Result<Trace> {
    let mut memory = Shared::new(DEPTH * BLOCK)?;
    let features = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | 1 << virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(path, features).map_err(|error| failed("connect", error))?);
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(transport.as_mut(), 1, QUEUE_SIZE)
        .map_err(|error| failed("set up its queue", error))?;
    let queue = queues
        .first_mut()
        .ok_or_else(|| failed("set up its queue", "there is none"))?;
    transport
        .map_mem_region(memory.start as usize, memory.len, memory.fd.as_raw_fd(), 0)
        .map_err(|error| failed("share its memory", error))?;
    queue.set_used_notif_enabled(true);
    let kick = transport.get_submission_notifier(0);
    let call = transport.get_completion_fd(0);

    let mut trace = Trace::default();
    let mut random = Random::new();
    let mut sequence = expected.iter().copied().max().unwrap_or(0);
    let mut flying: Vec<Option<Flying>> = vec![None; DEPTH];
    let mut busy = vec![false; expected.len()];
    let began = Instant::now();
    let mut issued = 0u64;
    let mut flushing = false;
    let mut flushed = false;
    let mut heard = Instant::now();
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        let count = flying.iter().flatten().count();
        if stopping && count == 0 && flushed {
            return Ok(trace);
        }
        let now = Instant::now();
        let due = match load {
            Load::Idle => 0,
            Load::Paced(rate) => due(began.elapsed(), rate),
            Load::Max => u64::MAX,
        };
        // What a full queue could not take is not made up for later: a guest's programs do not
        // write twice as fast afterwards either.
        issued = issued.max(due.saturating_sub(DEPTH as u64).min(u64::MAX / 2));
        if load == Load::Max {
            issued = 0;
        }
        let mut submitted = false;
        for slot in 0..DEPTH {
            let Some(place) = flying.get_mut(slot).filter(|place| place.is_none()) else {
                continue;
            };
            if stopping || issued >= due {
                break;
            }
            let block = random.below(busy.len());
            let Some(taken) = busy.get_mut(block).filter(|taken| !**taken) else {
                continue;
            };
            *taken = true;
            sequence += 1;
            stamp(block as u64, sequence, memory.block(slot));
            *place = Some(Flying {
                block,
                sequence,
                began: now,
            });
            // SAFETY: the slot's memory is shared with the server and untouched until the
            // completion; it is unmapped only after the last one (or with the process).
            unsafe {
                queue.write_raw(
                    (block * BLOCK) as u64,
                    memory.block(slot).as_ptr(),
                    BLOCK,
                    slot,
                )
            }
            .map_err(|error| failed("queue a write", error))?;
            issued += 1;
            submitted = true;
        }
        if stopping && count == 0 && !flushing {
            flushing = true;
            queue
                .flush(usize::MAX)
                .map_err(|error| failed("queue a flush", error))?;
            submitted = true;
        }
        if submitted && queue.avail_notif_needed() {
            kick.notify().map_err(|error| failed("kick", error))?;
        }
        wait(&call, load, began, issued)?;
        let now = Instant::now();
        for completion in queue.completions() {
            heard = now;
            if completion.ret != 0 {
                return Err(failed("write", format!("status {}", completion.ret)));
            }
            if completion.context == usize::MAX {
                flushed = true;
                continue;
            }
            let Some(done) = flying.get_mut(completion.context).and_then(Option::take) else {
                continue;
            };
            if let (Some(expected), Some(busy)) =
                (expected.get_mut(done.block), busy.get_mut(done.block))
            {
                *expected = done.sequence;
                *busy = false;
            }
            trace.0.push(Ended {
                at: now,
                latency: now - done.began,
            });
        }
        let waiting = flying.iter().any(Option::is_some);
        if waiting && heard.elapsed() > HUNG {
            return Err(failed("wait", "no write ended for a minute"));
        }
        if !waiting {
            heard = now;
        }
    }
}

fn due(elapsed: Duration, rate: u64) -> u64 {
    u64::try_from(elapsed.as_nanos() * u128::from(rate) / 1_000_000_000).unwrap_or(u64::MAX)
}

/// Waits for a completion or for the time of the next write.
fn wait(call: &virtio_driver::EventFd, load: Load, began: Instant, issued: u64) -> Result<()> {
    let limit = match load {
        Load::Paced(rate) => {
            let next =
                Duration::from_nanos((issued + 1).saturating_mul(1_000_000_000 / rate.max(1)));
            next.saturating_sub(began.elapsed())
                .clamp(Duration::from_micros(50), Duration::from_millis(20))
        }
        Load::Idle | Load::Max => Duration::from_millis(20),
    };
    // SAFETY: the descriptor lives as long as `call`.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(call.as_raw_fd()) };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec::try_from(limit).ok();
    match poll(&mut fds, timeout.as_ref()) {
        Ok(0) | Err(rustix::io::Errno::INTR) => {}
        Ok(_) => {
            call.read()
                .map_err(|error| failed("read its event", error))?;
        }
        Err(error) => return Err(error).os("poll", "the client's event"),
    }
    Ok(())
}
