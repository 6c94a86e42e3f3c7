//! Direct boot: a kernel, its initial RAM disk and its command line, put into guest memory as the
//! boot protocols ask for, and the registers at its entry.
//!
//! Two protocols are spoken, chosen by what the kernel file is:
//!
//! * a **bzImage** is entered at its 64-bit entry with boot parameters ("zero page") in RSI, in
//!   long mode with the first 4 GiB mapped to themselves;
//! * an **ELF** file with a PVH note is entered in 32-bit protected mode without paging, with the
//!   start information in EBX.
//!
//! The kernel file may have come out of a hostile guest's own disk (see [`disk`]). Nothing in it
//! is believed before it was checked against the file's length and the guest's RAM; what remains
//! wrong can hurt the guest alone.
//!
//! Guest memory must be fresh (all zeroes): parts that a kernel expects cleared are not written.
//!
//! Who writes where is in [`layout`]: descriptor table, page tables, parameters and
//! command line below 1 MiB; the kernel from 1 MiB (bzImage) or where it wants to be (ELF); the
//! initial RAM disk as high as possible below 3 GiB.

mod bzimage;
pub mod disk;
mod kind;
mod place;
mod pvh;
mod registers;
mod source;

use std::io::SeekFrom;

use strake_observe::Result;
use vm_memory::GuestMemoryMmap;

use crate::acpi::AcpiTables;
use crate::layout;
use crate::observations::{CommandLineInvalid, CommandLineTooLong, RamSize};

pub use registers::registers;
pub use source::BootFile;

use place::Memory;
use source::Source;

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// The 64-bit entry of Linux's boot protocol: long mode, RSI holds the zero page's address.
    Linux64,
    /// The PVH entry: 32-bit protected mode, EBX holds the start information's address.
    Pvh,
}

/// Where and how the first vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// How.
    pub protocol: Protocol,
    /// The first instruction.
    pub rip: u64,
    /// What the kernel finds its parameters by: in RSI or EBX as the protocol has it.
    pub parameters: u64,
}

/// Puts everything that a kernel needs into guest memory.
///
/// `ram_size` is the guest's RAM as [`layout::ram_ranges`] lays it out, and what `memory` maps.
///
/// # Errors
/// If the kernel is not one, is damaged, or does not fit; if the initial RAM disk does not fit; if
/// the command line is too long for this kernel; if a file cannot be read.
pub fn load(
    memory: &GuestMemoryMmap<()>,
    kernel: &mut dyn BootFile,
    initrd: Option<&mut dyn BootFile>,
    cmdline: &str,
    tables: &AcpiTables,
    ram_size: u64,
) -> Result<Entry> {
    check_ram(ram_size)?;
    let memory = Memory::new(memory, ram_size);
    let mut kernel = Source::new(kernel, "kernel");
    let size = kernel.size()?;
    let head = kernel.head(SeekFrom::Start(0), kind::HEAD)?;
    let mut initrd = initrd.map(|file| Source::new(file, "initial RAM disk"));
    let entry = match kind::identify(&head, size)? {
        kind::Kernel::BzImage => {
            bzimage::load(&memory, &mut kernel, initrd.as_mut(), cmdline, tables)?
        }
        kind::Kernel::Elf => pvh::load(&memory, &mut kernel, initrd.as_mut(), cmdline, tables)?,
    };
    for (gpa, blob) in &tables.blobs {
        memory.write("ACPI tables", *gpa, blob)?;
    }
    Ok(entry)
}

fn check_ram(bytes: u64) -> Result<()> {
    let reason = if bytes < layout::MIN_RAM {
        "it is too little"
    } else if bytes > layout::MAX_RAM {
        "it is too much"
    } else if !bytes.is_multiple_of(4096) {
        "it is not a multiple of the page size"
    } else {
        return Ok(());
    };
    Err(RamSize {
        bytes,
        reason: reason.to_owned(),
    }
    .into())
}

/// The command line with the zero byte that ends it, if a kernel that takes `most` bytes (without
/// the zero) can have it.
fn command_line(text: &str, most: u64) -> Result<Vec<u8>> {
    if let Some(offset) = text.bytes().position(|byte| byte == 0) {
        return Err(CommandLineInvalid {
            offset: offset as u64,
        }
        .into());
    }
    let most = most.min(layout::COMMAND_LINE.size - 1);
    let bytes = text.len() as u64;
    if bytes > most {
        return Err(CommandLineTooLong { bytes, most }.into());
    }
    let mut line = text.as_bytes().to_vec();
    line.push(0);
    Ok(line)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
