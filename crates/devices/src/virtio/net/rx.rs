//! From the tap to the guest.
//!
//! Receive buffers are taken out of the ring ahead of the packets and kept in a *pool*, because
//! how long a packet is turns out only when it has been read. With mergeable buffers the pool is
//! kept as long as the longest packet, without them it is one buffer. What a packet leaves of the
//! pool serves the next one; what is left at a stop goes back into the ring.
//!
//! A driver may offer less than the longest packet takes. So that nothing is cut off, each read
//! ends in an overflow of our own; a packet that reached it waits until the driver has offered
//! enough, or is dropped if the driver cannot ever.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use strake_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::device::Shared;
use super::tap::NetBackend;
use super::{BATCH, FRAME_LIMIT, HEADER, NUM_BUFFERS};
use crate::virtio::guest::IoVecs;
use crate::virtio::{ActiveQueue, Buffers, Fault, HostRange, Progress, VirtQueue};

/// Pieces of memory in the pool.
const POOL_PIECES: usize = 512;

/// The receiving side.
pub(super) struct Rx {
    pub(super) queue: VirtQueue,
    pub(super) kick: EventFd,
    mergeable: bool,
    pool: VecDeque<Buffer>,
    pool_len: u64,
    pool_pieces: usize,
    waiting: Option<Waiting>,
    overflow: Vec<u8>,
    iovecs: IoVecs,
    completed: Vec<(u16, u32)>,
}

struct Buffer {
    head: u16,
    guest: Buffers,
    ranges: Vec<HostRange>,
}

/// A packet that was read and does not fit yet.
#[derive(Clone, Copy)]
struct Waiting {
    len: u64,
    /// How much of it is in the pool already.
    direct: u64,
}

impl Rx {
    pub(super) fn new(active: ActiveQueue, mergeable: bool) -> Self {
        Self {
            queue: active.queue,
            kick: active.kick,
            mergeable,
            pool: VecDeque::new(),
            pool_len: 0,
            pool_pieces: 0,
            waiting: None,
            overflow: vec![0; FRAME_LIMIT],
            iovecs: IoVecs::default(),
            completed: Vec::new(),
        }
    }

    /// Moves a batch of packets.
    pub(super) fn step(
        &mut self,
        backend: &dyn NetBackend,
        shared: &Shared,
        memory: &Arc<GuestMemory>,
    ) -> Result<Progress, Fault> {
        let progress = self.receive(backend, shared, memory);
        self.queue.notify()?;
        progress
    }

    fn receive(
        &mut self,
        backend: &dyn NetBackend,
        shared: &Shared,
        memory: &Arc<GuestMemory>,
    ) -> Result<Progress, Fault> {
        for _ in 0..BATCH {
            let packet = match self.waiting.take() {
                Some(packet) => packet,
                None => {
                    self.fill(memory, FRAME_LIMIT as u64)?;
                    if self.pool.is_empty() {
                        return Ok(Progress::Wait);
                    }
                    match self.read(backend, memory) {
                        Some(packet) => packet,
                        None => return Ok(Progress::Wait),
                    }
                }
            };
            if shared.down.load(Ordering::Acquire) || packet.len < HEADER as u64 {
                shared.dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if packet.len > self.pool_len {
                self.fill(memory, packet.len)?;
                if packet.len > self.pool_len {
                    if self.mergeable && self.pool_pieces < POOL_PIECES {
                        // The driver's next kick brings more.
                        self.waiting = Some(packet);
                        return Ok(Progress::Wait);
                    }
                    shared.dropped.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
            }
            self.deliver(packet, memory)?;
            shared.received.fetch_add(1, Ordering::Relaxed);
        }
        Ok(Progress::More)
    }

    /// Takes buffers from the ring until the pool holds `len` bytes, or one buffer without
    /// merging. Kicks are wanted when the ring ran dry before.
    fn fill(&mut self, memory: &GuestMemory, len: u64) -> Result<(), Fault> {
        let enough = |rx: &Self| {
            rx.pool_len >= len
                || rx.pool_pieces >= POOL_PIECES
                || (!rx.mergeable && !rx.pool.is_empty())
        };
        if enough(self) {
            return Ok(());
        }
        self.queue.disable_kicks()?;
        while !enough(self) {
            let Some(chain) = self.queue.pop()? else {
                if self.queue.enable_kicks()? {
                    continue;
                }
                break;
            };
            if !chain.readable.is_empty() || chain.writable.len() < HEADER as u64 {
                return Err(self
                    .queue
                    .fault("a receive buffer has no room for a header"));
            }
            let ranges = chain
                .writable
                .host_ranges(memory)
                .map_err(|_| self.queue.fault("a receive buffer is not in guest RAM"))?;
            if ranges.len() > POOL_PIECES {
                return Err(self.queue.fault("a receive buffer has too many pieces"));
            }
            self.pool_len = self.pool_len.saturating_add(chain.writable.len());
            self.pool_pieces += ranges.len();
            self.pool.push_back(Buffer {
                head: chain.head,
                guest: chain.writable,
                ranges,
            });
        }
        Ok(())
    }

    /// Reads one packet into the pool and, beyond it, into the overflow.
    fn read(&mut self, backend: &dyn NetBackend, memory: &GuestMemory) -> Option<Waiting> {
        loop {
            let ranges = self
                .pool
                .iter()
                .flat_map(|buffer| buffer.ranges.iter().copied());
            let read = self
                .iovecs
                .read(backend.packets(), memory, ranges, &mut self.overflow);
            match read {
                Ok(0) => return None,
                Ok(len) => {
                    let len = len as u64;
                    return Some(Waiting {
                        len,
                        direct: len.min(self.pool_len),
                    });
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nothing there; or the tap is gone, and then nothing ever comes again.
                Err(_) => return None,
            }
        }
    }

    /// Hands a packet over that fits into the pool.
    fn deliver(&mut self, packet: Waiting, memory: &GuestMemory) -> Result<(), Fault> {
        let late = packet.len - packet.direct;
        let late = usize::try_from(late).unwrap_or(usize::MAX);
        self.completed.clear();
        let mut passed: u64 = 0;
        let mut rest = self.overflow.get(..late).unwrap_or_default();
        let mut used = 0;
        for buffer in &self.pool {
            if passed >= packet.len {
                break;
            }
            let here = buffer.guest.len().min(packet.len - passed);
            // What of the overflow belongs into this buffer.
            let from = packet.direct.max(passed);
            let count = (passed + here).saturating_sub(from);
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            if count > 0 {
                let (now, later) = rest
                    .split_at_checked(count)
                    .ok_or_else(|| self.queue.fault("a packet is longer than what was read"))?;
                buffer
                    .guest
                    .write(memory, from - passed, now)
                    .map_err(|_| self.queue.fault("a receive buffer is not in guest RAM"))?;
                rest = later;
            }
            self.completed
                .push((buffer.head, u32::try_from(here).unwrap_or(u32::MAX)));
            passed += here;
            used += 1;
        }
        let count = u16::try_from(used).unwrap_or(u16::MAX);
        if let Some(first) = self.pool.front() {
            first
                .guest
                .write(memory, NUM_BUFFERS, &count.to_le_bytes())
                .map_err(|_| self.queue.fault("a receive buffer is not in guest RAM"))?;
        }
        for buffer in self.pool.drain(..used) {
            self.pool_len -= buffer.guest.len().min(self.pool_len);
            self.pool_pieces -= buffer.ranges.len().min(self.pool_pieces);
        }
        self.queue.complete_together(&self.completed)
    }

    /// Gives the pool back to the ring. A packet that waits is dropped.
    pub(super) fn stop(&mut self) {
        self.waiting = None;
        let count = u16::try_from(self.pool.len()).unwrap_or(0);
        self.queue.undo(count);
        self.pool.clear();
        self.pool_len = 0;
        self.pool_pieces = 0;
    }
}
