//! A VM's swap file.
//!
//! ```text
//!   0        4 KiB      2 MiB            4 MiB
//!   ┌────────┬──────────┬────────────────┬────────────────┬──
//!   │ header │  unused  │ segment 0      │ segment 1      │ …     a segment: 512 slots of 4 KiB
//!   └────────┴──────────┴────────────────┴────────────────┴──
//! ```
//!
//! The header says whose file it is, and a file of another VM is refused: a monitor that is handed
//! the wrong descriptor stops there. Which slot holds which page, and the checksum of each slot, is
//! known to the running monitor alone. A swap file means nothing without its VM's memory, so both
//! end together, and a file that is opened anew is begun anew.
//!
//! Pages go to slots in the order in which they are evicted, so that a neighbourhood that left
//! together is read back with one transfer. Room is allocated in the file one segment at a time,
//! before anything is written to it: a full store is seen while the page is still in memory.

pub(crate) mod file;
pub(crate) mod header;
pub(crate) mod ring;
pub(crate) mod slots;
pub(crate) mod tier;

pub use file::{Provision, SwapFaults, SwapFile, Transfer};
pub use header::Owner;

/// Slots of a segment.
pub const SEGMENT_SLOTS: u32 = 512;

/// Bytes of a segment.
pub const SEGMENT_BYTES: u64 = 2 << 20;

/// Where the first segment begins.
pub(crate) const DATA_START: u64 = SEGMENT_BYTES;
