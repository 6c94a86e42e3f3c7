//! A server's side of the negotiation, as a state machine without a socket: an option comes in,
//! replies go out, and it is said what comes next.

use strake_block::SECTOR_BYTES;

use crate::protocol::handshake::{
    BASE_ALLOCATION, BlockSizes, Info, InfoRequest, MetaRequest, info, meta_context_data, option,
    push_refusal, push_reply, reply, server_data,
};
use crate::protocol::transmission::flag;
use crate::protocol::{MAX_PAYLOAD, MAX_STRING};

/// The longest data of an option that is taken: a name and some queries.
pub const MAX_OPTION_BYTES: u32 = 64 * 1024;

/// The most options of a session. No client needs more than some dozens.
pub const MAX_OPTIONS: u32 = 1024;

/// The most metadata queries of an option that are looked at.
const MAX_QUERIES: usize = 256;

/// The number of our only metadata context.
pub(crate) const ALLOCATION_ID: u32 = 1;

/// What clients are told of an export.
#[derive(Debug, Clone)]
pub struct Offer {
    /// Its name.
    pub name: String,
    /// Words for people.
    pub description: String,
    /// Its size in bytes.
    pub size: u64,
    /// Whether clients may write.
    pub writable: bool,
}

impl Offer {
    fn flags(&self, structured: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN;
        if structured {
            flags |= flag::SEND_DF;
        }
        match self.writable {
            true => flags | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO,
            false => flags | flag::READ_ONLY,
        }
    }

    fn info(&self, structured: bool) -> Info {
        Info::Export {
            size: self.size,
            flags: self.flags(structured),
        }
    }
}

/// How far a session must be encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// There is none.
    None,
    /// Nothing but STARTTLS is answered before it.
    Required,
}

/// What an option leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The next option.
    Option,
    /// TLS, then the next option.
    Tls,
    /// The transmission.
    Transmission(Agreed),
    /// The end, after the replies.
    End,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// The export, by its place in the list of offers.
    pub export: usize,
    /// Whether reads are answered by structured replies.
    pub structured: bool,
    /// Whether the client may ask for the status of blocks.
    pub allocation: bool,
}

/// The state of one client's negotiation.
#[derive(Debug)]
pub struct Negotiation<'a> {
    offers: &'a [Offer],
    tls: Tls,
    no_zeroes: bool,
    encrypted: bool,
    structured: bool,
    /// The export for which the metadata context was chosen.
    allocation: Option<usize>,
    options: u32,
}

impl<'a> Negotiation<'a> {
    /// At its beginning. `no_zeroes` is what the client's flags said.
    #[must_use]
    pub fn new(offers: &'a [Offer], tls: Tls, no_zeroes: bool) -> Self {
        Self {
            offers,
            tls,
            no_zeroes,
            encrypted: false,
            structured: false,
            allocation: None,
            options: 0,
        }
    }

    /// Answers an option whose data is longer than [`MAX_OPTION_BYTES`] and was skipped.
    pub fn too_long(&mut self, option: u32, out: &mut Vec<u8>) -> Next {
        if !self.count() || option == option::EXPORT_NAME {
            return Next::End;
        }
        push_refusal(out, option, reply::ERR_TOO_BIG, "too much data");
        Next::Option
    }

    /// Answers an option.
    pub fn answer(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        if !self.count() {
            return Next::End;
        }
        if self.tls == Tls::Required && !self.encrypted {
            match option {
                option::STARTTLS | option::ABORT => {}
                // It has no way to be refused.
                option::EXPORT_NAME => return Next::End,
                _ => {
                    push_refusal(out, option, reply::ERR_TLS_REQD, "TLS is required");
                    return Next::Option;
                }
            }
        }
        match option {
            option::EXPORT_NAME => self.export_name(data, out),
            option::ABORT => {
                push_reply(out, option, reply::ACK, &[]);
                Next::End
            }
            option::LIST => self.list(data, out),
            option::STARTTLS => self.start_tls(data, out),
            option::INFO | option::GO => self.info(option, data, out),
            option::STRUCTURED_REPLY => {
                if !data.is_empty() {
                    return invalid(out, option, "it takes no data");
                }
                self.structured = true;
                push_reply(out, option, reply::ACK, &[]);
                Next::Option
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data, out)
            }
            _ => {
                push_refusal(out, option, reply::ERR_UNSUP, "unknown option");
                Next::Option
            }
        }
    }

    fn count(&mut self) -> bool {
        self.options += 1;
        self.options <= MAX_OPTIONS
    }

    /// The export of this name; the only one has no need of a name.
    fn find(&self, name: &str) -> Option<(usize, &'a Offer)> {
        let named = self.offers.iter().position(|offer| offer.name == name);
        let only = (name.is_empty() && self.offers.len() == 1).then_some(0);
        let index = named.or(only)?;
        self.offers.get(index).map(|offer| (index, offer))
    }

    fn agreed(&self, export: usize) -> Next {
        Next::Transmission(Agreed {
            export,
            structured: self.structured,
            allocation: self.allocation == Some(export),
        })
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Next {
        let name = std::str::from_utf8(data)
            .ok()
            .filter(|_| data.len() <= MAX_STRING);
        let Some((index, offer)) = name.and_then(|name| self.find(name)) else {
            return Next::End;
        };
        out.extend(offer.size.to_be_bytes());
        out.extend(offer.flags(self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0u8; 124]);
        }
        self.agreed(index)
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) -> Next {
        if !data.is_empty() {
            return invalid(out, option::LIST, "it takes no data");
        }
        for offer in self.offers {
            let data = server_data(&offer.name, &offer.description);
            push_reply(out, option::LIST, reply::SERVER, &data);
        }
        push_reply(out, option::LIST, reply::ACK, &[]);
        Next::Option
    }

    fn start_tls(&mut self, data: &[u8], out: &mut Vec<u8>) -> Next {
        let option = option::STARTTLS;
        if !data.is_empty() {
            return invalid(out, option, "it takes no data");
        }
        if self.encrypted {
            return invalid(out, option, "TLS is in use already");
        }
        if self.tls == Tls::None {
            push_refusal(out, option, reply::ERR_POLICY, "this server has no TLS");
            return Next::Option;
        }
        push_reply(out, option, reply::ACK, &[]);
        // Nothing that was said in the clear counts.
        self.encrypted = true;
        self.structured = false;
        self.allocation = None;
        Next::Tls
    }

    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        let request = match InfoRequest::parse(data) {
            Ok(request) => request,
            Err(seen) => return invalid(out, option, seen.text()),
        };
        let Some((index, offer)) = self.find(&request.name) else {
            return unknown(out, option);
        };
        let mut tell = |info: &Info| push_reply(out, option, reply::INFO, &info.encode());
        tell(&offer.info(self.structured));
        if request.wants.contains(&info::NAME) {
            tell(&Info::Name(offer.name.clone()));
        }
        if request.wants.contains(&info::DESCRIPTION) {
            tell(&Info::Description(offer.description.clone()));
        }
        if request.wants.contains(&info::BLOCK_SIZE) {
            tell(&Info::BlockSize(block_sizes()));
        }
        push_reply(out, option, reply::ACK, &[]);
        match option {
            option::GO => self.agreed(index),
            _ => Next::Option,
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.allocation = None;
        }
        if !self.structured {
            return invalid(out, option, "structured replies come first");
        }
        let request = match MetaRequest::parse(data) {
            Ok(request) => request,
            Err(seen) => return invalid(out, option, seen.text()),
        };
        if request.queries.len() > MAX_QUERIES {
            push_refusal(out, option, reply::ERR_TOO_BIG, "too many queries");
            return Next::Option;
        }
        let Some((index, _)) = self.find(&request.name) else {
            return unknown(out, option);
        };
        let chosen = request
            .queries
            .iter()
            .any(|query| query == BASE_ALLOCATION || (!set && query == "base:"));
        if chosen || (!set && request.queries.is_empty()) {
            let id = if set { ALLOCATION_ID } else { 0 };
            let data = meta_context_data(id, BASE_ALLOCATION);
            push_reply(out, option, reply::META_CONTEXT, &data);
            if set {
                self.allocation = Some(index);
            }
        }
        push_reply(out, option, reply::ACK, &[]);
        Next::Option
    }
}

/// The sizes that every export of ours has.
fn block_sizes() -> BlockSizes {
    BlockSizes {
        minimum: u32::try_from(SECTOR_BYTES).unwrap_or(512),
        preferred: 4096,
        maximum: MAX_PAYLOAD,
    }
}

fn invalid(out: &mut Vec<u8>, option: u32, words: &str) -> Next {
    push_refusal(out, option, reply::ERR_INVALID, words);
    Next::Option
}

fn unknown(out: &mut Vec<u8>, option: u32) -> Next {
    push_refusal(out, option, reply::ERR_UNKNOWN, "there is no such export");
    Next::Option
}
