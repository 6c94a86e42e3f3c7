//! Kernels are made here, byte by byte, so that each field can be wrong on its own.

use std::io::Cursor;

use proptest::prelude::*;
use strake_observe::Observation;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::acpi::{self, AcpiConfig};
use crate::layout::{GIB, MIB};

type Ram = GuestMemoryMmap<()>;

fn ram(size: u64) -> Ram {
    let ranges: Vec<_> = layout::ram_ranges(size)
        .iter()
        .map(|span| {
            (
                GuestAddress(span.start),
                usize::try_from(span.size).unwrap(),
            )
        })
        .collect();
    Ram::from_ranges(&ranges).unwrap()
}

fn tables() -> AcpiTables {
    acpi::build(&AcpiConfig { cpus: 2 }).unwrap()
}

struct Boot {
    kernel: Vec<u8>,
    initrd: Option<Vec<u8>>,
    cmdline: String,
    size: u64,
}

impl Boot {
    fn new(kernel: Vec<u8>) -> Self {
        Self {
            kernel,
            initrd: None,
            cmdline: "console=ttyS0".into(),
            size: 128 * MIB,
        }
    }

    fn go(self) -> Result<(Ram, Entry)> {
        let ram = ram(self.size);
        let mut initrd = self.initrd.map(Cursor::new);
        let entry = load(
            &ram,
            &mut Cursor::new(self.kernel),
            initrd.as_mut().map(|file| file as &mut dyn BootFile),
            &self.cmdline,
            &tables(),
            self.size,
        )?;
        Ok((ram, entry))
    }

    fn fails(self) -> Observation {
        self.go().err().unwrap()
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage with two setup sectors and 64 KiB of "code".
fn bzimage() -> Vec<u8> {
    let code = 64 << 10_usize;
    let mut image = vec![0_u8; 3 * 512 + code];
    image[0x1f1] = 2;
    put(&mut image, 0x1f4, &(code as u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020f_u16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x214, &0x10_0000_u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000_u32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &0x7f_u16.to_le_bytes());
    put(&mut image, 0x238, &2047_u32.to_le_bytes());
    put(&mut image, 0x250, &0xdead_u64.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000_u64.to_le_bytes());
    put(&mut image, 0x260, &0x200_0000_u32.to_le_bytes());
    for (at, byte) in image[3 * 512..].iter_mut().enumerate() {
        *byte = at as u8;
    }
    image
}

/// An ELF file with one segment of 8 KiB at 16 MiB (memory: 12 KiB) and a PVH note.
fn elf() -> Vec<u8> {
    let mut image = vec![0_u8; 0x3000];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2_u16.to_le_bytes());
    put(&mut image, 18, &62_u16.to_le_bytes());
    put(&mut image, 24, &0x100_0000_u64.to_le_bytes());
    put(&mut image, 32, &64_u64.to_le_bytes());
    put(&mut image, 54, &56_u16.to_le_bytes());
    put(&mut image, 56, &2_u16.to_le_bytes());
    let mut header = |at: usize, kind: u32, offset: u64, gpa: u64, file: u64, memory: u64| {
        put(&mut image, at, &kind.to_le_bytes());
        for (index, value) in [offset, 0xffff_ffff_8100_0000, gpa, file, memory, 0x1000]
            .into_iter()
            .enumerate()
        {
            put(&mut image, at + 8 + index * 8, &value.to_le_bytes());
        }
    };
    header(64, 1, 0x1000, 0x100_0000, 0x2000, 0x3000);
    header(120, 4, 0x200, 0, 64, 64);
    let mut notes = Vec::new();
    for (kind, name, value) in [
        (1_u32, &b"Linux\0"[..], &[1_u8, 2, 3, 4, 5][..]),
        (18, b"Xen\0", &0x100_0123_u32.to_le_bytes()),
    ] {
        notes.extend((name.len() as u32).to_le_bytes());
        notes.extend((value.len() as u32).to_le_bytes());
        notes.extend(kind.to_le_bytes());
        notes.extend(name);
        notes.resize(notes.len().next_multiple_of(4), 0);
        notes.extend(value);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
    put(&mut image, 0x200, &notes);
    for (at, byte) in image[0x1000..].iter_mut().enumerate() {
        *byte = at as u8;
    }
    image
}

fn u32_in(ram: &Ram, at: u64) -> u32 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

fn u64_in(ram: &Ram, at: u64) -> u64 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

fn bytes_in(ram: &Ram, at: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn bzimage_is_entered_in_long_mode_with_its_parameters() {
    let image = bzimage();
    let mut boot = Boot::new(image.clone());
    boot.size = 5 * GIB;
    boot.initrd = Some(vec![0xab; 5000]);
    let (ram, entry) = boot.go().unwrap();
    assert_eq!(
        entry,
        Entry {
            protocol: Protocol::Linux64,
            rip: 0x10_0200,
            parameters: 0x7000
        }
    );
    assert_eq!(bytes_in(&ram, 0x10_0000, 64 << 10), image[3 * 512..]);
    let zero = 0x7000;
    assert_eq!(u64_in(&ram, zero + 0x70), 0xe_0000, "RSDP");
    assert_eq!(bytes_in(&ram, 0xe_0000, 8), b"RSD PTR ");
    assert_eq!(&bytes_in(&ram, zero + 0x202, 4), b"HdrS");
    assert_eq!(bytes_in(&ram, zero + 0x210, 1), [0xff]);
    assert_eq!(u64_in(&ram, zero + 0x250), 0, "setup_data of the file");
    assert_eq!(u32_in(&ram, zero + 0x228), 0x2_0000);
    assert_eq!(&bytes_in(&ram, 0x2_0000, 14), b"console=ttyS0\0");
    let (start, size) = (u32_in(&ram, zero + 0x218), u32_in(&ram, zero + 0x21c));
    assert_eq!(
        (start, size),
        (0x7fff_e000, 5000),
        "as high as the kernel allows"
    );
    assert_eq!(bytes_in(&ram, u64::from(start), 5000), [0xab; 5000]);
    let map = layout::e820(5 * GIB);
    assert_eq!(bytes_in(&ram, zero + 0x1e8, 1)[0] as usize, map.len());
    for (index, range) in map.iter().enumerate() {
        let at = zero + 0x2d0 + index as u64 * 20;
        assert_eq!(u64_in(&ram, at), range.span.start);
        assert_eq!(u64_in(&ram, at + 8), range.span.size);
        assert_eq!(u32_in(&ram, at + 16), range.kind.e820());
    }
    // The page tables map the entry, the parameters and 4 GiB - 1 to themselves.
    for address in [0x10_0200_u64, 0x7000, 0xffff_ffff] {
        let mut table = 0x9000;
        let mut last = 0;
        for shift in [39, 30, 21] {
            last = u64_in(&ram, table + (address >> shift & 511) * 8);
            assert_eq!(last & 3, 3);
            table = last & !0xfff;
        }
        assert_ne!(last & 1 << 7, 0);
        assert_eq!(last & !0x1f_ffff, address & !0x1f_ffff);
    }
}

#[test]
fn elf_is_entered_in_protected_mode_with_its_start_information() {
    let image = elf();
    let mut boot = Boot::new(image.clone());
    boot.initrd = Some(vec![0xcd; 4096]);
    let (ram, entry) = boot.go().unwrap();
    assert_eq!(
        entry,
        Entry {
            protocol: Protocol::Pvh,
            rip: 0x100_0123,
            parameters: 0x6000
        }
    );
    assert_eq!(bytes_in(&ram, 0x100_0000, 0x2000), image[0x1000..]);
    assert_eq!(u32_in(&ram, 0x6000), 0x336e_c578);
    assert_eq!(u32_in(&ram, 0x6004), 1, "version");
    assert_eq!(u32_in(&ram, 0x600c), 1, "modules");
    let module = u64_in(&ram, 0x6010);
    assert_eq!(u64_in(&ram, module), 128 * MIB - 4096);
    assert_eq!(u64_in(&ram, module + 8), 4096);
    assert_eq!(u64_in(&ram, 0x6018), 0x2_0000);
    assert_eq!(u64_in(&ram, 0x6020), 0xe_0000);
    let (map, count) = (u64_in(&ram, 0x6028), u32_in(&ram, 0x6030));
    let expected = layout::e820(128 * MIB);
    assert_eq!(count as usize, expected.len());
    for (index, range) in expected.iter().enumerate() {
        let at = map + index as u64 * 24;
        assert_eq!(u64_in(&ram, at), range.span.start);
        assert_eq!(u64_in(&ram, at + 8), range.span.size);
        assert_eq!(u32_in(&ram, at + 16), range.kind.e820());
    }
}

#[test]
fn registers_are_those_of_the_protocol() {
    let mut reset = kvm_bindings::kvm_sregs {
        apic_base: 0xfee0_0900,
        ..Default::default()
    };
    reset.cs.base = 0xffff_0000;
    let entry = Entry {
        protocol: Protocol::Linux64,
        rip: 0x10_0200,
        parameters: 0x7000,
    };
    let (regs, sregs) = registers(&entry, reset);
    assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x10_0200, 0x7000, 2));
    assert_eq!(sregs.apic_base, 0xfee0_0900);
    assert_eq!(
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer),
        (0x8000_0011, 0x9000, 0x20, 0x500)
    );
    assert_eq!(
        (sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.base),
        (0x10, 1, 0, 0)
    );
    assert_eq!((sregs.ds.selector, sregs.ss.limit), (0x18, 0xffff_ffff));
    assert_eq!(
        (sregs.tr.selector, sregs.tr.type_, sregs.tr.limit),
        (0x20, 11, 0x67)
    );

    let entry = Entry {
        protocol: Protocol::Pvh,
        rip: 0x100_0123,
        parameters: 0x6000,
    };
    let (regs, sregs) = registers(&entry, reset);
    assert_eq!((regs.rip, regs.rbx, regs.rsi), (0x100_0123, 0x6000, 0));
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.type_), (0, 1, 11));
    assert_eq!(sregs.cs.limit, 0xffff_ffff);
}

#[test]
fn files_that_are_no_kernel_are_named() {
    let with = |at: usize, bytes: &[u8]| {
        let mut file = vec![0; 4096];
        put(&mut file, at, bytes);
        file
    };
    let mut arm = elf();
    put(&mut arm, 18, &183_u16.to_le_bytes());
    let mut module = elf();
    put(&mut module, 16, &1_u16.to_le_bytes());
    let mut small = elf();
    small[4] = 1;
    let mut no_note = elf();
    put(&mut no_note, 120, &6_u32.to_le_bytes());
    let mut i386 = bzimage();
    put(&mut i386, 0x236, &[0, 0]);
    let mut old = bzimage();
    put(&mut old, 0x206, &0x020a_u16.to_le_bytes());
    let mut zimage = bzimage();
    zimage[0x211] = 0;
    for (file, named) in [
        (Vec::new(), "an empty file"),
        (with(0, b"\x1f\x8b\x08"), "gzip"),
        (with(0, b"070701"), "cpio"),
        (with(0, b"QFI\xfb"), "qcow2"),
        (with(257, b"ustar"), "tar"),
        (with(1080, b"\x53\xef"), "ext2/3/4"),
        (with(512, b"EFI PART"), "GPT"),
        (with(510, b"\x55\xaa"), "boot sector"),
        (with(0, b"MZ"), "an EFI program"),
        (vec![0; 5000], "zeroes"),
        (b"hello world\n".to_vec(), "a text file"),
        (b"#!/bin/sh\nexit 0\n".to_vec(), "a script"),
        (vec![0xee; 100], "unknown kind"),
        (arm, "for arm64"),
        (module, "kernel module"),
        (small, "64-bit"),
        (no_note, "PVH note"),
        (i386, "32-bit Linux"),
        (old, "boot protocol 2.10"),
        (zimage, "a zImage"),
    ] {
        let seen = Boot::new(file).fails();
        assert_eq!(seen.id(), "arch.not-a-kernel", "{seen}");
        assert!(seen.text().contains(named), "{named}: {}", seen.text());
        assert!(seen.remedy().contains("bzImage"));
    }
}

#[test]
fn what_does_not_fit_is_said_with_numbers() {
    // The kernel.
    let mut boot = Boot::new(bzimage());
    boot.size = 32 * MIB;
    let seen = boot.fails();
    assert_eq!(seen.id(), "arch.kernel-does-not-fit");
    assert_eq!(seen.datum("needed").unwrap(), 0x300_0000);
    let mut big = elf();
    put(&mut big, 64 + 40, &u64::MAX.to_le_bytes());
    assert_eq!(Boot::new(big).fails().id(), "arch.kernel-does-not-fit");

    // The initial RAM disk: one byte more than there is.
    for (kernel, end) in [(bzimage(), 0x300_0000), (elf(), 0x100_3000)] {
        let room = 128 * MIB - end;
        let mut boot = Boot::new(kernel.clone());
        boot.initrd = Some(vec![1; usize::try_from(room).unwrap()]);
        boot.go().unwrap();
        let mut boot = Boot::new(kernel);
        boot.initrd = Some(vec![1; usize::try_from(room).unwrap() + 1]);
        let seen = boot.fails();
        assert_eq!(seen.id(), "arch.initrd-does-not-fit");
        assert_eq!(seen.datum("available").unwrap(), room);
    }

    // The command line.
    for kernel in [bzimage(), elf()] {
        let mut boot = Boot::new(kernel.clone());
        boot.cmdline = "x".repeat(2047);
        boot.go().unwrap();
        let mut boot = Boot::new(kernel.clone());
        boot.cmdline = "x".repeat(2048);
        let seen = boot.fails();
        assert_eq!(seen.id(), "arch.command-line-too-long");
        let mut boot = Boot::new(kernel);
        boot.cmdline = "a\0b".into();
        assert_eq!(boot.fails().id(), "arch.command-line-invalid");
    }

    // RAM itself.
    for size in [0, 16 * MIB, 64 * MIB + 1, u64::MAX] {
        let seen = load(
            &ram(32 * MIB),
            &mut Cursor::new(bzimage()),
            None,
            "",
            &tables(),
            size,
        )
        .unwrap_err();
        assert_eq!(seen.id(), "arch.ram-size");
    }
}

#[test]
fn damage_is_named() {
    let cut = |mut file: Vec<u8>, to: usize| {
        file.truncate(to);
        file
    };
    let patched = |mut file: Vec<u8>, at: usize, value: &[u8]| {
        put(&mut file, at, value);
        file
    };
    for (file, named) in [
        (cut(bzimage(), 0x220), "ends in its setup header"),
        (cut(bzimage(), 30_000), "its header says"),
        (cut(elf(), 50), "ends in its ELF header"),
        (cut(elf(), 0x2000), "past the end of the file"),
        (patched(elf(), 56, &[0, 0]), "0 program headers"),
        (patched(elf(), 56, &[0xff, 0xff]), "65535 program headers"),
        (patched(elf(), 54, &[57, 0]), "57 bytes each"),
        (
            patched(elf(), 32, &u64::MAX.to_le_bytes()),
            "ends in its program headers",
        ),
        (
            patched(elf(), 64 + 8, &u64::MAX.to_le_bytes()),
            "past the end",
        ),
        (patched(elf(), 64 + 24, &[0; 8]), "below 1 MiB"),
        (
            patched(elf(), 64 + 40, &0x1000_u64.to_le_bytes()),
            "larger in the file",
        ),
        (
            patched(elf(), 0x200 + 44, &[0; 4]),
            "outside of its segments",
        ),
    ] {
        let seen = Boot::new(file).fails();
        assert_eq!(seen.id(), "arch.kernel-damaged", "{seen}");
        assert!(seen.text().contains(named), "{named}: {}", seen.text());
    }
}

/// A file whose store fails from some offset on.
struct Failing {
    inner: Cursor<Vec<u8>>,
    from: u64,
}

impl std::io::Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.inner.position() >= self.from {
            return Err(std::io::Error::from_raw_os_error(5));
        }
        let most = usize::try_from(self.from - self.inner.position()).unwrap();
        let most = most.min(buffer.len());
        self.inner.read(&mut buffer[..most])
    }
}

impl std::io::Seek for Failing {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.inner.seek(to)
    }
}

#[test]
fn a_failing_store_is_the_cause() {
    for kernel in [bzimage(), elf()] {
        for from in [0, 0x100, 0x1200, 0x2000] {
            let mut file = Failing {
                inner: Cursor::new(kernel.clone()),
                from,
            };
            let seen = load(&ram(128 * MIB), &mut file, None, "", &tables(), 128 * MIB);
            let seen = seen.unwrap_err();
            assert_eq!(seen.id(), "arch.boot-read-failed", "{from:#x} {seen}");
            assert_eq!(seen.causes()[0].datum("name").unwrap(), "EIO");
        }
        let mut initrd = Failing {
            inner: Cursor::new(vec![0; 10_000]),
            from: 5000,
        };
        let seen = load(
            &ram(128 * MIB),
            &mut Cursor::new(kernel),
            Some(&mut initrd),
            "",
            &tables(),
            128 * MIB,
        )
        .unwrap_err();
        assert!(seen.text().contains("initial RAM disk"));
        assert!(seen.find("os.call-failed").is_some());
    }
}

/// Changes to a good file: single bytes, whole fields, the end.
fn damage() -> impl Strategy<Value = (Vec<(usize, u64, usize)>, Option<usize>)> {
    let interesting = prop_oneof![
        any::<u64>(),
        Just(0),
        Just(u64::MAX),
        Just(u64::MAX - 0xfff),
        Just(0x7fff_ffff_ffff_ffff),
        Just(0xffff_ffff),
        0_u64..0x1000,
    ];
    let place = prop_oneof![
        0_usize..0x270,
        0x1f0_usize..0x268,
        0_usize..64,
        64_usize..176
    ];
    (
        prop::collection::vec((place, interesting, 1_usize..=8), 1..6),
        prop::option::of(0_usize..0x4000),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a header says, loading ends, without a panic, in an entry or an observation.
    #[test]
    fn damaged_headers_are_harmless(
        (changes, cut) in damage(),
        is_elf: bool,
        with_initrd: bool,
    ) {
        let mut file = if is_elf { elf() } else { bzimage() };
        for (at, value, count) in changes {
            put(&mut file, at, &value.to_le_bytes()[..count]);
        }
        if let Some(cut) = cut {
            file.truncate(cut);
        }
        let mut boot = Boot::new(file);
        boot.size = 64 * MIB;
        boot.initrd = with_initrd.then(|| vec![7; 3000]);
        if let Ok((_, entry)) = boot.go() {
            prop_assert!(entry.rip >= layout::HIMEM_START && entry.rip < 64 * MIB);
        }
    }

    #[test]
    fn arbitrary_files_are_harmless(file in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(Boot::new(file).go().is_err());
    }
}
