//! A client's side of the negotiation.

use std::time::Duration;

use strake_observe::{Because, Observation, Result};

use crate::channel::{Channel, Deadline};
use crate::protocol::handshake::{
    BASE_ALLOCATION, BlockSizes, Info, InfoRequest, MetaRequest, OptionReplyHead, client_flags,
    info, option, option_message, parse_greeting, parse_meta_context, parse_server, reply,
};
use crate::protocol::{MAX_PAYLOAD, Reader, malformed};
use crate::tls::TlsClient;
use crate::{OptionRefused, TlsMismatch};

/// How long a server may take to negotiate.
const NEGOTIATION: Duration = Duration::from_secs(20);

/// The longest data of a reply that is taken.
const MAX_REPLY_BYTES: u32 = 64 * 1024;

/// The most data of all replies to one option.
const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;

/// What a server said of the export.
#[derive(Debug, Clone)]
pub(super) struct Agreed {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) sizes: BlockSizes,
    pub(super) structured: bool,
    /// The number of the context `base:allocation`, if the server has it.
    pub(super) allocation: Option<u32>,
}

/// What the caller wants of TLS.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted<'a> {
    Plain,
    Tls(&'a TlsClient, &'a str),
}

/// The replies to one option, up to the last.
struct Answer {
    replies: Vec<(u32, Vec<u8>)>,
    /// What the last one was: ACK or an error, and its data.
    kind: u32,
    words: String,
}

impl Answer {
    fn accepted(&self) -> bool {
        self.kind == reply::ACK
    }

    fn refusal(&self, option: u32) -> Observation {
        let advice = match self.kind {
            reply::ERR_UNKNOWN => "name an export that the server has (nbdinfo --list shows them)",
            reply::ERR_TLS_REQD => "use nbds:// and give certificates",
            reply::ERR_POLICY => "the server's configuration forbids it: change that",
            reply::ERR_SHUTDOWN => "the server is about to end: start it again",
            _ => "check the server's version and its log",
        };
        let message = match self.words.is_empty() {
            true => "no reason given".to_owned(),
            false => self.words.clone(),
        };
        OptionRefused {
            option: option::name(option).to_owned(),
            reply: reply::name(self.kind).to_owned(),
            message,
            advice: advice.to_owned(),
        }
        .into()
    }
}

struct Talk<'a> {
    channel: &'a mut Channel,
    until: Deadline<'a>,
}

impl Talk<'_> {
    fn receive(&mut self, to: &mut [u8]) -> Result<()> {
        match self.channel.exchange(to, &self.until)? {
            true => Ok(()),
            false => Err(malformed("negotiation", "the server ended the connection")),
        }
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> Result<Answer> {
        self.channel.push(option_message(option, data));
        let mut replies = Vec::new();
        let mut room = MAX_ANSWER_BYTES;
        loop {
            let mut head = [0u8; OptionReplyHead::BYTES];
            self.receive(&mut head)?;
            let head = OptionReplyHead::parse(&head)?;
            if head.option != option {
                return Err(malformed("reply to an option", "to another than was asked"));
            }
            let length = usize::try_from(head.length).unwrap_or(usize::MAX);
            room = match room.checked_sub(length.saturating_add(OptionReplyHead::BYTES)) {
                Some(left) if head.length <= MAX_REPLY_BYTES => left,
                _ => return Err(malformed("reply to an option", "too much of it")),
            };
            let mut data = vec![0u8; length];
            self.receive(&mut data)?;
            if head.kind == reply::ACK || head.kind & reply::ERROR != 0 {
                let mut words = Reader::new("refusal", &data);
                let words = words.words(words.left())?;
                return Ok(Answer {
                    replies,
                    kind: head.kind,
                    words,
                });
            }
            replies.push((head.kind, data));
        }
    }

    /// The greeting, and TLS if it is wanted.
    fn open(&mut self, wanted: Wanted<'_>) -> Result<()> {
        let mut greeting = [0u8; 18];
        self.receive(&mut greeting)?;
        let flags = parse_greeting(&greeting)?;
        self.channel.push(client_flags(flags).to_vec());
        let Wanted::Tls(tls, name) = wanted else {
            return Ok(());
        };
        let answer = self.ask(option::STARTTLS, &[])?;
        if !answer.accepted() {
            let refusal = answer.refusal(option::STARTTLS);
            let what = "the server has no TLS, and it was asked for".to_owned();
            return Err(Observation::from(TlsMismatch { what }).because(refusal));
        }
        match self.channel.start_tls(tls.session(name)?, &self.until)? {
            true => Ok(()),
            false => Err(malformed("TLS", "the server ended the connection")),
        }
    }

    fn structured(&mut self) -> Result<bool> {
        let answer = self.ask(option::STRUCTURED_REPLY, &[])?;
        if answer.kind == reply::ERR_TLS_REQD {
            let what = "the server requires TLS".to_owned();
            let refusal = answer.refusal(option::STRUCTURED_REPLY);
            return Err(Observation::from(TlsMismatch { what }).because(refusal));
        }
        Ok(answer.accepted())
    }

    fn allocation(&mut self, export: &str) -> Result<Option<u32>> {
        let request = MetaRequest {
            name: export.to_owned(),
            queries: vec![BASE_ALLOCATION.to_owned()],
        };
        let answer = self.ask(option::SET_META_CONTEXT, &request.encode())?;
        if !answer.accepted() {
            return Ok(None);
        }
        for (kind, data) in &answer.replies {
            if *kind == reply::META_CONTEXT {
                let (id, name) = parse_meta_context(data)?;
                if name == BASE_ALLOCATION {
                    return Ok(Some(id));
                }
            }
        }
        Ok(None)
    }

    fn go(&mut self, export: &str) -> Result<(u64, u16, BlockSizes)> {
        let request = InfoRequest {
            name: export.to_owned(),
            wants: vec![info::BLOCK_SIZE],
        };
        let answer = self.ask(option::GO, &request.encode())?;
        if !answer.accepted() {
            return Err(answer.refusal(option::GO));
        }
        let mut told = None;
        // What holds if the server tells nothing.
        let mut sizes = BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum: MAX_PAYLOAD,
        };
        for (kind, data) in &answer.replies {
            if *kind != reply::INFO {
                continue;
            }
            match Info::parse(data)? {
                Info::Export { size, flags } => told = Some((size, flags)),
                Info::BlockSize(given) => sizes = given,
                Info::Name(_) | Info::Description(_) | Info::Other(_) => {}
            }
        }
        match told {
            Some((size, flags)) => Ok((size, flags, sizes)),
            None => Err(malformed("reply to GO", "it tells no size")),
        }
    }
}

/// Negotiates for an export.
pub(super) fn negotiate(channel: &mut Channel, export: &str, wanted: Wanted<'_>) -> Result<Agreed> {
    let mut talk = Talk {
        channel,
        until: Deadline::new(NEGOTIATION, None),
    };
    talk.open(wanted)?;
    let structured = talk.structured()?;
    let allocation = match structured {
        true => talk.allocation(export)?,
        false => None,
    };
    let (size, flags, sizes) = talk.go(export)?;
    Ok(Agreed {
        size,
        flags,
        sizes,
        structured,
        allocation,
    })
}

/// Asks for the exports' names, each with words for people.
pub(super) fn list(channel: &mut Channel, wanted: Wanted<'_>) -> Result<Vec<(String, String)>> {
    let mut talk = Talk {
        channel,
        until: Deadline::new(NEGOTIATION, None),
    };
    talk.open(wanted)?;
    let answer = talk.ask(option::LIST, &[])?;
    if !answer.accepted() {
        return Err(answer.refusal(option::LIST));
    }
    let exports = answer
        .replies
        .iter()
        .filter(|(kind, _)| *kind == reply::SERVER)
        .map(|(_, data)| parse_server(data))
        .collect::<Result<_>>()
        .because_of(|| crate::Malformed {
            what: "list of exports".to_owned(),
            why: "one of them cannot be read".to_owned(),
        })?;
    talk.ask(option::ABORT, &[])?;
    Ok(exports)
}
