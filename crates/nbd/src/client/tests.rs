#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::coverage::Coverage;
use super::decoder::*;
use crate::protocol::transmission::{
    ChunkPayload, Extent, ReplyHead, chunk, data_chunk_head, error,
};

const OFFSET: u64 = 4096;
const LENGTH: u32 = 1024;

/// One read (cookie 1), one status (2), one write (3).
#[derive(Default)]
struct Asked {
    data: Vec<u8>,
    coverage: Coverage,
    extents: Option<Vec<Extent>>,
    failed: Vec<(u64, u32)>,
    done: Vec<u64>,
}

impl Asked {
    fn new() -> Self {
        Self {
            data: vec![0xee; LENGTH as usize],
            ..Self::default()
        }
    }
}

impl Sink for Asked {
    fn expected(&self, cookie: u64) -> Option<Expected> {
        if self.done.contains(&cookie) {
            return None;
        }
        match cookie {
            1 => Some(Expected::Data {
                offset: OFFSET,
                length: LENGTH,
            }),
            2 => Some(Expected::Extents { context: 5 }),
            3 => Some(Expected::Result),
            _ => None,
        }
    }

    fn coverage(&mut self, cookie: u64) -> Option<&mut Coverage> {
        (cookie == 1).then_some(&mut self.coverage)
    }

    fn data(&mut self, cookie: u64, at: u64, bytes: &[u8]) {
        assert_eq!(cookie, 1);
        self.data[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn zeroes(&mut self, cookie: u64, at: u64, length: u32) {
        assert_eq!(cookie, 1);
        self.data[at as usize..at as usize + length as usize].fill(0);
    }

    fn extents(&mut self, _: u64, extents: Vec<Extent>) {
        self.extents = Some(extents);
    }

    fn failed(&mut self, cookie: u64, error: u32, _: String) {
        self.failed.push((cookie, error));
    }

    fn done(&mut self, cookie: u64) {
        self.done.push(cookie);
    }
}

fn data(cookie: u64, flags: u16, at: u64, bytes: &[u8]) -> Vec<u8> {
    let mut out = data_chunk_head(cookie, flags, OFFSET.wrapping_add(at), bytes.len() as u32);
    out.extend(bytes);
    out
}

fn hole(flags: u16, at: u64, length: u32) -> Vec<u8> {
    let offset = OFFSET + at;
    ChunkPayload::Hole { offset, length }.encode(1, flags)
}

#[test]
fn a_read_in_pieces() {
    let mut wire = data(1, 0, 512, &[7; 512]);
    wire.extend(
        ReplyHead::Simple {
            error: 0,
            cookie: 3,
        }
        .encode(),
    );
    wire.extend(hole(0, 0, 512));
    let extents = vec![Extent {
        length: 9,
        state: 3,
    }];
    let context = 5;
    wire.extend(ChunkPayload::Status { context, extents }.encode(2, chunk::DONE));
    wire.extend(ChunkPayload::None.encode(1, chunk::DONE));
    // However it is cut.
    for size in [1, 7, 64, 10_000] {
        let mut asked = Asked::new();
        let mut decoder = Decoder::new(true);
        for piece in wire.chunks(size) {
            decoder.feed(piece, &mut asked).unwrap();
        }
        assert_eq!(asked.done, [3, 2, 1]);
        assert_eq!(asked.extents.as_ref().unwrap().len(), 1);
        assert!(asked.failed.is_empty());
        assert!(asked.data[..512] == [0; 512] && asked.data[512..] == [7; 512]);
    }
}

#[test]
fn a_simple_read() {
    let mut wire = ReplyHead::Simple {
        error: 0,
        cookie: 1,
    }
    .encode();
    wire.extend([9; LENGTH as usize]);
    let mut asked = Asked::new();
    Decoder::new(false).feed(&wire, &mut asked).unwrap();
    assert_eq!(asked.done, [1]);
    assert!(asked.data.iter().all(|byte| *byte == 9));
    let mut asked = Asked::new();
    assert!(Decoder::new(true).feed(&wire, &mut asked).is_err());
    let failed = ReplyHead::Simple {
        error: 5,
        cookie: 1,
    }
    .encode();
    Decoder::new(true).feed(&failed, &mut asked).unwrap();
    assert_eq!(asked.failed, [(1, error::EIO)]);
}

#[test]
fn success_without_the_data_is_none() {
    let wire = data(1, chunk::DONE, 0, &[1; 512]);
    let mut asked = Asked::new();
    Decoder::new(true).feed(&wire, &mut asked).unwrap();
    assert_eq!((asked.failed, asked.done), (vec![(1, error::EIO)], vec![1]));
}

#[test]
fn breaches() {
    let two = |one: Vec<u8>, other: Vec<u8>| [one, other].concat();
    let status = |context, cookie| {
        let extents = vec![Extent {
            length: 9,
            state: 3,
        }];
        ChunkPayload::Status { context, extents }.encode(cookie, chunk::DONE)
    };
    for (what, wire) in [
        ("magic", vec![0u8; 16]),
        (
            "cookie",
            ReplyHead::Simple {
                error: 0,
                cookie: 4,
            }
            .encode(),
        ),
        ("beyond the end", data(1, 0, 1000, &[1; 25])),
        (
            "before the begin",
            data(1, 0, 0u64.wrapping_sub(1), &[1; 2]),
        ),
        ("twice", two(data(1, 0, 0, &[1; 9]), data(1, 0, 8, &[1; 9]))),
        ("data and hole", two(data(1, 0, 0, &[1; 9]), hole(0, 0, 1))),
        ("data for a write", data(3, 0, 0, &[1; 9])),
        (
            "hole for a status",
            ChunkPayload::Hole {
                offset: OFFSET,
                length: 1,
            }
            .encode(2, 0),
        ),
        ("another context", status(6, 2)),
        ("extents for a read", status(5, 1)),
        (
            "no extents",
            ReplyHead::Simple {
                error: 0,
                cookie: 2,
            }
            .encode(),
        ),
        ("none in the middle", ChunkPayload::None.encode(1, 0)),
        ("after the end", two(status(5, 2), status(5, 2))),
    ] {
        let seen = Decoder::new(true).feed(&wire, &mut Asked::new());
        assert!(seen.is_err(), "{what}");
        let seen = Decoder::new(false).feed(&wire, &mut Asked::new());
        assert!(seen.is_err(), "{what}, without structured replies");
    }
}

proptest! {
    #[test]
    fn nothing_panics(
        pieces in vec(prop_oneof![
            vec(any::<u8>(), 0..40),
            (any::<u16>(), 0u16..8, 0u64..5, 0u32..40).prop_map(|(flags, kind, cookie, length)| {
                ReplyHead::Chunk { flags, kind, cookie, length }.encode()
            }),
            (0u32..2, 0u64..5)
                .prop_map(|(error, cookie)| ReplyHead::Simple { error, cookie }.encode()),
            (0u16..2, 0u64..1100, 1usize..200)
                .prop_map(|(flags, at, count)| data(1, flags, at, &vec![1; count])),
        ], 0..20),
        structured: bool,
    ) {
        let mut asked = Asked::new();
        let mut decoder = Decoder::new(structured);
        for piece in pieces {
            if decoder.feed(&piece, &mut asked).is_err() {
                break;
            }
        }
        let mut done = asked.done.clone();
        done.dedup();
        prop_assert_eq!(done.len(), asked.done.len());
    }
}
