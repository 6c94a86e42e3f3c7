//! The host bridge at slot 0: nothing but an identity, which kernels look for before they believe
//! in PCI at all.

use std::sync::{Mutex, PoisonError};

use strake_observe::Result;

use super::config::{BarRange, BarSize, ConfigSpace, Identity};
use super::root::PciFunction;
use crate::lifecycle::{PhaseCell, Registers};

/// The host bridge.
#[derive(Debug)]
pub struct HostBridge {
    name: String,
    phase: PhaseCell,
    config: Mutex<ConfigSpace>,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self {
            name: "host-bridge".to_owned(),
            phase: PhaseCell::default(),
            config: Mutex::new(ConfigSpace::new(Identity {
                // Red Hat's identity for a generic PCIe host bridge: no kernel has quirks for it.
                vendor: 0x1b36,
                device: 0x0008,
                revision: 0,
                class: 0x06_00_00,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            })),
        }
    }
}

crate::registers_only!(HostBridge);

strake_state::saved! {
    /// The host bridge.
    pub record SavedHostBridge("pci-host-bridge", version 1) {
        /// Its configuration space.
        1 => config: [u8; 256],
    }
}

impl Registers for HostBridge {
    type Saved = SavedHostBridge;

    fn registers(&self) -> SavedHostBridge {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        SavedHostBridge {
            config: config.bytes(),
        }
    }

    fn set_registers(&self, saved: SavedHostBridge) -> Result<()> {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.restore(&self.name, &saved.config)
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.write(offset, data);
    }

    fn bars(&self) -> Vec<BarSize> {
        Vec::new()
    }

    fn place(&self, _: u8, _: u64) {}

    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }

    fn bar_read(&self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
}
