//! The tables are read back as a guest reads them: from the RSDP on, by address.

use super::*;

struct Guest(AcpiTables);

impl Guest {
    fn new(cpus: u8) -> Self {
        Self(build(&AcpiConfig { cpus }).unwrap())
    }

    fn at(&self, gpa: u64) -> &[u8] {
        &self
            .0
            .blobs
            .iter()
            .find(|(at, _)| *at == gpa)
            .unwrap_or_else(|| panic!("no table at {gpa:#x}"))
            .1
    }

    fn tables(&self) -> Vec<&[u8]> {
        let rsdp = self.at(self.0.rsdp_gpa);
        let xsdt = self.at(u64_at(rsdp, 24));
        xsdt[36..]
            .chunks(8)
            .map(|entry| self.at(u64_at(entry, 0)))
            .collect()
    }

    fn table(&self, signature: &[u8; 4]) -> &[u8] {
        self.tables()
            .into_iter()
            .find(|table| table.starts_with(signature))
            .unwrap()
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

#[test]
fn every_table_is_reachable_and_its_checksum_is_right() {
    for cpus in 1..=layout::MAX_CPUS {
        let guest = Guest::new(cpus);
        let rsdp = guest.at(guest.0.rsdp_gpa);
        assert!(rsdp.starts_with(b"RSD PTR "));
        assert_eq!(rsdp.len(), 36);
        assert_eq!(sum(&rsdp[..20]), 0);
        assert_eq!(sum(rsdp), 0);
        let mut names: Vec<_> = Vec::new();
        let fadt = guest.table(b"FACP");
        let dsdt = guest.at(u64_at(fadt, 140));
        for table in guest.tables().into_iter().chain([dsdt]) {
            names.push(std::str::from_utf8(&table[..4]).unwrap());
            assert_eq!(u32_at(table, 4) as usize, table.len());
            assert_eq!(sum(table), 0, "{}", names.last().unwrap());
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT"]);
        for (gpa, blob) in &guest.0.blobs {
            let span = layout::Span::new(*gpa, blob.len() as u64);
            assert!(layout::ACPI_TABLES.contains(span));
        }
    }
}

#[test]
fn blobs_do_not_overlap() {
    let mut blobs = Guest::new(16).0.blobs;
    blobs.sort();
    for pair in blobs.windows(2) {
        assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0);
    }
}

#[test]
fn the_number_of_cpus_is_bounded() {
    for cpus in [0, 17, 255] {
        let seen = build(&AcpiConfig { cpus }).unwrap_err();
        assert_eq!(seen.id(), "arch.cpu-count");
    }
}

#[test]
fn fadt_names_the_fixed_hardware() {
    let guest = Guest::new(2);
    let fadt = guest.table(b"FACP");
    assert_eq!(fadt.len(), 276);
    let facs = u64::from(u32_at(fadt, 36));
    assert!(guest.at(facs).starts_with(b"FACS"));
    assert_eq!(facs % 64, 0);
    assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
    assert_eq!(u16_at(fadt, 46), 9, "SCI");
    assert_eq!(u32_at(fadt, 48), 0, "SMI command");
    assert_eq!(u32_at(fadt, 56), 0x600, "PM1a events");
    assert_eq!(u32_at(fadt, 64), 0x604, "PM1a control");
    assert_eq!(u32_at(fadt, 76), 0, "no PM timer");
    assert_eq!((fadt[88], fadt[89], fadt[91]), (4, 2, 0), "lengths");
    assert_eq!(u16_at(fadt, 109), 0b11_0101, "boot architecture");
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & 1 << 4, 0, "the power button is a fixed feature");
    assert_ne!(flags & 1 << 5, 0, "no sleep button");
    assert_ne!(flags & 1 << 10, 0, "reset register");
    assert_eq!(flags & 1 << 20, 0, "not hardware-reduced");
    assert_eq!(&fadt[116..120], &[1, 8, 0, 1], "reset: one port, one byte");
    assert_eq!(u64_at(fadt, 120), 0x608);
    assert_eq!(fadt[128], layout::ACPI_RESET_VALUE);
    assert_eq!(&fadt[148..152], &[1, 32, 0, 2]);
    assert_eq!(u64_at(fadt, 152), 0x600);
    assert_eq!(&fadt[172..176], &[1, 16, 0, 2]);
    assert_eq!(u64_at(fadt, 176), 0x604);
}

#[test]
fn madt_lists_every_cpu_once() {
    for cpus in [1, 4, 16] {
        let guest = Guest::new(cpus);
        let madt = guest.table(b"APIC");
        assert_eq!(u32_at(madt, 36), 0xfee0_0000);
        let (mut ids, mut ioapics, mut overrides) = (Vec::new(), Vec::new(), Vec::new());
        let mut rest = &madt[44..];
        while let [kind, length, ..] = *rest {
            let (entry, after) = rest.split_at(usize::from(length));
            match kind {
                0 => {
                    assert_eq!(u32_at(entry, 4), 1);
                    assert_eq!(entry[2], entry[3]);
                    ids.push(entry[3]);
                }
                1 => ioapics.push((entry[2], u32_at(entry, 4), u32_at(entry, 8))),
                2 => overrides.push((entry[3], u32_at(entry, 4), u16_at(entry, 8))),
                4 => assert_eq!(entry, [4, 6, 0xff, 0, 0, 1]),
                other => panic!("entry of kind {other}"),
            }
            rest = after;
        }
        assert!(rest.is_empty());
        assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        assert_eq!(ioapics, [(layout::IOAPIC_ID, 0xfec0_0000, 0)]);
        assert_eq!(overrides, [(9, 9, 0b0101)]);
    }
}

#[test]
fn mcfg_is_the_ecam_of_bus_0() {
    let guest = Guest::new(1);
    let mcfg = guest.table(b"MCFG");
    assert_eq!(mcfg.len(), 60);
    assert_eq!(u64_at(mcfg, 44), layout::PCI_ECAM.start);
    assert_eq!(&mcfg[52..60], &[0; 8]);
}

#[test]
fn dsdt_windows_are_those_of_the_layout() {
    let guest = Guest::new(1);
    let fadt = guest.table(b"FACP");
    let dsdt = guest.at(u64_at(fadt, 140));
    // DWord memory: descriptor 0x87, 23 bytes, type 0.
    let at = find(dsdt, &[0x87, 23, 0, 0]).unwrap();
    assert_eq!(u32_at(dsdt, at + 10), 0xc000_0000);
    assert_eq!(u32_at(dsdt, at + 14), 0xdfff_ffff);
    assert_eq!(u32_at(dsdt, at + 22), 0x2000_0000);
    // QWord memory: descriptor 0x8a, 43 bytes, type 0.
    let at = find(dsdt, &[0x8a, 43, 0, 0]).unwrap();
    assert_eq!(u64_at(dsdt, at + 14), 0x40_0000_0000);
    assert_eq!(u64_at(dsdt, at + 22), 0x7f_ffff_ffff);
    assert_eq!(u64_at(dsdt, at + 38), 0x40_0000_0000);
    // Word bus numbers: descriptor 0x88, 13 bytes, type 2; then word I/O, type 1.
    let at = find(dsdt, &[0x88, 13, 0, 2]).unwrap();
    assert_eq!((u16_at(dsdt, at + 8), u16_at(dsdt, at + 10)), (0, 0));
    assert_eq!(u16_at(dsdt, at + 14), 1);
    let at = find(dsdt, &[0x88, 13, 0, 1]).unwrap();
    assert_eq!(
        (u16_at(dsdt, at + 8), u16_at(dsdt, at + 10)),
        (0x1000, 0xffff)
    );
    assert_eq!(u16_at(dsdt, at + 14), 0xf000);
    // \_S5: a package of four whose first is the sleep type.
    let at = find(dsdt, b"_S5_").unwrap();
    assert_eq!(&dsdt[at + 4..at + 12], &[0x12, 7, 4, 0x0a, 5, 0, 0, 0]);
}

/// Writes the tables to the directory named by `STRAKE_ACPI_DUMP`, one file each, for a look with
/// `iasl -d`.
#[test]
#[ignore = "writes files for a look by hand"]
fn dump() {
    let dir = std::env::var_os("STRAKE_ACPI_DUMP").unwrap();
    for (_, blob) in Guest::new(4).0.blobs {
        let name = String::from_utf8_lossy(&blob[..4]).trim().to_owned();
        std::fs::write(std::path::Path::new(&dir).join(format!("{name}.dat")), blob).unwrap();
    }
}
