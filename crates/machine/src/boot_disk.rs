//! Booting the kernel that a disk of the guest names.

use std::io::Cursor;
use std::sync::Arc;

use strake_arch::acpi::AcpiTables;
use strake_arch::boot::disk::{ReadAt, find};
use strake_arch::boot::{self, BootFile, Entry};
use strake_block::{Image, LiveDisk};
use strake_memory::GuestMemory;
use strake_observe::Result;

/// A disk's image, read before the guest runs.
struct DiskReader(Arc<dyn Image>);

impl ReadAt for DiskReader {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, data)
    }
}

/// Finds the kernel on `disk` and puts it into the guest's memory. `append` goes to the end of the
/// image's own command line, where a kernel lets it win.
pub(crate) fn load(
    disk: &LiveDisk,
    append: &str,
    memory: &GuestMemory,
    tables: &AcpiTables,
    ram_size: u64,
) -> Result<Entry> {
    let found = find(Box::new(DiskReader(disk.image())))?;
    let cmdline = match append.trim() {
        "" => found.cmdline,
        append => format!("{} {append}", found.cmdline),
    };
    let mut kernel = Cursor::new(found.kernel);
    let mut initrd = found.initrd.map(Cursor::new);
    let initrd = initrd.as_mut().map(|bytes| bytes as &mut dyn BootFile);
    boot::load(memory, &mut kernel, initrd, &cmdline, tables, ram_size)
}
