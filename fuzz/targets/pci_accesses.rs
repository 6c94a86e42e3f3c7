//! Configuration space and BARs of a bus with devices, by ports, by ECAM and by the windows, with
//! the workers that a driver's DRIVER_OK starts.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use strake_devices::testing::{Driver, ECAM, Host, Ring, WINDOW64};
use strake_devices::virtio::rng::VirtioRng;
use strake_fuzz::{Access, Address};

#[derive(Debug, Arbitrary)]
enum Step {
    Ports {
        offset: u8,
        access: Access,
    },
    Config {
        slot: u8,
        offset: u16,
        access: Access,
    },
    AnyConfig {
        offset: u32,
        access: Access,
    },
    Bar {
        device: u8,
        offset: u16,
        access: Access,
    },
    Common {
        device: u8,
        offset: u8,
        access: Access,
    },
    Vector {
        device: u8,
        vector: u8,
        word: u8,
        value: u32,
    },
    Msix {
        slot: u8,
        control: u16,
    },
    Rings {
        device: u8,
        at: Address,
    },
    Ready {
        device: u8,
    },
    Window {
        offset: u64,
        access: Access,
    },
}

const BAR_BYTES: u64 = 0x8000;

fn access(host: &Host, at: u64, access: &Access) {
    let (mut bytes, len) = access.bytes();
    if access.write {
        host.write(at, &bytes[..len]);
    } else {
        host.read(at, &mut bytes[..len]);
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let host = Host::default();
    host.add(1, VirtioRng::new("rng1"));
    host.add(2, VirtioRng::new("rng2"));
    for slot in [1u64, 2] {
        host.write(ECAM + (slot << 15) + 4, &[6, 0]);
    }
    let ports = host.pci.config_ports();
    let bar = |device: u8| WINDOW64.start + u64::from(device % 2) * BAR_BYTES;
    for step in steps.iter().take(200) {
        match step {
            Step::Ports { offset, access } => {
                let (mut bytes, len) = access.bytes();
                let offset = u64::from(offset % 8);
                if access.write {
                    ports.write(offset, &bytes[..len]);
                } else {
                    ports.read(offset, &mut bytes[..len]);
                }
            }
            Step::Config {
                slot,
                offset,
                access: what,
            } => {
                let slot = u64::from(slot % 4);
                access(&host, ECAM + (slot << 15) + u64::from(offset % 256), what);
            }
            Step::AnyConfig {
                offset,
                access: what,
            } => access(&host, ECAM + u64::from(offset % (1 << 20)), what),
            Step::Bar {
                device,
                offset,
                access: what,
            } => access(&host, bar(*device) + u64::from(*offset) % BAR_BYTES, what),
            Step::Common {
                device,
                offset,
                access: what,
            } => access(&host, bar(*device) + u64::from(offset % 64), what),
            Step::Vector {
                device,
                vector,
                word,
                value,
            } => {
                let at = u64::from(vector % 3) * 16 + u64::from(word % 4) * 4;
                host.write(bar(*device) + 0x4000 + at, &value.to_le_bytes());
            }
            Step::Msix { slot, control } => {
                let slot = u64::from(slot % 3);
                host.write(ECAM + (slot << 15) + 0x42, &control.to_le_bytes());
            }
            Step::Rings { device, at } => {
                let common = bar(*device);
                for (field, ring) in [(32, 0), (40, 0x2000), (48, 0x3000)] {
                    let at = (at.0 & !15).wrapping_add(ring);
                    host.write(common + field, &at.to_le_bytes());
                }
                host.write(common + 28, &[1, 0]);
            }
            Step::Ready { device } => {
                let common = bar(*device);
                host.write(common + 8, &1u32.to_le_bytes());
                host.write(common + 12, &1u32.to_le_bytes());
                for status in [1u8, 3, 11, 15] {
                    host.write(common + 20, &[status]);
                }
            }
            Step::Window {
                offset,
                access: what,
            } => {
                let size = WINDOW64.end - WINDOW64.start;
                access(&host, WINDOW64.start + offset % size, what);
            }
        }
    }
    // Rings of the driver that nobody set up are part of guest RAM as well.
    let _ = Ring::new(host.memory(), Driver::ring_base(0), 16, true);
});
