//! The part of a machine that every guest has: buses, PCI root, serial port, power management.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use strake_api::control::ExitReason;
use strake_arch::layout::{self, Ports, Span};
use strake_devices::acpi_pm::{AcpiPm, PowerEvents};
use strake_devices::bus::{MmioBus, PortBus};
use strake_devices::cmos::Cmos;
use strake_devices::console_hub::ConsoleHub;
use strake_devices::i8042::I8042;
use strake_devices::lifecycle::Component;
use strake_devices::pci::{PciRoot, PciWindows};
use strake_devices::serial::Serial;
use strake_kvm::Vm;
use strake_observe::Result;

use crate::Mailbox;
use crate::adapters::Legacy;
use crate::vcpus::{Buses, Crew};

/// The clock's index and data port.
const CMOS: Ports = Ports::new(0x70, 2);

/// What every guest has.
pub(crate) struct Platform {
    pub(crate) buses: Buses,
    pub(crate) pci: Arc<PciRoot>,
    pub(crate) console: Arc<ConsoleHub>,
    pub(crate) power: Arc<AcpiPm>,
    pub(crate) components: Vec<Arc<dyn Component>>,
}

/// The guest's wish to end, from whatever device it says so to.
struct Power {
    mailbox: Arc<Mailbox>,
    crew: Arc<Crew>,
}

impl PowerEvents for Power {
    fn power_off(&self) {
        self.end(ExitReason::GuestPowerOff);
    }

    fn reset(&self) {
        self.end(ExitReason::GuestReset);
    }
}

impl Power {
    /// Called by a vCPU: it leaves the guest for good when it is back from the device.
    fn end(&self, reason: ExitReason) {
        self.mailbox.exit(reason);
        self.crew.leave();
    }
}

impl Platform {
    /// Builds it. The serial port's output is appended to `console_log`, and input goes to it until
    /// another console takes it.
    pub(crate) fn build(
        vm: &Vm,
        crew: &Arc<Crew>,
        console_log: File,
        mailbox: &Arc<Mailbox>,
    ) -> Result<Self> {
        let events: Arc<dyn PowerEvents> = Arc::new(Power {
            mailbox: Arc::clone(mailbox),
            crew: Arc::clone(crew),
        });
        let ports = PortBus::new();
        let mmio = MmioBus::new();

        let pci = PciRoot::new(PciWindows {
            mmio32: addresses(layout::PCI_BAR32),
            mmio64: addresses(layout::PCI_BAR64),
        });
        ports.register(range(layout::PCI_CONFIG), pci.config_ports())?;
        mmio.register(addresses(layout::PCI_ECAM), pci.ecam())?;
        for window in [layout::PCI_BAR32, layout::PCI_BAR64] {
            mmio.register(addresses(window), pci.window(window.start))?;
        }

        let console = ConsoleHub::new("console", console_log)?;
        let line = Arc::new(Legacy(vm.legacy_irq(layout::COM1_IRQ)?));
        let serial = Serial::new("serial", line, console.clone());
        console.connect_input(serial.clone());
        ports.register(range(layout::COM1), serial.clone())?;

        let sci = Arc::new(Legacy(vm.legacy_irq(layout::SCI_IRQ)?));
        let power = AcpiPm::new(sci, Arc::clone(&events));
        ports.register(range(layout::ACPI_PM1_EVENT), power.event_block())?;
        ports.register(range(layout::ACPI_PM1_CONTROL), power.control_block())?;
        ports.register(range(layout::ACPI_RESET), power.reset_register())?;

        let keyboard = I8042::new(events);
        ports.register(range(layout::I8042), keyboard.clone())?;
        let clock = Cmos::new();
        ports.register(range(CMOS), clock.clone())?;

        Ok(Self {
            buses: Buses {
                ports: Arc::new(ports),
                mmio: Arc::new(mmio),
            },
            // The hub first: it comes to rest last, when nobody writes to it any more.
            components: vec![
                console.clone(),
                pci.clone(),
                serial,
                power.clone(),
                keyboard,
                clock,
            ],
            pci,
            console,
            power,
        })
    }
}

fn range(ports: Ports) -> Range<u64> {
    u64::from(ports.start)..u64::from(ports.last()) + 1
}

fn addresses(span: Span) -> Range<u64> {
    span.start..span.end()
}
