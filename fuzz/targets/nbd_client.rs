//! A server at our NBD client: replies to options, then replies to requests, cut anywhere. What
//! reaches a request's memory is within it, comes once, and never after the request's end; success
//! comes with all of the data.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use strake_nbd::Uri;
use strake_nbd::client::coverage::Coverage;
use strake_nbd::client::decoder::{Decoder, Expected, Sink};
use strake_nbd::protocol::handshake::{
    Info, OptionReplyHead, parse_greeting, parse_meta_context, parse_server,
};
use strake_nbd::protocol::transmission::{
    ChunkPayload, Extent, ReplyHead, chunk, data_chunk_head,
};

const OFFSET: u64 = 1 << 20;
const LENGTH: u32 = 4096;

#[derive(Debug, Arbitrary)]
enum Piece<'a> {
    Noise(&'a [u8]),
    Simple(u8, u8),
    Head(u16, u8, u8, u16),
    Data(u8, bool, u16, &'a [u8]),
    Hole(u8, bool, u16, u16),
    Status(u8, bool, Vec<(u32, u32)>),
    Error(u8, bool, u32, &'a str, Option<u64>),
    None(u8),
}

impl Piece<'_> {
    fn bytes(&self) -> Vec<u8> {
        let flags = |done: &bool| if *done { chunk::DONE } else { 0 };
        let cookie = |cookie: &u8| u64::from(cookie % 8);
        match self {
            Self::Noise(noise) => noise.to_vec(),
            Self::Simple(which, error) => ReplyHead::Simple {
                error: u32::from(error % 2),
                cookie: cookie(which),
            }
            .encode(),
            Self::Head(flags, kind, which, length) => ReplyHead::Chunk {
                flags: *flags,
                kind: u16::from(*kind) % 8,
                cookie: cookie(which),
                length: u32::from(*length),
            }
            .encode(),
            Self::Data(which, done, at, data) => {
                let offset = OFFSET + u64::from(at % 4200);
                let length = data.len() as u32;
                let mut out = data_chunk_head(cookie(which), flags(done), offset, length);
                out.extend(*data);
                out
            }
            Self::Hole(which, done, at, length) => ChunkPayload::Hole {
                offset: OFFSET + u64::from(at % 4200),
                length: u32::from(*length),
            }
            .encode(cookie(which), flags(done)),
            Self::Status(which, done, extents) => {
                let extents = extents.iter();
                ChunkPayload::Status {
                    context: 1,
                    extents: extents
                        .map(|(length, state)| Extent {
                            length: *length,
                            state: *state,
                        })
                        .collect(),
                }
                .encode(cookie(which), flags(done))
            }
            Self::Error(which, done, error, message, offset) => ChunkPayload::Error {
                error: *error,
                message: (*message).to_owned(),
                offset: *offset,
            }
            .encode(cookie(which), flags(done)),
            Self::None(which) => ChunkPayload::None.encode(cookie(which), chunk::DONE),
        }
    }
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    uri: &'a str,
    greeting: [u8; 18],
    head: [u8; 20],
    data: &'a [u8],
    structured: bool,
    cut: u8,
    pieces: Vec<Piece<'a>>,
}

/// Reads 0 to 3, statuses 4 and 5, others 6 and 7.
#[derive(Default)]
struct Asked {
    coverage: [Coverage; 4],
    written: [Vec<bool>; 4],
    failed: [bool; 8],
    done: [bool; 8],
}

impl Asked {
    fn write(&mut self, cookie: u64, at: u64, length: usize) {
        assert!(!self.done[cookie as usize]);
        let written = &mut self.written[cookie as usize];
        written.resize(LENGTH as usize, false);
        for byte in &mut written[at as usize..at as usize + length] {
            assert!(!*byte);
            *byte = true;
        }
    }
}

impl Sink for Asked {
    fn expected(&self, cookie: u64) -> Option<Expected> {
        if cookie >= 8 || self.done[cookie as usize] {
            return None;
        }
        Some(match cookie {
            0..4 => Expected::Data {
                offset: OFFSET,
                length: LENGTH,
            },
            4 | 5 => Expected::Extents { context: 1 },
            _ => Expected::Result,
        })
    }

    fn coverage(&mut self, cookie: u64) -> Option<&mut Coverage> {
        self.coverage.get_mut(cookie as usize)
    }

    fn data(&mut self, cookie: u64, at: u64, bytes: &[u8]) {
        self.write(cookie, at, bytes.len());
    }

    fn zeroes(&mut self, cookie: u64, at: u64, length: u32) {
        self.write(cookie, at, length as usize);
    }

    fn extents(&mut self, cookie: u64, extents: Vec<Extent>) {
        assert!(matches!(cookie, 4 | 5) && !extents.is_empty());
    }

    fn failed(&mut self, cookie: u64, error: u32, _: String) {
        assert!(error != 0);
        self.failed[cookie as usize] = true;
    }

    fn done(&mut self, cookie: u64) {
        let at = cookie as usize;
        assert!(!std::mem::replace(&mut self.done[at], true));
        if at < 4 && !self.failed[at] {
            assert!(self.written[at].iter().filter(|byte| **byte).count() == LENGTH as usize);
        }
    }
}

fuzz_target!(|input: Input<'_>| {
    if let Ok(uri) = input.uri.parse::<Uri>() {
        assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
    }
    let _ = parse_greeting(&input.greeting);
    let _ = OptionReplyHead::parse(&input.head);
    let _ = Info::parse(input.data);
    let _ = parse_server(input.data);
    let _ = parse_meta_context(input.data);
    let wire: Vec<u8> = input.pieces.iter().flat_map(Piece::bytes).collect();
    let mut decoder = Decoder::new(input.structured);
    let mut asked = Asked::default();
    for part in wire.chunks(usize::from(input.cut).max(1)) {
        if let Err(seen) = decoder.feed(part, &mut asked) {
            assert!(!seen.text().is_empty() && !seen.remedy().is_empty());
            break;
        }
    }
});
