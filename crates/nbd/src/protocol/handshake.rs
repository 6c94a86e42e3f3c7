//! Messages of the negotiation (fixed newstyle).

use strake_observe::Result;

use super::{Reader, cut, length, malformed};

/// "NBDMAGIC".
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake and client flag: fixed newstyle.
pub const FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake and client flag: no zeroes after EXPORT_NAME.
pub const NO_ZEROES: u16 = 1 << 1;

/// What a client can ask for during the negotiation.
pub mod option {
    /// Choose an export, without any chance to say no.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Tell of an export.
    pub const INFO: u32 = 6;
    /// Tell of an export and begin the transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;

    /// An option's name.
    #[must_use]
    pub fn name(number: u32) -> &'static str {
        match number {
            EXPORT_NAME => "EXPORT_NAME",
            ABORT => "ABORT",
            LIST => "LIST",
            STARTTLS => "STARTTLS",
            INFO => "INFO",
            GO => "GO",
            STRUCTURED_REPLY => "STRUCTURED_REPLY",
            LIST_META_CONTEXT => "LIST_META_CONTEXT",
            SET_META_CONTEXT => "SET_META_CONTEXT",
            _ => "an unknown option",
        }
    }
}

/// What a server answers to an option.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export's name.
    pub const SERVER: u32 = 2;
    /// One piece of information on an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The bit of every error.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// The option is not allowed here.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option's data is wrong.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// Not on this platform.
    pub const ERR_PLATFORM: u32 = ERROR + 4;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is about to end.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// Ask for the block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// Too much data or too many queries.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;

    /// A reply's name.
    #[must_use]
    pub fn name(kind: u32) -> &'static str {
        match kind {
            ACK => "ACK",
            SERVER => "SERVER",
            INFO => "INFO",
            META_CONTEXT => "META_CONTEXT",
            ERR_UNSUP => "ERR_UNSUP",
            ERR_POLICY => "ERR_POLICY",
            ERR_INVALID => "ERR_INVALID",
            ERR_PLATFORM => "ERR_PLATFORM",
            ERR_TLS_REQD => "ERR_TLS_REQD",
            ERR_UNKNOWN => "ERR_UNKNOWN",
            ERR_SHUTDOWN => "ERR_SHUTDOWN",
            ERR_BLOCK_SIZE_REQD => "ERR_BLOCK_SIZE_REQD",
            ERR_TOO_BIG => "ERR_TOO_BIG",
            _ if kind & ERROR != 0 => "an unknown error",
            _ => "an unknown reply",
        }
    }
}

/// What INFO and GO tell.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// The only metadata context that we know.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Reads what a server says first; gives the handshake flags.
///
/// # Errors
/// When it is not a newstyle server.
pub fn parse_greeting(bytes: &[u8; 18]) -> Result<u16> {
    let mut reader = Reader::new("greeting", bytes);
    if reader.u64()? != GREETING_MAGIC {
        return Err(reader.bad("it does not begin with NBDMAGIC"));
    }
    if reader.u64()? != OPTION_MAGIC {
        return Err(reader.bad("an oldstyle server"));
    }
    let flags = reader.u16()?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(reader.bad("a server without fixed newstyle negotiation"));
    }
    Ok(flags)
}

/// What a server says first.
#[must_use]
pub fn greeting() -> Vec<u8> {
    let mut out = GREETING_MAGIC.to_be_bytes().to_vec();
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    out
}

/// Reads a client's flags; says whether it wants no zeroes after EXPORT_NAME.
///
/// # Errors
/// When it is not a fixed newstyle client, or asks for what was not offered.
pub fn parse_client_flags(bytes: [u8; 4]) -> Result<bool> {
    let flags = u32::from_be_bytes(bytes);
    let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
    if flags & !known != 0 {
        return Err(malformed("client flags", format!("{flags:#x} is unknown")));
    }
    if flags & u32::from(FIXED_NEWSTYLE) == 0 {
        return Err(malformed("client flags", "a client without fixed newstyle"));
    }
    Ok(flags & u32::from(NO_ZEROES) != 0)
}

/// A client's flags, given the server's.
#[must_use]
pub fn client_flags(server: u16) -> [u8; 4] {
    u32::from(server & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes()
}

/// The head of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHead {
    /// Which.
    pub option: u32,
    /// How many bytes of data follow.
    pub length: u32,
}

impl OptionHead {
    /// Its length on the wire.
    pub const BYTES: usize = 16;

    /// Reads one.
    ///
    /// # Errors
    /// When it does not begin with the right magic number.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut reader = Reader::new("option", bytes);
        if reader.u64()? != OPTION_MAGIC {
            return Err(reader.bad("it does not begin with IHAVEOPT"));
        }
        Ok(Self {
            option: reader.u32()?,
            length: reader.u32()?,
        })
    }
}

/// An option with its data.
#[must_use]
pub fn option_message(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(length(data.len()).to_be_bytes());
    out.extend(data);
    out
}

/// The head of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHead {
    /// The option that is answered.
    pub option: u32,
    /// The kind of answer.
    pub kind: u32,
    /// How many bytes of data follow.
    pub length: u32,
}

impl OptionReplyHead {
    /// Its length on the wire.
    pub const BYTES: usize = 20;

    /// Reads one.
    ///
    /// # Errors
    /// When it does not begin with the right magic number.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let mut reader = Reader::new("reply to an option", bytes);
        if reader.u64()? != REPLY_MAGIC {
            return Err(reader.bad("wrong magic number"));
        }
        Ok(Self {
            option: reader.u32()?,
            kind: reader.u32()?,
            length: reader.u32()?,
        })
    }
}

/// Appends a reply to an option.
pub fn push_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(length(data.len()).to_be_bytes());
    out.extend(data);
}

/// Appends an error as a reply to an option, with words for people.
pub fn push_refusal(out: &mut Vec<u8>, option: u32, kind: u32, words: &str) {
    push_reply(out, option, kind, cut(words).as_bytes());
}

/// The data of INFO and GO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export; empty for the default one.
    pub name: String,
    /// What the client would like to be told (see [`info`]).
    pub wants: Vec<u16>,
}

impl InfoRequest {
    /// Reads one.
    ///
    /// # Errors
    /// When the lengths in it do not fit.
    pub fn parse(data: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("INFO or GO", data);
        let name = reader.counted_string()?;
        let count = usize::from(reader.u16()?);
        if reader.left() != count * 2 {
            return Err(reader.bad(format!("{count} requests in {} bytes", reader.left())));
        }
        let wants = (0..count).map(|_| reader.u16()).collect::<Result<_>>()?;
        reader.end()?;
        Ok(Self { name, wants })
    }

    /// Writes it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let name = cut(&self.name);
        let mut out = length(name.len()).to_be_bytes().to_vec();
        out.extend(name.as_bytes());
        let count = u16::try_from(self.wants.len()).unwrap_or(u16::MAX);
        out.extend(count.to_be_bytes());
        for wanted in self.wants.iter().take(usize::from(count)) {
            out.extend(wanted.to_be_bytes());
        }
        out
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export.
    pub name: String,
    /// The contexts asked for.
    pub queries: Vec<String>,
}

impl MetaRequest {
    /// Reads one.
    ///
    /// # Errors
    /// When the lengths in it do not fit.
    pub fn parse(data: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("metadata contexts", data);
        let name = reader.counted_string()?;
        let count = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        // Each query has at least its length.
        if count > reader.left() / 4 {
            return Err(reader.bad(format!("{count} queries in {} bytes", reader.left())));
        }
        let queries = (0..count)
            .map(|_| reader.counted_string())
            .collect::<Result<_>>()?;
        reader.end()?;
        Ok(Self { name, queries })
    }

    /// Writes it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut string = |text: &str| {
            let text = cut(text);
            out.extend(length(text.len()).to_be_bytes());
            out.extend(text.as_bytes());
        };
        string(&self.name);
        let mut queries = Vec::new();
        for query in &self.queries {
            let query = cut(query);
            queries.extend(length(query.len()).to_be_bytes());
            queries.extend(query.as_bytes());
        }
        out.extend(length(self.queries.len()).to_be_bytes());
        out.extend(queries);
        out
    }
}

/// The sizes of an export's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// What every offset and length must be a multiple of.
    pub minimum: u32,
    /// What they should be a multiple of.
    pub preferred: u32,
    /// The largest payload.
    pub maximum: u32,
}

/// One piece of information on an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Its size and what its server can do.
    Export {
        /// In bytes.
        size: u64,
        /// Transmission flags.
        flags: u16,
    },
    /// Its canonical name.
    Name(String),
    /// Words for people.
    Description(String),
    /// Its block sizes.
    BlockSize(BlockSizes),
    /// Something that we do not know.
    Other(u16),
}

impl Info {
    /// Reads one.
    ///
    /// # Errors
    /// When it is too short or breaks a rule for block sizes.
    pub fn parse(data: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("information on an export", data);
        let parsed = match reader.u16()? {
            info::EXPORT => Self::Export {
                size: reader.u64()?,
                flags: reader.u16()?,
            },
            info::NAME => Self::Name(reader.string(reader.left())?),
            info::DESCRIPTION => Self::Description(reader.words(reader.left())?),
            info::BLOCK_SIZE => {
                let sizes = BlockSizes {
                    minimum: reader.u32()?,
                    preferred: reader.u32()?,
                    maximum: reader.u32()?,
                };
                if !sizes.minimum.is_power_of_two() || sizes.minimum > 65536 {
                    return Err(reader.bad(format!("smallest block {}", sizes.minimum)));
                }
                if sizes.maximum < sizes.minimum {
                    return Err(reader.bad(format!("largest payload {}", sizes.maximum)));
                }
                Self::BlockSize(sizes)
            }
            other => return Ok(Self::Other(other)),
        };
        reader.end()?;
        Ok(parsed)
    }

    /// Writes it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Export { size, flags } => {
                out.extend(info::EXPORT.to_be_bytes());
                out.extend(size.to_be_bytes());
                out.extend(flags.to_be_bytes());
            }
            Self::Name(name) => {
                out.extend(info::NAME.to_be_bytes());
                out.extend(cut(name).as_bytes());
            }
            Self::Description(words) => {
                out.extend(info::DESCRIPTION.to_be_bytes());
                out.extend(cut(words).as_bytes());
            }
            Self::BlockSize(sizes) => {
                out.extend(info::BLOCK_SIZE.to_be_bytes());
                out.extend(sizes.minimum.to_be_bytes());
                out.extend(sizes.preferred.to_be_bytes());
                out.extend(sizes.maximum.to_be_bytes());
            }
            Self::Other(kind) => out.extend(kind.to_be_bytes()),
        }
        out
    }
}

/// Reads a SERVER reply: name and words for people.
///
/// # Errors
/// When the lengths in it do not fit.
pub fn parse_server(data: &[u8]) -> Result<(String, String)> {
    let mut reader = Reader::new("an export's name", data);
    let name = reader.counted_string()?;
    let words = reader.words(reader.left())?;
    Ok((name, words))
}

/// Writes a SERVER reply's data.
#[must_use]
pub fn server_data(name: &str, words: &str) -> Vec<u8> {
    let name = cut(name);
    let mut out = length(name.len()).to_be_bytes().to_vec();
    out.extend(name.as_bytes());
    out.extend(cut(words).as_bytes());
    out
}

/// Reads a META_CONTEXT reply: number and name.
///
/// # Errors
/// When it is too short.
pub fn parse_meta_context(data: &[u8]) -> Result<(u32, String)> {
    let mut reader = Reader::new("metadata context", data);
    let id = reader.u32()?;
    let name = reader.string(reader.left())?;
    Ok((id, name))
}

/// Writes a META_CONTEXT reply's data.
#[must_use]
pub fn meta_context_data(id: u32, name: &str) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend(cut(name).as_bytes());
    out
}
