//! PCI: one bus, its host bridge, configuration space, BARs and MSI-X.
//!
//! ```text
//! vCPU ──port 0xcf8/0xcfc──┐
//! vCPU ──ECAM──────────────┤ PciRoot ──config──▶ PciFunction (ConfigSpace, Msix)
//! vCPU ──BAR windows───────┘         ──BAR─────▶ PciFunction
//! ```
//!
//! Lock order: the root's configuration lock → a function's own lock → its MSI-X table. The map of
//! decoded BARs is locked alone and only for a lookup or an exchange; no device runs under it.

mod config;
mod host_bridge;
mod msix;
mod root;
#[cfg(test)]
mod tests;

pub(crate) use config::CONFIG_SIZE;
pub use config::{BarRange, BarSize, BarWidth, ConfigSpace, Identity, MSIX_CAPABILITY};
pub use host_bridge::{HostBridge, SavedHostBridge};
pub use msix::{Msix, SavedVector, TABLE_ENTRY_SIZE};
pub use root::{PciFunction, PciRoot, PciWindows, SLOTS, SavedPciRoot};
