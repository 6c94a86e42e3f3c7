//! ELF kernels with a PVH note.

use std::io::SeekFrom;

use linux_loader::loader::{Elf, KernelLoader};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use strake_observe::{Observation, Result};

use super::place::Memory;
use super::source::Source;
use super::{Entry, Protocol, command_line, kind};
use crate::acpi::AcpiTables;
use crate::layout::{self, Span};
use crate::observations::{KernelDamaged, KernelDoesNotFit};

/// Program headers of a kernel: Linux has five.
const MOST_SEGMENTS: u16 = 64;
/// Notes of a kernel: Linux has some hundred bytes.
const MOST_NOTES: u64 = 64 << 10;
/// Linux's own limit on x86, without the zero byte; PVH has no field that says it.
const COMMAND_LINE: u64 = 2047;

pub(super) fn load(
    memory: &Memory<'_>,
    kernel: &mut Source<'_>,
    initrd: Option<&mut Source<'_>>,
    cmdline: &str,
    tables: &AcpiTables,
) -> Result<Entry> {
    let plan = plan(memory, kernel)?;
    let line = command_line(cmdline, COMMAND_LINE)?;
    Elf::load(memory.map, None, kernel, None).map_err(|error| {
        kernel
            .failure()
            .unwrap_or_else(|| damaged(&error.to_string()))
    })?;

    memory.write("command line", layout::COMMAND_LINE.start, &line)?;
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE.start,
        rsdp_paddr: tables.rsdp_gpa,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        let placed = memory.place_initrd(initrd, plan.end, memory.low_end())?;
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
        let module = hvm_modlist_entry {
            paddr: placed.start,
            size: placed.size,
            ..Default::default()
        };
        let words = [
            module.paddr,
            module.size,
            module.cmdline_paddr,
            module.reserved,
        ];
        memory.write_words("module list", layout::PVH_MODULES, &words)?;
    }
    let mut map = Vec::new();
    for range in layout::e820(memory.ram_size) {
        let entry = hvm_memmap_table_entry {
            addr: range.span.start,
            size: range.span.size,
            type_: range.kind.e820(),
            reserved: 0,
        };
        map.extend([entry.addr, entry.size, u64::from(entry.type_)]);
        info.memmap_entries += 1;
    }
    memory.write_words("memory map", layout::PVH_MEMORY_MAP, &map)?;
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let words = [
        pair(info.magic, info.version),
        pair(info.flags, info.nr_modules),
        info.modlist_paddr,
        info.cmdline_paddr,
        info.rsdp_paddr,
        info.memmap_paddr,
        pair(info.memmap_entries, info.reserved),
    ];
    memory.write_words("start information", layout::PVH_START_INFO, &words)?;
    super::registers::write_gdt(memory, Protocol::Pvh)?;
    Ok(Entry {
        protocol: Protocol::Pvh,
        rip: plan.entry,
        parameters: layout::PVH_START_INFO,
    })
}

/// What the headers say, checked.
struct Plan {
    /// The PVH entry.
    entry: u64,
    /// Where the kernel's memory ends.
    end: u64,
}

/// One program header.
struct Segment {
    kind: u32,
    offset: u64,
    memory: Span,
    file_size: u64,
}

impl Segment {
    const SIZE: usize = 56;
    const LOAD: u32 = 1;
    const NOTE: u32 = 4;

    fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            kind: u32_at(bytes, 0)?,
            offset: u64_at(bytes, 8)?,
            file_size: u64_at(bytes, 32)?,
            memory: Span::new(u64_at(bytes, 24)?, u64_at(bytes, 40)?),
        })
    }
}

/// Reads the headers and checks everything that the loader will rely upon: that segments are in
/// the file, in RAM above 1 MiB, and apart, so that loading copies no more than the file has.
fn plan(memory: &Memory<'_>, kernel: &mut Source<'_>) -> Result<Plan> {
    let size = kernel.size()?;
    let header = kernel.head(SeekFrom::Start(0), 64)?;
    let table = u64_at(&header, 32).ok_or_else(|| damaged("the file ends in its ELF header"))?;
    let (width, count) = match (u16_at(&header, 54), u16_at(&header, 56)) {
        (Some(width), Some(count)) => (width, count),
        _ => return Err(damaged("the file ends in its ELF header")),
    };
    if usize::from(width) != Segment::SIZE {
        return Err(damaged(&format!(
            "its program headers have {width} bytes each, not {}",
            Segment::SIZE
        )));
    }
    if count == 0 || count > MOST_SEGMENTS {
        return Err(damaged(&format!("it has {count} program headers")));
    }
    let bytes = kernel.head(SeekFrom::Start(table), usize::from(count) * Segment::SIZE)?;
    let segments: Vec<Segment> = bytes
        .chunks_exact(Segment::SIZE)
        .filter_map(Segment::parse)
        .collect();
    if segments.len() != usize::from(count) {
        return Err(damaged("the file ends in its program headers"));
    }

    let mut entry = None;
    let mut loaded: Vec<Span> = Vec::new();
    for segment in &segments {
        let in_file = segment
            .offset
            .checked_add(segment.file_size)
            .is_some_and(|end| end <= size);
        match segment.kind {
            Segment::LOAD | Segment::NOTE if !in_file => {
                return Err(damaged("a segment reaches past the end of the file"));
            }
            Segment::LOAD if segment.memory.size > 0 => {
                check_segment(memory, segment, &loaded)?;
                loaded.push(segment.memory);
            }
            Segment::LOAD if segment.file_size > 0 => {
                return Err(damaged("a segment is larger in the file than in memory"));
            }
            Segment::NOTE if entry.is_none() => {
                if segment.file_size > MOST_NOTES {
                    return Err(damaged("its notes are implausibly large"));
                }
                let most = usize::try_from(segment.file_size).unwrap_or(0);
                let notes = kernel.head(SeekFrom::Start(segment.offset), most)?;
                entry = pvh_note(&notes);
            }
            _ => {}
        }
    }
    let Some(entry) = entry else {
        return Err(kind::not(
            "an ELF program without a PVH note",
            "there is no entry for a kernel that is started without firmware",
        ));
    };
    if !loaded.iter().any(|span| span.contains(Span::new(entry, 1))) {
        return Err(damaged(&format!(
            "its PVH entry {entry:#x} is outside of its segments"
        )));
    }
    Ok(Plan {
        entry,
        end: loaded.iter().map(|span| span.end()).max().unwrap_or(0),
    })
}

fn check_segment(memory: &Memory<'_>, segment: &Segment, loaded: &[Span]) -> Result<()> {
    if segment.file_size > segment.memory.size {
        return Err(damaged("a segment is larger in the file than in memory"));
    }
    if segment.memory.start < layout::HIMEM_START {
        return Err(damaged(&format!(
            "a segment wants to be at {:#x}, below 1 MiB",
            segment.memory.start
        )));
    }
    if segment.memory.end() > memory.low_end() {
        return Err(KernelDoesNotFit {
            needed: segment.memory.end(),
            available: memory.low_end(),
        }
        .into());
    }
    if loaded.iter().any(|other| other.overlaps(segment.memory)) {
        return Err(damaged("two segments overlap in memory"));
    }
    Ok(())
}

/// The entry in the note "Xen" of type `XEN_ELFNOTE_PHYS32_ENTRY`, if there is one.
fn pvh_note(mut notes: &[u8]) -> Option<u64> {
    const ENTRY: u32 = 18;
    const HEADER: usize = 12;
    loop {
        let name_size = usize::try_from(u32_at(notes, 0)?).ok()?;
        let value_size = usize::try_from(u32_at(notes, 4)?).ok()?;
        let kind = u32_at(notes, 8)?;
        let name = notes.get(HEADER..)?.get(..name_size)?;
        let value_at = HEADER + name_size.next_multiple_of(4);
        let value = notes.get(value_at..)?.get(..value_size)?;
        if kind == ENTRY && name == b"Xen\0" {
            // 4 or 8 bytes; the entry is in 32-bit mode either way.
            return u32_at(value, 0).map(u64::from);
        }
        notes = notes.get(value_at + value_size.next_multiple_of(4)..)?;
    }
}

fn damaged(reason: &str) -> Observation {
    KernelDamaged {
        format: "ELF".to_owned(),
        reason: reason.to_owned(),
    }
    .into()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
