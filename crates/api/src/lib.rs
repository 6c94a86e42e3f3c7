//! The VM spec and every request and response between Strake's processes. Types only: nothing
//! here knows how anything is done.
//!
//! * [`spec`]: what an operator writes about a VM, in TOML, and its validation.
//! * [`rest`]: the daemon's API over HTTP, as JSON.
//! * [`control`]: the daemon's protocol with a monitor, as packets with descriptors.
//! * [`export`]: disks that other programs use.
//! * [`image`]: formats of images, and how a monitor is given one.
//! * [`job`]: progress of long work, the same in both protocols.

pub mod control;
pub mod export;
pub mod image;
pub mod job;
mod observations;
pub mod rest;
pub mod schema;
pub mod spec;
pub mod steer;
#[cfg(test)]
mod tests;

pub use observations::{CATALOG, SpecInvalid, SpecProblems, SpecRefused, SpecUnwritable};
