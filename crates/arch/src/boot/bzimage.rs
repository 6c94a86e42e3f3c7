//! bzImage: Linux's boot protocol with the 64-bit entry.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use strake_observe::{Observation, Result};
use vm_memory::{ByteValued, GuestAddress};

use super::place::Memory;
use super::source::Source;
use super::{Entry, Protocol, command_line, kind};
use crate::acpi::AcpiTables;
use crate::layout;
use crate::observations::{KernelDamaged, KernelDoesNotFit};

/// Where the protected-mode part goes.
const LOAD: u64 = layout::HIMEM_START;
/// The 64-bit entry, from there.
const ENTRY_64: u64 = 0x200;
/// The first version of the protocol that says whether there is a 64-bit entry: 2.12, Linux 3.8.
const VERSION: u16 = 0x020c;
/// `loadflags`: the protected-mode part goes to 1 MiB.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: the kernel is a 64-bit one with an entry at [`ENTRY_64`].
const KERNEL_64: u16 = 1;
/// "A boot loader without a number of its own."
const LOADER: u8 = 0xff;

pub(super) fn load(
    memory: &Memory<'_>,
    kernel: &mut Source<'_>,
    initrd: Option<&mut Source<'_>>,
    cmdline: &str,
    tables: &AcpiTables,
) -> Result<Entry> {
    let header = setup(kernel)?;
    let line = command_line(cmdline, u64::from(header.cmdline_size))?;
    let end = room(memory, &header)?;

    let loaded = BzImage::load(memory.map, Some(GuestAddress(LOAD)), kernel, None)
        .map_err(|error| damaged_or(kernel, &error.to_string()))?;
    let mut header = loaded.setup_header.unwrap_or(header);
    if loaded.kernel_end > memory.low_end() {
        return Err(KernelDoesNotFit {
            needed: loaded.kernel_end,
            available: memory.low_end(),
        }
        .into());
    }
    let end = end.max(loaded.kernel_end);

    memory.write("command line", layout::COMMAND_LINE.start, &line)?;
    header.type_of_loader = LOADER;
    header.cmd_line_ptr = low(layout::COMMAND_LINE.start);
    // What a loader fills in must not come from the file.
    header.setup_data = 0;
    header.ramdisk_image = 0;
    header.ramdisk_size = 0;
    if let Some(initrd) = initrd {
        let top = u64::from(header.initrd_addr_max).saturating_add(1);
        let placed = memory.place_initrd(initrd, end, top)?;
        header.ramdisk_image = low(placed.start);
        header.ramdisk_size = low(placed.size);
    }

    let mut parameters = boot_params {
        hdr: header,
        acpi_rsdp_addr: tables.rsdp_gpa,
        ..Default::default()
    };
    let mut map = [boot_e820_entry::default(); 128];
    let mut count = 0;
    for (entry, range) in map.iter_mut().zip(layout::e820(memory.ram_size)) {
        *entry = boot_e820_entry {
            addr: range.span.start,
            size: range.span.size,
            r#type: range.kind.e820(),
        };
        count += 1;
    }
    parameters.e820_table = map;
    parameters.e820_entries = count;
    memory.write("boot parameters", layout::ZERO_PAGE, parameters.as_slice())?;
    page_tables(memory)?;
    super::registers::write_gdt(memory, Protocol::Linux64)?;
    Ok(Entry {
        protocol: Protocol::Linux64,
        rip: LOAD + ENTRY_64,
        parameters: layout::ZERO_PAGE,
    })
}

/// Reads the setup header and checks all of it that is relied upon.
fn setup(kernel: &mut Source<'_>) -> Result<setup_header> {
    const AT: u64 = 0x1f1;
    let size = kernel.size()?;
    let bytes = kernel.head(
        std::io::SeekFrom::Start(AT),
        std::mem::size_of::<setup_header>(),
    )?;
    let mut header = setup_header::default();
    if bytes.len() != header.as_slice().len() {
        return Err(damaged("the file ends in its setup header"));
    }
    header.as_mut_slice().copy_from_slice(&bytes);

    let (version, flags) = (header.version, header.xloadflags);
    if version < VERSION {
        return Err(kind::not(
            &format!(
                "a Linux kernel of boot protocol {}.{:02}",
                version >> 8,
                version & 0xff
            ),
            "the 64-bit entry came with 2.12 (Linux 3.8)",
        ));
    }
    if flags & KERNEL_64 == 0 {
        return Err(kind::not("a 32-bit Linux kernel", "it has no 64-bit entry"));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(kind::not("a zImage", "only bzImage goes to 1 MiB"));
    }
    let sectors = match header.setup_sects {
        0 => 4,
        some => u64::from(some),
    };
    let setup = (sectors + 1) * 512;
    let code = u64::from(header.syssize) * 16;
    if size < setup + code || size <= setup + ENTRY_64 {
        return Err(damaged(&format!(
            "the file has {size} bytes, its header says {}",
            setup + code
        )));
    }
    Ok(header)
}

/// Where the memory ends that the kernel needs before it has read the memory map: it unpacks
/// itself to its preferred address or to where it was loaded, whichever is higher.
fn room(memory: &Memory<'_>, header: &setup_header) -> Result<u64> {
    let available = memory.low_end();
    let needed = LOAD
        .max(header.pref_address)
        .saturating_add(u64::from(header.init_size));
    if needed > available {
        return Err(KernelDoesNotFit { needed, available }.into());
    }
    Ok(needed)
}

/// Maps the first 4 GiB to themselves in pages of 2 MiB.
fn page_tables(memory: &Memory<'_>) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 0x1000;
    let pml4 = layout::BOOT_PAGE_TABLES.start;
    let pdpt = pml4 + PAGE;
    let directories = pdpt + PAGE;
    memory.write_words("page tables", pml4, &[pdpt | PRESENT_WRITABLE])?;
    let pointers: Vec<u64> = (0..4)
        .map(|index| (directories + index * PAGE) | PRESENT_WRITABLE)
        .collect();
    memory.write_words("page tables", pdpt, &pointers)?;
    let pages: Vec<u64> = (0..4 * 512)
        .map(|index| index << 21 | LARGE | PRESENT_WRITABLE)
        .collect();
    memory.write_words("page tables", directories, &pages)
}

fn damaged(reason: &str) -> Observation {
    KernelDamaged {
        format: "bzImage".to_owned(),
        reason: reason.to_owned(),
    }
    .into()
}

/// The file's own failure explains more than what the loader made of it.
fn damaged_or(kernel: &mut Source<'_>, reason: &str) -> Observation {
    kernel.failure().unwrap_or_else(|| damaged(reason))
}

/// For addresses and sizes below 4 GiB, which all those of this module are.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
