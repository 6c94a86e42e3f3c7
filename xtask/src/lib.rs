//! What the project's own commands are made of: the lab, the guests that it boots, the checks.

pub mod build;
pub mod cpio;
pub mod guest;
pub mod kernel;
pub mod lab;
pub mod observations;
pub mod packages;
pub mod part;
pub mod programs;
pub mod setup;
pub mod show;
pub mod suite;
pub mod tool;
pub mod whole;
pub mod workspace;
