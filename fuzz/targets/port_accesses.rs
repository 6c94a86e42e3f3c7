//! The serial port, power management, the keyboard controller and the clock.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use strake_devices::acpi_pm::{AcpiPm, PowerEvents};
use strake_devices::bus::PortBus;
use strake_devices::cmos::Cmos;
use strake_devices::i8042::I8042;
use strake_devices::interrupt::IrqLine;
use strake_devices::serial::{ConsoleInput, ConsoleOutput, Serial};
use strake_fuzz::Access;

struct Nobody;

impl IrqLine for Nobody {
    fn raise(&self) {}
}

impl PowerEvents for Nobody {
    fn power_off(&self) {}

    fn reset(&self) {}
}

impl ConsoleOutput for Nobody {
    fn write(&self, _: &[u8]) {}
}

#[derive(Debug, Arbitrary)]
enum Step {
    Port { which: u8, access: Access },
    AnyPort { port: u16, access: Access },
    Type(Vec<u8>),
    PressPower,
}

/// The ports of all devices, one after the other.
const PORTS: [u64; 24] = [
    0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x600, 0x601, 0x602, 0x603, 0x604,
    0x605, 0x608, 0x60, 0x61, 0x62, 0x63, 0x64, 0x70, 0x71, 0x72, 0x80,
];

fuzz_target!(|steps: Vec<Step>| {
    let nobody = Arc::new(Nobody);
    let bus = PortBus::new();
    let serial = Serial::new("com1", nobody.clone(), nobody.clone());
    let pm = AcpiPm::new(nobody.clone(), nobody.clone());
    for (range, device) in [
        (0x3f8..0x400, serial.clone() as Arc<_>),
        (0x600..0x604, pm.event_block()),
        (0x604..0x606, pm.control_block()),
        (0x608..0x609, pm.reset_register()),
        (0x60..0x65, I8042::new(nobody) as Arc<_>),
        (0x70..0x72, Cmos::new() as Arc<_>),
    ] {
        bus.register(range, device).expect("a free range");
    }
    let access = |port: u64, access: &Access| {
        let (mut bytes, len) = access.bytes();
        if access.write {
            bus.write(port, &bytes[..len]);
        } else {
            bus.read(port, &mut bytes[..len]);
        }
    };
    for step in steps.iter().take(1000) {
        match step {
            Step::Port {
                which,
                access: what,
            } => access(PORTS[usize::from(*which) % PORTS.len()], what),
            Step::AnyPort { port, access: what } => access(u64::from(*port), what),
            Step::Type(bytes) => {
                let _ = serial.offer(bytes);
            }
            Step::PressPower => pm.press_power_button(),
        }
    }
});
