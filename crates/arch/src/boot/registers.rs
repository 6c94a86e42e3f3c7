//! Registers and segments at a kernel's entry.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use strake_observe::Result;

use super::place::Memory;
use super::{Entry, Protocol};
use crate::layout;

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// The bit of RFLAGS that is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// The same segments for both protocols, at the selectors that Linux's protocol prescribes; PVH
/// prescribes none. Index 2 is code, 3 data, 4 the task.
const CODE: u16 = 2;
const DATA: u16 = 3;
const TASK: u16 = 4;

const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;
const TASK_32: u64 = 0x0000_8b00_0000_0067;

fn gdt(protocol: Protocol) -> [u64; 5] {
    let code = match protocol {
        Protocol::Linux64 => CODE_64,
        Protocol::Pvh => CODE_32,
    };
    [0, 0, code, FLAT_DATA, TASK_32]
}

pub(super) fn write_gdt(memory: &Memory<'_>, protocol: Protocol) -> Result<()> {
    memory.write_words("segment descriptors", layout::BOOT_GDT, &gdt(protocol))
}

/// A descriptor of the table as the processor caches it in a segment register.
fn segment(table: &[u64; 5], index: u16) -> kvm_segment {
    let descriptor = table.get(usize::from(index)).copied().unwrap_or(0);
    let bits = |low: u32, count: u32| descriptor >> low & ((1 << count) - 1);
    // Every one of these holds fewer bits than a byte.
    let small = |low: u32, count: u32| u8::try_from(bits(low, count)).unwrap_or(0);
    let limit = u32::try_from(bits(0, 16) | bits(48, 4) << 16).unwrap_or(0);
    let granular = small(55, 1);
    kvm_segment {
        base: bits(16, 24) | bits(56, 8) << 24,
        limit: if granular == 1 {
            limit << 12 | 0xfff
        } else {
            limit
        },
        selector: index * 8,
        type_: small(40, 4),
        s: small(44, 1),
        dpl: small(45, 2),
        present: small(47, 1),
        avl: small(52, 1),
        l: small(53, 1),
        db: small(54, 1),
        g: granular,
        unusable: 0,
        padding: 0,
    }
}

/// The registers of the first vCPU at the kernel's entry. `reset` is what `KVM_GET_SREGS` gave:
/// what the boot protocols do not speak of stays as it is. The other vCPUs keep their reset state
/// and wait for the kernel's startup interrupt.
#[must_use]
pub fn registers(entry: &Entry, reset: kvm_sregs) -> (kvm_regs, kvm_sregs) {
    let table = gdt(entry.protocol);
    let data = segment(&table, DATA);
    let mut sregs = kvm_sregs {
        cs: segment(&table, CODE),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: segment(&table, TASK),
        gdt: kvm_dtable {
            base: layout::BOOT_GDT,
            limit: 5 * 8 - 1,
            ..Default::default()
        },
        idt: kvm_dtable::default(),
        cr0: CR0_PROTECTED | CR0_EXTENSION_TYPE,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..reset
    };
    let mut regs = kvm_regs {
        rip: entry.rip,
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry.protocol {
        Protocol::Linux64 => {
            sregs.cr0 |= CR0_PAGING;
            sregs.cr3 = layout::BOOT_PAGE_TABLES.start;
            sregs.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
            sregs.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
            regs.rsi = entry.parameters;
        }
        Protocol::Pvh => regs.rbx = entry.parameters,
    }
    (regs, sregs)
}
