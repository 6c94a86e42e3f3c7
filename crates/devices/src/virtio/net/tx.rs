//! From the guest to the tap.

use std::io::ErrorKind;
use std::sync::atomic::Ordering;

use strake_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::device::Shared;
use super::tap::NetBackend;
use super::{BATCH, FRAME_LIMIT, HEADER};
use crate::virtio::guest::{IOVEC_LIMIT, IoVecs};
use crate::virtio::{ActiveQueue, Chain, Fault, Progress, VirtQueue};

/// The sending side.
pub(super) struct Tx {
    pub(super) queue: VirtQueue,
    pub(super) kick: EventFd,
    /// Whether the tap had no room for the packet that is next in the ring.
    pub(super) blocked: bool,
    iovecs: IoVecs,
}

/// What became of a packet.
enum Sent {
    Yes,
    Dropped,
    NoRoom,
}

impl Tx {
    pub(super) fn new(active: ActiveQueue) -> Self {
        Self {
            queue: active.queue,
            kick: active.kick,
            blocked: false,
            iovecs: IoVecs::default(),
        }
    }

    /// Moves a batch of packets.
    pub(super) fn step(
        &mut self,
        backend: &dyn NetBackend,
        shared: &Shared,
        memory: &GuestMemory,
    ) -> Result<Progress, Fault> {
        let progress = self.send_batch(backend, shared, memory);
        self.queue.notify()?;
        progress
    }

    fn send_batch(
        &mut self,
        backend: &dyn NetBackend,
        shared: &Shared,
        memory: &GuestMemory,
    ) -> Result<Progress, Fault> {
        self.blocked = false;
        self.queue.disable_kicks()?;
        for _ in 0..BATCH {
            let Some(chain) = self.queue.pop()? else {
                if self.queue.enable_kicks()? {
                    continue;
                }
                return Ok(Progress::Wait);
            };
            let sent = if shared.down.load(Ordering::Acquire) {
                Sent::Dropped
            } else {
                self.send(&chain, backend, memory)?
            };
            match sent {
                Sent::Yes => shared.sent.fetch_add(1, Ordering::Relaxed),
                Sent::Dropped => shared.dropped.fetch_add(1, Ordering::Relaxed),
                Sent::NoRoom => {
                    self.queue.undo(1);
                    self.blocked = true;
                    return Ok(Progress::Wait);
                }
            };
            self.queue.complete(chain.head, 0)?;
        }
        Ok(Progress::More)
    }

    fn send(
        &mut self,
        chain: &Chain,
        backend: &dyn NetBackend,
        memory: &GuestMemory,
    ) -> Result<Sent, Fault> {
        if chain.readable.len() < HEADER as u64 {
            return Err(self.queue.fault("a packet is shorter than its header"));
        }
        let ranges = chain
            .readable
            .host_ranges(memory)
            .map_err(|_| self.queue.fault("a packet is not in guest RAM"))?;
        if chain.readable.len() > FRAME_LIMIT as u64 || ranges.len() > IOVEC_LIMIT {
            return Ok(Sent::Dropped);
        }
        loop {
            let written = self
                .iovecs
                .write(backend.packets(), memory, ranges.iter().copied());
            return Ok(match written {
                Ok(_) => Sent::Yes,
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => continue,
                    ErrorKind::WouldBlock => Sent::NoRoom,
                    // The header makes no sense to the kernel, or the interface is down: a cable
                    // loses such packets too.
                    _ => Sent::Dropped,
                },
            });
        }
    }
}
