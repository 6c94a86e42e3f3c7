//! An interface as a guest's driver uses it, over a socket that keeps packets apart.
#![allow(clippy::cast_possible_truncation)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use strake_observe::Result;
use vm_memory::{Bytes, GuestAddress};

use super::{FRAME_LIMIT, HEADER, Link, NetBackend, Offloads, VirtioNet};
use crate::lifecycle::Component;
use crate::testing::{Driver, Host, Line, NEEDS_RESET, Piece, eventually};
use crate::virtio::{VERSION_1, VirtioPci, feature};

const BUFFER: u64 = 0x20_0000;
const MRG_RXBUF: u64 = feature(15);

#[derive(Debug)]
struct Wire {
    socket: UnixDatagram,
    offloads: Mutex<Vec<Offloads>>,
}

impl NetBackend for Wire {
    fn packets(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn set_offloads(&self, offloads: Offloads) -> Result<()> {
        self.offloads.lock().unwrap().push(offloads);
        Ok(())
    }
}

struct Net {
    host: Host,
    wire: Arc<Wire>,
    far: UnixDatagram,
}

fn net() -> Net {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(std::time::Duration::from_secs(5)))
        .unwrap();
    Net {
        host: Host::default(),
        wire: Arc::new(Wire {
            socket: near,
            offloads: Mutex::default(),
        }),
        far,
    }
}

impl Net {
    fn device(&self) -> (Arc<VirtioPci<VirtioNet>>, Driver<'_>) {
        let device = VirtioNet::over("net0", self.wire.clone(), [2, 0, 0, 1, 2, 3]);
        let (function, lines): (_, Vec<Arc<Line>>) = self.host.add(9, device);
        (function, Driver::probe(&self.host, 9, lines))
    }

    fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.host
            .memory()
            .read_slice(&mut data, GuestAddress(at))
            .unwrap();
        data
    }
}

/// A packet with its header, as the tap gives it.
fn packet(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|n| if n < HEADER { 0 } else { (n * 3 + seed) as u8 })
        .collect()
}

#[test]
fn the_configuration_says_what_it_is() {
    let net = net();
    let (function, mut driver) = net.device();
    assert_eq!(driver.config16(2), 0x1041);
    assert_eq!(driver.get32(driver.device), 0x0100_0002);
    assert_eq!(driver.get16(driver.device + 4), 0x0302);
    assert_eq!(driver.get16(driver.device + 6), 1);
    driver.bring_up(u64::MAX, 64);
    let generation = driver.get8(driver.common + 21);
    let line = driver.lines[2].clone();
    line.raised();
    function.device().set_link(Link::Down);
    assert_eq!(driver.get16(driver.device + 6), 0);
    assert_ne!(driver.get8(driver.common + 21), generation);
    assert_eq!(line.raised(), 1);
    assert_eq!(driver.get8(driver.isr), 2);
}

#[test]
fn features_that_need_others_are_refused_without_them() {
    let net = net();
    let (_function, mut driver) = net.device();
    for (features, good) in [
        (feature(7), false),
        (feature(7) | feature(1), true),
        (feature(9) | feature(1), false),
        (feature(9) | feature(8) | feature(1), true),
        (feature(11), false),
        (feature(12) | feature(0), true),
        (feature(13) | feature(0), false),
        (0, true),
    ] {
        assert_eq!(
            driver.negotiate(features | VERSION_1),
            good,
            "{features:#x}"
        );
    }
    driver.bring_up(feature(0) | feature(1) | feature(7), 64);
    let told = net.wire.offloads.lock().unwrap().last().copied();
    assert_eq!(told, Some(Offloads::CHECKSUM.with(Offloads::TSO4)));
}

#[test]
fn packets_of_the_guest_reach_the_wire() {
    let net = net();
    let (function, mut driver) = net.device();
    driver.bring_up(u64::MAX, 64);
    for len in [HEADER, 60, 1514 + HEADER, FRAME_LIMIT] {
        let sent = packet(len, len);
        net.host
            .memory()
            .write_slice(&sent, GuestAddress(BUFFER))
            .unwrap();
        // Header and packet apart, as drivers often do.
        let rest = (len - HEADER) as u32;
        let pieces = [
            Piece::readable(BUFFER, HEADER as u32),
            Piece::readable(BUFFER + HEADER as u64, rest),
        ];
        driver.submit(1, &pieces);
        let mut got = vec![0; FRAME_LIMIT + 1];
        let count = net.far.recv(&mut got).unwrap();
        assert_eq!(&got[..count], sent);
        driver.complete(1);
    }
    assert_eq!(function.device().counters().sent, 4);
}

#[test]
fn packets_from_the_wire_reach_the_guest_in_merged_buffers() {
    let net = net();
    let (_function, mut driver) = net.device();
    driver.bring_up(u64::MAX, 256);
    assert_ne!(driver.features & MRG_RXBUF, 0);
    let buffer = 1536u64;
    let offer = |driver: &mut Driver<'_>, n: u64| {
        driver.submit(0, &[Piece::writable(BUFFER + n * buffer, buffer as u32)]);
    };
    let slots = 200;
    for n in 0..slots {
        offer(&mut driver, n);
    }
    let mut next = 0;
    for len in [
        60,
        1536,
        1537,
        20_000,
        HEADER + 14,
        FRAME_LIMIT,
        60,
        1536 * 3,
    ] {
        let sent = packet(len, next as usize);
        net.far.send(&sent).unwrap();
        let (_, first) = driver.complete(0);
        let buffers = net.memory(BUFFER + next * buffer + 10, 2);
        let buffers = u64::from(u16::from_le_bytes([buffers[0], buffers[1]]));
        assert_eq!(buffers, (len as u64).div_ceil(buffer));
        let mut got = Vec::new();
        let mut written = first;
        for n in 0..buffers {
            if n > 0 {
                // All buffers of a packet are there when the first one is.
                written = driver.rings[0].reap().expect("the rest of the packet").1;
            }
            let at = BUFFER + (next % slots) * buffer;
            got.extend(net.memory(at, written as usize));
            offer(&mut driver, next % slots);
            next += 1;
        }
        assert_eq!(got.len(), len);
        assert_eq!(&got[HEADER..], &sent[HEADER..]);
    }
}

#[test]
fn a_packet_that_does_not_fit_yet_waits_for_more_buffers() {
    let net = net();
    let (_function, mut driver) = net.device();
    driver.bring_up(u64::MAX, 64);
    driver.submit(0, &[Piece::writable(BUFFER, 1000)]);
    let sent = packet(2500, 1);
    net.far.send(&sent).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(driver.rings[0].reap().is_none());
    driver.submit(0, &[Piece::writable(BUFFER + 1000, 1000)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(driver.rings[0].reap().is_none());
    driver.submit(0, &[Piece::writable(BUFFER + 2000, 1000)]);
    assert_eq!(driver.complete(0).1, 1000);
    assert_eq!(driver.complete(0).1, 1000);
    assert_eq!(driver.complete(0).1, 500);
    let got = net.memory(BUFFER, 2500);
    assert_eq!(got[10..12], [3, 0]);
    assert_eq!(got[HEADER..], sent[HEADER..]);
}

#[test]
fn without_merging_a_packet_takes_one_buffer_or_is_dropped() {
    let net = net();
    let (function, mut driver) = net.device();
    driver.bring_up(!MRG_RXBUF, 64);
    driver.submit(0, &[Piece::writable(BUFFER, 1600)]);
    net.far.send(&packet(5000, 1)).unwrap();
    eventually(|| function.device().counters().dropped == 1);
    net.far.send(&packet(1500, 2)).unwrap();
    assert_eq!(driver.complete(0).1, 1500);
    assert_eq!(net.memory(BUFFER + 10, 2), [1, 0]);
    assert_eq!(
        net.memory(BUFFER, 1500)[HEADER..],
        packet(1500, 2)[HEADER..]
    );
}

#[test]
fn a_full_wire_holds_packets_back_and_loses_none() {
    let net = net();
    let (_function, mut driver) = net.device();
    driver.bring_up(u64::MAX, 256);
    let count = 200u64;
    for n in 0..count {
        let sent = packet(9000, n as usize);
        let at = BUFFER + n * 9000;
        net.host
            .memory()
            .write_slice(&sent, GuestAddress(at))
            .unwrap();
        driver.submit(1, &[Piece::readable(at, 9000)]);
    }
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(
        driver.rings[1].used_index() < count as u16,
        "the wire is full"
    );
    let mut got = vec![0; 10_000];
    for n in 0..count {
        let len = net.far.recv(&mut got).unwrap();
        assert_eq!(got[..len], packet(9000, n as usize));
    }
    for _ in 0..count {
        driver.complete(1);
    }
}

#[test]
fn with_the_cable_out_nothing_passes() {
    let net = net();
    let (function, mut driver) = net.device();
    driver.bring_up(u64::MAX, 64);
    function.device().set_link(Link::Down);
    driver.submit(1, &[Piece::readable(BUFFER, 60)]);
    driver.complete(1);
    net.far.set_nonblocking(true).unwrap();
    let error = net.far.recv(&mut [0; 100]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    driver.submit(0, &[Piece::writable(BUFFER, 2000)]);
    net.far.send(&packet(60, 0)).unwrap();
    eventually(|| function.device().counters().dropped == 2);
    function.device().set_link(Link::Up);
    net.far.send(&packet(61, 0)).unwrap();
    assert_eq!(driver.complete(0).1, 61);
}

#[test]
fn buffers_that_were_taken_ahead_survive_a_quiesce() {
    let net = net();
    let (function, mut driver) = net.device();
    driver.bring_up(u64::MAX, 64);
    for n in 0..40 {
        driver.submit(0, &[Piece::writable(BUFFER + n * 2048, 2048)]);
    }
    for n in 0..10 {
        net.far.send(&packet(100, n)).unwrap();
        assert_eq!(driver.complete(0), (n as u16, 100));
        function.quiesce().unwrap();
        function.resume().unwrap();
    }
    for n in 10..40 {
        net.far.send(&packet(100, n)).unwrap();
        assert_eq!(driver.complete(0), (n as u16, 100));
    }
}

#[test]
fn a_reset_takes_its_buffers_from_the_device() {
    let net = net();
    let (_function, mut driver) = net.device();
    for round in 0..5 {
        driver.bring_up(u64::MAX, 64);
        for n in 0..40 {
            driver.submit(0, &[Piece::writable(BUFFER + n * 2048, 2048)]);
        }
        net.far.send(&packet(100, round)).unwrap();
        driver.complete(0);
        driver.reset();
        net.host
            .memory()
            .write_slice(&[0xaa; 40 * 2048], GuestAddress(BUFFER))
            .unwrap();
        net.far.send(&packet(3000, round)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert!(net.memory(BUFFER, 40 * 2048).iter().all(|b| *b == 0xaa));
        net.wire.socket.recv(&mut [0; 4000]).unwrap();
    }
}

#[test]
fn malformed_buffers_ask_for_a_reset_and_absurd_packets_are_dropped() {
    let net = net();
    let (function, mut driver) = net.device();
    let far = 0x7000_0000_0000;
    for (queue, piece) in [
        (0, Piece::writable(BUFFER, 11)),
        (0, Piece::readable(BUFFER, 2000)),
        (0, Piece::writable(far, 2000)),
        (1, Piece::readable(BUFFER, 11)),
        (1, Piece::readable(far, 60)),
        (1, Piece::writable(BUFFER, 60)),
    ] {
        driver.bring_up(u64::MAX, 64);
        driver.submit(queue, &[piece]);
        driver.expect_needs_reset();
    }
    driver.bring_up(u64::MAX, 64);
    let dropped = function.device().counters().dropped;
    driver.submit(1, &[Piece::readable(BUFFER, 1 << 20)]);
    driver.complete(1);
    assert_eq!(function.device().counters().dropped, dropped + 1);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}
