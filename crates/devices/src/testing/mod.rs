//! The other side: a machine without KVM and a driver as a guest has one.
//!
//! For the tests of this crate, for benches, and for the fuzz targets. What is here is trusted and
//! may panic; only the devices under test may not.
//!
//! * [`Host`] is a machine: RAM, a PCI bus, interrupt lines and doorbells that are plain eventfds.
//! * [`Driver`] finds a virtio device on the bus and drives it through its registers.
//! * [`Ring`] is the driver's half of a split virtqueue; it can also be written wrongly on purpose.
//! * [`Bare`] runs a device's workers in the caller's thread, step by step, for fuzzing.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc
)]

mod bare;
mod driver;
mod host;
mod ring;

pub use bare::Bare;
pub use driver::{Driver, NEEDS_RESET, NO_VECTOR};
pub use host::{ECAM, HIGH_RAM, HIGH_RAM_AT, Host, LOW_RAM, Line, WINDOW32, WINDOW64, eventually};
pub use ring::{INDIRECT, NEXT, Piece, Ring, WRITE};
