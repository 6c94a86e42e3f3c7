//! Our side: a live disk exported over vhost-user-blk, so that the same client can write to it as
//! to the peer. Only what the client needs: one queue, writes, reads and flushes.
//!
//! One worker thread (that of vhost-user-backend) takes requests from the virtqueue and reaps the
//! disk's queue; the disk's event is one more event of its loop.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use strake_block::{Buffer, DiskQueue, LiveDisk, Operation, Request};
use strake_observe::{Observation, OsContext, Result};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::client::DEPTH;
use crate::observations::StepFailed;

type Atomic = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Atomic>;

const QUEUE_SIZE: usize = 256;
const KICK: u16 = 0;
/// The first number that vhost-user-backend leaves to us: after its queue and its exit event.
const DISK: u16 = 2;

struct Export {
    size: u64,
    inner: Mutex<Inner>,
}

struct Inner {
    /// First: dropping it waits for what still uses the client's memory.
    queue: Option<DiskQueue>,
    memory: Option<Atomic>,
    /// Head and status byte of each request in flight, by its tag.
    flying: Vec<Option<(u16, GuestAddress)>>,
    event_idx: bool,
}

/// A running export. It ends when its client has gone.
#[derive(Debug)]
pub(crate) struct Server {
    thread: JoinHandle<()>,
}

impl Server {
    /// Exports `disk` at `socket`.
    pub(crate) fn start(disk: &Arc<LiveDisk>, socket: &Path) -> Result<Self> {
        let failed = |reason: String| -> Observation {
            StepFailed {
                step: "export our disk over vhost-user".to_owned(),
                reason,
            }
            .into()
        };
        let queue = disk.queue(u32::try_from(DEPTH * 2).unwrap_or(64))?;
        let event = queue.event().as_raw_fd();
        let export = Arc::new(Export {
            size: disk.size(),
            inner: Mutex::new(Inner {
                queue: Some(queue),
                memory: None,
                flying: vec![None; QUEUE_SIZE],
                event_idx: false,
            }),
        });
        let memory = Atomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("export".to_owned(), Arc::clone(&export), memory)
            .map_err(|error| failed(error.to_string()))?;
        for handler in daemon.get_epoll_handlers() {
            handler
                .register_listener(event, EventSet::IN, u64::from(DISK))
                .map_err(|error| failed(error.to_string()))?;
        }
        let mut listener =
            Listener::new(socket, true).map_err(|error| failed(error.to_string()))?;
        let thread = std::thread::Builder::new()
            .name("export-control".to_owned())
            .spawn(move || {
                if daemon.start(&mut listener).is_ok() {
                    // Ends with "disconnected", which is how a client leaves.
                    let _ = daemon.wait();
                }
                // The worker thread ends with the daemon; the queue before it.
                lock(&export.inner).queue = None;
            })
            .os("clone", "the export's thread")?;
        Ok(Self { thread })
    }

    /// Waits until it has ended.
    pub(crate) fn join(self) {
        let _ = self.thread.join();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn other(reason: impl std::fmt::Display) -> io::Error {
    io::Error::other(reason.to_string())
}

impl VhostUserBackend for Export {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_BLK_F_FLUSH
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::MQ
    }

    fn set_event_idx(&self, enabled: bool) {
        lock(&self.inner).event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = vec![0u8; 60];
        for (to, from) in config.iter_mut().zip((self.size / 512).to_le_bytes()) {
            *to = from;
        }
        let (offset, size) = (
            usize::try_from(offset).unwrap_or(usize::MAX),
            usize::try_from(size).unwrap_or(0),
        );
        let mut part: Vec<u8> = config.into_iter().skip(offset).take(size).collect();
        part.resize(size, 0);
        part
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn update_memory(&self, memory: Atomic) -> io::Result<()> {
        lock(&self.inner).memory = Some(memory);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let Some(vring) = vrings.first() else {
            return Ok(());
        };
        let mut inner = lock(&self.inner);
        if event == KICK {
            inner.accept(vring)
        } else {
            inner.reap(vring)
        }
    }
}

impl Inner {
    fn accept(&mut self, vring: &Vring) -> io::Result<()> {
        let Some(memory) = self.memory.as_ref().map(GuestAddressSpace::memory) else {
            return Ok(());
        };
        loop {
            if self.event_idx {
                vring.disable_notification().map_err(other)?;
            }
            let chains: Vec<_> = vring
                .get_mut()
                .get_queue_mut()
                .iter(memory.clone())
                .map_err(other)?
                .collect();
            for chain in chains {
                self.start(&memory, chain)?;
            }
            if !self.event_idx || !vring.enable_notification().map_err(other)? {
                break;
            }
        }
        match self.queue.as_mut() {
            Some(queue) => queue.push().map_err(other),
            None => Ok(()),
        }
    }

    fn start(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>,
    ) -> io::Result<()> {
        let head = chain.head_index();
        let parts: Vec<_> = chain.collect();
        let [header, data @ .., status] = parts.as_slice() else {
            return Err(other("a request without header or status"));
        };
        let kind: u32 = memory.read_obj(header.addr()).map_err(other)?;
        let sector: u64 = memory
            .read_obj(GuestAddress(header.addr().0 + 8))
            .map_err(other)?;
        let op = match kind {
            VIRTIO_BLK_T_IN => Operation::Read,
            VIRTIO_BLK_T_OUT => Operation::Write,
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            _ => return Err(other(format!("request of kind {kind}"))),
        };
        let mut buffers = Vec::with_capacity(data.len());
        for part in data {
            let len = usize::try_from(part.len()).map_err(other)?;
            let slice = memory.get_slice(part.addr(), len).map_err(other)?;
            // SAFETY: in the client's memory, which `self.memory` keeps mapped; `self.queue`, which
            // waits for its requests when it is dropped, is dropped before it.
            buffers.push(unsafe { Buffer::new(slice.ptr_guard_mut().as_ptr(), len) });
        }
        let tag = usize::from(head);
        let (Some(place), Some(queue)) = (self.flying.get_mut(tag), self.queue.as_mut()) else {
            return Err(other("a head outside of the queue"));
        };
        *place = Some((head, status.addr()));
        queue.submit(Request {
            tag: tag as u64,
            op,
            offset: sector * 512,
            buffers,
        });
        Ok(())
    }

    fn reap(&mut self, vring: &Vring) -> io::Result<()> {
        let Some(memory) = self.memory.as_ref().map(GuestAddressSpace::memory) else {
            return Ok(());
        };
        let Self { queue, flying, .. } = self;
        let Some(queue) = queue.as_mut() else {
            return Ok(());
        };
        let mut ended = 0;
        queue
            .reap(&mut |tag, result| {
                let place = usize::try_from(tag)
                    .ok()
                    .and_then(|tag| flying.get_mut(tag));
                let Some((head, status)) = place.and_then(Option::take) else {
                    return;
                };
                let _ = memory.write_obj(u8::from(result.is_err()), status);
                let _ = vring.add_used(head, 1);
                ended += 1;
            })
            .map_err(other)?;
        if ended > 0 && (!self.event_idx || vring.needs_notification().map_err(other)?) {
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}
