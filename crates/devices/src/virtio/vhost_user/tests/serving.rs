//! A front-end that keeps to the protocol.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use strake_block::{Fault, FaultOn};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use super::super::inflight::Area;
use super::front_end::*;
use crate::lifecycle::Component;
use crate::testing::{Piece, eventually};

#[test]
fn requests_of_all_kinds_on_all_rings() {
    let served = serve(3);
    let mut guest = Guest::new(3, 64);
    let mut front_end = guest.attach(&served, &[]);
    assert_eq!(front_end.get_queue_num().unwrap(), 3);
    for ring in 0..3 {
        let sector = 8 * ring as u64;
        let pattern: Vec<u8> = (0..4096u32).map(|n| (n * 3) as u8 ^ ring as u8).collect();
        guest.put(DATA, &pattern);
        let data = [Piece::readable(DATA, 4096)];
        assert_eq!(guest.request(ring, OUT, sector, &data), 0);
        assert_eq!(guest.request(ring, FLUSH, 0, &[]), 0);
        assert!(guest.calls[ring].read().is_ok(), "it was called");
        let mut found = vec![0; 4096];
        served
            .file
            .as_file()
            .read_exact_at(&mut found, sector * 512)
            .unwrap();
        assert_eq!(found, pattern);
        let data = [Piece::writable(DATA + 8192, 4096)];
        assert_eq!(guest.request(ring, IN, sector, &data), 0);
        assert_eq!(guest.get(DATA + 8192, 4096), pattern);
        for kind in [DISCARD, WRITE_ZEROES] {
            let mut range = [0; 16];
            range[..8].copy_from_slice(&sector.to_le_bytes());
            range[8..12].copy_from_slice(&8u32.to_le_bytes());
            guest.put(DATA, &range);
            let data = [Piece::readable(DATA, 16)];
            assert_eq!(guest.request(ring, kind, 0, &data), 0);
        }
        let data = [Piece::writable(DATA, 4096)];
        assert_eq!(guest.request(ring, IN, sector, &data), 0);
        assert_eq!(guest.get(DATA, 4096), vec![0; 4096]);
        let data = [Piece::writable(DATA, 20)];
        assert_eq!(guest.request(ring, GET_ID, 0, &data), 0);
        assert_eq!(&guest.get(DATA, 8), b"serial-1");
    }
}

#[test]
fn the_configuration_is_read_and_written() {
    let served = serve(2);
    let guest = Guest::new(2, 64);
    let mut front_end = guest.connect(&served);
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, config) = front_end.get_config(0, 60, flags, &[0; 60]).unwrap();
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[34..36], 2u16.to_le_bytes());
    assert_eq!(config[32], 1, "the cache is on");
    front_end.set_config(32, flags, &[0]).unwrap();
    let (_, config) = front_end.get_config(32, 1, flags, &[0]).unwrap();
    assert_eq!(config, [0]);
    drop(front_end);
    // The next front-end begins anew.
    let mut front_end = guest.connect(&served);
    let (_, config) = front_end.get_config(32, 1, flags, &[0]).unwrap();
    assert_eq!(config, [1]);
}

#[test]
fn a_ring_that_is_stopped_tells_where_and_goes_on_there() {
    let served = serve(1);
    let mut guest = Guest::new(1, 8);
    let mut front_end = guest.attach(&served, &[]);
    // Around the ring more than once.
    for n in 0..20 {
        let data = [Piece::writable(DATA, 512)];
        assert_eq!(guest.request(0, IN, n, &data), 0);
    }
    let base = front_end.get_vring_base(0).unwrap();
    assert_eq!(base, 20);
    // What comes while it stands still waits.
    let head = guest.submit(0, 0, IN, 0, &[Piece::writable(DATA, 512)]);
    guest.kick(0);
    guest.run(&mut front_end, &[20]);
    assert_eq!(guest.complete(0), head);
    front_end.set_vring_enable(0, false).unwrap();
    let head = guest.submit(0, 0, IN, 0, &[Piece::writable(DATA, 512)]);
    guest.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(
        guest.rings[0].reap().is_none(),
        "a disabled ring stands still"
    );
    front_end.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.complete(0), head);
}

#[test]
fn memory_comes_and_goes_while_requests_are_in_flight() {
    let served = serve(1);
    let mut guest = Guest::new(1, 64);
    let mut front_end = guest.attach(&served, &[]);
    let more = Guest::new(1, 8);
    let mut region = more.region();
    region.guest_phys_addr = 1 << 32;
    region.userspace_addr = THEIRS + (1 << 32);
    for round in 0..10u64 {
        let mut heads: Vec<u16> = (0..16)
            .map(|n| {
                let data = [Piece::writable(DATA + n * 4096, 4096)];
                guest.submit(0, n, IN, n * 8, &data)
            })
            .collect();
        guest.kick(0);
        if round % 2 == 0 {
            front_end.add_mem_region(&region).unwrap();
        } else {
            front_end.remove_mem_region(&region).unwrap();
        }
        while !heads.is_empty() {
            let head = guest.complete(0);
            heads.retain(|of| *of != head);
        }
        // The new memory is used, and the old is not there any more.
        let data = [Piece::writable(1 << 32, 512)];
        let status = guest.request(0, IN, 0, &data);
        assert_eq!(status, u8::from(round % 2 != 0), "round {round}");
    }
}

#[test]
fn a_front_end_goes_in_the_middle_and_comes_back() {
    let served = serve(1);
    let mut guest = Guest::new(1, 64);
    for round in 0..5 {
        let front_end = guest.attach(&served, &[guest.rings[0].used_index()]);
        for n in 0..8 {
            let data = [Piece::writable(DATA + n * 4096, 4096)];
            guest.submit(0, n, IN, n * 8, &data);
        }
        guest.kick(0);
        if round % 2 == 0 {
            for _ in 0..8 {
                guest.complete(0);
            }
        }
        drop(front_end);
        eventually(|| !served.server.connected());
        // All that was taken was finished before the connection counted as ended.
        while guest.rings[0].reap().is_some() {}
        let left = guest.rings[0]
            .available()
            .wrapping_sub(guest.rings[0].used_index());
        let front_end = guest.attach(&served, &[guest.rings[0].used_index()]);
        for _ in 0..left {
            guest.complete(0);
        }
        drop(front_end);
        eventually(|| !served.server.connected());
    }
}

#[test]
fn what_a_dead_server_left_in_flight_is_done_by_the_next() {
    let served = serve(1);
    let mut guest = Guest::new(1, 16);
    let mut front_end = guest.connect(&served);
    let (description, file) = inflight(&mut front_end, 1, 16);
    // A server that died: it took three requests, completed the second, and published that.
    let heads: Vec<u16> = (0..3)
        .map(|n| {
            let data = [Piece::writable(DATA + n * 4096, 512)];
            guest.submit(0, n, IN, n, &data)
        })
        .collect();
    {
        let area = Area::open(file.try_clone().unwrap(), 0, 1, 16).unwrap();
        let (mut journal, _) = area.ring(0, 16, 0).unwrap();
        for head in &heads {
            journal.begin(*head);
        }
        journal.completing(heads[1]);
    }
    let used = guest.rings[0].used();
    guest.put(used + 4, &u32::from(heads[1]).to_le_bytes());
    guest.put(used + 2, &1u16.to_le_bytes());
    assert_eq!(guest.complete(0), heads[1]);
    // The next one: what was not completed is, once, and new requests follow.
    front_end
        .set_inflight_fd(&description, file.as_raw_fd())
        .unwrap();
    front_end.set_mem_table(&[guest.region()]).unwrap();
    guest.run(&mut front_end, &[1]);
    let mut done = [guest.complete(0), guest.complete(0)];
    done.sort_unstable();
    assert_eq!(done, [heads[0], heads[2]]);
    assert_eq!((guest.status(0), guest.status(2)), (0, 0));
    assert_eq!(guest.status(1), 0xee, "it was not done twice");
    assert!(guest.calls[0].read().is_ok());
    let data = [Piece::writable(DATA, 512)];
    assert_eq!(guest.request(0, IN, 0, &data), 0);
    assert_eq!(front_end.get_vring_base(0).unwrap(), 4);
}

#[test]
fn a_server_that_is_quiesced_has_nothing_in_flight_and_serves_again() {
    let served = serve(1);
    let mut guest = Guest::new(1, 64);
    let front_end = guest.attach(&served, &[]);
    for n in 0..16 {
        let data = [Piece::writable(DATA + n * 4096, 4096)];
        guest.submit(0, n, IN, n * 8, &data);
    }
    guest.kick(0);
    served.server.quiesce().unwrap();
    let used = guest.rings[0].used_index();
    drop(front_end);
    assert_eq!(guest.rings[0].used_index(), used);
    served.server.resume().unwrap();
    let _front_end = guest.attach(&served, &[used]);
    for _ in 0..16 {
        guest.complete(0);
    }
    assert!((0..16).all(|n| guest.status(n) == 0));
}

#[test]
fn a_failing_disk_is_an_error_of_the_request_alone() {
    let served = serve(1);
    let mut guest = Guest::new(1, 64);
    let _front_end = guest.attach(&served, &[]);
    served.faults.add(Fault::failing(FaultOn::Write, libc::EIO));
    let data = [Piece::readable(DATA, 512)];
    assert_eq!(guest.request(0, OUT, 0, &data), 1);
    served.faults.clear();
    assert_eq!(guest.request(0, OUT, 0, &data), 0);
}
