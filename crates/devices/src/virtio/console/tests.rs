//! A console as a guest's driver uses it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::VirtioConsole;
use crate::testing::{Driver, Host, Line, Piece, eventually};
use crate::virtio::VirtioPci;

const BUFFER: u64 = 0x20_0000;

fn console(host: &Host) -> (Arc<VirtioPci<VirtioConsole>>, Vec<Arc<Line>>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = VirtioConsole::new("console", theirs.into()).unwrap();
    let (function, lines) = host.add(7, device);
    (function, lines, ours)
}

#[test]
fn output_and_input_pass() {
    let host = Host::default();
    let (_function, lines, mut ours) = console(&host);
    let mut driver = Driver::probe(&host, 7, lines);
    driver.bring_up(u64::MAX, 64);
    host.memory()
        .write_slice(b"hello", GuestAddress(BUFFER))
        .unwrap();
    driver.submit(1, &[Piece::readable(BUFFER, 5)]);
    driver.complete(1);
    let mut got = [0; 5];
    ours.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");

    // Input before there is a buffer waits for it.
    ours.write_all(b"abcdef").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(10));
    driver.submit(0, &[Piece::writable(BUFFER, 4)]);
    assert_eq!(driver.complete(0).1, 4);
    driver.submit(0, &[Piece::writable(BUFFER + 4, 4)]);
    assert_eq!(driver.complete(0).1, 2);
    let mut got = [0; 6];
    host.memory()
        .read_slice(&mut got, GuestAddress(BUFFER))
        .unwrap();
    assert_eq!(&got, b"abcdef");
    // Input after there is a buffer needs no kick.
    driver.submit(0, &[Piece::writable(BUFFER, 4)]);
    std::thread::sleep(std::time::Duration::from_millis(10));
    ours.write_all(b"x").unwrap();
    assert_eq!(driver.complete(0).1, 1);
}

#[test]
fn a_host_that_does_not_read_does_not_hold_the_guest() {
    let host = Host::default();
    let (function, lines, _ours) = console(&host);
    let mut driver = Driver::probe(&host, 7, lines);
    driver.bring_up(u64::MAX, 64);
    for _ in 0..200 {
        driver.submit(1, &[Piece::readable(BUFFER, 8192)]);
        driver.complete(1);
    }
    assert!(function.device().lost() > 0);
}

#[test]
fn a_host_that_goes_away_is_survived() {
    let host = Host::default();
    let (_function, lines, ours) = console(&host);
    let mut driver = Driver::probe(&host, 7, lines);
    driver.bring_up(u64::MAX, 64);
    driver.submit(0, &[Piece::writable(BUFFER, 4)]);
    drop(ours);
    for _ in 0..10 {
        driver.submit(1, &[Piece::readable(BUFFER, 10)]);
        driver.complete(1);
    }
    driver.reset();
}

#[test]
fn buffers_outside_of_ram_ask_for_a_reset() {
    let host = Host::default();
    let (_function, lines, mut ours) = console(&host);
    let mut driver = Driver::probe(&host, 7, lines);
    for queue in [0, 1] {
        driver.bring_up(u64::MAX, 64);
        let far = 0x7000_0000_0000;
        let piece = match queue {
            0 => Piece::writable(far, 64),
            _ => Piece::readable(far, 64),
        };
        ours.write_all(b"x").unwrap();
        driver.submit(queue, &[piece]);
        driver.expect_needs_reset();
    }
    driver.bring_up(u64::MAX, 64);
    driver.submit(1, &[Piece::readable(BUFFER, 10)]);
    driver.complete(1);
    eventually(|| driver.rings[1].used_index() == 1);
}
