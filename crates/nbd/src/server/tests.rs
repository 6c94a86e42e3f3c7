#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::negotiation::*;
use super::request::*;
use crate::protocol::handshake::*;
use crate::protocol::transmission::{RequestHead, command, command_flag, error, flag};

fn offers() -> Vec<Offer> {
    let offer = |name: &str, writable| Offer {
        name: name.to_owned(),
        description: "words".to_owned(),
        size: 1 << 20,
        writable,
    };
    vec![offer("one", true), offer("two", false)]
}

/// The kinds of the replies in `out`, all of them to `option`.
fn kinds(option: u32, out: &[u8]) -> Vec<u32> {
    let mut kinds = Vec::new();
    let mut rest = out;
    while !rest.is_empty() {
        let head = rest[..20].try_into().unwrap();
        let head = OptionReplyHead::parse(head).unwrap();
        assert_eq!(head.option, option);
        kinds.push(head.kind);
        rest = &rest[20 + head.length as usize..];
    }
    kinds
}

fn ask(negotiation: &mut Negotiation<'_>, option: u32, data: &[u8]) -> (Vec<u32>, Next) {
    let mut out = Vec::new();
    let next = negotiation.answer(option, data, &mut out);
    (kinds(option, &out), next)
}

fn go(name: &str) -> Vec<u8> {
    InfoRequest {
        name: name.to_owned(),
        wants: vec![info::BLOCK_SIZE, 99],
    }
    .encode()
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    MetaRequest {
        name: name.to_owned(),
        queries: queries.iter().map(|query| (*query).to_owned()).collect(),
    }
    .encode()
}

#[test]
fn a_usual_client() {
    let offers = offers();
    let mut it = Negotiation::new(&offers, Tls::None, true);
    let contexts = meta("two", &["base:allocation", "qemu:x"]);
    // Structured replies come first.
    let refused = (vec![reply::ERR_INVALID], Next::Option);
    assert_eq!(ask(&mut it, option::SET_META_CONTEXT, &contexts), refused);
    let done = (vec![reply::ACK], Next::Option);
    assert_eq!(ask(&mut it, option::STRUCTURED_REPLY, &[]), done);
    let (kinds, _) = ask(&mut it, option::SET_META_CONTEXT, &contexts);
    assert_eq!(kinds, [reply::META_CONTEXT, reply::ACK]);
    let (kinds, _) = ask(&mut it, option::LIST, &[]);
    assert_eq!(kinds, [reply::SERVER, reply::SERVER, reply::ACK]);
    let (kinds, next) = ask(&mut it, option::INFO, &go("one"));
    assert_eq!(kinds, [reply::INFO, reply::INFO, reply::ACK]);
    assert_eq!(next, Next::Option);
    // The contexts were chosen for another export.
    let agreed = |export, allocation| {
        Next::Transmission(Agreed {
            export,
            structured: true,
            allocation,
        })
    };
    assert_eq!(ask(&mut it, option::GO, &go("one")).1, agreed(0, false));
    assert_eq!(ask(&mut it, option::GO, &go("two")).1, agreed(1, true));
    // No name is no export if there are several; and the last choice counts.
    assert_eq!(ask(&mut it, option::GO, &go("")).0, [reply::ERR_UNKNOWN]);
    let nothing = meta("two", &[]);
    assert_eq!(ask(&mut it, option::SET_META_CONTEXT, &nothing), done);
    assert_eq!(ask(&mut it, option::GO, &go("two")).1, agreed(1, false));
    assert_eq!(ask(&mut it, option::ABORT, b"x").1, Next::End);
}

#[test]
fn the_old_way() {
    let offers = offers();
    for (no_zeroes, length) in [(true, 10), (false, 134)] {
        let mut it = Negotiation::new(&offers, Tls::None, no_zeroes);
        let mut out = Vec::new();
        let next = it.answer(option::EXPORT_NAME, b"two", &mut out);
        assert!(matches!(next, Next::Transmission(Agreed { export: 1, .. })));
        assert_eq!(out.len(), length);
        let flags = u16::from_be_bytes([out[8], out[9]]);
        assert!(flags & flag::READ_ONLY != 0 && flags & flag::SEND_TRIM == 0);
        assert_eq!(it.answer(option::EXPORT_NAME, b"no", &mut out), Next::End);
    }
}

#[test]
fn nothing_before_tls() {
    let offers = offers();
    let mut it = Negotiation::new(&offers, Tls::Required, true);
    let refused = (vec![reply::ERR_TLS_REQD], Next::Option);
    for option in [
        option::LIST,
        option::STRUCTURED_REPLY,
        option::SET_META_CONTEXT,
        77,
    ] {
        assert_eq!(ask(&mut it, option, &[]), refused);
    }
    assert_eq!(ask(&mut it, option::GO, &go("one")), refused);
    assert_eq!(ask(&mut it, option::STARTTLS, b"x").0, [reply::ERR_INVALID]);
    assert_eq!(ask(&mut it, option::STARTTLS, &[]).1, Next::Tls);
    assert_eq!(ask(&mut it, option::STARTTLS, &[]).0, [reply::ERR_INVALID]);
    let (_, next) = ask(&mut it, option::GO, &go("one"));
    assert!(matches!(
        next,
        Next::Transmission(Agreed {
            structured: false,
            ..
        })
    ));
    let mut it = Negotiation::new(&offers, Tls::Required, true);
    assert_eq!(ask(&mut it, option::EXPORT_NAME, b"one").1, Next::End);
    let mut it = Negotiation::new(&offers, Tls::None, true);
    assert_eq!(ask(&mut it, option::STARTTLS, &[]).0, [reply::ERR_POLICY]);
}

#[test]
fn it_does_not_go_on_for_ever() {
    let offers = offers();
    let mut it = Negotiation::new(&offers, Tls::None, true);
    for _ in 0..MAX_OPTIONS {
        assert_eq!(
            ask(&mut it, 77, &[]),
            (vec![reply::ERR_UNSUP], Next::Option)
        );
    }
    assert_eq!(ask(&mut it, 77, &[]).1, Next::End);
}

const LIMITS: Limits = Limits {
    size: 1 << 20,
    writable: true,
    structured: true,
    allocation: true,
};

fn head(command: u16, flags: u16, offset: u64, length: u32) -> RequestHead {
    RequestHead {
        flags,
        command,
        cookie: 1,
        offset,
        length,
    }
}

#[test]
fn requests_that_are_refused() {
    let refused = |head: &RequestHead, limits: &Limits| match check(head, limits) {
        Action::Refuse(error, words) => {
            assert!(!words.is_empty());
            error
        }
        other => panic!("{head:?}: {other:?}"),
    };
    let size = LIMITS.size;
    for (command, flags, offset, length, expected) in [
        (command::READ, command_flag::NO_HOLE, 0, 512, error::EINVAL),
        (command::READ, 0, size - 512, 1024, error::EINVAL),
        (command::READ, 0, u64::MAX, 1024, error::EINVAL),
        (command::WRITE, 0, size, 512, error::ENOSPC),
        (command::WRITE, 0, 1, 512, error::EINVAL),
        (command::WRITE, 0, 0, 513, error::EINVAL),
        (command::WRITE, command_flag::DF, 0, 512, error::EINVAL),
        (command::TRIM, 0, size, 512, error::EINVAL),
        (command::WRITE_ZEROES, 0, size, 512, error::ENOSPC),
        (command::BLOCK_STATUS, 0, 0, 0, error::EINVAL),
        (5, 0, 0, 512, error::EINVAL),
        (99, 0, 0, 0, error::EINVAL),
    ] {
        assert_eq!(
            refused(&head(command, flags, offset, length), &LIMITS),
            expected
        );
    }
    let read_only = Limits {
        writable: false,
        ..LIMITS
    };
    for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(refused(&head(command, 0, 0, 512), &read_only), error::EPERM);
    }
    let plain = Limits {
        structured: false,
        allocation: false,
        ..LIMITS
    };
    let whole = head(command::READ, command_flag::DF, 0, 512);
    assert_eq!(refused(&whole, &plain), error::EINVAL);
    assert_eq!(
        refused(&head(command::BLOCK_STATUS, 0, 0, 512), &plain),
        error::EINVAL
    );
    let large = Limits {
        size: 1 << 40,
        ..LIMITS
    };
    assert_eq!(
        refused(&head(command::READ, 0, 0, 1 << 26), &large),
        error::EOVERFLOW
    );
    assert_eq!(
        check(&head(command::WRITE, 0, 0, 1 << 26), &large),
        Action::HangUp
    );
}

proptest! {
    /// Whatever is asked for: what is done is within the export and in sectors.
    #[test]
    fn only_what_is_within(
        command in 0u16..10,
        flags in 0u16..32,
        offset in prop_oneof![0u64..(2 << 20), any::<u64>()],
        length in prop_oneof![0u32..(2 << 20), any::<u32>()],
        writable: bool,
    ) {
        let limits = Limits { writable, ..LIMITS };
        match check(&head(command, flags, offset, length), &limits) {
            Action::Read { .. } | Action::Status { .. } => {
                prop_assert!(length > 0 && offset + u64::from(length) <= limits.size);
            }
            Action::Write { .. } | Action::Trim { .. } | Action::WriteZeroes { .. } => {
                prop_assert!(writable && length > 0);
                prop_assert!(offset % 512 == 0 && length % 512 == 0);
                prop_assert!(offset + u64::from(length) <= limits.size);
            }
            _ => {}
        }
    }

    #[test]
    fn any_option(options in vec((0u32..12, vec(any::<u8>(), 0..60)), 0..20), tls: bool) {
        let offers = offers();
        let tls = if tls { Tls::Required } else { Tls::None };
        let mut it = Negotiation::new(&offers, tls, true);
        for (option, data) in options {
            let mut out = Vec::new();
            let next = it.answer(option, &data, &mut out);
            if option != option::EXPORT_NAME {
                let kinds = kinds(option, &out);
                // Each option has one last reply.
                let is_last = |kind: &u32| *kind == reply::ACK || kind & reply::ERROR != 0;
                prop_assert!(next == Next::End || kinds.last().is_some_and(is_last));
            }
            if next == Next::End {
                break;
            }
        }
    }
}
