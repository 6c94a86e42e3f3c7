//! The bus as a guest's kernel sees it.

#![allow(clippy::cast_possible_truncation)]

use std::sync::Arc;

use proptest::prelude::*;

use super::{BarRange, BarSize, BarWidth, ConfigSpace, Identity, Msix, PciRoot, PciWindows};
use crate::testing::{Host, Line};
use crate::virtio::rng::VirtioRng;

fn identity() -> Identity {
    Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x42,
    }
}

fn space() -> ConfigSpace {
    let mut space = ConfigSpace::new(identity());
    space.add_bar(BarSize {
        index: 0,
        size: 0x8000,
        width: BarWidth::Bits64,
    });
    space.add_bar(BarSize {
        index: 2,
        size: 0x1000,
        width: BarWidth::Bits32,
    });
    space
}

#[test]
fn the_identity_cannot_be_written() {
    let mut space = space();
    let mut before = [0; 256];
    space.read(0, &mut before);
    space.write(0, &[0xff; 4]);
    space.write(8, &[0xff; 4]);
    space.write(0x2c, &[0xff; 8]);
    space.write(0x34, &[0xff; 4]);
    let mut after = [0; 256];
    space.read(0, &mut after);
    assert_eq!(before, after);
    assert_eq!(&after[..4], &[0xf4, 0x1a, 0x42, 0x10]);
    assert_eq!(&after[8..12], &[1, 0, 0x80, 0x01]);
}

#[test]
fn bars_are_sized_moved_and_decoded_only_when_enabled() {
    let mut space = space();
    space.place(0, 0x40_0000_0000);
    space.place(2, 0xc000_0000);
    assert!(space.decoded().is_empty());
    space.write(4, &[2, 0]);
    assert_eq!(
        space.decoded(),
        [
            BarRange {
                index: 0,
                base: 0x40_0000_0000,
                size: 0x8000
            },
            BarRange {
                index: 2,
                base: 0xc000_0000,
                size: 0x1000
            },
        ]
    );
    space.write(0x18, &[0xff; 4]);
    let mut size = [0; 4];
    space.read(0x18, &mut size);
    assert_eq!(u32::from_le_bytes(size), 0xffff_f000);
    space.write(0x18, &0xd000_0123u32.to_le_bytes());
    assert_eq!(space.decoded()[1].base, 0xd000_0000);
    space.write(0x10, &[0xff; 8]);
    // All ones is what sizing leaves; nothing answers at the end of the address space.
    assert_eq!(space.decoded().len(), 1);
    space.write(4, &[0]);
    assert!(space.decoded().is_empty());
}

#[test]
fn both_ways_to_configure_show_the_same() {
    let host = Host::default();
    host.add(5, VirtioRng::new("rng"));
    let ports = host.pci.config_ports();
    let ecam = host.pci.ecam();
    for slot in 0..32u32 {
        for register in (0..256u32).step_by(4) {
            let address = 0x8000_0000 | slot << 11 | register;
            ports.write(0, &address.to_le_bytes());
            let (mut one, mut other) = ([0; 4], [0; 4]);
            ports.read(4, &mut one);
            ecam.read(u64::from(slot << 15 | register), &mut other);
            assert_eq!(one, other, "{slot} {register:#x}");
            let present = slot == 0 || slot == 5;
            assert_eq!(one == [0xff; 4] && register == 0, !present && register == 0);
        }
    }
    // Other functions and buses are absent, and the rest of the extended space reads as zero.
    let mut data = [0; 4];
    ecam.read((5 << 15) | (1 << 12), &mut data);
    assert_eq!(data, [0xff; 4]);
    ecam.read((1 << 20) | (5 << 15), &mut data);
    assert_eq!(data, [0xff; 4]);
    ecam.read((5 << 15) | 0x100, &mut data);
    assert_eq!(data, [0; 4]);
}

#[test]
fn the_probe_of_a_kernel_for_configuration_by_ports_succeeds() {
    let host = Host::default();
    let ports = host.pci.config_ports();
    ports.write(3, &[1]);
    ports.write(0, &0x8000_0000u32.to_le_bytes());
    let mut data = [0; 4];
    ports.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
    // A host bridge is what it looks for: class 0600 at slot 0.
    ports.write(0, &0x8000_0008u32.to_le_bytes());
    let mut class = [0; 2];
    ports.read(6, &mut class);
    assert_eq!(class, [0, 6]);
}

#[test]
fn a_slot_is_given_once() {
    let host = Host::default();
    host.add(5, VirtioRng::new("rng"));
    let (function, _) = host.add(6, VirtioRng::new("rng2"));
    for slot in [0, 5, 6, 32, 255] {
        assert!(host.pci.add(slot, function.clone()).is_err(), "{slot}");
    }
}

#[test]
fn a_full_window_is_refused() {
    let root = PciRoot::new(PciWindows {
        mmio32: 0xc000_0000..0xc000_c000,
        mmio64: 0..0,
    });
    let host = Host::default();
    let (one, _) = host.add(1, VirtioRng::new("one"));
    let (two, _) = host.add(2, VirtioRng::new("two"));
    root.add(1, one).unwrap();
    assert!(root.add(2, two).is_err());
}

fn msix() -> (Msix, Vec<Arc<Line>>) {
    let host = Host::default();
    let msix = Msix::new("test", 3, &*host.msi).unwrap();
    let lines = host.msi.0.lock().unwrap().clone();
    (msix, lines)
}

fn set_message(msix: &Msix, vector: u64, address: u32, data: u32, control: u32) {
    for (offset, value) in [(0, address), (4, 0), (8, data), (12, control)] {
        msix.write_table(vector * 16 + offset, &value.to_le_bytes());
    }
}

#[test]
fn an_interrupt_of_a_masked_vector_is_pending_and_comes_on_unmask() {
    let (msix, lines) = msix();
    set_message(&msix, 1, 0xfee0_0000, 0x41, 1);
    msix.control(true, false);
    msix.trigger(1);
    assert_eq!(lines[1].raised(), 0);
    let mut pending = [0; 8];
    msix.read_pending(0, &mut pending);
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    assert!(lines[1].routes.lock().unwrap().is_empty());
    msix.write_table(16 + 12, &[0, 0, 0, 0]);
    assert_eq!(lines[1].raised(), 1);
    assert_eq!(*lines[1].routes.lock().unwrap(), [(0xfee0_0000, 0x41)]);
    msix.read_pending(0, &mut pending);
    assert_eq!(pending, [0; 8]);
    msix.trigger(1);
    assert_eq!(lines[1].raised(), 1);
}

#[test]
fn the_function_mask_holds_all_back() {
    let (msix, lines) = msix();
    for vector in 0..3 {
        set_message(&msix, vector, 0xfee0_0000, 0x40 + vector as u32, 0);
    }
    msix.control(true, true);
    for vector in 0..3 {
        msix.trigger(vector);
    }
    assert!(lines.iter().all(|line| line.raised() == 0));
    msix.control(true, false);
    assert!(lines.iter().all(|line| line.raised() == 1));
}

#[test]
fn a_live_message_is_routed_anew_when_it_changes() {
    let (msix, lines) = msix();
    set_message(&msix, 0, 0xfee0_0000, 0x40, 0);
    msix.control(true, false);
    msix.write_table(8, &0x50u32.to_le_bytes());
    // The same message again is no change.
    msix.write_table(8, &0x50u32.to_le_bytes());
    assert_eq!(
        *lines[0].routes.lock().unwrap(),
        [(0xfee0_0000, 0x40), (0xfee0_0000, 0x50)]
    );
    let mut data = [0; 4];
    msix.read_table(8, &mut data);
    assert_eq!(data, [0x50, 0, 0, 0]);
}

#[test]
fn with_msix_off_nothing_is_raised_or_kept() {
    let (msix, lines) = msix();
    set_message(&msix, 0, 0xfee0_0000, 0x40, 0);
    msix.trigger(0);
    msix.control(true, false);
    assert_eq!(lines[0].raised(), 0);
    msix.trigger(0);
    msix.trigger(17);
    msix.trigger(0xffff);
    assert_eq!(lines[0].raised(), 1);
}

proptest! {
    /// Whatever a guest does to configuration space: what is not writable stays, and what is
    /// decoded is aligned and does not wrap.
    #[test]
    fn any_writes_leave_the_space_sane(
        writes in prop::collection::vec((0usize..300, prop::collection::vec(any::<u8>(), 0..9)), 0..60)
    ) {
        let mut space = space();
        let mut before = [0; 64];
        space.read(0, &mut before);
        for (offset, data) in writes {
            space.write(offset, &data);
            for range in space.decoded() {
                prop_assert_eq!(range.base % range.size, 0);
                prop_assert!(range.base.checked_add(range.size).is_some());
            }
        }
        let mut after = [0; 64];
        space.read(0, &mut after);
        prop_assert_eq!(&before[..4], &after[..4]);
        prop_assert_eq!(&before[6..12], &after[6..12]);
        prop_assert_eq!(&before[0x2c..0x3c], &after[0x2c..0x3c]);
    }

    /// Interrupts of live vectors come at once, of others when they become live, and none is lost:
    /// a model of one vector under random masks.
    #[test]
    fn no_interrupt_is_lost(steps in prop::collection::vec(0u8..6, 1..80)) {
        let (msix, lines) = msix();
        set_message(&msix, 0, 0xfee0_0000, 0x40, 1);
        let (mut enabled, mut function, mut vector) = (false, false, true);
        let (mut pending, mut expected, mut got) = (false, 0, 0);
        for step in steps {
            match step {
                0 => enabled = !enabled,
                1 => function = !function,
                2 | 3 => vector = !vector,
                _ => {
                    msix.trigger(0);
                    let live = enabled && !function && !vector;
                    expected += u64::from(live);
                    pending |= enabled && !live;
                }
            }
            msix.control(enabled, function);
            msix.write_table(12, &u32::from(vector).to_le_bytes());
            if enabled && !function && !vector && std::mem::take(&mut pending) {
                expected += 1;
            }
            got += lines[0].raised();
            prop_assert_eq!(got, expected);
        }
    }
}
