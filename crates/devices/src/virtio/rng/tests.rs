//! Entropy as a guest's driver asks for it.
#![allow(clippy::cast_possible_truncation)]

use vm_memory::{Bytes, GuestAddress};

use super::{ANSWER_LIMIT, VirtioRng};
use crate::testing::{Driver, Host, Piece};

#[test]
fn requests_are_filled_up_to_the_limit() {
    let host = Host::default();
    let (_function, lines) = host.add(4, VirtioRng::new("rng"));
    let mut driver = Driver::probe(&host, 4, lines);
    driver.bring_up(u64::MAX, 64);
    for (len, expected) in [(1, 1), (64, 64), (1 << 20, ANSWER_LIMIT as u32)] {
        driver.submit(0, &[Piece::writable(0x20_0000, len)]);
        assert_eq!(driver.complete(0).1, expected);
    }
    let mut bytes = [0; ANSWER_LIMIT];
    host.memory()
        .read_slice(&mut bytes, GuestAddress(0x20_0000))
        .unwrap();
    let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
    assert!((14_000..19_000).contains(&ones), "{ones} of 32768 bits");
}

#[test]
fn a_request_without_room_is_answered_with_nothing() {
    let host = Host::default();
    let (_function, lines) = host.add(4, VirtioRng::new("rng"));
    let mut driver = Driver::probe(&host, 4, lines);
    driver.bring_up(u64::MAX, 64);
    driver.submit(0, &[Piece::readable(0x20_0000, 64)]);
    assert_eq!(driver.complete(0).1, 0);
}

#[test]
fn a_request_outside_of_ram_asks_for_a_reset() {
    let host = Host::default();
    let (_function, lines) = host.add(4, VirtioRng::new("rng"));
    let mut driver = Driver::probe(&host, 4, lines);
    driver.bring_up(u64::MAX, 64);
    driver.submit(0, &[Piece::writable(0x7000_0000_0000, 64)]);
    driver.expect_needs_reset();
}
