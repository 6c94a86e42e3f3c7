//! One client's session: one thread, which never waits for anything but its poll.
//!
//! A round takes in requests as far as there is memory for them, starts them, hands the replies of
//! those that have ended to the channel, and sends what the socket takes. A client that does not
//! read its replies holds up nobody but itself: requests in flight are reaped all the same, so the
//! export's image can be switched over under it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::{Event, SECTOR_BYTES};
use strake_observe::Result;

use super::flights::{Durability, Flight, Flights, Work};
use super::negotiation::{Agreed, MAX_OPTION_BYTES, Negotiation, Next, Offer, Tls};
use super::replies::{Replies, error_of, reads_as_zeroes, status};
use super::request::{Action, Limits, check, payload_of};
use crate::channel::{Channel, Deadline, Got};
use crate::export::{Access, Export};
use crate::memory::{Pages, Pool};
use crate::protocol::handshake::{OptionHead, greeting, parse_client_flags};
use crate::protocol::transmission::{RequestHead, error};
use crate::protocol::{MAX_PAYLOAD, malformed};
use crate::tls::TlsServer;

/// How long a client may take to negotiate.
const NEGOTIATION: Duration = Duration::from_secs(20);

/// The most requests of a session at once.
const MAX_REQUESTS: usize = 256;

/// The most requests of a session at the device at once.
const DEPTH: u32 = 128;

/// The most memory for the data of a session's requests: one of the largest being received, one
/// being worked on, and one being sent.
const MAX_MEMORY: usize = 3 * MAX_PAYLOAD as usize;

/// How long a server that is stopped waits for its clients to take the last replies.
const LAST_REPLIES: Duration = Duration::from_secs(3);

/// How long it looks away meanwhile.
const REST: Duration = Duration::from_millis(20);

/// How many times a round reads from the socket before it looks at what has ended.
const READS_PER_ROUND: usize = 64;

/// Negotiates with a client.
pub(super) struct Welcome<'a> {
    pub(super) offers: &'a [Offer],
    pub(super) tls: Option<&'a TlsServer>,
    pub(super) stop: &'a Event,
}

impl Welcome<'_> {
    /// What was agreed on; none if the client or the server ended it.
    pub(super) fn negotiate(&self, channel: &mut Channel) -> Result<Option<Agreed>> {
        let until = Deadline::new(NEGOTIATION, Some(self.stop));
        channel.push(greeting());
        let mut flags = [0u8; 4];
        if !channel.exchange(&mut flags, &until)? {
            return Ok(None);
        }
        let no_zeroes = parse_client_flags(flags)?;
        let tls = match self.tls {
            Some(_) => Tls::Required,
            None => Tls::None,
        };
        let mut negotiation = Negotiation::new(self.offers, tls, no_zeroes);
        loop {
            let mut head = [0u8; OptionHead::BYTES];
            if !channel.exchange(&mut head, &until)? {
                return Ok(None);
            }
            let head = OptionHead::parse(&head)?;
            let mut out = Vec::new();
            let next = if head.length > MAX_OPTION_BYTES {
                if head.length > MAX_PAYLOAD || !skip(channel, head.length, &until)? {
                    return Ok(None);
                }
                negotiation.too_long(head.option, &mut out)
            } else {
                let mut data = vec![0u8; usize::try_from(head.length).unwrap_or(0)];
                if !channel.exchange(&mut data, &until)? {
                    return Ok(None);
                }
                negotiation.answer(head.option, &data, &mut out)
            };
            channel.push(out);
            if !channel.exchange(&mut [], &until)? {
                return Ok(None);
            }
            match (next, self.tls) {
                (Next::Option, _) => {}
                (Next::Transmission(agreed), _) => return Ok(Some(agreed)),
                (Next::Tls, Some(tls)) => {
                    if !channel.start_tls(tls.session()?, &until)? {
                        return Ok(None);
                    }
                }
                (Next::End | Next::Tls, _) => {
                    channel.say_goodbye();
                    return Ok(None);
                }
            }
        }
    }
}

fn skip(channel: &mut Channel, length: u32, until: &Deadline<'_>) -> Result<bool> {
    let mut left = usize::try_from(length).unwrap_or(usize::MAX);
    let mut scratch = [0u8; 4096];
    while left > 0 {
        let count = left.min(scratch.len());
        if !channel.exchange(scratch.get_mut(..count).unwrap_or(&mut []), until)? {
            return Ok(false);
        }
        left -= count;
    }
    Ok(true)
}

/// What is being received.
#[derive(Debug)]
enum Input {
    /// A request's head, so many bytes of it are here.
    Head([u8; RequestHead::BYTES], usize),
    /// A request that waits for memory.
    Held(RequestHead, Action),
    /// The payload of a write, so many bytes of it are here.
    Payload(RequestHead, Durability, Pages, usize),
    /// The payload of a write that is refused, so many bytes of it are to come.
    Refused(RequestHead, usize, u32, &'static str),
    /// Nothing more.
    End,
}

impl Input {
    const START: Self = Self::Head([0; RequestHead::BYTES], 0);
}

/// The transmission phase.
#[derive(Debug)]
pub(super) struct Session {
    channel: Channel,
    export: Arc<dyn Export>,
    flights: Flights,
    replies: Replies,
    limits: Limits,
    input: Input,
    pool: Pool,
    /// Bytes of pages that are in flight, being received, or on their way out.
    used: usize,
}

impl Session {
    pub(super) fn new(channel: Channel, export: Arc<dyn Export>, agreed: Agreed) -> Result<Self> {
        let queue = export.open_queue(DEPTH)?;
        let limits = Limits {
            size: export.size(),
            writable: export.access() == Access::ReadWrite,
            structured: agreed.structured,
            allocation: agreed.allocation,
        };
        Ok(Self {
            channel,
            export,
            flights: Flights::new(queue),
            replies: match agreed.structured {
                true => Replies::Structured,
                false => Replies::Simple,
            },
            limits,
            input: Input::START,
            pool: Pool::default(),
            used: 0,
        })
    }

    /// Serves until the client or the server ends it; what the client asked for before has ended
    /// and, if it listens, was answered.
    pub(super) fn serve(mut self, stop: &Event) -> Result<()> {
        let mut leave_by: Option<Instant> = None;
        loop {
            self.take_in()?;
            self.flights.push()?;
            let flushed = self.channel.flush(&mut self.pool);
            let ended = matches!(self.input, Input::End);
            match flushed {
                Ok(freed) => self.used -= freed.min(self.used),
                // It has gone without waiting for its answers.
                Err(_) if ended => return Ok(()),
                Err(seen) => return Err(seen),
            }
            if ended && self.flights.count() == 0 && !self.channel.wants_write() {
                self.channel.say_goodbye();
                return Ok(());
            }
            let ready = self.wants_input();
            if ready && self.channel.has_input() {
                // Others have a turn all the same.
                self.reap()?;
                continue;
            }
            let stop = if ended {
                self.flights.event()
            } else {
                stop.as_fd()
            };
            let events = [self.flights.event(), stop];
            let left = leave_by.map(|by| by.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) && self.flights.count() == 0 {
                return Ok(());
            }
            // What is in flight is waited for, however long it takes, but not without rest.
            let left = left.map(|left| left.max(REST));
            let [reapable, stopped] = self.channel.wait(ready, events, left)?;
            if reapable {
                self.reap()?;
            }
            if stopped && !ended {
                self.input = Input::End;
                leave_by = Some(Instant::now() + LAST_REPLIES);
            }
        }
    }

    fn has_room(&self, needed: usize) -> bool {
        let memory = self.used == 0 || self.used + needed <= MAX_MEMORY;
        memory && self.flights.count() < MAX_REQUESTS && self.channel.queued() <= MAX_MEMORY
    }

    /// Whether what the client sends next can be taken.
    fn wants_input(&self) -> bool {
        match &self.input {
            Input::Head(..) => self.has_room(0),
            Input::Held(head, _) => self.has_room(memory_for(head)),
            Input::Payload(..) | Input::Refused(..) => true,
            Input::End => false,
        }
    }

    /// Receives requests and starts them.
    fn take_in(&mut self) -> Result<()> {
        let mut scratch = [0u8; 4096];
        for _ in 0..READS_PER_ROUND {
            if !self.wants_input() {
                return Ok(());
            }
            let room = match &mut self.input {
                Input::Head(head, have) => head.get_mut(*have..),
                Input::Payload(_, _, pages, have) => pages.bytes_mut().get_mut(*have..),
                Input::Refused(_, left, ..) => scratch.get_mut(..(*left).min(4096)),
                Input::Held(..) | Input::End => None,
            };
            let mut got = 0;
            if let Some(room) = room.filter(|room| !room.is_empty()) {
                match self.channel.read(room)? {
                    Got::Some(count) => got = count,
                    Got::Nothing => return Ok(()),
                    Got::End => {
                        let between = matches!(self.input, Input::Head(_, 0));
                        self.input = Input::End;
                        return match between {
                            true => Ok(()),
                            false => Err(malformed("request", "it ends in its middle")),
                        };
                    }
                }
            }
            self.received(got)?;
        }
        Ok(())
    }

    /// Goes on after `got` more bytes were received.
    fn received(&mut self, got: usize) -> Result<()> {
        match std::mem::replace(&mut self.input, Input::START) {
            Input::Head(head, have) if have + got < RequestHead::BYTES => {
                self.input = Input::Head(head, have + got);
            }
            Input::Head(head, _) => {
                let head = RequestHead::parse(&head)?;
                let action = check(&head, &self.limits);
                match self.has_room(memory_for(&head)) {
                    true => self.begin(head, action)?,
                    false => self.input = Input::Held(head, action),
                }
            }
            Input::Held(head, action) => self.begin(head, action)?,
            Input::Payload(head, durability, pages, have) if have + got < pages.len() => {
                self.input = Input::Payload(head, durability, pages, have + got);
            }
            Input::Payload(head, durability, pages, _) => {
                self.start(&head, Work::Write, durability, pages);
            }
            Input::Refused(head, left, error, words) if got < left => {
                self.input = Input::Refused(head, left - got, error, words);
            }
            Input::Refused(head, _, error, words) => {
                let channel = &mut self.channel;
                self.replies.failed(channel, head.cookie, error, words);
            }
            Input::End => self.input = Input::End,
        }
        Ok(())
    }

    /// A request's head is here and there is memory for it.
    fn begin(&mut self, head: RequestHead, action: Action) -> Result<()> {
        let durability = |fua| match fua {
            true => Durability::Durable,
            false => Durability::Accepted,
        };
        match action {
            Action::HangUp => {
                let why = format!("a payload of {} bytes", head.length);
                return Err(malformed("request", why));
            }
            Action::Disconnect => self.input = Input::End,
            Action::Refuse(error, words) => match payload_of(&head) {
                0 => {
                    let channel = &mut self.channel;
                    self.replies.failed(channel, head.cookie, error, words);
                }
                payload => {
                    let left = usize::try_from(payload).unwrap_or(usize::MAX);
                    self.input = Input::Refused(head, left, error, words);
                }
            },
            Action::Nothing => match head.command {
                crate::protocol::transmission::command::READ => {
                    self.replies.nothing_read(&mut self.channel, head.cookie);
                }
                _ => self.replies.done(&mut self.channel, head.cookie),
            },
            Action::Status { one } => {
                let export = &*self.export;
                match status(export, head.offset, head.length, one) {
                    Ok(payload) => {
                        let done = crate::protocol::transmission::chunk::DONE;
                        self.channel.push(payload.encode(head.cookie, done));
                    }
                    Err(seen) => self.failed(head.cookie, &seen),
                }
            }
            Action::Read { whole } => {
                let start = head.offset - head.offset % SECTOR_BYTES;
                let skip = usize::try_from(head.offset - start).unwrap_or(0);
                let pages = self.pages(memory_for(&head));
                let work = Work::Read { skip, whole };
                self.start(&head, work, Durability::Accepted, pages);
            }
            Action::Write { fua } => {
                let pages = self.pages(memory_for(&head));
                self.input = Input::Payload(head, durability(fua), pages, 0);
            }
            Action::Flush => {
                self.start(&head, Work::Flush, Durability::Accepted, Pages::default());
            }
            Action::Trim { fua } => {
                self.start(&head, Work::Trim, durability(fua), Pages::default());
            }
            Action::WriteZeroes {
                fua,
                hole,
                fast: true,
            } => {
                // Fast for certain is only what needs nothing to be done.
                let known = hole && reads_as_zeroes(&*self.export, head.offset, head.length);
                match (known, fua) {
                    (true, true) => {
                        self.start(&head, Work::Flush, Durability::Accepted, Pages::default());
                    }
                    (true, false) => self.replies.done(&mut self.channel, head.cookie),
                    (false, _) => {
                        let words = "zeroing may be as slow as writing";
                        let channel = &mut self.channel;
                        self.replies
                            .failed(channel, head.cookie, error::ENOTSUP, words);
                    }
                }
            }
            Action::WriteZeroes { fua, hole, .. } => {
                let work = Work::WriteZeroes { unmap: hole };
                self.start(&head, work, durability(fua), Pages::default());
            }
        }
        Ok(())
    }

    fn pages(&mut self, len: usize) -> Pages {
        self.used += len;
        self.pool.take(len)
    }

    fn start(&mut self, head: &RequestHead, work: Work, durability: Durability, pages: Pages) {
        self.flights.start(Flight {
            cookie: head.cookie,
            work,
            durability,
            offset: match work {
                Work::Flush => 0,
                _ => head.offset - head.offset % SECTOR_BYTES,
            },
            length: head.length,
            pages,
        });
    }

    fn failed(&mut self, cookie: u64, seen: &strake_observe::Observation) {
        let channel = &mut self.channel;
        let words = seen.to_string();
        self.replies.failed(channel, cookie, error_of(seen), &words);
    }

    /// Answers what has ended.
    fn reap(&mut self) -> Result<()> {
        let mut ended = Vec::new();
        let reaped = self
            .flights
            .reap(&mut |flight, result| ended.push((flight, result)));
        for (flight, result) in ended {
            let cookie = flight.cookie;
            match (result, flight.work) {
                (Ok(()), Work::Read { skip, whole }) => {
                    let offset = flight.offset + skip as u64;
                    let length = usize::try_from(flight.length).unwrap_or(0);
                    let range = skip..skip + length;
                    let channel = &mut self.channel;
                    let unsent =
                        self.replies
                            .data(channel, cookie, offset, flight.pages, range, whole);
                    if let Some(pages) = unsent {
                        self.give(pages);
                    }
                    continue;
                }
                (Ok(()), _) => self.replies.done(&mut self.channel, cookie),
                (Err(seen), _) => self.failed(cookie, &seen),
            }
            self.give(flight.pages);
        }
        reaped
    }

    fn give(&mut self, pages: Pages) {
        self.used -= pages.len().min(self.used);
        self.pool.give(pages);
    }
}

/// How much memory the data of a request takes: for a read, whole sectors around it.
fn memory_for(head: &RequestHead) -> usize {
    use crate::protocol::transmission::command;
    let bytes = match head.command {
        command::READ if head.length <= MAX_PAYLOAD => {
            let end = head.offset.saturating_add(u64::from(head.length));
            let start = head.offset - head.offset % SECTOR_BYTES;
            end.saturating_add(SECTOR_BYTES - 1) / SECTOR_BYTES * SECTOR_BYTES - start
        }
        command::WRITE => u64::from(head.length),
        _ => 0,
    };
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
