//! A connection that never blocks: a socket, with TLS on it or not.
//!
//! One thread owns a channel and polls its socket. What goes out waits in here, piece by piece,
//! until the socket takes it; nothing is copied on the way unless TLS encrypts it. What comes in
//! goes straight into the reader's memory if that is large, else through a small buffer, so that
//! many small messages cost one system call.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use strake_block::Event;
use strake_observe::{OsContext, Result};

use crate::memory::{Pages, Pool};
use crate::socket::Socket;
use crate::{HandshakeTimeout, TlsFailed};

/// The buffer for small messages.
const INPUT_BYTES: usize = 64 * 1024;

/// Reads at least this long go past that buffer.
const DIRECT_BYTES: usize = 16 * 1024;

/// How much plain text TLS may hold back until the socket takes it.
const TLS_BYTES: usize = 256 * 1024;

/// The most pieces in one system call.
const MAX_PIECES: usize = 64;

/// Something on its way out.
#[derive(Debug)]
enum Piece {
    Bytes(Vec<u8>),
    /// A range of pages that other pieces may share.
    Pages(Arc<Pages>, Range<usize>),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Pages(pages, range) => pages.bytes().get(range.clone()).unwrap_or(&[]),
        }
    }
}

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Got {
    /// That many bytes, at least one.
    Some(usize),
    /// Nothing yet.
    Nothing,
    /// The other side ended the connection.
    End,
}

/// See the module.
pub(crate) struct Channel {
    socket: Socket,
    tls: Option<Box<rustls::Connection>>,
    input: Vec<u8>,
    /// What of `input` was not taken yet.
    unread: Range<usize>,
    output: VecDeque<Piece>,
    /// How much of the first piece has gone.
    sent: usize,
    /// Bytes in `output` that have not gone.
    queued: usize,
    /// Whether a read of the socket may give something: not once a read came back with less than
    /// there was room for, until a poll says otherwise. It spares a system call per message.
    ready: bool,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("socket", &self.socket)
            .field("tls", &self.tls.is_some())
            .field("queued", &self.queued)
            .finish_non_exhaustive()
    }
}

impl Channel {
    pub(crate) fn new(socket: Socket) -> Result<Self> {
        socket.prepare()?;
        Ok(Self {
            socket,
            tls: None,
            input: vec![0; INPUT_BYTES],
            unread: 0..0,
            output: VecDeque::new(),
            sent: 0,
            queued: 0,
            ready: true,
        })
    }

    /// Bytes that wait to go out.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    pub(crate) fn wants_write(&self) -> bool {
        self.queued > 0 || self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Whether a read may give something without a wait.
    pub(crate) fn has_input(&self) -> bool {
        !self.unread.is_empty() || self.ready
    }

    pub(crate) fn push(&mut self, bytes: Vec<u8>) {
        self.queued += bytes.len();
        self.output.push_back(Piece::Bytes(bytes));
    }

    pub(crate) fn push_pages(&mut self, pages: Arc<Pages>, range: Range<usize>) {
        let piece = Piece::Pages(pages, range);
        self.queued += piece.bytes().len();
        self.output.push_back(piece);
    }

    /// Sends what the socket takes; sent pages go to the pool. Gives the number of their bytes.
    pub(crate) fn flush(&mut self, pool: &mut Pool) -> Result<usize> {
        let mut freed = 0;
        loop {
            let (taken, full) = match self.tls {
                Some(_) => self.encrypt()?,
                None => self.send()?,
            };
            freed += self.gone(taken, pool);
            if full || !self.wants_write() {
                return Ok(freed);
            }
        }
    }

    /// Lets go of `taken` bytes of output.
    fn gone(&mut self, taken: usize, pool: &mut Pool) -> usize {
        let mut freed = 0;
        self.queued -= taken;
        self.sent += taken;
        while let Some(first) = self.output.front() {
            let len = first.bytes().len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            let Some(Piece::Pages(pages, _)) = self.output.pop_front() else {
                continue;
            };
            if let Ok(pages) = Arc::try_unwrap(pages) {
                freed += pages.len();
                pool.give(pages);
            }
        }
        freed
    }

    /// One system call: how many bytes went, and whether the socket takes no more now.
    fn send(&mut self) -> Result<(usize, bool)> {
        let mut skip = self.sent;
        let pieces: Vec<IoSlice<'_>> = self
            .output
            .iter()
            .take(MAX_PIECES)
            .map(|piece| {
                let bytes = piece.bytes().get(skip..).unwrap_or(&[]);
                skip = 0;
                IoSlice::new(bytes)
            })
            .collect();
        if self.queued == 0 {
            return Ok((0, false));
        }
        match (&self.socket).write_vectored(&pieces) {
            Ok(taken) => Ok((taken, false)),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => Ok((0, true)),
                ErrorKind::Interrupted => Ok((0, false)),
                _ => Err(error).os("sendmsg", "the connection"),
            },
        }
    }

    /// The same through TLS.
    fn encrypt(&mut self) -> Result<(usize, bool)> {
        let Some(tls) = self.tls.as_mut() else {
            return Ok((0, true));
        };
        let mut taken = 0;
        let mut skip = self.sent;
        for piece in &self.output {
            let bytes = piece.bytes().get(skip..).unwrap_or(&[]);
            skip = 0;
            let count = tls.writer().write(bytes).os("encrypt", "the connection")?;
            taken += count;
            if count < bytes.len() {
                break;
            }
        }
        let full = send_tls(tls, &self.socket)?;
        Ok((taken, full))
    }

    /// Reads what there is, as much as fits.
    pub(crate) fn read(&mut self, to: &mut [u8]) -> Result<Got> {
        if self.unread.is_empty() {
            if to.len() >= DIRECT_BYTES {
                return self.read_stream(to);
            }
            let mut input = std::mem::take(&mut self.input);
            let got = self.read_stream(&mut input);
            self.input = input;
            match got? {
                Got::Some(count) => self.unread = 0..count,
                other => return Ok(other),
            }
        }
        let from = self.input.get(self.unread.clone()).unwrap_or(&[]);
        let count = from.len().min(to.len());
        for (to, from) in to.iter_mut().zip(from) {
            *to = *from;
        }
        self.unread.start += count;
        Ok(Got::Some(count))
    }

    fn read_stream(&mut self, to: &mut [u8]) -> Result<Got> {
        if to.is_empty() || !self.ready {
            return Ok(Got::Nothing);
        }
        loop {
            let read = match self.tls.as_mut() {
                None => (&self.socket).read(to),
                Some(tls) => match tls.reader().read(to) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        match receive_tls(tls, &self.socket)? {
                            Got::Nothing => Err(error),
                            // The end is told by the next read of plain text.
                            Got::Some(_) | Got::End => continue,
                        }
                    }
                    // Ended without saying so.
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(0),
                    other => other,
                },
            };
            return match read {
                Ok(0) => Ok(Got::End),
                Ok(count) => {
                    // TLS may hold more than it gave, which no poll of the socket tells.
                    self.ready = self.tls.is_some() || count == to.len();
                    Ok(Got::Some(count))
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.ready = false;
                    Ok(Got::Nothing)
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(Got::End),
                Err(error) => Err(error).os("recv", "the connection"),
            };
        }
    }

    /// Waits for the socket, for any of `others` to be readable, or for `limit`. Says which of
    /// the others are.
    pub(crate) fn wait<const N: usize>(
        &mut self,
        for_input: bool,
        others: [BorrowedFd<'_>; N],
        limit: Option<Duration>,
    ) -> Result<[bool; N]> {
        let mut flags = PollFlags::empty();
        if for_input {
            flags |= PollFlags::IN;
        }
        if self.wants_write() {
            flags |= PollFlags::OUT;
        }
        let mut fds: Vec<PollFd<'_>> = others
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        // A socket that is not asked for anything still tells of its end, again and again.
        if !flags.is_empty() {
            fds.push(PollFd::new(&self.socket, flags));
        }
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok([false; N]),
            Err(error) => return Err(error).os("poll", "the connection"),
        }
        let mut signalled = [false; N];
        for (to, fd) in signalled.iter_mut().zip(&fds) {
            *to = !fd.revents().is_empty();
        }
        if let Some(socket) = fds.get(N) {
            self.ready |= socket.revents().intersects(!PollFlags::OUT);
        }
        Ok(signalled)
    }

    /// Sends all that is queued and fills `to`, for the negotiation. False if the connection ended
    /// or `stop` was signalled before.
    pub(crate) fn exchange(&mut self, to: &mut [u8], until: &Deadline<'_>) -> Result<bool> {
        let mut pool = Pool::default();
        let mut done = 0;
        loop {
            self.flush(&mut pool)?;
            match to.get_mut(done..) {
                Some(rest) if !rest.is_empty() => match self.read(rest)? {
                    Got::Some(count) => {
                        done += count;
                        continue;
                    }
                    Got::Nothing => {}
                    Got::End => return Ok(false),
                },
                _ if !self.wants_write() => return Ok(true),
                _ => {}
            }
            if !until.wait(self, done < to.len())? {
                return Ok(false);
            }
        }
    }

    /// Goes on in TLS. Nothing of it may have come before it was agreed on.
    pub(crate) fn start_tls(
        &mut self,
        mut session: rustls::Connection,
        until: &Deadline<'_>,
    ) -> Result<bool> {
        if !self.unread.is_empty() {
            return Err(crate::protocol::malformed(
                "STARTTLS",
                "data came in before TLS began",
            ));
        }
        session.set_buffer_limit(Some(TLS_BYTES));
        let mut tls = Box::new(session);
        loop {
            let full = send_tls(&mut tls, &self.socket)?;
            if !tls.is_handshaking() && !full {
                self.tls = Some(tls);
                // What came with the last of the handshake is in there already.
                self.ready = true;
                return Ok(true);
            }
            let mut flags = PollFlags::empty();
            if full {
                flags |= PollFlags::OUT;
            } else {
                flags |= PollFlags::IN;
            }
            if !until.poll(&self.socket, flags)? {
                return Ok(false);
            }
            if !full && receive_tls(&mut tls, &self.socket)? == Got::End {
                return Ok(false);
            }
        }
    }

    /// Tells the other side that nothing more comes, as far as it listens.
    pub(crate) fn say_goodbye(&mut self) {
        if let Some(tls) = self.tls.as_mut() {
            tls.send_close_notify();
            let _ = send_tls(tls, &self.socket);
        }
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
    }
}

/// Sends what TLS has; true if the socket takes no more now.
fn send_tls(tls: &mut rustls::Connection, socket: &Socket) -> Result<bool> {
    while tls.wants_write() {
        match tls.write_tls(&mut { socket }) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error).os("sendmsg", "the connection"),
        }
    }
    Ok(false)
}

/// Takes in what the socket has for TLS.
fn receive_tls(tls: &mut rustls::Connection, socket: &Socket) -> Result<Got> {
    let got = loop {
        match tls.read_tls(&mut { socket }) {
            Ok(0) => break Got::End,
            Ok(count) => break Got::Some(count),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Got::Nothing),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                let why = "the other side broke the connection".to_owned();
                return Err(TlsFailed { why }.into());
            }
            Err(error) => return Err(error).os("recv", "the connection"),
        }
    };
    if let Err(error) = tls.process_new_packets() {
        // Tells the other side why.
        let _ = send_tls(tls, socket);
        let why = error.to_string();
        return Err(TlsFailed { why }.into());
    }
    Ok(got)
}

/// How long a negotiation may take, and what ends it before.
#[derive(Debug)]
pub(crate) struct Deadline<'a> {
    limit: Duration,
    end: Instant,
    stop: Option<&'a Event>,
}

impl<'a> Deadline<'a> {
    pub(crate) fn new(limit: Duration, stop: Option<&'a Event>) -> Self {
        Self {
            limit,
            end: Instant::now() + limit,
            stop,
        }
    }

    fn left(&self) -> Result<Duration> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let seconds = self.limit.as_secs();
            return Err(HandshakeTimeout { seconds }.into());
        }
        Ok(left)
    }

    /// False if it was stopped.
    fn wait(&self, channel: &mut Channel, for_input: bool) -> Result<bool> {
        let limit = Some(self.left()?);
        match self.stop {
            Some(stop) => {
                let [stopped] = channel.wait(for_input, [stop.as_fd()], limit)?;
                Ok(!stopped)
            }
            None => channel.wait(for_input, [], limit).map(|[]| true),
        }
    }

    fn poll(&self, socket: &Socket, flags: PollFlags) -> Result<bool> {
        let mut fds = vec![PollFd::new(socket, flags)];
        fds.extend(self.stop.map(|stop| PollFd::new(stop, PollFlags::IN)));
        let limit = Timespec::try_from(self.left()?).ok();
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(!self.stopped()),
            Err(error) => Err(error).os("poll", "the connection"),
        }
    }

    fn stopped(&self) -> bool {
        self.stop.is_some_and(|stop| stop.wait(Duration::ZERO))
    }
}
