//! The connection of an image to its server: one thread, shared by all queues of the image.
//!
//! ```text
//! queue (virtqueue worker, copier) ── Ask ──► outbox ────► pump thread ──► socket
//!        ▲                                                    │
//!        └──────────── mailbox, event ◄───────────────────────┘◄── socket
//! ```
//!
//! The thread owns the channel, the decoder and every request that is on its way, so nothing of
//! that has a lock; the outbox and the mailboxes do, each held for a push or a swap only, never two
//! at once. A queue's memory is touched by this thread only between the push of an ask and the
//! delivery of its result. When the connection is lost, every ask is delivered as failed, and so
//! is each that comes later.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::Event;
use strake_observe::{Observation, OsContext, Result, State as Recorded, recorder};

use super::asks::{Ask, Asks, EIO, Failure, deliver};
use super::decoder::{Decoder, breach};
use super::outbox::{End, Outbox};
use crate::ConnectionLost;
use crate::channel::{Channel, Got};
use crate::memory::Pool;
use crate::protocol::transmission::{RequestHead, command};

/// How much is read from the socket at once.
const READ_BYTES: usize = 256 * 1024;

/// How much of a write's data is handed to the channel at once, and how much waits there.
const WRITE_BYTES: usize = 256 * 1024;

/// How many reads a round makes before it looks at what is to be sent.
const READS_PER_ROUND: usize = 16;

/// How long the last words to a server may take.
const GOODBYE: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Shared {
    path: String,
    wake: Event,
    outbox: Outbox<Ask>,
}

/// The users' side. Dropping the last one ends the connection.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
}

impl Link {
    pub(super) fn start(
        channel: Channel,
        path: &str,
        structured: bool,
        allocation: Option<u32>,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            wake: Event::new()?,
            outbox: Outbox::new(),
        });
        let pump = Pump {
            channel,
            shared: Arc::clone(&shared),
            decoder: Decoder::new(structured),
            asks: Asks::new(path, allocation),
            to_send: VecDeque::new(),
            sending: None,
            pool: Pool::default(),
        };
        std::thread::Builder::new()
            .name("nbd-link".to_owned())
            .spawn(move || pump.run())
            .os("clone", "a connection's thread")?;
        Ok(Self { shared })
    }

    /// Hands over requests. They are all answered, sooner or later.
    pub(super) fn send(&self, asks: &mut Vec<Ask>) {
        match self.shared.outbox.send(asks) {
            None => self.shared.wake.signal(),
            Some(seen) => {
                for ask in asks.drain(..) {
                    let seen = seen.clone();
                    deliver(ask.to, Err(Failure { errno: EIO, seen }));
                }
            }
        }
    }

    /// Ends the connection at once: what is in flight fails.
    pub(super) fn give_up(&self, why: &'static str) {
        self.shared.outbox.end(End::GivenUp(why));
        self.shared.wake.signal();
    }
}

impl Drop for Link {
    /// The thread takes leave of the server by itself. It is not waited for: the last user may be a
    /// guest's worker that has just gone over to another image, and no request is left.
    fn drop(&mut self) {
        self.shared.outbox.end(End::Closed);
        self.shared.wake.signal();
    }
}

/// The data of a write that is on its way to the channel.
#[derive(Debug)]
struct Sending {
    cookie: u64,
    at: usize,
    left: usize,
}

/// The thread.
struct Pump {
    channel: Channel,
    shared: Arc<Shared>,
    decoder: Decoder,
    asks: Asks,
    to_send: VecDeque<Ask>,
    sending: Option<Sending>,
    pool: Pool,
}

impl Pump {
    fn run(mut self) {
        let mut scratch = vec![0u8; READ_BYTES];
        if let Err(seen) = self.pump(&mut scratch) {
            recorder().record(seen.clone(), Recorded::Open);
            self.lose(&seen);
        }
    }

    fn lost(&self, why: &str) -> Observation {
        ConnectionLost {
            path: self.shared.path.clone(),
            why: why.to_owned(),
        }
        .into()
    }

    /// Until the image and its queues have gone, or the connection is lost.
    fn pump(&mut self, scratch: &mut [u8]) -> Result<()> {
        loop {
            // Cleared before the look, so that what comes after it wakes again.
            self.shared.wake.clear();
            match self.shared.outbox.take(&mut self.to_send) {
                None => {}
                Some(End::GivenUp(why)) => return Err(self.lost(why)),
                Some(End::Closed) => {
                    self.say_goodbye();
                    return Ok(());
                }
            }
            self.fill();
            let sent = self.channel.flush(&mut self.pool);
            sent.map_err(|seen| self.lost("it does not take requests").because(seen))?;
            self.receive(scratch)?;
            if self.may_fill() || self.channel.has_input() {
                // More can be done; but look at what came meanwhile first.
                continue;
            }
            let wake = [self.shared.wake.as_fd()];
            self.channel.wait(true, wake, None)?;
        }
    }

    fn may_fill(&self) -> bool {
        let more = self.sending.is_some() || !self.to_send.is_empty();
        more && self.channel.queued() < WRITE_BYTES
    }

    /// Hands requests to the channel, as long as not much waits there.
    fn fill(&mut self) {
        while self.may_fill() {
            if let Some(sending) = &mut self.sending {
                let count = sending.left.min(WRITE_BYTES);
                let mut pages = self.pool.take(count);
                if let Some(pending) = self.asks.get(sending.cookie) {
                    pending.ask.memory.copy_to(sending.at, pages.bytes_mut());
                }
                self.channel.push_pages(Arc::new(pages), 0..count);
                sending.at += count;
                sending.left -= count;
                if sending.left == 0 {
                    self.sending = None;
                }
                continue;
            }
            let Some(ask) = self.to_send.pop_front() else {
                return;
            };
            let mut head = RequestHead {
                flags: ask.flags,
                command: ask.command,
                cookie: 0,
                offset: ask.offset,
                length: ask.length,
            };
            let left = match ask.command {
                command::WRITE => usize::try_from(ask.length).unwrap_or(0),
                _ => 0,
            };
            head.cookie = self.asks.add(ask);
            self.channel.push(head.encode().to_vec());
            self.sending = (left > 0).then_some(Sending {
                cookie: head.cookie,
                at: 0,
                left,
            });
        }
    }

    fn receive(&mut self, scratch: &mut [u8]) -> Result<()> {
        for _ in 0..READS_PER_ROUND {
            let got = self.channel.read(scratch);
            match got.map_err(|seen| self.lost("it cannot be read").because(seen))? {
                Got::Some(count) => {
                    let bytes = scratch.get(..count).unwrap_or(&[]);
                    breach(self.decoder.feed(bytes, &mut self.asks))
                        .map_err(|seen| self.lost("the server misbehaves").because(seen))?;
                    if self.sent_half() {
                        return Err(self.lost("the server answered what was not yet sent"));
                    }
                }
                Got::Nothing => return Ok(()),
                Got::End => return Err(self.lost("the server ended it")),
            }
        }
        Ok(())
    }

    /// Whether the write that is being sent was answered: its memory is the queue's again, so the
    /// rest of it cannot be sent any more. (A server may refuse a write early, but it must take
    /// the data all the same; none does both.)
    fn sent_half(&self) -> bool {
        let sending = self.sending.as_ref();
        sending.is_some_and(|sending| self.asks.get(sending.cookie).is_none())
    }

    fn say_goodbye(&mut self) {
        let head = RequestHead {
            flags: 0,
            command: command::DISC,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        self.channel.push(head.encode().to_vec());
        let until = Instant::now() + GOODBYE;
        while self.channel.flush(&mut self.pool).is_ok() && self.channel.wants_write() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.channel.wait(false, [], Some(left)).is_err() {
                break;
            }
        }
        self.channel.say_goodbye();
    }

    /// The connection is lost: everybody who waits is told, and whoever comes later.
    fn lose(&mut self, seen: &Observation) {
        let untaken = self.shared.outbox.lose(seen.clone());
        self.to_send.extend(untaken);
        for ask in self.asks.drain().chain(self.to_send.drain(..)) {
            let seen = seen.clone();
            deliver(ask.to, Err(Failure { errno: EIO, seen }));
        }
    }
}

impl Drop for Pump {
    /// Nobody waits for ever, whatever ended the thread.
    fn drop(&mut self) {
        let seen = self.lost("its thread has ended");
        self.lose(&seen);
    }
}
