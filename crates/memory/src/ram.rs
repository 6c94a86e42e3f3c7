//! The mapping of the memfd.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use strake_observe::{Observation, OsContext, Result};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use crate::observations::{MapFailed, MemfdRefused, SizeRefused};
use crate::{GuestMemory, HIGH_RAM_START, LOW_RAM_END, RAM_MAX, RAM_UNIT, Ram};

/// The guest's RAM, mapped into this process.
#[derive(Debug, Clone)]
pub struct GuestRam {
    ram: Ram,
    slots: Vec<Slot>,
    size: u64,
    memfd: Arc<File>,
}

/// One contiguous range of RAM, as KVM is told about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Its number, from 0.
    pub index: u32,
    /// Where the guest sees it.
    pub gpa: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where this process has it mapped.
    pub host_addr: u64,
    /// Where it starts in the memfd.
    pub offset: u64,
}

impl GuestRam {
    /// Maps `size` bytes of the memfd, of which it must hold exactly so many.
    ///
    /// # Errors
    /// [`SizeRefused`], [`MemfdRefused`] or [`MapFailed`].
    pub fn map(memfd: OwnedFd, size: u64) -> Result<Self> {
        check_size(size)?;
        let found = rustix::fs::fstat(&memfd)
            .os("fstat", "the memfd of guest RAM")?
            .st_size;
        let found = u64::try_from(found).unwrap_or(0);
        if found != size {
            return Err(MemfdRefused {
                expected: size,
                found,
            }
            .into());
        }
        let file = Arc::new(File::from(memfd));
        let mut regions = Vec::new();
        let mut slots = Vec::new();
        for (index, (gpa, offset, bytes)) in (0..).zip(ranges(size)) {
            let region = map_range(&file, gpa, offset, bytes)?;
            slots.push(Slot {
                index,
                gpa,
                size: bytes,
                host_addr: region.as_ptr() as u64,
                offset,
            });
            regions.push(region);
        }
        let memory = GuestMemory::from_regions(regions)
            .map_err(|error| map_failed(0, size, error.to_string()))?;
        Ok(Self {
            ram: Ram::new(memory),
            slots,
            size,
            memfd: file,
        })
    }

    /// Another descriptor of the memfd.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn memfd(&self) -> Result<OwnedFd> {
        let memfd = self.memfd.try_clone();
        Ok(memfd.os("dup", "the memfd of guest RAM")?.into())
    }

    /// The memory for devices; clones share it.
    #[must_use]
    pub fn ram(&self) -> Ram {
        self.ram.clone()
    }

    /// The ranges for KVM.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

fn map_range(file: &Arc<File>, gpa: u64, offset: u64, size: u64) -> Result<GuestRegionMmap<()>> {
    let bytes =
        usize::try_from(size).map_err(|_| map_failed(gpa, size, "does not fit".to_owned()))?;
    // vm-memory maps shared and without reserving swap.
    let region = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(file), offset), bytes)
        .map_err(|error| map_failed(gpa, size, error.to_string()))?;
    GuestRegionMmap::new(region, GuestAddress(gpa))
        .ok_or_else(|| map_failed(gpa, size, "the guest address overflows".to_owned()))
}

fn map_failed(gpa: u64, size: u64, reason: String) -> Observation {
    MapFailed { gpa, size, reason }.into()
}

/// The ranges of `size` bytes of RAM: guest address, offset in the memfd, bytes.
fn ranges(size: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let low = size.min(LOW_RAM_END);
    let high = size - low;
    [(0, 0, low), (HIGH_RAM_START, low, high)]
        .into_iter()
        .filter(|(_, _, bytes)| *bytes > 0)
}

pub(crate) fn check_size(size: u64) -> Result<()> {
    let reason = if size == 0 {
        "a guest needs memory"
    } else if !size.is_multiple_of(RAM_UNIT) {
        "it is not a multiple of 2 MiB"
    } else if size > RAM_MAX {
        "it exceeds 255 GiB"
    } else {
        return Ok(());
    };
    Err(SizeRefused {
        size,
        reason: reason.to_owned(),
    }
    .into())
}
