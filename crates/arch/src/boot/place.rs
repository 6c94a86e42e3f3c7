//! Guest memory during boot, and the place of the initial RAM disk in it.

use std::io::{Seek, SeekFrom};

use strake_observe::Result;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::source::Source;
use crate::layout::{self, Span};
use crate::observations::{BootWriteFailed, InitrdDoesNotFit};

/// Guest memory, and how much of it there is.
pub(super) struct Memory<'a> {
    pub(super) map: &'a GuestMemoryMmap<()>,
    pub(super) ram_size: u64,
}

impl<'a> Memory<'a> {
    pub(super) fn new(map: &'a GuestMemoryMmap<()>, ram_size: u64) -> Self {
        Self { map, ram_size }
    }

    /// Where RAM below the device hole ends.
    pub(super) fn low_end(&self) -> u64 {
        layout::low_ram_end(self.ram_size)
    }

    pub(super) fn write(&self, what: &str, address: u64, bytes: &[u8]) -> Result<()> {
        self.map
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| {
                BootWriteFailed {
                    what: what.to_owned(),
                    address,
                    reason: error.to_string(),
                }
                .into()
            })
    }

    pub(super) fn write_words(&self, what: &str, address: u64, words: &[u64]) -> Result<()> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write(what, address, &bytes)
    }

    /// Copies the initial RAM disk to the highest page at which it ends at or below `top`, above
    /// the kernel, which ends at `kernel_end`.
    pub(super) fn place_initrd(
        &self,
        initrd: &mut Source<'_>,
        kernel_end: u64,
        top: u64,
    ) -> Result<Span> {
        const PAGE: u64 = 4096;
        let bytes = initrd.size()?;
        let top = top.min(self.low_end());
        let room = top.saturating_sub(kernel_end.next_multiple_of(PAGE));
        let start = top.saturating_sub(bytes) & !(PAGE - 1);
        let span = Span::new(start, bytes);
        let too_large = bytes > room || start < kernel_end || u32::try_from(span.end()).is_err();
        let count = match usize::try_from(bytes) {
            Ok(count) if !too_large => count,
            _ => {
                return Err(InitrdDoesNotFit {
                    bytes,
                    available: room,
                }
                .into());
            }
        };
        let copied = initrd.seek(SeekFrom::Start(0)).is_ok()
            && self
                .map
                .read_exact_volatile_from(GuestAddress(start), initrd, count)
                .is_ok();
        if !copied {
            // Without a failure of the file, it became shorter while it was read.
            return Err(initrd
                .failure()
                .unwrap_or_else(|| initrd.unreadable().into()));
        }
        Ok(span)
    }
}
