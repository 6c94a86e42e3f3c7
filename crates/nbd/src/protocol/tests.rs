#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::handshake::*;
use super::transmission::*;
use super::*;

#[test]
fn messages_as_the_specification_has_them() {
    assert_eq!(&greeting()[..16], b"NBDMAGICIHAVEOPT");
    let head = RequestHead {
        flags: command_flag::FUA,
        command: command::WRITE,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1_0000,
        length: 0x200,
    };
    let wire = [
        0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,
        2, 0,
    ];
    assert_eq!(head.encode(), wire);
    assert_eq!(RequestHead::parse(&wire).unwrap(), head);
    let simple = ReplyHead::Simple {
        error: 5,
        cookie: 9,
    };
    assert_eq!(
        simple.encode(),
        [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9]
    );
    let hole = ChunkPayload::Hole {
        offset: 512,
        length: 1024,
    };
    assert_eq!(
        hole.encode(7, chunk::DONE),
        [
            0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 12, 0, 0, 0, 0, 0,
            0, 2, 0, 0, 0, 4, 0
        ]
    );
}

#[test]
fn greetings_that_are_none() {
    let mut good: [u8; 18] = greeting().try_into().unwrap();
    assert_eq!(parse_greeting(&good).unwrap(), FIXED_NEWSTYLE | NO_ZEROES);
    good[17] = 0;
    assert!(parse_greeting(&good).is_err());
    good[0] = 0;
    assert!(parse_greeting(&good).unwrap_err().is::<Malformed>());
    assert!(parse_client_flags(client_flags(FIXED_NEWSTYLE | NO_ZEROES)).unwrap());
    assert!(!parse_client_flags(client_flags(FIXED_NEWSTYLE)).unwrap());
    assert!(parse_client_flags([0, 0, 0, 0]).is_err());
    assert!(parse_client_flags([0, 0, 0, 5]).is_err());
}

#[test]
fn chunks_that_break_the_rules() {
    for (kind, payload) in [
        (chunk::NONE, &[0u8][..]),
        (chunk::OFFSET_HOLE, &[0; 12]),
        (chunk::OFFSET_HOLE, &[1; 11]),
        (chunk::OFFSET_HOLE, &[1; 13]),
        (chunk::BLOCK_STATUS, &[1; 4]),
        (chunk::BLOCK_STATUS, &[1; 13]),
        (chunk::BLOCK_STATUS, &[0; 12]),
        (chunk::ERROR, &[0, 0, 0, 5, 0, 1]),
        (chunk::ERROR, &[0, 0, 0, 0, 0, 0]),
        (chunk::ERROR, &[0, 0, 0, 5, 0, 0, 1]),
        (chunk::ERROR_OFFSET, &[0, 0, 0, 5, 0, 0, 1]),
        (77, &[]),
    ] {
        assert!(
            ChunkPayload::parse(kind, payload).is_err(),
            "{kind} {payload:?}"
        );
    }
    // An unknown error is an error, whatever follows its message.
    let unknown = ChunkPayload::parse(chunk::ERROR_BIT + 99, &[0, 0, 0, 5, 0, 1, b'x', 1, 2]);
    let expected = ChunkPayload::Error {
        error: 5,
        message: "x".to_owned(),
        offset: None,
    };
    assert_eq!(unknown.unwrap(), expected);
}

fn name() -> impl Strategy<Value = String> {
    "[a-z :/é]{0,40}"
}

fn info() -> impl Strategy<Value = Info> {
    prop_oneof![
        any::<(u64, u16)>().prop_map(|(size, flags)| Info::Export { size, flags }),
        name().prop_map(Info::Name),
        name().prop_map(Info::Description),
        (0u32..17, any::<u32>(), any::<u32>()).prop_map(|(minimum, preferred, maximum)| {
            Info::BlockSize(BlockSizes {
                minimum: 1 << minimum,
                preferred,
                maximum: maximum.max(1 << minimum),
            })
        }),
        (4u16..).prop_map(Info::Other),
    ]
}

fn payload() -> impl Strategy<Value = ChunkPayload> {
    let extent = (1u32.., any::<u32>()).prop_map(|(length, state)| Extent { length, state });
    prop_oneof![
        Just(ChunkPayload::None),
        (any::<u64>(), 1u32..).prop_map(|(offset, length)| ChunkPayload::Hole { offset, length }),
        (any::<u32>(), vec(extent, 1..20))
            .prop_map(|(context, extents)| ChunkPayload::Status { context, extents }),
        (1u32.., name(), any::<Option<u64>>()).prop_map(|(error, message, offset)| {
            ChunkPayload::Error {
                error,
                message,
                offset,
            }
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        request in (name(), vec(any::<u16>(), 0..9)),
        meta in (name(), vec(name(), 0..9)),
        info in info(),
        payload in payload(),
        head in any::<(u16, u16, u64, u64, u32)>(),
    ) {
        let (name, wants) = request;
        let request = InfoRequest { name, wants };
        prop_assert_eq!(&InfoRequest::parse(&request.encode()).unwrap(), &request);
        let (name, queries) = meta;
        let meta = MetaRequest { name, queries };
        prop_assert_eq!(&MetaRequest::parse(&meta.encode()).unwrap(), &meta);
        prop_assert_eq!(&Info::parse(&info.encode()).unwrap(), &info);
        let (flags, command, cookie, offset, length) = head;
        let head = RequestHead { flags, command, cookie, offset, length };
        prop_assert_eq!(RequestHead::parse(&head.encode()).unwrap(), head);
        let wire = payload.encode(cookie, flags);
        let (first, rest) = wire.split_at(ReplyHead::CHUNK_BYTES);
        let ReplyHead::Chunk { flags: f, kind, cookie: c, length } =
            ReplyHead::parse(first).unwrap() else { panic!("not a chunk") };
        prop_assert_eq!((f, c, length as usize), (flags, cookie, rest.len()));
        prop_assert_eq!(ChunkPayload::parse(kind, rest).unwrap(), payload);
    }

    #[test]
    fn nothing_panics(bytes in vec(any::<u8>(), 0..200), kind in any::<u16>()) {
        let _ = InfoRequest::parse(&bytes);
        let _ = MetaRequest::parse(&bytes);
        let _ = Info::parse(&bytes);
        let _ = parse_server(&bytes);
        let _ = parse_meta_context(&bytes);
        let _ = ReplyHead::parse(&bytes);
        let _ = ChunkPayload::parse(kind % 8, &bytes);
        let _ = ChunkPayload::parse(kind, &bytes);
    }
}
