//! Packets that are damaged on purpose.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};
use strake_api::control::{Body, FdIndex, MAX_FDS, MAX_PACKET, Packet, Request};
use strake_observe::Kind;

use crate::control::{Connection, Received, Sent};
use crate::observations::{BadPacket, DescriptorMissing};

fn pair() -> (Connection, OwnedFd) {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    (Connection::new(ours), theirs)
}

fn send_raw(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::empty(),
    )
    .unwrap();
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn status() -> Packet {
    Packet {
        id: 7,
        body: Body::Request(Request::Status),
    }
}

#[test]
fn packets_arrive_with_their_descriptors() {
    let (connection, theirs) = pair();
    let theirs = Connection::new(theirs);
    let file = File::open("/dev/null").unwrap();
    let sent = theirs.send_with(&status(), &[file.as_fd(), file.as_fd()]);
    assert_eq!(sent.unwrap(), Sent::Done);
    let Received::Packet(packet, mut fds) = connection.receive().unwrap() else {
        panic!("no packet");
    };
    assert_eq!(packet, status());
    assert_eq!(fds.count(), 2);
    fds.take(FdIndex(1), "a test").unwrap();
    let seen = fds.take(FdIndex(1), "a test").unwrap_err();
    assert_eq!(seen.id(), DescriptorMissing::ID);
    assert!(fds.take(FdIndex(2), "a test").is_err());
    assert!(matches!(connection.receive().unwrap(), Received::Nothing));
    drop(theirs);
    assert!(matches!(connection.receive().unwrap(), Received::Closed));
    assert_eq!(connection.send(&status()).unwrap(), Sent::Closed);
}

#[test]
fn damaged_packets_are_refused_one_by_one() {
    let (connection, theirs) = pair();
    let cases: [(&[u8], u64); 6] = [
        (b"", 0),
        (b"\xff\x00", 0),
        (b"{\"id\":3}", 3),
        (b"{\"id\":4,\"body\":{\"request\":\"unheard-of\"}}", 4),
        (b"{\"id\":-1,\"body\":{\"request\":\"status\"}}", 0),
        (b"[[[[[[[[[[[[[[[[", 0),
    ];
    for (bytes, expected) in cases {
        if bytes.is_empty() {
            continue; // the empty packet is the end of the stream
        }
        send_raw(&theirs, bytes, &[]);
        let Received::Damaged(id, seen) = connection.receive().unwrap() else {
            panic!("{bytes:?} was taken");
        };
        assert_eq!(id, expected, "{bytes:?}");
        assert_eq!(seen.id(), BadPacket::ID);
    }
    // Deeply nested beyond any sense.
    send_raw(&theirs, &b"[".repeat(MAX_PACKET), &[]);
    assert!(matches!(
        connection.receive().unwrap(),
        Received::Damaged(0, _)
    ));
    // And the connection still works.
    send_raw(&theirs, &serde_json::to_vec(&status()).unwrap(), &[]);
    assert!(matches!(
        connection.receive().unwrap(),
        Received::Packet(..)
    ));
}

#[test]
fn too_long_a_packet_is_refused() {
    let (connection, theirs) = pair();
    let mut bytes = serde_json::to_vec(&status()).unwrap();
    bytes.resize(MAX_PACKET + 1, b' ');
    send_raw(&theirs, &bytes, &[]);
    assert!(matches!(
        connection.receive().unwrap(),
        Received::Damaged(..)
    ));
    bytes.truncate(MAX_PACKET);
    send_raw(&theirs, &bytes, &[]);
    assert!(matches!(
        connection.receive().unwrap(),
        Received::Packet(..)
    ));
}

#[test]
fn too_many_descriptors_are_refused_and_closed() {
    let (connection, theirs) = pair();
    let file = File::open("/dev/null").unwrap();
    let bytes = serde_json::to_vec(&status()).unwrap();
    let many = vec![file.as_fd(); 253];
    // Other tests open descriptors at the same time, so leaks show only in numbers.
    let before = open_descriptors();
    for _ in 0..20 {
        send_raw(&theirs, &bytes, &many);
        assert!(matches!(
            connection.receive().unwrap(),
            Received::Damaged(7, _)
        ));
    }
    assert!(open_descriptors() < before + MAX_FDS * 10);
    send_raw(&theirs, &bytes, &vec![file.as_fd(); MAX_FDS]);
    let Received::Packet(_, fds) = connection.receive().unwrap() else {
        panic!("{MAX_FDS} descriptors were refused");
    };
    assert_eq!(fds.count(), MAX_FDS);
}

#[test]
fn a_full_socket_is_told() {
    let (connection, _theirs) = pair();
    let sent = (0..100_000)
        .map(|_| connection.send(&status()).unwrap())
        .find(|sent| *sent != Sent::Done);
    assert_eq!(sent, Some(Sent::Full));
}
