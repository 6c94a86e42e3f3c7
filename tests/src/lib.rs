//! Whole-system tests: what a user does, with the programs that a user runs.
//!
//! They need root, a KVM that runs stock kernels, and two datastores on file systems of their own.
//! `cargo xtask test` provides that: in the lab, or on this host if its KVM will do. Each test has
//! a daemon of its own with fresh folders, and talks to it through `strake` alone; what happens
//! inside of a guest is asked over its network.

pub mod cases;
pub mod failure;
pub mod guest;
pub mod host;
pub mod load;
pub mod place;
pub mod process;
pub mod runner;
pub mod vm;
