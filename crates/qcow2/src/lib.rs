//! qcow2 images as disks: a writable layer over a chain of read-only ones.
//!
//! qcow2 is a page table on disk. The guest's disk is cut into clusters; the L1 table names L2
//! tables, an L2 entry says where a cluster's data is in the file, or that it reads as zeroes, or
//! that the image below has it. Beside that the file counts the references to each of its own
//! clusters, from which free space is found. What makes it hard is not reading it but changing it:
//! after a crash at any instant no table may refer to a cluster that is counted as free, and no
//! table may refer to data that has not reached the disk.
//!
//! The folder by subject, from below:
//!
//! * `store`: the file of a layer ([`Store`]); `memory`: buffers for direct I/O;
//! * `header`: the header, parsed from hostile bytes and changed atomically (`rebase`);
//! * `refcount`: which clusters of the file are free;
//! * `tables`: the caches of L2 tables; `state`: both together, behind one lock per layer;
//! * `flush`: in which order changes reach the disk;
//! * `map`: where a byte of the guest is; `plan`: where a byte of the guest goes;
//! * `layer`, `chain`: layers on each other, listed by the daemon and built by the monitor;
//! * `image`, `queue`: the [`strake_block::Image`] on top, one state machine per request;
//! * `create`, `resize`, `live`, [`Commit`], [`Stream`], [`Consolidation`], [`NewOverlay`]: what changes
//!   images as a whole.
//!
//! Threads: none of its own. Every queue is driven by its owner; jobs by whoever steps them. One
//! mutex per layer guards its tables; it is held for memory operations and for the reading of a
//! table that is not cached, never across a guest's data or a sync. No code holds the locks of two
//! layers.

mod chain;
mod commit;
mod compressed;
mod consolidate;
mod create;
mod flush;
mod header;
mod image;
mod layer;
mod live;
mod map;
mod memory;
mod num;
mod observations;
mod overlay;
mod plan;
mod queue;
mod rebase;
mod refcount;
mod resize;
mod state;
mod store;
mod stream;
mod tables;

pub use chain::{
    ChainPart, Format, MAX_LAYERS, Member, open_chain, open_member, open_single, survey,
};
pub use commit::Commit;
pub use consolidate::{Below, Consolidation};
pub use create::{CreateOptions, create};
pub use header::{Backing, Header};
pub use image::{Extent, ExtentKind, Qcow2Image};
pub use observations::*;
pub use overlay::NewOverlay;
pub use rebase::rebase;
pub use store::{FileStore, Store};
pub use stream::Stream;

/// How far a job that goes step by step has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It goes on at this byte of the disk.
    At(u64),
    /// Nothing is left to do.
    Done,
}
