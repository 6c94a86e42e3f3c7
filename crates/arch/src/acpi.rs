//! The ACPI tables: how a guest finds its processors, interrupt controllers, PCI bus, serial port,
//! power button, power-off and reset.
//!
//! The platform is classic ACPI (not hardware-reduced): PM1 event and control registers, and the
//! SCI. That gives a fixed-feature power button and S5 that every kernel handles without AML code.
//! What a PC has and this one has not is said so in the FADT, because a kernel that probes for it
//! waits: no VGA, no CMOS clock (the guest takes the time from kvm-clock), no keyboard.
//!
//! The tables are made once for a guest's shape and never change while it lives.

use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed,
    Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{self, AccessSize, GAS};
use acpi_tables::{Aml, facs::FACS, mcfg::MCFG, rsdp::Rsdp, sdt::Sdt, xsdt::XSDT};
use strake_observe::Result;

use crate::layout;
use crate::observations::CpuCount;

const OEM: [u8; 6] = *b"STRAKE";
const OEM_TABLE: [u8; 8] = *b"STRAKEVM";
const OEM_REVISION: u32 = 1;

/// Every table begins at a multiple of this; the FACS demands it.
const ALIGN: u64 = 64;

/// What the tables depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcpiConfig {
    /// How many vCPUs, 1 to [`layout::MAX_CPUS`]. The local APIC identifiers are 0, 1, 2, …
    pub cpus: u8,
}

/// The finished tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    /// Where the RSDP is, by which a guest finds the others.
    pub rsdp_gpa: u64,
    /// What to write where in guest memory.
    pub blobs: Vec<(u64, Vec<u8>)>,
}

/// Hands out the addresses of tables in the order they are made.
struct Placer {
    next: u64,
    blobs: Vec<(u64, Vec<u8>)>,
}

impl Placer {
    fn place(&mut self, table: &dyn Aml) -> u64 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = self.next;
        self.next = (at + bytes.len() as u64).next_multiple_of(ALIGN);
        self.blobs.push((at, bytes));
        at
    }
}

/// Makes the tables of a machine.
///
/// # Errors
/// [`CpuCount`] if the number of vCPUs is out of bounds.
pub fn build(config: &AcpiConfig) -> Result<AcpiTables> {
    if config.cpus == 0 || config.cpus > layout::MAX_CPUS {
        return Err(CpuCount {
            cpus: config.cpus,
            most: layout::MAX_CPUS,
        }
        .into());
    }
    let rsdp_gpa = layout::ACPI_TABLES.start;
    let mut placer = Placer {
        next: rsdp_gpa + ALIGN,
        blobs: Vec::new(),
    };
    let dsdt = placer.place(&dsdt());
    let facs = placer.place(&FACS::new());
    let tables = [
        placer.place(&fadt(dsdt, facs)),
        placer.place(&madt(config.cpus)),
        placer.place(&mcfg()),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = placer.place(&xsdt);
    let Placer { next, mut blobs } = placer;
    debug_assert!(next <= layout::ACPI_TABLES.end());
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    blobs.push((rsdp_gpa, rsdp));
    Ok(AcpiTables { rsdp_gpa, blobs })
}

fn io_register(ports: layout::Ports, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(
        gas::AddressSpace::SystemIo,
        bytes * 8,
        0,
        access,
        u64::from(ports.start),
    )
}

/// The tables live below 1 MiB, so 32-bit fields always hold their addresses.
fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

fn fadt(dsdt: u64, facs: u64) -> acpi_tables::fadt::FADT {
    // IA-PC boot architecture flags.
    const LEGACY_DEVICES: u16 = 1 << 0;
    const NO_VGA: u16 = 1 << 2;
    const NO_ASPM: u16 = 1 << 4;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    // "Not supported", as the specification has it for the latencies of C2 and C3.
    const NO_C2: u16 = 101;
    const NO_C3: u16 = 1001;

    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // A set bit says that the fixed feature is absent: there is no sleep button and no clock
        // that wakes. The power button's bit stays clear: it is a fixed feature.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.firmware_ctrl = low(facs).into();
    fadt.dsdt = low(dsdt).into();
    fadt.x_dsdt = dsdt.into();
    // SMI_CMD stays zero: ACPI mode is on from the beginning and cannot be left.
    fadt.sci_int = 9.into();
    debug_assert_eq!(layout::SCI_IRQ, 9);
    fadt.pm1a_evt_blk = u32::from(layout::ACPI_PM1_EVENT.start).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io_register(layout::ACPI_PM1_EVENT, 4, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(layout::ACPI_PM1_CONTROL.start).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io_register(layout::ACPI_PM1_CONTROL, 2, AccessSize::WordAccess);
    fadt.reset_reg = io_register(layout::ACPI_RESET, 1, AccessSize::ByteAccess);
    fadt.reset_value = layout::ACPI_RESET_VALUE;
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_ASPM | NO_CMOS_CLOCK).into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"STRAKE\0\0").into();
    fadt.finalize()
}

fn madt(cpus: u8) -> Sdt {
    const LOCAL_APIC: u8 = 0;
    const IO_APIC: u8 = 1;
    const OVERRIDE: u8 = 2;
    const LOCAL_APIC_NMI: u8 = 4;
    const PICS_PRESENT: u32 = 1;
    const ENABLED: u32 = 1;
    // Active high, edge-triggered: see `layout::SCI_IRQ`.
    const HIGH_EDGE: u16 = 0b01_01;

    let mut madt = Sdt::new(*b"APIC", 44, 4, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, low(layout::LOCAL_APIC.start));
    madt.write_u32(40, PICS_PRESENT);
    for cpu in 0..cpus {
        let mut entry = vec![LOCAL_APIC, 8, cpu, cpu];
        entry.extend(ENABLED.to_le_bytes());
        madt.append_slice(&entry);
    }
    let mut ioapic = vec![IO_APIC, 12, layout::IOAPIC_ID, 0];
    ioapic.extend(low(layout::IOAPIC.start).to_le_bytes());
    ioapic.extend(0_u32.to_le_bytes());
    madt.append_slice(&ioapic);
    // The other ISA interrupts are where a PC has them, edge-triggered and on the IOAPIC's pin of
    // the same number; the timer too, because that is how KVM routes it by default.
    let mut sci = vec![OVERRIDE, 10, 0, 9];
    sci.extend(layout::SCI_IRQ.to_le_bytes());
    sci.extend(HIGH_EDGE.to_le_bytes());
    madt.append_slice(&sci);
    // NMIs of the platform arrive at LINT1 of every local APIC.
    madt.append_slice(&[LOCAL_APIC_NMI, 6, 0xff, 0, 0, 1]);
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM.start, 0, 0, layout::PCI_LAST_BUS);
    mcfg
}

fn dsdt() -> Sdt {
    let mut code = Vec::new();

    // \_S5: the value of SLP_TYP for power-off in PM1a, the one in PM1b, two reserved.
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![
            &layout::ACPI_S5_SLEEP_TYPE,
            &aml::ZERO,
            &aml::ZERO,
            &aml::ZERO,
        ]),
    )
    .to_aml_bytes(&mut code);

    let bus = layout::PCI_LAST_BUS;
    let pci = Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_SEG"), &aml::ZERO),
            &Name::new(Path::new("_BBN"), &aml::ZERO),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &AddressSpace::<u16>::new_bus_number(0, u16::from(bus)),
                    &io(layout::PCI_CONFIG),
                    &AddressSpace::<u16>::new_io(layout::PCI_IO.start, layout::PCI_IO.last(), None),
                    &AddressSpace::<u32>::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        low(layout::PCI_BAR32.start),
                        low(layout::PCI_BAR32.end() - 1),
                        None,
                    ),
                    &AddressSpace::<u64>::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        layout::PCI_BAR64.start,
                        layout::PCI_BAR64.end() - 1,
                        None,
                    ),
                ]),
            ),
        ],
    )
    .bytes();
    // What the platform itself occupies. A kernel uses the ECAM only if it finds it claimed here.
    let board = Device::new(
        Path::new("MBRD"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(
                        true,
                        low(layout::PCI_ECAM.start),
                        low(layout::PCI_ECAM.size),
                    ),
                    &io(layout::ACPI_PM),
                ]),
            ),
        ],
    )
    .bytes();
    let com1 = Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(Path::new("_DDN"), &"COM1"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &io(layout::COM1),
                    // Consumer, edge-triggered, active high, not shared.
                    &Interrupt::new(true, true, false, false, layout::COM1_IRQ),
                ]),
            ),
        ],
    )
    .bytes();
    let devices: Vec<u8> = [pci, board, com1].concat();
    code.extend(Scope::raw(Path::new("\\_SB_"), devices));

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn io(ports: layout::Ports) -> IO {
    let length = u8::try_from(ports.count).unwrap_or(u8::MAX);
    IO::new(ports.start, ports.start, 1, length)
}

trait Bytes {
    fn bytes(&self) -> Vec<u8>;
}

impl<T: Aml> Bytes for T {
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.to_aml_bytes(&mut out);
        out
    }
}

#[cfg(test)]
#[path = "acpi_tests.rs"]
mod tests;
