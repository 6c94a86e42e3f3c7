//! Front-ends that break the protocol, and guests that break their rings.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};

use super::front_end::*;
use crate::testing::{NEXT, Piece, eventually};

/// That the server still serves a front-end that behaves.
fn serves(served: &Served) {
    let mut guest = Guest::new(1, 16);
    let _front_end = guest.attach(served, &[]);
    let data = [Piece::writable(DATA, 512)];
    assert_eq!(guest.request(0, IN, 0, &data), 0);
}

#[test]
fn nonsense_in_messages_ends_the_connection_and_nothing_else() {
    let served = serve(2);
    let guest = Guest::new(2, 64);
    let addresses = guest.addresses(&guest.rings[0]);
    let elsewhere = VringConfigData {
        desc_table_addr: 0x1000,
        ..addresses
    };
    let misaligned = VringConfigData {
        used_ring_addr: addresses.used_ring_addr + 1,
        ..addresses
    };
    let at_the_end = VringConfigData {
        desc_table_addr: THEIRS + (4 << 20) - 16,
        ..addresses
    };
    type Nonsense<'a> = Box<dyn Fn(&mut Frontend) -> bool + 'a>;
    let tries: Vec<(&str, Nonsense<'_>)> = vec![
        (
            "features",
            Box::new(|of| of.set_features(u64::MAX).is_err()),
        ),
        ("size 0", Box::new(|of| of.set_vring_num(0, 0).is_err())),
        ("size 3", Box::new(|of| of.set_vring_num(0, 3).is_err())),
        (
            "size 2048",
            Box::new(|of| of.set_vring_num(0, 2048).is_err()),
        ),
        (
            "a region at the end of the address space",
            Box::new(|of| {
                let mut region = guest.region();
                region.guest_phys_addr = u64::MAX - 4096;
                of.set_mem_table(&[region]).is_err()
            }),
        ),
        (
            "a region that its file does not have",
            Box::new(|of| {
                let mut region = guest.region();
                region.mmap_offset = 1 << 40;
                of.set_mem_table(&[region]).is_err()
            }),
        ),
        (
            "regions that overlap",
            Box::new(|of| of.set_mem_table(&[guest.region(), guest.region()]).is_err()),
        ),
        (
            "the removal of what was never added",
            Box::new(|of| of.remove_mem_region(&guest.region()).is_err()),
        ),
        (
            "a configuration too far",
            Box::new(|of| {
                let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
                let got = of.get_config(0x20, 0xe0, flags, &[0; 0xe0]);
                got.is_err() || got.is_ok_and(|(_, bytes)| bytes.iter().skip(40).all(|of| *of == 0))
            }),
        ),
    ];
    for (what, nonsense) in tries {
        let mut front_end = guest.connect(&served);
        assert!(nonsense(&mut front_end), "{what}");
        drop(front_end);
        serves(&served);
    }
    for (what, wrong) in [
        ("elsewhere", elsewhere),
        ("misaligned", misaligned),
        ("at the end", at_the_end),
    ] {
        let mut front_end = guest.connect(&served);
        front_end.set_mem_table(&[guest.region()]).unwrap();
        front_end.set_vring_num(0, 64).unwrap();
        let refused = front_end.set_vring_addr(0, &wrong).is_err()
            || front_end.set_vring_kick(0, &guest.kicks[0]).is_err()
            || front_end.set_vring_enable(0, true).is_err();
        assert!(refused, "{what}");
        drop(front_end);
        serves(&served);
    }
}

#[test]
fn broken_chains_stop_their_ring_and_tell_the_front_end() {
    let served = serve(1);
    type Breaks = fn(&mut Guest);
    let tries: [(&str, Breaks); 5] = [
        ("a loop", |guest| {
            let ring = &mut guest.rings[0];
            ring.describe(ring.base, 0, DATA, 16, NEXT, 1);
            ring.describe(ring.base, 1, DATA, 16, NEXT, 0);
            ring.publish(0);
        }),
        ("a head outside of the table", |guest| {
            guest.rings[0].publish(900)
        }),
        ("an index that runs ahead", |guest| {
            guest.rings[0].publish_index(5000);
        }),
        ("an indirect table outside of memory", |guest| {
            let ring = &mut guest.rings[0];
            ring.describe(ring.base, 0, 1 << 40, 64, crate::testing::INDIRECT, 0);
            ring.publish(0);
        }),
        ("no place for a status", |guest| {
            guest.rings[0].add(&[Piece::readable(DATA, 16)]);
        }),
    ];
    for (what, breaks) in tries {
        let mut guest = Guest::new(1, 16);
        let front_end = guest.attach(&served, &[]);
        breaks(&mut guest);
        guest.kick(0);
        eventually(|| guest.errors[0].read().is_ok());
        assert!(guest.rings[0].reap().is_none(), "{what}");
        // The connection goes on; the ring can be stopped.
        front_end.get_vring_base(0).unwrap();
        drop(front_end);
        serves(&served);
    }
}

#[test]
fn data_outside_of_memory_fails_its_request_only() {
    let served = serve(1);
    let mut guest = Guest::new(1, 16);
    let _front_end = guest.attach(&served, &[]);
    for at in [4 << 20, 1 << 40, u64::MAX - 100] {
        let data = [Piece::writable(at, 512)];
        assert_eq!(guest.request(0, IN, 0, &data), 1);
        let data = [Piece::readable(at, 512)];
        assert_eq!(guest.request(0, OUT, 0, &data), 1);
    }
    let data = [Piece::writable(DATA, 512)];
    assert_eq!(guest.request(0, IN, SECTORS, &data), 1, "beyond the disk");
    assert_eq!(guest.request(0, IN, 0, &data), 0);
}

#[test]
fn half_a_message_holds_up_nobody_but_its_sender() {
    let served = serve(1);
    let mut stream = UnixStream::connect(served.socket()).unwrap();
    stream.write_all(&[1, 0, 0]).unwrap();
    eventually(|| served.server.connected());
    // The server can be stopped all the same.
    crate::lifecycle::Component::quiesce(&served.server).unwrap();
    crate::lifecycle::Component::resume(&served.server).unwrap();
    drop(stream);
    serves(&served);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Anything at all on the socket: the server answers, hangs up or waits, and then serves.
    #[test]
    fn anything_may_be_said(
        messages in prop::collection::vec(
            (0u32..48, 0u32..16, prop::collection::vec(any::<u8>(), 0..96)),
            1..12,
        )
    ) {
        let served = serve(1);
        let mut stream = UnixStream::connect(served.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        for (request, flags, body) in messages {
            let mut bytes = request.to_le_bytes().to_vec();
            bytes.extend((flags | 1).to_le_bytes());
            bytes.extend((body.len() as u32).to_le_bytes());
            bytes.extend(body);
            if stream.write_all(&bytes).is_err() {
                break;
            }
            let _ = stream.read(&mut [0; 256]);
        }
        drop(stream);
        serves(&served);
    }
}
