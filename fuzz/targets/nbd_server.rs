//! A client of our NBD server: options as they come, their data whole or made of noise, then
//! requests. Whatever it says: each option gets one last reply, nothing is agreed on that was not
//! offered, and nothing is done beyond the export.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use strake_nbd::protocol::handshake::{
    InfoRequest, MetaRequest, OptionHead, OptionReplyHead, option, parse_client_flags, reply,
};
use strake_nbd::protocol::transmission::RequestHead;
use strake_nbd::server::negotiation::{Negotiation, Next, Offer, Tls};
use strake_nbd::server::request::{Action, Limits, check, payload_of};

#[derive(Debug, Arbitrary)]
enum Data<'a> {
    Noise(&'a [u8]),
    Info(&'a str, Vec<u16>),
    Meta(&'a str, Vec<&'a str>),
}

impl Data<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Noise(noise) => noise.to_vec(),
            Self::Info(name, wants) => InfoRequest {
                name: (*name).to_owned(),
                wants: wants.clone(),
            }
            .encode(),
            Self::Meta(name, queries) => MetaRequest {
                name: (*name).to_owned(),
                queries: queries.iter().map(|query| (*query).to_owned()).collect(),
            }
            .encode(),
        }
    }
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    flags: [u8; 4],
    tls: bool,
    options: Vec<(u8, Data<'a>)>,
    head: [u8; 16],
    requests: Vec<[u8; 24]>,
}

/// Whether the replies are whole, all to this option, and the last of them is a last one.
fn well_formed(out: &[u8], asked: u32) -> bool {
    let mut rest = out;
    let mut last = None;
    while !rest.is_empty() {
        let (head, data) = rest.split_at(OptionReplyHead::BYTES);
        let head = OptionReplyHead::parse(head.try_into().unwrap()).unwrap();
        assert_eq!(head.option, asked);
        rest = &data[head.length as usize..];
        last = Some(head.kind);
    }
    last.is_some_and(|kind| kind == reply::ACK || kind & reply::ERROR != 0)
}

fuzz_target!(|input: Input<'_>| {
    let _ = OptionHead::parse(&input.head);
    let offers = [("", true), ("a", false), ("b/c", true)].map(|(name, writable)| Offer {
        name: name.to_owned(),
        description: "a disk".to_owned(),
        size: 1 << 30,
        writable,
    });
    let tls = if input.tls { Tls::Required } else { Tls::None };
    let no_zeroes = parse_client_flags(input.flags).unwrap_or(true);
    let mut negotiation = Negotiation::new(&offers, tls, no_zeroes);
    let mut encrypted = false;
    let mut agreed = None;
    for (number, data) in &input.options {
        let (number, data) = (u32::from(number % 13), data.bytes());
        let mut out = Vec::new();
        match negotiation.answer(number, &data, &mut out) {
            Next::End => break,
            Next::Tls => encrypted = true,
            Next::Option => assert!(well_formed(&out, number)),
            Next::Transmission(what) => {
                assert!(encrypted || !input.tls);
                assert!(number == option::EXPORT_NAME || well_formed(&out, number));
                agreed = Some(what);
                break;
            }
        }
    }
    let Some(agreed) = agreed else {
        return;
    };
    let offer = &offers[agreed.export];
    assert!(agreed.structured || !agreed.allocation);
    let limits = Limits {
        size: offer.size,
        writable: offer.writable,
        structured: agreed.structured,
        allocation: agreed.allocation,
    };
    for request in &input.requests {
        let mut wire = [0u8; RequestHead::BYTES];
        wire[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
        wire[4..].copy_from_slice(request);
        let head = RequestHead::parse(&wire).unwrap();
        assert_eq!(head.encode(), wire);
        let within = || head.offset.checked_add(u64::from(head.length)).unwrap() <= limits.size;
        match check(&head, &limits) {
            Action::Read { .. } | Action::Status { .. } => assert!(within()),
            Action::Write { .. } | Action::Trim { .. } | Action::WriteZeroes { .. } => {
                assert!(within() && limits.writable);
                assert!(head.offset % 512 == 0 && head.length % 512 == 0);
            }
            Action::Refuse(error, words) => assert!(error != 0 && !words.is_empty()),
            Action::Nothing => assert_eq!(head.length, 0),
            Action::HangUp => assert!(payload_of(&head) > 0),
            Action::Flush | Action::Disconnect => {}
        }
    }
});
