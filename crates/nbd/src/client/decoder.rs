//! A server's replies, byte by byte: a state machine without a socket.
//!
//! Nothing that a server says is believed: a reply must be to a request that waits for one, data
//! must lie within what was asked for and come once, and success must come with all of it. The
//! first breach is an error, after which the connection is of no more use.

use strake_observe::{Because, Result};

use super::coverage::Coverage;
use crate::Malformed;
use crate::protocol::malformed;
use crate::protocol::transmission::{ChunkPayload, Extent, ReplyHead, chunk};

/// What a request expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// The bytes of a range.
    Data {
        /// Where.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// The extents of a range, for a metadata context.
    Extents {
        /// The context's number.
        context: u32,
    },
    /// Nothing but the result.
    Result,
}

/// Whoever waits for replies.
pub trait Sink {
    /// What the request with this cookie expects; none if there is none.
    fn expected(&self, cookie: u64) -> Option<Expected>;

    /// What of it has come; the same object for the same request, empty at first.
    fn coverage(&mut self, cookie: u64) -> Option<&mut Coverage>;

    /// Bytes of it: `at` bytes from the begin of the request's range, and within it.
    fn data(&mut self, cookie: u64, at: u64, bytes: &[u8]);

    /// The same, for zeroes.
    fn zeroes(&mut self, cookie: u64, at: u64, length: u32);

    /// Its extents.
    fn extents(&mut self, cookie: u64, extents: Vec<Extent>);

    /// The server could not do it. Its end is told separately.
    fn failed(&mut self, cookie: u64, error: u32, message: String);

    /// It has ended; it expects nothing any more.
    fn done(&mut self, cookie: u64);
}

/// What is being read.
#[derive(Debug)]
enum State {
    /// A head; so many bytes of it are here.
    Head([u8; ReplyHead::CHUNK_BYTES], usize),
    /// The offset before a chunk's data.
    DataOffset {
        cookie: u64,
        flags: u16,
        length: u32,
        offset: [u8; 8],
        have: usize,
    },
    /// Data.
    Data {
        cookie: u64,
        at: u64,
        left: u32,
        done: bool,
    },
    /// A chunk's payload as a whole.
    Payload {
        cookie: u64,
        flags: u16,
        kind: u16,
        length: usize,
        have: Vec<u8>,
    },
}

impl State {
    const START: Self = Self::Head([0; ReplyHead::CHUNK_BYTES], 0);
}

/// See the module.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    /// The longest payload that is taken.
    structured: bool,
}

impl Decoder {
    /// At the begin of a reply. `structured` says what was agreed on.
    #[must_use]
    pub fn new(structured: bool) -> Self {
        Self {
            state: State::START,
            structured,
        }
    }

    /// Takes in what was received, all of it.
    ///
    /// # Errors
    /// When the server breaks the protocol.
    pub fn feed(&mut self, bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let used = self.step(rest, sink)?;
            rest = rest.get(used..).unwrap_or(&[]);
        }
        Ok(())
    }

    /// Where data could be put without a copy is not told: it goes through `feed` as everything.
    fn step(&mut self, bytes: &[u8], sink: &mut dyn Sink) -> Result<usize> {
        match &mut self.state {
            State::Head(head, have) => {
                let used = fill(head, have, ReplyHead::SIMPLE_BYTES, bytes);
                if *have < ReplyHead::SIMPLE_BYTES {
                    return Ok(used);
                }
                let magic = [head[0], head[1], head[2], head[3]];
                let length = ReplyHead::bytes(magic)?;
                let more = bytes.get(used..).unwrap_or(&[]);
                let used = used + fill(head, have, length, more);
                if *have < length {
                    return Ok(used);
                }
                let head = ReplyHead::parse(head.get(..length).unwrap_or(&[]))?;
                self.state = self.headed(head, sink)?;
                Ok(used)
            }
            State::DataOffset {
                cookie,
                flags,
                length,
                offset,
                have,
            } => {
                let used = fill(offset, have, 8, bytes);
                if *have == 8 {
                    let start = u64::from_be_bytes(*offset);
                    let (cookie, length) = (*cookie, *length);
                    let done = *flags & chunk::DONE != 0;
                    let at = claim(sink, cookie, start, length)?;
                    self.state = State::Data {
                        cookie,
                        at,
                        left: length,
                        done,
                    };
                }
                Ok(used)
            }
            State::Data {
                cookie,
                at,
                left,
                done,
            } => {
                let (cookie, done) = (*cookie, *done);
                let most = usize::try_from(*left).unwrap_or(usize::MAX);
                let piece = bytes.get(..most.min(bytes.len())).unwrap_or(bytes);
                sink.data(cookie, *at, piece);
                *at += piece.len() as u64;
                *left -= u32::try_from(piece.len()).unwrap_or(*left);
                if *left == 0 {
                    self.state = State::START;
                    if done {
                        finish(sink, cookie)?;
                    }
                }
                Ok(piece.len())
            }
            State::Payload {
                cookie,
                flags,
                kind,
                length,
                have,
            } => {
                let want = *length - have.len();
                let piece = bytes.get(..want.min(bytes.len())).unwrap_or(bytes);
                have.extend(piece);
                let used = piece.len();
                if have.len() == *length {
                    let payload = ChunkPayload::parse(*kind, have)?;
                    let (cookie, done) = (*cookie, *flags & chunk::DONE != 0);
                    self.state = State::START;
                    chunk_ended(sink, cookie, payload, done)?;
                }
                Ok(used)
            }
        }
    }

    /// What follows a head.
    fn headed(&self, head: ReplyHead, sink: &mut dyn Sink) -> Result<State> {
        match head {
            ReplyHead::Simple { error, cookie } => {
                let expected = waiting(sink, cookie)?;
                if error != 0 {
                    sink.failed(cookie, error, String::new());
                    sink.done(cookie);
                    return Ok(State::START);
                }
                match expected {
                    Expected::Data { .. } if self.structured => Err(malformed(
                        "reply",
                        "a simple one to a read, although structured ones were agreed on",
                    )),
                    Expected::Data { offset, length } => {
                        let at = claim(sink, cookie, offset, length)?;
                        Ok(State::Data {
                            cookie,
                            at,
                            left: length,
                            done: true,
                        })
                    }
                    Expected::Extents { .. } => {
                        Err(malformed("reply", "extents were asked for and none came"))
                    }
                    Expected::Result => {
                        sink.done(cookie);
                        Ok(State::START)
                    }
                }
            }
            ReplyHead::Chunk {
                flags,
                kind,
                cookie,
                length,
            } => {
                if !self.structured {
                    return Err(malformed("reply", "a structured one was not agreed on"));
                }
                let expected = waiting(sink, cookie)?;
                if kind == chunk::OFFSET_DATA {
                    if !matches!(expected, Expected::Data { .. }) || length < 9 {
                        return Err(malformed("chunk", "data that was not asked for"));
                    }
                    return Ok(State::DataOffset {
                        cookie,
                        flags,
                        length: length - 8,
                        offset: [0; 8],
                        have: 0,
                    });
                }
                if length > ChunkPayload::MAX_BYTES {
                    return Err(malformed("chunk", format!("{length} bytes of payload")));
                }
                if length == 0 {
                    let payload = ChunkPayload::parse(kind, &[])?;
                    chunk_ended(sink, cookie, payload, flags & chunk::DONE != 0)?;
                    return Ok(State::START);
                }
                Ok(State::Payload {
                    cookie,
                    flags,
                    kind,
                    length: usize::try_from(length).unwrap_or(0),
                    have: Vec::new(),
                })
            }
        }
    }
}

/// Copies to `to` until it has `want` bytes; says how many were used.
fn fill(to: &mut [u8], have: &mut usize, want: usize, from: &[u8]) -> usize {
    let room = to.get_mut(*have..want).unwrap_or(&mut []);
    let count = room.len().min(from.len());
    for (to, from) in room.iter_mut().zip(from) {
        *to = *from;
    }
    *have += count;
    count
}

fn waiting(sink: &dyn Sink, cookie: u64) -> Result<Expected> {
    sink.expected(cookie).ok_or_else(|| {
        malformed(
            "reply",
            format!("nothing was asked with cookie {cookie:#x}"),
        )
    })
}

/// Checks that the range was asked for and has not come yet; gives where in the request it is.
fn claim(sink: &mut dyn Sink, cookie: u64, start: u64, length: u32) -> Result<u64> {
    let Expected::Data {
        offset,
        length: asked,
    } = waiting(sink, cookie)?
    else {
        return Err(malformed("chunk", "data that was not asked for"));
    };
    let at = start.checked_sub(offset);
    let within = at.filter(|at| at.saturating_add(u64::from(length)) <= u64::from(asked));
    let fits = within.filter(|at| {
        sink.coverage(cookie)
            .is_some_and(|coverage| coverage.add(*at, u64::from(length)))
    });
    fits.ok_or_else(|| {
        let range = format!("{length} bytes at {start}");
        malformed(
            "chunk",
            format!("{range} were not asked for, or came twice"),
        )
    })
}

fn chunk_ended(sink: &mut dyn Sink, cookie: u64, payload: ChunkPayload, done: bool) -> Result<()> {
    let expected = waiting(sink, cookie)?;
    match payload {
        ChunkPayload::None => {
            if !done {
                return Err(malformed("chunk", "an empty one that is not the last"));
            }
        }
        ChunkPayload::Hole { offset, length } => {
            let at = claim(sink, cookie, offset, length)?;
            sink.zeroes(cookie, at, length);
        }
        ChunkPayload::Status { context, extents } => match expected {
            Expected::Extents { context: asked } if asked == context => {
                sink.extents(cookie, extents);
            }
            _ => return Err(malformed("chunk", "extents that were not asked for")),
        },
        ChunkPayload::Error { error, message, .. } => sink.failed(cookie, error, message),
    }
    match done {
        true => finish(sink, cookie),
        false => Ok(()),
    }
}

/// The last chunk has come.
fn finish(sink: &mut dyn Sink, cookie: u64) -> Result<()> {
    if let Expected::Data { length, .. } = waiting(sink, cookie)? {
        let here = sink.coverage(cookie).map_or(0, |coverage| coverage.bytes());
        if here < u64::from(length) {
            // All right if it failed; whoever waits knows that. If not, it must not be taken for
            // success.
            let why = format!("the reply ended after {here} of {length} bytes");
            sink.failed(cookie, crate::protocol::transmission::error::EIO, why);
        }
    }
    sink.done(cookie);
    Ok(())
}

/// Puts the place of the breach above it.
pub(super) fn breach<T>(result: Result<T>) -> Result<T> {
    result.because_of(|| Malformed {
        what: "stream of replies".to_owned(),
        why: "the server breaks the protocol".to_owned(),
    })
}
