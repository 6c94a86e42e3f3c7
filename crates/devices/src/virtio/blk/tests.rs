//! A disk as a guest's driver sees it, through the PCI transport.
#![allow(clippy::cast_possible_truncation)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use strake_block::{Access, Fault, FaultImage, FaultOn, Image, LiveDisk, RawImage};
use vm_memory::{Bytes, GuestAddress};

use super::{BlkConfig, VirtioBlk};
use crate::lifecycle::Component;
use crate::testing::{Bare, Driver, HIGH_RAM_AT, Host, INDIRECT, NEXT, Piece, WRITE, eventually};
use crate::virtio::{EVENT_IDX, VirtioPci, feature};

const SECTORS: u64 = 16 * 1024;
const HEADER: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
const STATUS: u64 = 0x2f_0000;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const ALL: u64 = u64::MAX;

struct Disk {
    host: Host,
    file: tempfile::NamedTempFile,
    faults: Arc<FaultImage>,
}

fn disk() -> Disk {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * 512).unwrap();
    let open = File::options()
        .read(true)
        .write(true)
        .open(file.path())
        .unwrap();
    let raw = RawImage::from_fd(open.into(), "disk.raw", Access::ReadWrite).unwrap();
    Disk {
        host: Host::default(),
        faults: FaultImage::new(Arc::new(raw)),
        file,
    }
}

impl Disk {
    fn device(&self, queues: u16, read_only: bool) -> (Arc<VirtioPci<VirtioBlk>>, Driver<'_>) {
        let image: Arc<dyn Image> = self.faults.clone();
        let device = VirtioBlk::new(
            "blk-root",
            LiveDisk::new("root", image),
            &BlkConfig {
                queues,
                serial: "serial-1".into(),
                read_only,
            },
        )
        .unwrap();
        let (function, lines) = self.host.add(3, device);
        let driver = Driver::probe(&self.host, 3, lines);
        (function, driver)
    }
}

fn put(driver: &Driver<'_>, at: u64, data: &[u8]) {
    driver
        .host
        .memory()
        .write_slice(data, GuestAddress(at))
        .unwrap();
}

fn get(driver: &Driver<'_>, at: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    driver
        .host
        .memory()
        .read_slice(&mut data, GuestAddress(at))
        .unwrap();
    data
}

/// The header, data and status of request number `n`, which do not overlap others'.
fn header(driver: &Driver<'_>, n: u64, kind: u32, sector: u64) -> Piece {
    let mut raw = [0; 16];
    raw[..4].copy_from_slice(&kind.to_le_bytes());
    raw[8..].copy_from_slice(&sector.to_le_bytes());
    put(driver, HEADER + n * 16, &raw);
    put(driver, STATUS + n, &[0xee]);
    Piece::readable(HEADER + n * 16, 16)
}

fn status(n: u64) -> Piece {
    Piece::writable(STATUS + n, 1)
}

/// One request on queue 0 from submission to its status.
fn request(driver: &mut Driver<'_>, kind: u32, sector: u64, data: &[Piece]) -> u8 {
    let mut pieces = vec![header(driver, 0, kind, sector)];
    pieces.extend(data);
    pieces.push(status(0));
    let head = driver.submit(0, &pieces);
    assert_eq!(driver.complete(0).0, head);
    get(driver, STATUS, 1)[0]
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let disk = disk();
    let (_function, driver) = disk.device(4, false);
    assert_eq!(driver.config16(2), 0x1042);
    assert_eq!(driver.get32(driver.device), 16 * 1024);
    assert_eq!(driver.get32(driver.device + 4), 0);
    assert_eq!(driver.get32(driver.device + 12), 254); // seg_max
    assert_eq!(driver.get32(driver.device + 20), 512); // blk_size
    assert_eq!(driver.get8(driver.device + 24), 3); // 4 KiB physical blocks
    assert_eq!(driver.get8(driver.device + 32), 1); // writeback
    assert_eq!(driver.get16(driver.device + 34), 4); // queues
    assert_eq!(driver.get16(driver.common + 18), 4);
    assert!(driver.get32(driver.device + 36) > 0); // discard
    assert_eq!(driver.get32(driver.device + 52), 1); // write-zeroes segments
    assert_eq!(driver.get32(driver.device + 0x800), 0, "beyond it is zero");
}

#[test]
fn data_written_is_read_back_and_is_in_the_file() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 64);
    let pattern: Vec<u8> = (0..8192u32).map(|n| (n * 7) as u8).collect();
    put(&driver, DATA, &pattern);
    // In three pieces, one of them in the upper RAM.
    put(&driver, HIGH_RAM_AT + 512, &pattern[4096..4608]);
    let pieces = [
        Piece::readable(DATA, 4096),
        Piece::readable(HIGH_RAM_AT + 512, 512),
        Piece::readable(DATA + 4608, 3584),
    ];
    assert_eq!(request(&mut driver, OUT, 8, &pieces), OK);
    let mut in_file = vec![0; 8192];
    disk.file
        .as_file()
        .read_exact_at(&mut in_file, 4096)
        .unwrap();
    assert_eq!(in_file, pattern);
    let back = [Piece::writable(DATA + 0x1_0000, 8192)];
    assert_eq!(request(&mut driver, IN, 8, &back), OK);
    assert_eq!(get(&driver, DATA + 0x1_0000, 8192), pattern);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
    assert!(driver.lines[0].raised() > 0);
}

#[test]
fn descriptors_may_cut_a_request_anywhere() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 64);
    header(&driver, 0, OUT, 1);
    put(&driver, HEADER + 16, &[0x5a; 512]);
    // Header and data in one descriptor, cut in the middle of the header.
    let head = driver.submit(
        0,
        &[
            Piece::readable(HEADER, 5),
            Piece::readable(HEADER + 5, 11 + 512),
            status(0),
        ],
    );
    assert_eq!(driver.complete(0), (head, 1));
    assert_eq!(get(&driver, STATUS, 1), [OK]);
    // Data and status in one.
    let pieces = [header(&driver, 1, IN, 1), Piece::writable(DATA, 513)];
    let head = driver.submit(0, &pieces);
    assert_eq!(driver.complete(0), (head, 513));
    assert_eq!(get(&driver, DATA, 512), [0x5a; 512]);
    assert_eq!(get(&driver, DATA + 512, 1), [OK]);
}

#[test]
fn indirect_descriptors_work() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 8);
    put(&driver, DATA, &[0x77; 512 * 100]);
    let mut pieces = vec![header(&driver, 0, OUT, 0)];
    pieces.extend((0..100).map(|n| Piece::readable(DATA + n * 512, 512)));
    pieces.push(status(0));
    let head = driver.rings[0].add_indirect(0x28_0000, &pieces);
    driver.kick(0);
    assert_eq!(driver.complete(0).0, head);
    assert_eq!(get(&driver, STATUS, 1), [OK]);
    let mut in_file = vec![0; 512 * 100];
    disk.file.as_file().read_exact_at(&mut in_file, 0).unwrap();
    assert!(in_file.iter().all(|byte| *byte == 0x77));
}

#[test]
fn the_serial_number_is_given_as_far_as_there_is_room() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 8);
    put(&driver, DATA, &[0xff; 32]);
    let room = [Piece::writable(DATA, 20)];
    assert_eq!(request(&mut driver, GET_ID, 0, &room), OK);
    assert_eq!(
        get(&driver, DATA, 21),
        b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0\xff"
    );
    let room = [Piece::writable(DATA + 64, 3)];
    assert_eq!(request(&mut driver, GET_ID, 0, &room), OK);
    assert_eq!(get(&driver, DATA + 64, 4), b"ser\0");
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut raw = sector.to_le_bytes().to_vec();
    raw.extend(sectors.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw
}

#[test]
fn discard_and_write_zeroes_take_their_ranges() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 64);
    disk.file
        .as_file()
        .write_all_at(&[0x11; 512 * 64], 0)
        .unwrap();
    put(&driver, DATA, &range(0, 8, 0));
    put(&driver, DATA + 16, &range(16, 8, 0));
    let two = [Piece::readable(DATA, 32)];
    assert_eq!(request(&mut driver, DISCARD, 0, &two), OK);
    put(&driver, DATA, &range(32, 3, 1));
    let one = [Piece::readable(DATA, 16)];
    assert_eq!(request(&mut driver, WRITE_ZEROES, 0, &one), OK);
    let mut data = vec![0; 512 * 64];
    disk.file.as_file().read_exact_at(&mut data, 0).unwrap();
    for (sector, bytes) in data.chunks(512).enumerate() {
        let gone = matches!(sector, 0..8 | 16..24 | 32..35);
        let expected = if gone { 0 } else { 0x11 };
        assert!(bytes.iter().all(|byte| *byte == expected), "{sector}");
    }
    for (kind, bytes, expected) in [
        (DISCARD, range(0, 0, 0), IOERR),
        (DISCARD, range(SECTORS, 1, 0), IOERR),
        (DISCARD, range(u64::MAX, 1, 0), IOERR),
        (DISCARD, range(0, u32::MAX, 0), IOERR),
        (DISCARD, range(0, 1, 1), UNSUPP),
        (WRITE_ZEROES, range(0, 1, 2), UNSUPP),
        (WRITE_ZEROES, range(SECTORS - 1, 2, 0), IOERR),
        (WRITE_ZEROES, vec![0; 15], IOERR),
        (WRITE_ZEROES, vec![0; 32], IOERR),
        (DISCARD, Vec::new(), IOERR),
        (DISCARD, vec![0; 16 * 17], IOERR),
    ] {
        put(&driver, DATA, &bytes);
        let piece = [Piece::readable(DATA, bytes.len() as u32)];
        assert_eq!(request(&mut driver, kind, 0, &piece), expected, "{bytes:?}");
    }
}

#[test]
fn requests_that_make_no_sense_get_an_error_and_the_device_goes_on() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 64);
    let far = 0x7000_0000_0000;
    for (kind, sector, data, expected) in [
        (99, 0, vec![], UNSUPP),
        (IN, SECTORS, vec![Piece::writable(DATA, 512)], IOERR),
        (IN, u64::MAX, vec![Piece::writable(DATA, 512)], IOERR),
        (IN, u64::MAX / 512, vec![Piece::writable(DATA, 512)], IOERR),
        (IN, 0, vec![Piece::writable(DATA, 511)], IOERR),
        (IN, 0, vec![Piece::writable(far, 512)], IOERR),
        (IN, 0, vec![Piece::writable(u64::MAX - 100, 512)], IOERR),
        (IN, 0, vec![Piece::writable(8 << 20, 512)], IOERR),
        (IN, 0, vec![Piece::writable((8 << 20) - 511, 512)], IOERR),
        (IN, 0, vec![Piece::writable(DATA, u32::MAX - 4096)], IOERR),
        (OUT, SECTORS - 1, vec![Piece::readable(DATA, 1024)], IOERR),
        (OUT, 0, vec![Piece::readable(far, 512)], IOERR),
        (IN, 0, vec![], OK),
        (OUT, 0, vec![], OK),
        (IN, 0, vec![Piece::writable(DATA, 512)], OK),
    ] {
        let what = format!("{kind} {sector:#x} {data:x?}");
        assert_eq!(
            request(&mut driver, kind, sector, &data),
            expected,
            "{what}"
        );
    }
    // No header at all.
    put(&driver, STATUS, &[0xee]);
    driver.submit(0, &[status(0)]);
    driver.complete(0);
    assert_eq!(get(&driver, STATUS, 1), [IOERR]);
}

#[test]
fn an_error_of_the_store_is_an_error_of_the_request() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 64);
    disk.faults.add(Fault::failing(FaultOn::Write, 5));
    let data = [Piece::readable(DATA, 512)];
    assert_eq!(request(&mut driver, OUT, 0, &data), IOERR);
    disk.faults.clear();
    assert_eq!(request(&mut driver, OUT, 0, &data), OK);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, true);
    assert!(driver.offered() & feature(5) != 0);
    driver.bring_up(ALL, 64);
    let data = [Piece::readable(DATA, 512)];
    assert_eq!(request(&mut driver, OUT, 0, &data), IOERR);
    put(&driver, DATA, &range(0, 1, 0));
    let piece = [Piece::readable(DATA, 16)];
    assert_eq!(request(&mut driver, WRITE_ZEROES, 0, &piece), IOERR);
    let data = [Piece::writable(DATA, 512)];
    assert_eq!(request(&mut driver, IN, 0, &data), OK);
}

#[test]
fn with_the_cache_off_each_write_is_flushed() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 64);
    // A flush that fails shows that there was one.
    disk.faults.add(Fault::failing(FaultOn::Flush, 5));
    let data = [Piece::readable(DATA, 512)];
    assert_eq!(request(&mut driver, OUT, 0, &data), OK);
    driver.put8(driver.device + 32, 0);
    assert_eq!(driver.get8(driver.device + 32), 0);
    assert_eq!(request(&mut driver, OUT, 0, &data), IOERR);
    driver.reset();
    assert_eq!(driver.get8(driver.device + 32), 1, "a reset undoes it");
}

#[test]
fn queues_work_side_by_side_and_each_interrupts_by_its_vector() {
    let disk = disk();
    let (_function, mut driver) = disk.device(4, false);
    driver.bring_up(ALL, 64);
    for round in 0..50u64 {
        for queue in 0..4u16 {
            let n = u64::from(queue);
            let at = DATA + n * 4096;
            put(&driver, at, &[(round * 4 + n) as u8; 4096]);
            let pieces = [
                header(&driver, n, OUT, (round * 4 + n) * 8),
                Piece::readable(at, 4096),
                status(n),
            ];
            driver.submit(queue, &pieces);
        }
        for queue in 0..4 {
            driver.complete(queue);
            assert_eq!(get(&driver, STATUS + u64::from(queue), 1), [OK]);
        }
    }
    for queue in 0..4 {
        assert!(driver.lines[queue].raised() > 0, "{queue}");
    }
    let mut data = [0; 1];
    for block in 0..200u64 {
        disk.file
            .as_file()
            .read_exact_at(&mut data, block * 4096)
            .unwrap();
        assert_eq!(data[0], block as u8);
    }
}

#[test]
fn many_requests_in_flight_all_complete_with_and_without_event_index() {
    for wanted in [ALL, ALL & !crate::virtio::EVENT_IDX] {
        let disk = disk();
        let (_function, mut driver) = disk.device(1, false);
        driver.bring_up(wanted, 256);
        disk.faults
            .add(Fault::delaying(FaultOn::Write, Duration::from_millis(1)));
        let mut done = 0;
        let mut sent: u64 = 0;
        while done < 1000 {
            while sent < 1000 && sent - done < 80 {
                let n = sent % 80;
                let pieces = [
                    header(&driver, n, OUT, sent % SECTORS),
                    Piece::readable(DATA, 512),
                    status(n),
                ];
                driver.submit(0, &pieces);
                sent += 1;
            }
            driver.complete(0);
            done += 1;
        }
    }
}

#[test]
fn reset_in_the_middle_of_requests_waits_for_them_and_the_device_works_again() {
    let disk = disk();
    let (_function, mut driver) = disk.device(2, false);
    for _ in 0..3 {
        driver.bring_up(ALL, 64);
        disk.faults
            .add(Fault::delaying(FaultOn::Read, Duration::from_millis(200)));
        for n in 0..20 {
            let pieces = [
                header(&driver, n, IN, n),
                Piece::writable(DATA + n * 512, 512),
                status(n),
            ];
            driver.submit((n % 2) as u16, &pieces);
        }
        std::thread::sleep(Duration::from_millis(20));
        // The vCPU is not held for all of it.
        driver.put8(driver.common + 20, 0);
        assert_ne!(driver.status(), 0, "requests are still in flight");
        driver.reset();
        // Nothing writes into the guest's memory any more.
        put(&driver, DATA, &[0xaa; 20 * 512]);
        std::thread::sleep(Duration::from_millis(50));
        assert!(get(&driver, DATA, 20 * 512).iter().all(|b| *b == 0xaa));
        disk.faults.clear();
    }
    driver.bring_up(ALL, 64);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
}

#[test]
fn a_quiesced_disk_stands_still_and_loses_no_kick() {
    let disk = disk();
    let (function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 64);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
    function.quiesce().unwrap();
    let pieces = [header(&driver, 1, FLUSH, 0), status(1)];
    driver.submit(0, &pieces);
    std::thread::sleep(Duration::from_millis(30));
    assert!(driver.rings[0].reap().is_none());
    function.resume().unwrap();
    driver.complete(0);
    assert_eq!(get(&driver, STATUS + 1, 1), [OK]);
}

#[test]
fn quiescing_waits_for_what_is_in_flight() {
    let disk = disk();
    let (function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 64);
    disk.faults
        .add(Fault::delaying(FaultOn::Flush, Duration::from_millis(100)));
    let pieces = [header(&driver, 1, FLUSH, 0), status(1)];
    driver.submit(0, &pieces);
    eventually(|| driver.rings[0].available() == 1);
    std::thread::sleep(Duration::from_millis(20));
    function.quiesce().unwrap();
    assert_eq!(driver.rings[0].used_index(), 1);
    function.resume().unwrap();
}

/// Each of these breaks the ring itself: there is no way to answer.
#[test]
fn a_broken_ring_asks_for_a_reset_and_is_well_after_it() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    type Break = fn(&mut Driver<'_>);
    let breaks: [(&str, Break); 11] = [
        ("a chain that loops", |driver| {
            let ring = &mut driver.rings[0];
            ring.describe(ring.base, 0, HEADER, 16, NEXT, 1);
            ring.describe(ring.base, 1, HEADER, 16, NEXT, 0);
            ring.publish(0);
        }),
        ("a next that leaves the table", |driver| {
            let ring = &mut driver.rings[0];
            ring.describe(ring.base, 0, HEADER, 16, NEXT, 9999);
            ring.publish(0);
        }),
        ("a head that leaves the table", |driver| {
            driver.rings[0].publish(9999);
        }),
        ("an index that runs ahead", |driver| {
            driver.rings[0].publish_index(5000);
        }),
        ("an index that runs back", |driver| {
            driver.rings[0].publish_index(u16::MAX);
        }),
        ("no status", |driver| {
            let ring = &mut driver.rings[0];
            ring.describe(ring.base, 0, HEADER, 16, 0, 0);
            ring.publish(0);
        }),
        ("a status outside of RAM", |driver| {
            let ring = &mut driver.rings[0];
            ring.describe(ring.base, 0, HEADER, 16, NEXT, 1);
            ring.describe(ring.base, 1, 0x7000_0000_0000, 1, WRITE, 0);
            ring.publish(0);
        }),
        ("readable after writable", |driver| {
            let ring = &mut driver.rings[0];
            ring.describe(ring.base, 0, STATUS, 1, NEXT | WRITE, 1);
            ring.describe(ring.base, 1, HEADER, 16, 0, 0);
            ring.publish(0);
        }),
        ("an indirect table in an indirect table", |driver| {
            let ring = &mut driver.rings[0];
            ring.describe(0x28_0000, 0, 0x28_0000, 16, INDIRECT, 0);
            ring.describe(ring.base, 0, 0x28_0000, 16, INDIRECT, 0);
            ring.publish(0);
        }),
        ("an indirect table of odd length", |driver| {
            let ring = &mut driver.rings[0];
            ring.describe(ring.base, 0, 0x28_0000, 17, INDIRECT, 0);
            ring.publish(0);
        }),
        ("an indirect table outside of RAM", |driver| {
            let ring = &mut driver.rings[0];
            ring.describe(ring.base, 0, 0x7000_0000_0000, 1024, INDIRECT, 0);
            ring.publish(0);
        }),
    ];
    for (what, break_it) in breaks {
        driver.bring_up(ALL, 16);
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK, "before {what}");
        let config_line = driver.lines[1].clone();
        config_line.raised();
        break_it(&mut driver);
        driver.kick(0);
        driver.expect_needs_reset();
        eventually(|| config_line.raised() > 0);
        driver.reset();
    }
    driver.bring_up(ALL, 16);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
}

/// What came before the fault in the same batch was accepted: it is served, or a reset would wait
/// for it for ever.
#[test]
fn requests_before_a_broken_one_are_served_and_the_reset_comes_through() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    for features in [ALL, ALL & !EVENT_IDX] {
        driver.bring_up(features, 16);
        // So that its worker waits for the kick.
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), OK);
        driver.lines[0].raised();
        driver.rings[0].set_used_event(1);
        for n in 0..3 {
            let pieces = [
                header(&driver, n, IN, n),
                Piece::writable(DATA + n * 512, 512),
                status(n),
            ];
            driver.rings[0].add(&pieces);
        }
        driver.rings[0].publish(9999);
        driver.kick(0);
        driver.expect_needs_reset();
        for n in 0..3 {
            driver.complete(0);
            assert_eq!(get(&driver, STATUS + n, 1), [OK]);
        }
        let line = driver.lines[0].clone();
        eventually(|| line.raised() > 0);
        driver.reset();
    }
}

/// A used ring that cannot be written: every completion faults, and all of them are taken.
#[test]
fn a_fault_in_the_middle_of_completions_leaves_none_behind() {
    let disk = disk();
    // Failures are told together.
    disk.faults.add(Fault::failing(FaultOn::Flush, 5));
    let image: Arc<dyn Image> = disk.faults.clone();
    let config = BlkConfig {
        queues: 1,
        serial: "serial-1".into(),
        read_only: false,
    };
    let device = VirtioBlk::new("blk-root", LiveDisk::new("root", image), &config).unwrap();
    let mut bare = Bare::with_used_ring_at(&device, &disk.host.memory(), ALL, 16, 0x7000_0000_0000);
    for n in 0..5u64 {
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&FLUSH.to_le_bytes());
        let at = GuestAddress(HEADER + n * 16);
        disk.host.memory().write_slice(&raw, at).unwrap();
        bare.rings[0].add(&[Piece::readable(HEADER + n * 16, 16), status(n)]);
    }
    bare.run();
    assert_eq!(bare.stop().len(), 1);
}

#[test]
fn one_head_made_available_twice_is_two_requests() {
    let disk = disk();
    let (_function, mut driver) = disk.device(1, false);
    driver.bring_up(ALL, 16);
    let pieces = [header(&driver, 0, FLUSH, 0), status(0)];
    let head = driver.rings[0].add(&pieces);
    for _ in 0..7 {
        driver.rings[0].publish(head);
    }
    driver.kick(0);
    for _ in 0..8 {
        assert_eq!(driver.complete(0).0, head);
    }
}
