//! Messages of the transmission phase.

use strake_observe::Result;

use super::{Reader, cut, length, malformed};

/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// What an export's server can do.
pub mod flag {
    /// Always.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Only reads.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag FUA.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and the flag NO_HOLE.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag DF.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection flushes all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// The flag FAST_ZERO.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Requests.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Tell what is allocated.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes must be allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk of data.
    pub const DF: u16 = 1 << 2;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail if zeroing is as slow as writing.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of chunks.
pub mod chunk {
    /// Nothing; the end.
    pub const NONE: u16 = 0;
    /// Data.
    pub const OFFSET_DATA: u16 = 1;
    /// A range of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// The bit of every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1 << 0;
}

/// The protocol's error numbers.
pub mod error {
    /// Not permitted.
    pub const EPERM: u32 = 1;
    /// The device failed.
    pub const EIO: u32 = 5;
    /// No memory.
    pub const ENOMEM: u32 = 12;
    /// Wrong request.
    pub const EINVAL: u32 = 22;
    /// No space.
    pub const ENOSPC: u32 = 28;
    /// Too large.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server is about to end.
    pub const ESHUTDOWN: u32 = 108;

    /// Its name.
    #[must_use]
    pub fn name(error: u32) -> &'static str {
        match error {
            EPERM => "EPERM",
            EIO => "EIO",
            ENOMEM => "ENOMEM",
            EINVAL => "EINVAL",
            ENOSPC => "ENOSPC",
            EOVERFLOW => "EOVERFLOW",
            ENOTSUP => "ENOTSUP",
            ESHUTDOWN => "ESHUTDOWN",
            _ => "an unknown error",
        }
    }
}

/// `base:allocation`: the range is a hole.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`: the range reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;

/// A request as it is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHead {
    /// See [`command_flag`].
    pub flags: u16,
    /// See [`command`].
    pub command: u16,
    /// The client's own name for it.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub length: u32,
}

impl RequestHead {
    /// Its length on the wire.
    pub const BYTES: usize = 28;

    /// Reads one.
    ///
    /// # Errors
    /// When it does not begin with the right magic number: the stream is of no more use then.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut reader = Reader::new("request", bytes);
        if reader.u32()? != REQUEST_MAGIC {
            return Err(reader.bad("wrong magic number"));
        }
        Ok(Self {
            flags: reader.u16()?,
            command: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            length: reader.u32()?,
        })
    }

    /// Writes it.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0u8; Self::BYTES];
        let fields = self
            .flags
            .to_be_bytes()
            .into_iter()
            .chain(self.command.to_be_bytes())
            .chain(self.cookie.to_be_bytes())
            .chain(self.offset.to_be_bytes())
            .chain(self.length.to_be_bytes());
        let all = REQUEST_MAGIC.to_be_bytes().into_iter().chain(fields);
        for (to, from) in out.iter_mut().zip(all) {
            *to = from;
        }
        out
    }
}

/// The head of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHead {
    /// A simple reply; the data of a read follows if there is no error.
    Simple {
        /// See [`error`]; 0 if none.
        error: u32,
        /// Of the request.
        cookie: u64,
    },
    /// A chunk of a structured reply.
    Chunk {
        /// See [`chunk::DONE`].
        flags: u16,
        /// See [`chunk`].
        kind: u16,
        /// Of the request.
        cookie: u64,
        /// How many bytes of payload follow.
        length: u32,
    },
}

impl ReplyHead {
    /// The length of a simple reply's head.
    pub const SIMPLE_BYTES: usize = 16;
    /// The length of a chunk's head.
    pub const CHUNK_BYTES: usize = 20;

    /// How long the head is that begins with these bytes.
    ///
    /// # Errors
    /// When it is the head of nothing.
    pub fn bytes(magic: [u8; 4]) -> Result<usize> {
        match u32::from_be_bytes(magic) {
            SIMPLE_MAGIC => Ok(Self::SIMPLE_BYTES),
            CHUNK_MAGIC => Ok(Self::CHUNK_BYTES),
            other => Err(malformed("reply", format!("magic number {other:#x}"))),
        }
    }

    /// Reads one.
    ///
    /// # Errors
    /// When it is too short or begins with a wrong magic number.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("reply", bytes);
        match reader.u32()? {
            SIMPLE_MAGIC => {
                let head = Self::Simple {
                    error: reader.u32()?,
                    cookie: reader.u64()?,
                };
                reader.end()?;
                Ok(head)
            }
            CHUNK_MAGIC => {
                let head = Self::Chunk {
                    flags: reader.u16()?,
                    kind: reader.u16()?,
                    cookie: reader.u64()?,
                    length: reader.u32()?,
                };
                reader.end()?;
                Ok(head)
            }
            other => Err(reader.bad(format!("magic number {other:#x}"))),
        }
    }

    /// Writes it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::CHUNK_BYTES);
        match self {
            Self::Simple { error, cookie } => {
                out.extend(SIMPLE_MAGIC.to_be_bytes());
                out.extend(error.to_be_bytes());
                out.extend(cookie.to_be_bytes());
            }
            Self::Chunk {
                flags,
                kind,
                cookie,
                length,
            } => {
                out.extend(CHUNK_MAGIC.to_be_bytes());
                out.extend(flags.to_be_bytes());
                out.extend(kind.to_be_bytes());
                out.extend(cookie.to_be_bytes());
                out.extend(length.to_be_bytes());
            }
        }
        out
    }
}

/// A range of the export and what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// How many bytes.
    pub length: u32,
    /// [`STATE_HOLE`] and [`STATE_ZERO`].
    pub state: u32,
}

/// The payload of a chunk other than data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChunkPayload {
    /// Nothing.
    None,
    /// A range of zeroes.
    Hole {
        /// Where.
        offset: u64,
        /// How many bytes, not zero.
        length: u32,
    },
    /// Extents, from the request's offset on.
    Status {
        /// The metadata context's number.
        context: u32,
        /// At least one, none of them empty.
        extents: Vec<Extent>,
    },
    /// An error.
    Error {
        /// See [`error`], not 0.
        error: u32,
        /// Words for people.
        message: String,
        /// Where, if it was told.
        offset: Option<u64>,
    },
}

impl ChunkPayload {
    /// The longest payload that is taken: what 2^20 extents need.
    pub const MAX_BYTES: u32 = 4 + 8 * (1 << 20);

    /// Reads a chunk's payload; data has its own way, for it is never held as a whole.
    ///
    /// # Errors
    /// When a length does not fit or the kind is not known (unknown errors are errors).
    pub fn parse(kind: u16, payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("chunk", payload);
        match kind {
            chunk::NONE => {
                reader.end()?;
                Ok(Self::None)
            }
            chunk::OFFSET_HOLE => {
                let offset = reader.u64()?;
                let length = reader.u32()?;
                if length == 0 {
                    return Err(reader.bad("an empty hole"));
                }
                reader.end()?;
                Ok(Self::Hole { offset, length })
            }
            chunk::BLOCK_STATUS => {
                let context = reader.u32()?;
                if reader.left() == 0 || !reader.left().is_multiple_of(8) {
                    return Err(reader.bad(format!("extents in {} bytes", reader.left())));
                }
                let mut extents = Vec::with_capacity(reader.left() / 8);
                while reader.left() > 0 {
                    let length = reader.u32()?;
                    let state = reader.u32()?;
                    if length == 0 {
                        return Err(reader.bad("an empty extent"));
                    }
                    extents.push(Extent { length, state });
                }
                Ok(Self::Status { context, extents })
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let error = reader.u32()?;
                let count = usize::from(reader.u16()?);
                let message = reader.words(count)?;
                let offset = match kind {
                    chunk::ERROR_OFFSET => Some(reader.u64()?),
                    _ => None,
                };
                if error == 0 {
                    return Err(reader.bad("an error without a number"));
                }
                if kind == chunk::ERROR_OFFSET || kind == chunk::ERROR {
                    reader.end()?;
                }
                Ok(Self::Error {
                    error,
                    message,
                    offset,
                })
            }
            other => Err(reader.bad(format!("of the unknown kind {other}"))),
        }
    }

    /// The kind that it is sent as.
    #[must_use]
    pub fn kind(&self) -> u16 {
        match self {
            Self::None => chunk::NONE,
            Self::Hole { .. } => chunk::OFFSET_HOLE,
            Self::Status { .. } => chunk::BLOCK_STATUS,
            Self::Error { offset: None, .. } => chunk::ERROR,
            Self::Error { .. } => chunk::ERROR_OFFSET,
        }
    }

    /// Writes the whole chunk, head and payload.
    #[must_use]
    pub fn encode(&self, cookie: u64, flags: u16) -> Vec<u8> {
        let mut payload = Vec::new();
        match self {
            Self::None => {}
            Self::Hole { offset, length } => {
                payload.extend(offset.to_be_bytes());
                payload.extend(length.to_be_bytes());
            }
            Self::Status { context, extents } => {
                payload.reserve(4 + extents.len() * 8);
                payload.extend(context.to_be_bytes());
                for extent in extents {
                    payload.extend(extent.length.to_be_bytes());
                    payload.extend(extent.state.to_be_bytes());
                }
            }
            Self::Error {
                error,
                message,
                offset,
            } => {
                let message = cut(message);
                payload.extend(error.to_be_bytes());
                let count = u16::try_from(message.len()).unwrap_or(0);
                payload.extend(count.to_be_bytes());
                payload.extend(message.as_bytes().iter().take(usize::from(count)));
                if let Some(offset) = offset {
                    payload.extend(offset.to_be_bytes());
                }
            }
        }
        let mut out = ReplyHead::Chunk {
            flags,
            kind: self.kind(),
            cookie,
            length: length(payload.len()),
        }
        .encode();
        out.extend(payload);
        out
    }
}

/// The head of a chunk of data; `length` bytes follow it.
#[must_use]
pub fn data_chunk_head(cookie: u64, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut out = ReplyHead::Chunk {
        flags,
        kind: chunk::OFFSET_DATA,
        cookie,
        length: length.saturating_add(8),
    }
    .encode();
    out.extend(offset.to_be_bytes());
    out
}
