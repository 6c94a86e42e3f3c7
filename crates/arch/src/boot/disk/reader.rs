//! The disk as bytes: a deadline on every read, and windows for partitions.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use ext4_view::Ext4Read;
use strake_observe::{Observation, Result};

use crate::observations::DiskSearchEnded;

/// A disk image that can be read.
pub trait ReadAt: Send {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Reads exactly `data.len()` bytes. Any offset and length within [`size`](Self::size) may be
    /// asked for.
    ///
    /// # Errors
    /// If the store fails.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()>;
}

/// Small reads come in runs (group descriptors), so this much is read at once.
const AHEAD: usize = 64 << 10;

/// A disk under search.
#[derive(Clone)]
pub(super) struct Disk(Rc<Inner>);

struct Inner {
    disk: Box<dyn ReadAt>,
    deadline: Instant,
    ahead: RefCell<Ahead>,
}

#[derive(Default)]
struct Ahead {
    start: u64,
    bytes: Vec<u8>,
}

impl Disk {
    pub(super) fn new(disk: Box<dyn ReadAt>, deadline: Instant) -> Self {
        Self(Rc::new(Inner {
            disk,
            deadline,
            ahead: RefCell::default(),
        }))
    }

    pub(super) fn size(&self) -> u64 {
        self.0.disk.size()
    }

    /// Reads exactly `data.len()` bytes.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        if Instant::now() > self.0.deadline {
            return Err(ended("it took too long"));
        }
        let inside = offset
            .checked_add(data.len() as u64)
            .is_some_and(|end| end <= self.size());
        if !inside {
            return Err(ended("something lies beyond the end of the disk"));
        }
        if data.len() >= AHEAD / 4 {
            return self.0.disk.read_at(offset, data);
        }
        let mut ahead = self.0.ahead.borrow_mut();
        if ahead.get(offset, data) {
            return Ok(());
        }
        let left = self.size() - offset;
        let count = usize::try_from(left).map_or(AHEAD, |left| left.min(AHEAD));
        ahead.bytes.clear();
        ahead.bytes.resize(count, 0);
        ahead.start = offset;
        if let Err(seen) = self.0.disk.read_at(offset, &mut ahead.bytes) {
            // A bad place further on must not spoil what was asked for.
            ahead.bytes.clear();
            drop(seen);
            return self.0.disk.read_at(offset, data);
        }
        ahead.get(offset, data);
        Ok(())
    }

    /// The bytes from `offset` on, `count` of them or fewer at the end of the disk.
    pub(super) fn up_to(&self, offset: u64, count: usize) -> Result<Vec<u8>> {
        let left = self.size().saturating_sub(offset);
        let count = usize::try_from(left).map_or(count, |left| left.min(count));
        let mut bytes = vec![0; count];
        self.read(offset.min(self.size()), &mut bytes)?;
        Ok(bytes)
    }
}

impl Ahead {
    fn get(&self, offset: u64, data: &mut [u8]) -> bool {
        let found = offset
            .checked_sub(self.start)
            .and_then(|skip| usize::try_from(skip).ok())
            .and_then(|skip| self.bytes.get(skip..))
            .and_then(|from| from.get(..data.len()));
        if let Some(found) = found {
            data.copy_from_slice(found);
        }
        found.is_some()
    }
}

fn ended(how: &str) -> Observation {
    DiskSearchEnded {
        how: how.to_owned(),
    }
    .into()
}

/// A partition, as the file system reader sees it.
pub(super) struct Window {
    pub(super) disk: Disk,
    pub(super) start: u64,
    pub(super) size: u64,
    /// What the reader is shown instead of what is there, and from which offset on.
    pub(super) patch: Option<(u64, Vec<u8>)>,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        offset: u64,
        data: &mut [u8],
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let inside = offset
            .checked_add(data.len() as u64)
            .is_some_and(|end| end <= self.size);
        if !inside {
            return Err(Box::new(ended("something lies beyond the partition's end")));
        }
        self.disk
            .read(self.start.saturating_add(offset), data)
            .map_err(|seen| Box::new(seen) as Box<dyn std::error::Error + Send + Sync>)?;
        if let Some((at, bytes)) = &self.patch {
            for (place, byte) in (*at..).zip(bytes) {
                let index = place.checked_sub(offset).map(usize::try_from);
                if let Some(Ok(index)) = index
                    && let Some(target) = data.get_mut(index)
                {
                    *target = *byte;
                }
            }
        }
        Ok(())
    }
}
