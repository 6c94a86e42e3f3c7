//! Guests of a few bytes, as ELF files with a PVH entry: 32-bit protected mode, no paging.

/// Where the code is loaded and entered.
const CODE: u32 = 0x10_0000;

/// Writes `text` to the serial port.
pub(super) fn say(text: &str) -> Vec<u8> {
    let mut code = vec![0xba, 0xf8, 0x03, 0, 0]; // mov edx, 0x3f8
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code
}

/// Soft-off by ACPI: SLP_TYP 5 and SLP_EN to the PM1 control register.
pub(super) fn power_off() -> Vec<u8> {
    vec![
        0xba, 0x04, 0x06, 0, 0, // mov edx, 0x604
        0x66, 0xb8, 0x00, 0x34, // mov ax, 0x3400
        0x66, 0xef, // out dx, ax
    ]
}

/// Reset by ACPI's register.
pub(super) fn reset() -> Vec<u8> {
    vec![0xba, 0x08, 0x06, 0, 0, 0xb0, 0x01, 0xee]
}

/// An interrupt without a table for it.
pub(super) fn triple_fault() -> Vec<u8> {
    vec![
        0x0f, 0x01, 0x1d, 0, 0x20, 0, 0, // lidt [0x2000]: zeroes
        0x0f, 0x0b, // ud2
    ]
}

/// Jumps to where there is no memory: no host can emulate that.
pub(super) fn jump_into_nothing() -> Vec<u8> {
    vec![0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0] // mov eax, 0xd0000000; jmp eax
}

/// Says `.` for ever.
pub(super) fn chatter() -> Vec<u8> {
    vec![
        0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
        0xb0, b'.', // mov al, '.'
        0xee, // out dx, al
        0xeb, 0xfb, // jmp to the mov... of al
    ]
}

/// Loops without an exit.
pub(super) fn spin() -> Vec<u8> {
    vec![0xeb, 0xfe]
}

/// Counts the 32 bits at [`COUNTER`] up for ever.
pub(super) fn count() -> Vec<u8> {
    let mut code = vec![0xbf]; // mov edi, COUNTER
    code.extend(COUNTER.to_le_bytes());
    code.extend([0xff, 0x07, 0xeb, 0xfc]); // inc dword [edi]; jmp back
    code
}

/// Where [`count`] counts.
pub(super) const COUNTER: u32 = 0x20_0000;

/// An ELF file with `code` at its PVH entry.
pub(super) fn elf(parts: &[Vec<u8>]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 24;
    let mut code = parts.concat();
    code.extend(spin());
    let mut out = Vec::new();
    out.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    out.extend(2u16.to_le_bytes()); // an executable
    out.extend(62u16.to_le_bytes()); // x86-64
    out.extend(1u32.to_le_bytes());
    out.extend(u64::from(CODE).to_le_bytes());
    out.extend(64u64.to_le_bytes()); // program headers
    out.extend(0u64.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    for size in [64u16, 56, 2, 64, 0, 0] {
        out.extend(size.to_le_bytes());
    }
    let size = code.len() as u64;
    program_header(&mut out, 4, HEADERS, 0, NOTE);
    program_header(&mut out, 1, HEADERS + NOTE, u64::from(CODE), size);
    // XEN_ELFNOTE_PHYS32_ENTRY
    for word in [4u32, 4, 18] {
        out.extend(word.to_le_bytes());
    }
    out.extend(b"Xen\0");
    out.extend(CODE.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    out.extend(code);
    out
}

fn program_header(out: &mut Vec<u8>, kind: u32, offset: u64, address: u64, size: u64) {
    out.extend(kind.to_le_bytes());
    out.extend(5u32.to_le_bytes());
    for value in [offset, address, address, size, size, 4] {
        out.extend(value.to_le_bytes());
    }
}
