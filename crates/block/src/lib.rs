//! Disk images, the live disk of a virtio queue, and its migration to another image.
//!
//! Three axes, kept apart:
//!
//! * an [`Image`] is where the data is: [`RawImage`] on a regular file or a block device, driven
//!   by one io_uring per queue;
//! * a [`LiveDisk`] is what a guest's disk talks to: the image of the moment behind a gate, so
//!   that the image can be replaced while requests keep coming; each virtqueue worker owns one
//!   [`DiskQueue`] of it;
//! * a [`Migration`] is how the data moves: it copies the image while the guest writes, follows
//!   what the guest writes with a dirty bitmap or sends it to both, and switches the live disk over.
//!
//! The way of a guest's write: virtqueue worker → [`DiskQueue::submit`] → gate → [`ImageQueue`] →
//! io_uring → [`DiskQueue::reap`] → dirty bitmap → gate → guest; while it is mirrored, by the zones and
//! a second [`ImageQueue`] as well.
//!
//! [`FaultImage`] wraps any image and fails or delays requests on purpose; the tests of this crate
//! and of those above it use it.

mod bitmap;
mod blocking;
mod event;
mod fault;
mod image;
mod live;
pub mod lock;
mod migration;
mod observations;
mod raw;
mod request;
mod sync;
mod uring;

pub use bitmap::{BLOCK_BYTES, DirtyBitmap};
pub use blocking::Blocking;
pub use event::Event;
pub use fault::{Fault, FaultImage, FaultOn};
pub use image::{Access, Completion, Image, ImageQueue, SECTOR_BYTES};
pub use live::{DiskQueue, LiveDisk, Observer};
pub use migration::{
    Covered, Delta, Has, Keep, MakeCover, Migration, Overlay, SwitchHooks, journal,
};
pub use observations::*;
pub use raw::RawImage;
pub use request::{Buffer, Operation, Request};
