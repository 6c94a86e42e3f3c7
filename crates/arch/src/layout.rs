//! The guest-physical address map and the I/O ports of the platform.
//!
//! ```text
//! 0x0000_0000_0000  RAM                                             (usable up to 0x9_fc00)
//! 0x0000_000e_0000  ACPI tables                                     (RAM, reserved)
//! 0x0000_0010_0000  RAM up to 3 GiB
//! 0x0000_c000_0000  32-bit PCI BARs                                 (512 MiB)
//! 0x0000_e000_0000  PCI configuration space, ECAM                   (1 MiB, bus 0)
//! 0x0000_fec0_0000  IOAPIC
//! 0x0000_fee0_0000  local APICs, MSI target
//! 0x0000_fffb_c000  KVM's identity page table and TSS               (16 KiB, reserved)
//! 0x0001_0000_0000  the rest of RAM
//! 0x0040_0000_0000  64-bit PCI BARs                                 (256 GiB)
//! 0x0080_0000_0000  end of what a 39-bit address reaches
//! ```
//!
//! The 64-bit window ends at 512 GiB because that is the smallest physical address space that
//! hosts with KVM have (39 bits), and begins at 256 GiB, which bounds a guest's RAM.

/// One kibibyte.
pub const KIB: u64 = 1 << 10;
/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// How many vCPUs a guest may have.
pub const MAX_CPUS: u8 = 16;

/// The smallest RAM that a guest can be given: a stock kernel with its initial RAM disk does not
/// come up in less.
pub const MIN_RAM: u64 = 32 * MIB;

/// Where RAM below 4 GiB ends at the latest, and the 32-bit device space begins.
pub const MMIO32_START: u64 = 0xc000_0000;
/// Where the 32-bit device space ends and RAM goes on.
pub const MMIO32_END: u64 = 0x1_0000_0000;
/// Where RAM above the 32-bit device space begins.
pub const HIGH_RAM_START: u64 = MMIO32_END;

/// The window for 32-bit PCI BARs.
pub const PCI_BAR32: Span = Span::new(MMIO32_START, 0x2000_0000);
/// The window for 64-bit PCI BARs.
pub const PCI_BAR64: Span = Span::new(0x40_0000_0000, 0x40_0000_0000);
/// The memory-mapped PCI configuration space (ECAM) of bus 0.
pub const PCI_ECAM: Span = Span::new(0xe000_0000, MIB);
/// The last PCI bus number: bus 0 is all there is.
pub const PCI_LAST_BUS: u8 = 0;
/// The window for PCI I/O ports. None of our devices has an I/O BAR; a guest kernel wants a
/// window all the same.
pub const PCI_IO: Ports = Ports::new(0x1000, 0xf000);
/// PCI configuration by ports: address at the first, data at the fifth.
pub const PCI_CONFIG: Ports = Ports::new(0xcf8, 8);

/// The most RAM that a guest can be given.
pub const MAX_RAM: u64 = PCI_BAR64.start - (MMIO32_END - MMIO32_START);

/// The IOAPIC.
pub const IOAPIC: Span = Span::new(0xfec0_0000, 0x1000);
/// The IOAPIC's identifier. It differs from every local APIC's.
pub const IOAPIC_ID: u8 = 0xf0;
/// The local APICs, and the target of message-signalled interrupts.
pub const LOCAL_APIC: Span = Span::new(0xfee0_0000, 0x10_0000);
/// Where KVM on Intel keeps its identity page table: one page (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Where KVM on Intel keeps its task state segment: three pages (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// What the two of KVM occupy.
pub const KVM_PRIVATE: Span = Span::new(KVM_IDENTITY_MAP, 0x4000);

/// The first serial port.
pub const COM1: Ports = Ports::new(0x3f8, 8);
/// The interrupt of [`COM1`]: edge-triggered, ISA.
pub const COM1_IRQ: u32 = 4;
/// The keyboard controller's ports, of which only the reset command `0xfe` to the second one is
/// of use. Data is at the first and command at the fifth.
pub const I8042: Ports = Ports::new(0x60, 5);

/// ACPI's fixed hardware: everything of it, one range.
pub const ACPI_PM: Ports = Ports::new(0x600, 0x10);
/// PM1a event block: status (2 bytes), then enable (2 bytes).
pub const ACPI_PM1_EVENT: Ports = Ports::new(0x600, 4);
/// PM1a control block (2 bytes). `SCI_EN` (bit 0) always reads as one: there is no legacy mode.
pub const ACPI_PM1_CONTROL: Ports = Ports::new(0x604, 2);
/// The reset register (1 byte).
pub const ACPI_RESET: Ports = Ports::new(0x608, 1);
/// What, written to [`ACPI_RESET`], resets the machine.
pub const ACPI_RESET_VALUE: u8 = 0x01;
/// `SLP_TYP` of the soft-off state S5 in the PM1 control register (bits 12:10).
pub const ACPI_S5_SLEEP_TYPE: u8 = 5;
/// The power button's bit (`PWRBTN_STS` and `PWRBTN_EN`) in the PM1 event registers.
pub const ACPI_POWER_BUTTON: u16 = 1 << 8;
/// The interrupt of ACPI events (SCI). It is announced as edge-triggered, active high, so that one
/// pulse per event is right: an irqfd gives pulses, and a level-triggered line would lose those
/// that come while the guest handles the one before.
pub const SCI_IRQ: u32 = 9;

/// Where the ACPI tables go.
pub const ACPI_TABLES: Span = Span::new(0xe_0000, 0x2_0000);

/// Where usable RAM ends below 1 MiB: a kernel expects the extended BIOS data area above.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Where RAM goes on after the hole of the PC below 1 MiB.
pub const HIMEM_START: u64 = MIB;

/// The global descriptor table at the kernel's entry.
pub const BOOT_GDT: u64 = 0x500;
/// PVH's start information.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH's list of modules.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH's memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// Linux's boot parameters ("zero page").
pub const ZERO_PAGE: u64 = 0x7000;
/// The top of the stack at the kernel's entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The page tables at the entry of a 64-bit kernel: one PML4, one PDPT, four page directories,
/// which map the first 4 GiB to themselves.
pub const BOOT_PAGE_TABLES: Span = Span::new(0x9000, 6 * 0x1000);
/// The kernel's command line.
pub const COMMAND_LINE: Span = Span::new(0x2_0000, 0x1_0000);

/// A range of guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first address.
    pub start: u64,
    /// How many bytes.
    pub size: u64,
}

impl Span {
    /// `size` bytes from `start` on. They must not reach past 64 bits, which all those of this
    /// module respect.
    #[must_use]
    pub const fn new(start: u64, size: u64) -> Self {
        Self { start, size }
    }

    /// The first address after it.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// Whether all of `other` lies in it.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether any address is in both.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// A range of I/O ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// The first port.
    pub start: u16,
    /// How many.
    pub count: u16,
}

impl Ports {
    /// `count` ports from `start` on.
    #[must_use]
    pub const fn new(start: u16, count: u16) -> Self {
        Self { start, count }
    }

    /// The last port.
    #[must_use]
    pub const fn last(self) -> u16 {
        self.start + (self.count - 1)
    }
}

/// Where `size` bytes of RAM are in the guest: one range, or two around the device hole.
///
/// A size that is not a multiple of 4 KiB is the caller's mistake and would leave a partial page.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<Span> {
    let low = size.min(MMIO32_START);
    let mut ranges = vec![Span::new(0, low)];
    if size > low {
        ranges.push(Span::new(HIGH_RAM_START, size - low));
    }
    ranges
}

/// Where RAM below the device hole ends.
#[must_use]
pub fn low_ram_end(size: u64) -> u64 {
    size.min(MMIO32_START)
}

/// What a range of the memory map is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// The guest may use it.
    Usable,
    /// The guest must leave it alone.
    Reserved,
}

impl MemoryKind {
    /// The number for it in the BIOS's and in PVH's memory maps, which agree.
    #[must_use]
    pub const fn e820(self) -> u32 {
        match self {
            Self::Usable => 1,
            Self::Reserved => 2,
        }
    }
}

/// One range of the memory map that the guest is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Where.
    pub span: Span,
    /// What for.
    pub kind: MemoryKind,
}

/// The memory map of a guest with `size` bytes of RAM, in ascending order without overlaps.
#[must_use]
pub fn e820(size: u64) -> Vec<MemoryRange> {
    let usable = |start, end: u64| MemoryRange {
        span: Span::new(start, end.saturating_sub(start)),
        kind: MemoryKind::Usable,
    };
    let reserved = |start, end: u64| MemoryRange {
        span: Span::new(start, end.saturating_sub(start)),
        kind: MemoryKind::Reserved,
    };
    let mut map = vec![
        usable(0, LOW_RAM_END),
        reserved(LOW_RAM_END, 0xa_0000),
        reserved(ACPI_TABLES.start, ACPI_TABLES.end()),
        usable(HIMEM_START, low_ram_end(size)),
        reserved(PCI_ECAM.start, PCI_ECAM.end()),
        reserved(KVM_PRIVATE.start, KVM_PRIVATE.end()),
    ];
    if let Some(high) = ram_ranges(size).get(1) {
        map.push(usable(high.start, high.end()));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram_ranges(GIB), [Span::new(0, GIB)]);
        assert_eq!(ram_ranges(3 * GIB), [Span::new(0, 3 * GIB)]);
        assert_eq!(
            ram_ranges(5 * GIB),
            [Span::new(0, 3 * GIB), Span::new(4 * GIB, 2 * GIB)]
        );
        let most = ram_ranges(MAX_RAM);
        assert_eq!(most[1].end(), PCI_BAR64.start);
    }

    #[test]
    fn the_memory_map_is_ordered_and_covers_the_ram() {
        for size in [
            MIN_RAM,
            128 * MIB,
            3 * GIB,
            3 * GIB + 2 * MIB,
            64 * GIB,
            MAX_RAM,
        ] {
            let map = e820(size);
            for pair in map.windows(2) {
                assert!(pair[0].span.end() <= pair[1].span.start, "{pair:x?}");
            }
            let ram = ram_ranges(size);
            let usable: u64 = map
                .iter()
                .filter(|range| range.kind == MemoryKind::Usable)
                .inspect(|range| {
                    assert!(
                        ram.iter().any(|slot| slot.contains(range.span)),
                        "{range:x?}"
                    );
                })
                .map(|range| range.span.size)
                .sum();
            assert_eq!(usable, size - (MIB - LOW_RAM_END), "{size:#x}");
        }
    }

    #[test]
    fn nothing_overlaps() {
        let fixed = [
            PCI_BAR32,
            PCI_ECAM,
            IOAPIC,
            LOCAL_APIC,
            KVM_PRIVATE,
            PCI_BAR64,
        ];
        let ram = ram_ranges(MAX_RAM);
        for (index, one) in fixed.iter().enumerate() {
            for other in &fixed[index + 1..] {
                assert!(!one.overlaps(*other), "{one:x?} {other:x?}");
            }
            for slot in &ram {
                assert!(!one.overlaps(*slot), "{one:x?} {slot:x?}");
            }
        }
        let low = [
            Span::new(BOOT_GDT, 0x100),
            Span::new(PVH_START_INFO, 0x40),
            Span::new(PVH_MODULES, 0x20),
            Span::new(PVH_MEMORY_MAP, 0x400),
            Span::new(ZERO_PAGE, 0x1000),
            Span::new(BOOT_STACK - 0xf00, 0xf00),
            BOOT_PAGE_TABLES,
            COMMAND_LINE,
            ACPI_TABLES,
        ];
        for (index, one) in low.iter().enumerate() {
            for other in &low[index + 1..] {
                assert!(!one.overlaps(*other), "{one:x?} {other:x?}");
            }
            assert!(one.end() <= HIMEM_START);
        }
    }

    #[test]
    fn acpi_ports_are_in_their_range_and_touch_no_other() {
        for part in [ACPI_PM1_EVENT, ACPI_PM1_CONTROL, ACPI_RESET] {
            assert!(part.start >= ACPI_PM.start && part.last() <= ACPI_PM.last());
        }
        let all = [ACPI_PM, COM1, I8042, PCI_CONFIG, PCI_IO];
        for (index, one) in all.iter().enumerate() {
            for other in &all[index + 1..] {
                assert!(one.last() < other.start || other.last() < one.start);
            }
        }
        assert_eq!(PCI_IO.last(), 0xffff);
    }
}
