//! Requests on their way to a server and back, and who waits for them.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strake_block::Event;
use strake_observe::Observation;

use super::coverage::Coverage;
use super::decoder::{Expected, Sink};
use crate::ServerError;
use crate::memory::Scattered;
use crate::protocol::transmission::{Extent, command, error};

/// The error number of a lost connection.
pub(super) const EIO: i32 = 5;

/// Nothing under these locks can panic half way through a change.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a request failed: an error number, and what was seen.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) errno: i32,
    pub(super) seen: Observation,
}

/// Where a queue finds what has ended.
#[derive(Debug)]
pub(super) struct Mailbox {
    event: Arc<Event>,
    ended: Mutex<Vec<(usize, std::result::Result<(), Failure>)>>,
}

impl Mailbox {
    pub(super) fn new(event: &Arc<Event>) -> Arc<Self> {
        Arc::new(Self {
            event: Arc::clone(event),
            ended: Mutex::new(Vec::new()),
        })
    }

    pub(super) fn take(&self) -> Vec<(usize, std::result::Result<(), Failure>)> {
        std::mem::take(&mut *lock(&self.ended))
    }

    pub(super) fn event(&self) -> &Event {
        &self.event
    }
}

/// Who is told the result of an ask.
#[derive(Debug)]
pub(super) enum To {
    /// A queue, with its own name for the request.
    Queue(Arc<Mailbox>, usize),
    /// Whoever waits for extents.
    Extents(SyncSender<std::result::Result<Vec<Extent>, Failure>>),
}

/// A request for the server.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) length: u32,
    /// What a read fills and a write sends; empty for others.
    pub(super) memory: Scattered,
    pub(super) to: To,
}

/// Tells whoever waits.
pub(super) fn deliver(to: To, result: std::result::Result<Option<Vec<Extent>>, Failure>) {
    match to {
        To::Queue(mailbox, token) => {
            lock(&mailbox.ended).push((token, result.map(|_| ())));
            mailbox.event.signal();
        }
        To::Extents(sender) => {
            // Whoever waited has gone if this fails.
            let _ = sender.send(result.map(Option::unwrap_or_default));
        }
    }
}

/// A request that was sent, or is being sent.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) ask: Ask,
    cookie: u64,
    coverage: Coverage,
    extents: Option<Vec<Extent>>,
    failure: Option<Failure>,
}

/// What waits for a reply, by cookie: the slot, and above it a number that tells a reply to this
/// request from one to an earlier one.
#[derive(Debug)]
pub(super) struct Asks {
    path: String,
    allocation: u32,
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
    generation: u32,
}

impl Asks {
    pub(super) fn new(path: &str, allocation: Option<u32>) -> Self {
        Self {
            path: path.to_owned(),
            allocation: allocation.unwrap_or(0),
            slots: Vec::new(),
            free: Vec::new(),
            generation: 0,
        }
    }

    /// All of them, given up.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Ask> {
        self.free.clear();
        self.slots.drain(..).flatten().map(|pending| pending.ask)
    }

    fn slot(cookie: u64) -> usize {
        usize::try_from(cookie & u64::from(u32::MAX)).unwrap_or(usize::MAX)
    }

    pub(super) fn get(&self, cookie: u64) -> Option<&Pending> {
        let pending = self.slots.get(Self::slot(cookie))?.as_ref();
        pending.filter(|pending| pending.cookie == cookie)
    }

    fn get_mut(&mut self, cookie: u64) -> Option<&mut Pending> {
        let pending = self.slots.get_mut(Self::slot(cookie))?.as_mut();
        pending.filter(|pending| pending.cookie == cookie)
    }

    pub(super) fn add(&mut self, ask: Ask) -> u64 {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        self.generation = self.generation.wrapping_add(1);
        let cookie = u64::from(self.generation) << 32 | slot as u64;
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(Pending {
                ask,
                cookie,
                coverage: Coverage::default(),
                extents: None,
                failure: None,
            });
        }
        cookie
    }
}

impl Sink for Asks {
    fn expected(&self, cookie: u64) -> Option<Expected> {
        let ask = &self.get(cookie)?.ask;
        Some(match ask.command {
            command::READ => Expected::Data {
                offset: ask.offset,
                length: ask.length,
            },
            command::BLOCK_STATUS => Expected::Extents {
                context: self.allocation,
            },
            _ => Expected::Result,
        })
    }

    fn coverage(&mut self, cookie: u64) -> Option<&mut Coverage> {
        self.get_mut(cookie).map(|pending| &mut pending.coverage)
    }

    fn data(&mut self, cookie: u64, at: u64, bytes: &[u8]) {
        if let (Some(pending), Ok(at)) = (self.get(cookie), usize::try_from(at)) {
            pending.ask.memory.copy_from(at, bytes);
        }
    }

    fn zeroes(&mut self, cookie: u64, at: u64, length: u32) {
        let range = (usize::try_from(at), usize::try_from(length));
        if let (Some(pending), (Ok(at), Ok(length))) = (self.get(cookie), range) {
            pending.ask.memory.zero(at, length);
        }
    }

    fn extents(&mut self, cookie: u64, extents: Vec<Extent>) {
        if let Some(pending) = self.get_mut(cookie) {
            pending.extents = Some(extents);
        }
    }

    fn failed(&mut self, cookie: u64, error: u32, message: String) {
        let message = match message.is_empty() {
            true => "no reason given".to_owned(),
            false => message,
        };
        let seen = ServerError {
            path: self.path.clone(),
            error,
            name: error::name(error).to_owned(),
            message,
        };
        if let Some(pending) = self.get_mut(cookie) {
            pending.failure.get_or_insert_with(|| Failure {
                errno: errno(error),
                seen: seen.into(),
            });
        }
    }

    fn done(&mut self, cookie: u64) {
        let slot = Self::slot(cookie);
        let place = self.slots.get_mut(slot);
        let Some(ended) = place.and_then(|place| place.take_if(|pending| pending.cookie == cookie))
        else {
            return;
        };
        self.free.push(slot);
        let extents = ended.extents;
        let missing = ended.ask.command == command::BLOCK_STATUS && extents.is_none();
        let result = match ended.failure {
            Some(failure) => Err(failure),
            None if missing => Err(Failure {
                errno: EIO,
                seen: crate::protocol::malformed("reply", "it has no extents"),
            }),
            None => Ok(extents),
        };
        deliver(ended.ask.to, result);
    }
}

/// The host's number for the protocol's. What is not known counts as EINVAL (so the
/// specification).
fn errno(error: u32) -> i32 {
    match error {
        error::EPERM
        | error::EIO
        | error::ENOMEM
        | error::EINVAL
        | error::ENOSPC
        | error::EOVERFLOW
        | error::ENOTSUP
        | error::ESHUTDOWN => i32::try_from(error).unwrap_or(EIO),
        _ => 22,
    }
}
