//! The memory that a front-end shares.

use std::fs::File;
use std::sync::Arc;

use strake_memory::GuestMemory;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

/// Most regions at once: those of a guest with every memory slot of QEMU's in use.
pub(super) const REGIONS: usize = 512;

/// A region as a front-end names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Where the guest sees it.
    pub(super) gpa: u64,
    /// Where the front-end itself has it mapped; the addresses of rings are given so.
    pub(super) theirs: u64,
    /// Bytes.
    pub(super) len: u64,
    /// Where it begins in its file.
    pub(super) offset: u64,
}

impl Place {
    fn sound(&self) -> bool {
        self.len > 0
            && self.gpa.checked_add(self.len).is_some()
            && self.theirs.checked_add(self.len).is_some()
            && self.offset.checked_add(self.len).is_some()
    }
}

/// All of them, mapped. A region stays mapped as long as anybody holds a map that has it.
#[derive(Debug)]
pub(super) struct Regions {
    regions: Vec<(Place, Arc<GuestRegionMmap<()>>)>,
    memory: Arc<GuestMemory>,
}

impl Default for Regions {
    fn default() -> Self {
        Self {
            regions: Vec::new(),
            memory: Arc::new(GuestMemory::new()),
        }
    }
}

impl Regions {
    /// The memory as one map, which never changes.
    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Exactly these regions.
    pub(super) fn of(places: impl IntoIterator<Item = (Place, File)>) -> Result<Self, String> {
        let mut regions = Vec::new();
        for (place, file) in places {
            regions.push((place, map(place, file)?));
        }
        Self::assemble(regions)
    }

    /// These and one more.
    pub(super) fn with(&self, place: Place, file: File) -> Result<Self, String> {
        let mut regions = self.regions.clone();
        regions.push((place, map(place, file)?));
        Self::assemble(regions)
    }

    /// These less one. Where it begins in its file does not name it.
    pub(super) fn without(&self, place: Place) -> Result<Self, String> {
        let mut regions = self.regions.clone();
        let same = |known: &Place| {
            (known.gpa, known.theirs, known.len) == (place.gpa, place.theirs, place.len)
        };
        let index = regions
            .iter()
            .position(|(known, _)| same(known))
            .ok_or("a memory region is removed that was never added")?;
        regions.remove(index);
        Self::assemble(regions)
    }

    fn assemble(mut regions: Vec<(Place, Arc<GuestRegionMmap<()>>)>) -> Result<Self, String> {
        if regions.len() > REGIONS {
            return Err(format!("more than {REGIONS} memory regions"));
        }
        regions.sort_by_key(|(place, _)| place.gpa);
        let all = regions.iter().map(|(_, region)| Arc::clone(region));
        let memory = GuestMemory::from_arc_regions(all.collect())
            .map_err(|error| format!("its memory regions: {error}"))?;
        Ok(Self {
            regions,
            memory: Arc::new(memory),
        })
    }

    /// Where the guest sees what the front-end has at `address`.
    pub(super) fn guest_address(&self, address: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|(place, _)| {
            let within = address.checked_sub(place.theirs)?;
            (within < place.len).then(|| GuestAddress(place.gpa + within))
        })
    }
}

/// Maps a part of a file that somebody else gave, if the file has it: a page beyond its end would be
/// a signal at the first access.
pub(super) fn map_file(file: File, offset: u64, len: usize) -> Result<MmapRegion<()>, String> {
    let about = file.metadata().map_err(|error| error.to_string())?;
    let end = offset.checked_add(len as u64);
    if about.is_file() && end.is_none_or(|end| about.len() < end) {
        return Err("its file is too short".to_owned());
    }
    MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(|error| error.to_string())
}

fn map(place: Place, file: File) -> Result<Arc<GuestRegionMmap<()>>, String> {
    if !place.sound() {
        return Err("a memory region leaves the address space".to_owned());
    }
    let failed = |reason: String| format!("a memory region cannot be mapped: {reason}");
    let len = usize::try_from(place.len).map_err(|error| failed(error.to_string()))?;
    let mapping = map_file(file, place.offset, len).map_err(failed)?;
    GuestRegionMmap::new(mapping, GuestAddress(place.gpa))
        .map(Arc::new)
        .ok_or_else(|| failed("its guest address overflows".to_owned()))
}
