//! What kind of file was given as a kernel, and why it is not one.

use strake_observe::Result;

use crate::observations::NotAKernel;

/// How much of the file's beginning is looked at.
pub(super) const HEAD: usize = 4096;

/// The kinds of kernel that can be booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    BzImage,
    Elf,
}

/// What other files begin with, and what they are then.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"\x1f\x8b", "a gzip-compressed file"),
    (0, b"\xfd7zXZ\0", "an xz-compressed file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd-compressed file"),
    (0, b"BZh", "a bzip2-compressed file"),
    (0, b"\x02\x21\x4c\x18", "an lz4-compressed file"),
    (0, b"\x04\x22\x4d\x18", "an lz4-compressed file"),
    (0, b"070701", "a cpio archive (an initial RAM disk?)"),
    (0, b"070702", "a cpio archive (an initial RAM disk?)"),
    (257, b"ustar", "a tar archive"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"vhdxfile", "a VHDX disk image"),
    (0, b"hsqs", "a squashfs file system"),
    (1080, b"\x53\xef", "an ext2/3/4 file system image"),
    (56, b"ARM\x64", "a kernel for arm64"),
    (48, b"RISCV", "a kernel for RISC-V"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
    (0, b"!<arch>\n", "an ar archive (a .deb package?)"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (0, b"#!", "a script"),
    (512, b"EFI PART", "a disk image with a GPT"),
];

/// Says which kind of kernel a file of `size` bytes that begins with `head` is.
///
/// # Errors
/// [`NotAKernel`] with what the file looks like instead.
pub(super) fn identify(head: &[u8], size: u64) -> Result<Kernel> {
    let has = |at: usize, bytes: &[u8]| head.get(at..).is_some_and(|from| from.starts_with(bytes));
    if has(0x202, b"HdrS") {
        return Ok(Kernel::BzImage);
    }
    if has(0, b"\x7fELF") {
        return elf(head);
    }
    if size == 0 {
        return Err(not("an empty file", "there is nothing in it"));
    }
    let found = SIGNATURES
        .iter()
        .find(|(at, bytes, _)| has(*at, bytes))
        .map(|(_, _, name)| *name);
    if let Some(found) = found {
        return Err(not(found, "a kernel was expected"));
    }
    if has(0, b"MZ") {
        return Err(not(
            "an EFI program",
            "it has no Linux setup header, and firmware is not run",
        ));
    }
    if has(510, b"\x55\xaa") {
        return Err(not(
            "a boot sector or a disk image",
            "it has no Linux setup header",
        ));
    }
    if head.iter().all(|byte| *byte == 0) {
        return Err(not("a file of zeroes", "there is nothing in it"));
    }
    if head
        .iter()
        .all(|byte| matches!(byte, b' '..=b'~' | b'\n' | b'\r' | b'\t'))
    {
        return Err(not("a text file", "a kernel was expected"));
    }
    Err(not(
        "a file of unknown kind",
        "it has neither a Linux setup header nor an ELF header",
    ))
}

fn elf(head: &[u8]) -> Result<Kernel> {
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const RELOCATABLE: u16 = 1;
    const CORE: u16 = 4;
    const X86_64: u16 = 62;
    let [.., class, data] = head.first_chunk::<6>().copied().unwrap_or_default();
    let half = |at: usize| {
        head.get(at..)
            .and_then(|from| from.first_chunk::<2>())
            .map_or(0, |bytes| u16::from_le_bytes(*bytes))
    };
    let (kind, machine) = (half(16), half(18));
    if class != CLASS_64 || data != LITTLE_ENDIAN {
        return Err(not(
            "an ELF file, but not a 64-bit little-endian one",
            "the guest's processors are x86-64",
        ));
    }
    if machine != X86_64 {
        let name = match machine {
            3 => "32-bit x86".to_owned(),
            183 => "arm64".to_owned(),
            243 => "RISC-V".to_owned(),
            other => format!("machine number {other}"),
        };
        return Err(not(
            &format!("an ELF file for {name}"),
            "the guest's processors are x86-64",
        ));
    }
    match kind {
        RELOCATABLE => Err(not(
            "an ELF object file or kernel module",
            "it is not a linked program",
        )),
        CORE => Err(not("an ELF core dump", "it is not a program")),
        _ => Ok(Kernel::Elf),
    }
}

pub(super) fn not(found: &str, reason: &str) -> strake_observe::Observation {
    NotAKernel {
        found: found.to_owned(),
        reason: reason.to_owned(),
    }
    .into()
}
