//! Guest RAM: one memfd, mapped shared, so that it outlives the monitor process.
//!
//! The daemon creates the memfd ([`create_memfd`]) and hands it to the monitor, which maps it
//! ([`GuestRam::map`]). The guest sees RAM from 0 up to [`LOW_RAM_END`] and, if there is more, from
//! [`HIGH_RAM_START`] on; the hole between holds MMIO. Devices and the boot loader get a [`Ram`],
//! KVM gets the [`Slot`]s. Both live as long as the [`GuestRam`].
//!
//! The memfd is sealed against changes of its size: a daemon that went wrong cannot truncate it
//! under the monitor, which would turn a guest's access into a signal. Pages can still be punched
//! out.
//!
//! With a [`Pager`] a guest's memory need not all be in the host's: cold pages leave for the VM's
//! own [`SwapFile`](swap::SwapFile), a compressed tier in memory, or no place at all if a disk holds
//! the same data, and come back when the guest or a device touches them.

mod memfd;
pub mod observations;
mod pagemap;
pub mod pager;
mod ram;
pub mod swap;
mod sync;
mod uffd;
mod window;

pub use memfd::create_memfd;
pub use pagemap::Pagemap;
pub use pager::{Pager, PagerConfig};
pub use ram::{GuestRam, Slot};
pub use uffd::UffdAccess;
pub use window::Page;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory map at one instant: what one access works on.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The guest's memory as devices hold it: gives a [`GuestMemory`] for each use.
pub type Ram = GuestMemoryAtomic<GuestMemory>;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// RAM below 4 GiB ends here; above it up to [`HIGH_RAM_START`] is MMIO.
pub const LOW_RAM_END: u64 = 0xC000_0000;

/// What does not fit below [`LOW_RAM_END`] starts here.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// The unit of RAM sizes: a huge page, so that each slot can be backed by them.
pub const RAM_UNIT: u64 = 2 << 20;

/// The largest RAM of a guest: it ends where the 64-bit window for PCI begins (256 GiB).
pub const RAM_MAX: u64 = LOW_RAM_END + (0x40_0000_0000 - HIGH_RAM_START);

#[cfg(test)]
mod tests;
