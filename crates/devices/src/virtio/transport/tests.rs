//! The transport's protocol, with the simplest device behind it.
#![allow(clippy::cast_possible_truncation)]

use std::sync::Arc;

use proptest::prelude::*;
use strake_observe::recorder;

use crate::lifecycle::{Component, Phase};
use crate::pci::PciFunction;
use crate::testing::{
    Driver, HIGH_RAM_AT, Host, LOW_RAM, NEEDS_RESET, NO_VECTOR, Piece, Ring, eventually,
};
use crate::virtio::rng::VirtioRng;
use crate::virtio::{EVENT_IDX, INDIRECT_DESC, VERSION_1, VirtioPci};

const BUFFER: u64 = 0x20_0000;

fn rng(host: &Host) -> (Arc<VirtioPci<VirtioRng>>, Driver<'_>) {
    let (function, lines) = host.add(4, VirtioRng::new("rng"));
    let driver = Driver::probe(host, 4, lines);
    (function, driver)
}

fn answered(driver: &mut Driver<'_>) -> bool {
    driver.submit(0, &[Piece::writable(BUFFER, 64)]);
    driver.complete(0).1 == 64
}

#[test]
fn a_driver_finds_and_drives_it() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    assert_eq!(driver.config16(2), 0x1044);
    assert_eq!(driver.config16(0x2e), 0x44);
    driver.bring_up(u64::MAX, 64);
    assert!(answered(&mut driver));
    assert_eq!(driver.lines[0].raised(), 1);
    assert_eq!(driver.get8(driver.isr) & 1, 1);
    assert_eq!(driver.get8(driver.isr), 0, "reading clears it");
    assert_eq!(
        *driver.lines[0].routes.lock().unwrap(),
        [(0xfee0_0000, 0x40)]
    );
}

#[test]
fn features_that_make_no_sense_are_refused() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    assert_eq!(driver.offered(), VERSION_1 | INDIRECT_DESC | EVENT_IDX);
    assert!(!driver.negotiate(EVENT_IDX), "without VERSION_1");
    driver.reset();
    driver.add_status(3);
    driver.accept(VERSION_1 | 1 << 50);
    driver.add_status(8);
    assert_eq!(driver.status() & 8, 0, "what was not offered");
    // Without FEATURES_OK there is no DRIVER_OK.
    driver.ready();
    assert_eq!(driver.status() & 4, 0);
    assert!(driver.negotiate(VERSION_1));
    // What was agreed on stays.
    driver.accept(VERSION_1 | EVENT_IDX);
    driver.put32(driver.common + 8, 0);
    assert_eq!(driver.get32(driver.common + 12), 0);
    // Select values beyond the standard read as zero.
    driver.put32(driver.common, 7);
    assert_eq!(driver.get32(driver.common + 4), 0);
}

#[test]
fn status_bits_are_only_added() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    driver.bring_up(u64::MAX, 64);
    driver.put8(driver.common + 20, 1);
    assert_eq!(driver.status(), 15);
    assert!(answered(&mut driver));
    driver.put8(driver.common + 20, !NEEDS_RESET);
    assert_eq!(driver.status() & NEEDS_RESET, 0, "that bit is the device's");
}

#[test]
fn a_driver_that_gave_up_gets_no_service() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    assert!(driver.negotiate(VERSION_1));
    driver.add_status(0x80);
    driver.ready();
    assert_eq!(driver.status() & 4, 0);
}

#[test]
fn queues_of_a_running_device_cannot_be_changed() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    driver.bring_up(u64::MAX, 64);
    driver.put16(driver.common + 22, 0);
    driver.put16(driver.common + 24, 8);
    driver.put64(driver.common + 32, 0);
    driver.put16(driver.common + 28, 0);
    assert_eq!(driver.get16(driver.common + 24), 64);
    assert_eq!(driver.get16(driver.common + 28), 1);
    assert_ne!(driver.get32(driver.common + 32), 0);
    assert!(answered(&mut driver));
}

#[test]
fn queues_and_vectors_that_do_not_exist_read_as_none() {
    let host = Host::default();
    let (_function, driver) = rng(&host);
    driver.put16(driver.common + 22, 999);
    assert_eq!(driver.get16(driver.common + 24), 0);
    driver.put16(driver.common + 26, 0);
    assert_eq!(driver.get16(driver.common + 26), NO_VECTOR);
    driver.put16(driver.common + 22, 0);
    driver.put16(driver.common + 26, 77);
    assert_eq!(driver.get16(driver.common + 26), NO_VECTOR);
    driver.put16(driver.common + 16, 2);
    assert_eq!(driver.get16(driver.common + 16), NO_VECTOR);
    driver.put16(driver.common + 16, 1);
    assert_eq!(driver.get16(driver.common + 16), 1);
}

#[test]
fn rings_that_make_no_sense_ask_for_a_reset() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    let good = Driver::ring_base(0);
    for (size, descriptors, avail, used) in [
        (3, good, good + 0x2000, good + 0x3000),
        (0, good, good + 0x2000, good + 0x3000),
        (1024, good, good + 0x2000, good + 0x3000),
        (64, good + 8, good + 0x2000, good + 0x3000),
        (64, good, good + 0x2001, good + 0x3000),
        (64, good, good + 0x2000, good + 0x3002),
        (64, LOW_RAM as u64 - 16, good, good),
        (64, !15, good, good),
        (64, good, !1, good),
        (64, good, good, !3),
        (64, good, good, HIGH_RAM_AT - 4),
    ] {
        assert!(driver.negotiate(u64::MAX));
        driver.put16(driver.common + 22, 0);
        driver.put16(driver.common + 24, size);
        driver.put64(driver.common + 32, descriptors);
        driver.put64(driver.common + 40, avail);
        driver.put64(driver.common + 48, used);
        driver.put16(driver.common + 28, 1);
        driver.ready();
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{size} {descriptors:#x}");
        driver.kick(0);
        driver.reset();
        assert_eq!(driver.status(), 0);
    }
    driver.bring_up(u64::MAX, 64);
    assert!(answered(&mut driver));
    assert!(
        recorder()
            .since(0)
            .iter()
            .any(|entry| entry.observation.id() == "devices.guest-broke-ring")
    );
}

#[test]
fn rings_may_lie_at_the_end_of_ram() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    assert!(driver.negotiate(u64::MAX));
    driver.enable_msix();
    let base = LOW_RAM as u64 - Ring::BYTES;
    let ring = Ring::new(host.memory(), base, 64, true);
    driver.put16(driver.common + 22, 0);
    driver.put64(driver.common + 32, ring.descriptors());
    driver.put64(driver.common + 40, ring.avail());
    driver.put64(driver.common + 48, ring.used());
    driver.put16(driver.common + 28, 1);
    driver.rings.push(ring);
    driver.ready();
    assert!(answered(&mut driver));
}

#[test]
fn doorbells_follow_the_bar_and_writes_that_exit_work_too() {
    let host = Host::default();
    let (function, mut driver) = rng(&host);
    driver.bring_up(u64::MAX, 64);
    let bells = || {
        host.bells
            .0
            .lock()
            .unwrap()
            .keys()
            .copied()
            .collect::<Vec<_>>()
    };
    assert_eq!(bells(), [(driver.notify, 2)]);
    // A write of another width is no doorbell's: it exits.
    driver.rings[0].add(&[Piece::writable(BUFFER, 64)]);
    driver.put32(driver.notify, 0);
    driver.complete(0);
    // Moved while decoding is off.
    driver.set_config(4, &[0]);
    assert!(bells().is_empty());
    driver.set_config(0x14, &0x50u32.to_le_bytes());
    driver.set_config(4, &[6]);
    let moved = driver.notify - 0x40_0000_0000 + 0x50_0000_0000;
    assert_eq!(bells(), [(moved, 2)]);
    let old = driver.common;
    for at in [
        &mut driver.common,
        &mut driver.notify,
        &mut driver.isr,
        &mut driver.table,
    ] {
        *at += 0x10_0000_0000;
    }
    assert_eq!(driver.get8(old + 20), 0xff, "nobody answers there any more");
    assert_eq!(driver.status(), 15);
    assert!(answered(&mut driver));
    drop(driver);
    let slot = function.clone();
    drop(function);
    drop(slot);
}

#[test]
fn two_bars_over_each_other_do_no_harm() {
    let host = Host::default();
    let (_one, mut driver) = rng(&host);
    let (_two, lines) = host.add(5, VirtioRng::new("rng2"));
    let other = Driver::probe(&host, 5, lines);
    driver.bring_up(u64::MAX, 64);
    let (low, high) = (driver.config32(0x10), driver.config32(0x14));
    other.set_config(0x10, &low.to_le_bytes());
    other.set_config(0x14, &high.to_le_bytes());
    // The doorbell of the second is refused, as KVM does; moving it away undoes nothing else.
    other.set_config(0x14, &0x60u32.to_le_bytes());
    assert!(answered(&mut driver));
}

#[test]
fn the_bar_is_reachable_through_configuration_space() {
    let host = Host::default();
    let (_function, driver) = rng(&host);
    let access = driver.pci_access;
    let aim = |offset: u32, length: u32| {
        driver.set_config(access + 4, &[0]);
        driver.set_config(access + 8, &offset.to_le_bytes());
        driver.set_config(access + 12, &length.to_le_bytes());
    };
    aim(20, 1);
    driver.set_config(access + 16, &[1]);
    assert_eq!(driver.status(), 1);
    assert_eq!(driver.config8(access + 16), 1);
    aim(18, 2);
    assert_eq!(driver.config16(access + 16), 1);
    aim(4, 4);
    assert_ne!(driver.config32(access + 16), 0);
    for (offset, length) in [(0, 3), (0, 0), (u32::MAX, 4), (0x8000, 4), (0, u32::MAX)] {
        aim(offset, length);
        driver.set_config(access + 16, &[0xff; 4]);
        let _ = driver.config32(access + 16);
    }
    driver.set_config(access + 4, &[3]);
    driver.set_config(access + 16, &[0xff; 4]);
    assert_eq!(driver.status(), 1);
}

#[test]
fn its_life_is_checked_and_a_driver_may_come_while_it_stands() {
    let host = Host::default();
    let (function, mut driver) = rng(&host);
    assert_eq!(function.phase(), Phase::Running);
    assert!(function.start().is_err());
    assert!(function.resume().is_err());
    function.quiesce().unwrap();
    driver.bring_up(u64::MAX, 64);
    driver.submit(0, &[Piece::writable(BUFFER, 64)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(driver.rings[0].reap().is_none());
    function.resume().unwrap();
    driver.complete(0);
    for _ in 0..20 {
        function.quiesce().unwrap();
        driver.submit(0, &[Piece::writable(BUFFER, 64)]);
        function.resume().unwrap();
        driver.complete(0);
    }
    function.quiesce().unwrap();
    driver.reset();
    function.resume().unwrap();
    driver.bring_up(u64::MAX, 64);
    assert!(answered(&mut driver));
}

#[test]
fn interrupts_are_suppressed_as_the_driver_wishes() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    driver.bring_up(!EVENT_IDX, 64);
    driver.rings[0].suppress_interrupts();
    assert!(answered(&mut driver));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.lines[0].raised(), 0);

    driver.bring_up(u64::MAX, 64);
    driver.lines[0].raised();
    driver.rings[0].set_used_event(2); // tell me when the third is done
    assert!(answered(&mut driver));
    assert!(answered(&mut driver));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.lines[0].raised(), 0);
    assert!(answered(&mut driver));
    let line = driver.lines[0].clone();
    eventually(|| line.raised() == 1);
}

#[test]
fn indices_wrap_around() {
    let host = Host::default();
    let (_function, mut driver) = rng(&host);
    driver.bring_up(u64::MAX, 4);
    for _ in 0..70_000 {
        let ring = &mut driver.rings[0];
        let before = ring.available();
        ring.add(&[Piece::writable(BUFFER, 1)]);
        if ring.wants_kick(before) {
            driver.kick(0);
        }
        while driver.rings[0].reap().is_none() {
            std::hint::spin_loop();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random accesses everywhere in the function: nothing panics or hangs, and a reset brings it
    /// back.
    #[test]
    fn any_accesses_are_survived(
        accesses in prop::collection::vec(
            (any::<bool>(), any::<bool>(), 0u64..0x8000, prop::sample::select(vec![1usize, 2, 4, 8]), any::<u64>()),
            0..200,
        )
    ) {
        let host = Host::default();
        let (function, mut driver) = rng(&host);
        let bar = driver.common;
        for (config, write, offset, len, value) in accesses {
            let mut data = value.to_le_bytes();
            let data = &mut data[..len];
            match (config, write) {
                (true, true) => function.config_write((offset % 0x1000) as usize, data),
                (true, false) => function.config_read((offset % 0x1000) as usize, data),
                (false, true) => function.bar_write(0, offset, data),
                (false, false) => function.bar_read(0, offset, data),
            }
        }
        // Put the BAR back where the driver knows it.
        driver.set_config(4, &[0]);
        driver.set_config(0x10, &(bar as u32).to_le_bytes());
        driver.set_config(0x14, &((bar >> 32) as u32).to_le_bytes());
        driver.set_config(4, &[6]);
        driver.bring_up(u64::MAX, 64);
        prop_assert!(answered(&mut driver));
    }
}
