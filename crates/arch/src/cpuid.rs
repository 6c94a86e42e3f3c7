//! Each vCPU's CPUID, made out of what the host supports.
//!
//! What the processor can do is the host's and KVM's business and passes through. What is
//! rewritten is what would otherwise describe the host: the vCPU's own APIC identifier and the
//! topology. The guest sees one socket with as many cores as it has vCPUs, one thread each, and
//! no sharing of caches but the last level's. APIC identifiers are 0, 1, 2, … as ACPI's MADT says.
//!
//! Performance counters are hidden: their state is not carried over a restart of the monitor.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Makes the CPUID of vCPU `vcpu_index` of `cpus`, from what `KVM_GET_SUPPORTED_CPUID` returned.
#[must_use]
pub fn guest_cpuid(
    supported: &[kvm_cpuid_entry2],
    vcpu_index: u8,
    cpus: u8,
) -> Vec<kvm_cpuid_entry2> {
    let topology = Topology::new(vcpu_index, cpus, vendor(supported));
    let mut entries: Vec<_> = supported
        .iter()
        // The topology leaves are made anew below.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_001e))
        .copied()
        .collect();
    for entry in &mut entries {
        topology.rewrite(entry);
    }
    let highest = |base| {
        supported
            .iter()
            .find(|entry| entry.function == base)
            .map_or(base, |entry| entry.eax)
    };
    if highest(0) >= 0xb {
        entries.extend(topology.levels(0xb));
    }
    if highest(0) >= 0x1f {
        entries.extend(topology.levels(0x1f));
    }
    if topology.vendor == Vendor::Amd && highest(0x8000_0000) >= 0x8000_001e {
        entries.push(topology.amd_compute_unit());
    }
    entries
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Amd,
    Other,
}

fn vendor(supported: &[kvm_cpuid_entry2]) -> Vendor {
    let name = supported
        .iter()
        .find(|entry| entry.function == 0)
        .map(|entry| {
            [entry.ebx, entry.edx, entry.ecx]
                .map(u32::to_le_bytes)
                .concat()
        });
    match name.as_deref() {
        Some(b"AuthenticAMD" | b"HygonGenuine") => Vendor::Amd,
        _ => Vendor::Other,
    }
}

struct Topology {
    id: u32,
    cpus: u32,
    /// How many low bits of an APIC identifier number the cores of a socket.
    shift: u32,
    vendor: Vendor,
}

/// Replaces the bits `high..=low` of `value`.
fn set_bits(value: &mut u32, high: u32, low: u32, bits: u32) {
    let mask = (u32::MAX >> (31 - (high - low))) << low;
    *value = *value & !mask | bits << low & mask;
}

fn set_bit(value: &mut u32, bit: u32, on: bool) {
    set_bits(value, bit, bit, u32::from(on));
}

impl Topology {
    fn new(index: u8, cpus: u8, vendor: Vendor) -> Self {
        let cpus = u32::from(cpus.max(1));
        Self {
            id: u32::from(index),
            cpus,
            shift: cpus.next_power_of_two().trailing_zeros(),
            vendor,
        }
    }

    /// How many APIC identifiers the socket spans, which is what older leaves count.
    fn ids(&self) -> u32 {
        1 << self.shift
    }

    fn rewrite(&self, entry: &mut kvm_cpuid_entry2) {
        match entry.function {
            1 => {
                set_bits(&mut entry.ebx, 31, 24, self.id);
                set_bits(&mut entry.ebx, 23, 16, self.ids());
                // The kernel's timer needs it, KVM emulates it with its own interrupt controller,
                // and does not list it because that depends on who emulates the controller.
                set_bit(&mut entry.ecx, 24, true);
                // Intel's virtualisation, see below.
                set_bit(&mut entry.ecx, 5, false);
                // x2APIC, and "this is a virtual machine".
                set_bit(&mut entry.ecx, 21, true);
                set_bit(&mut entry.ecx, 31, true);
                // More than one logical processor in the package.
                set_bit(&mut entry.edx, 28, self.cpus > 1);
            }
            4 | 0x8000_001d => {
                let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
                if kind != 0 {
                    let sharing = if level >= 3 { self.ids() } else { 1 };
                    set_bits(&mut entry.eax, 25, 14, sharing - 1);
                    if entry.function == 4 {
                        set_bits(&mut entry.eax, 31, 26, self.ids() - 1);
                    }
                }
            }
            // Performance counters; details of AMD's virtualisation.
            0xa | 0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 if self.vendor == Vendor::Amd => {
                // AMD's virtualisation. Guests of guests make the host's KVM run its most
                // intricate code at the will of a hostile guest, so no guest has any.
                set_bit(&mut entry.ecx, 2, false);
                set_bit(&mut entry.ecx, 12, false);
                // Cores, not threads, are what the logical processors are.
                set_bit(&mut entry.ecx, 1, self.cpus > 1);
                // Extended performance counters.
                set_bit(&mut entry.ecx, 23, false);
                set_bit(&mut entry.ecx, 24, false);
            }
            0x8000_0008 if self.vendor == Vendor::Amd => {
                set_bits(&mut entry.ecx, 7, 0, self.cpus - 1);
                set_bits(&mut entry.ecx, 15, 12, self.shift);
            }
            _ => {}
        }
    }

    /// The extended topology: threads of a core, cores of the socket, end.
    fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        const THREADS: u32 = 1;
        const CORES: u32 = 2;
        let level = |index: u32, shift, count, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: index | kind << 8,
            edx: self.id,
            ..Default::default()
        };
        [
            level(0, 0, 1, THREADS),
            level(1, self.shift, self.cpus, CORES),
            level(2, 0, 0, 0),
        ]
    }

    /// AMD's own topology leaf: this core, one thread in it, node 0 of one.
    fn amd_compute_unit(&self) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function: 0x8000_001e,
            eax: self.id,
            ebx: self.id,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn named(name: &[u8; 12], highest: u32) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, 0, [highest, word(0), word(8), word(4)])
    }

    fn host(name: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
        vec![
            named(name, 0x1f),
            leaf(1, 0, [0x806f8, 0x5540_0800, 0x0020_3020, 0x0100_0000]),
            // Level 1 data, level 2 unified, level 3 unified: shared by 2, 2 and 64 of the host.
            leaf(4, 0, [0xfc00_4121, 0, 0, 0]),
            leaf(4, 2, [0xfc00_4143, 0, 0, 0]),
            leaf(4, 3, [0xfc0f_c163, 0, 0, 0]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(0xa, 0, [0x0830_0805, 0, 0, 0x8603]),
            leaf(0xb, 0, [1, 2, 0x100, 77]),
            leaf(0xb, 1, [7, 128, 0x201, 77]),
            leaf(0x1f, 0, [1, 2, 0x100, 77]),
            leaf(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
            leaf(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
            leaf(
                0x8000_0001,
                0,
                [0, 0, 1 << 22 | 3 << 23 | 1 << 12 | 1 << 2, 0],
            ),
            leaf(0x8000_000a, 0, [1, 8, 0, 0x9]),
            leaf(0x8000_0008, 0, [0x3028, 0, 0x703f, 0]),
            leaf(0x8000_001d, 3, [0x0003_c163, 0, 0, 0]),
            leaf(0x8000_001e, 0, [77, 0x0126, 0, 0]),
        ]
    }

    fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let mut found = entries
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index));
        let entry = found.next().unwrap();
        assert!(found.next().is_none(), "{function:#x} twice");
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn intel_topology() {
        // cpus, vcpu, APIC identifiers, shift
        for (cpus, vcpu, ids, shift) in [
            (1_u8, 0_u8, 1, 0),
            (2, 1, 2, 1),
            (3, 2, 4, 2),
            (4, 3, 4, 2),
            (16, 15, 16, 4),
        ] {
            let entries = guest_cpuid(&host(b"GenuineIntel"), vcpu, cpus);
            let id = u32::from(vcpu);
            let [eax, ebx, ecx, edx] = get(&entries, 1, 0);
            assert_eq!(eax, 0x806f8);
            assert_eq!(ebx, id << 24 | ids << 16 | 0x0800);
            assert_eq!(ecx, 0x0020_3000 | 1 << 21 | 1 << 24 | 1 << 31);
            assert_eq!(edx, 0x0100_0000 | u32::from(cpus > 1) << 28);
            let cores = (ids - 1) << 26;
            assert_eq!(get(&entries, 4, 0)[0], cores | 0x121);
            assert_eq!(get(&entries, 4, 2)[0], cores | 0x143);
            assert_eq!(get(&entries, 4, 3)[0], cores | (ids - 1) << 14 | 0x163);
            assert_eq!(get(&entries, 4, 4)[0], 0);
            for function in [0xb, 0x1f] {
                assert_eq!(get(&entries, function, 0), [0, 1, 0x100, id]);
                assert_eq!(
                    get(&entries, function, 1),
                    [shift, u32::from(cpus), 0x201, id]
                );
                assert_eq!(get(&entries, function, 2), [0, 0, 2, id]);
            }
            assert_eq!(get(&entries, 0xa, 0), [0; 4]);
            assert_eq!(get(&entries, 0x4000_0000, 0), [0x4000_0001, 1, 2, 3]);
            assert!(!entries.iter().any(|entry| entry.function == 0x8000_001e));
        }
    }

    #[test]
    fn amd_topology() {
        let entries = guest_cpuid(&host(b"AuthenticAMD"), 2, 4);
        assert_eq!(get(&entries, 0x8000_0008, 0), [0x3028, 0, 0x2003, 0]);
        assert_eq!(get(&entries, 0x8000_0001, 0)[2], 1 << 22 | 1 << 1);
        assert_eq!(get(&entries, 0x8000_000a, 0), [0; 4]);
        assert_eq!(get(&entries, 0x8000_001d, 3)[0], 3 << 14 | 0x163);
        assert_eq!(get(&entries, 0x8000_001e, 0), [2, 2, 0, 0]);
    }

    /// KVM itself follows the guest's XCR0 in it. That takes each entry once, with its own index.
    #[test]
    fn the_extended_state_is_what_kvm_offers() {
        let offered = [
            (0, [0x207, 0xa88, 0xa88, 0]),
            (1, [5, 0x3c8, 0, 0]),
            (2, [0x100, 0x240, 0, 0]),
            (9, [8, 0xa80, 0, 0]),
        ];
        let mut supported = host(b"GenuineIntel");
        supported.extend(offered.map(|(index, registers)| leaf(0xd, index, registers)));
        for vcpu in 0..4 {
            let entries = guest_cpuid(&supported, vcpu, 4);
            for (index, registers) in offered {
                assert_eq!(get(&entries, 0xd, index), registers);
            }
        }
    }

    #[test]
    fn a_host_without_extended_leaves_gets_none() {
        let supported = [named(b"GenuineIntel", 4), leaf(1, 0, [0; 4])];
        let entries = guest_cpuid(&supported, 0, 1);
        assert_eq!(entries.len(), 2);
        assert!(guest_cpuid(&[], 0, 1).is_empty());
    }

    #[test]
    fn ids_are_distinct() {
        let ids: Vec<u32> = (0..16)
            .map(|vcpu| get(&guest_cpuid(&host(b"GenuineIntel"), vcpu, 16), 0xb, 1)[3])
            .collect();
        assert_eq!(ids, (0..16).collect::<Vec<_>>());
    }
}
