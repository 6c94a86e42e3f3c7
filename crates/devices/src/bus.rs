//! Buses: which device answers at which address.
//!
//! Called from every vCPU thread at once. A bus is filled while the machine is built and only
//! read afterwards (PCI BARs move inside of a window that the PCI root owns), so a lookup takes a
//! read lock that nobody contends for. An access that no device claims reads as ones and is
//! dropped when written, as on real hardware; none fails.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use strake_observe::Result;

use crate::observations::AddressTaken;

/// A device at addresses of a bus.
///
/// `data` has 1, 2, 4 or 8 bytes as the guest made the access, but a device takes any length:
/// everything comes from the guest.
pub trait BusDevice: Send + Sync {
    /// The guest reads at `offset` from the start of the range. Fills all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A bus; [`PortBus`] and [`MmioBus`] are the two of a machine.
#[derive(Default)]
pub struct Bus {
    devices: RwLock<BTreeMap<u64, Claim>>,
}

/// The bus behind `in` and `out`.
pub type PortBus = Bus;

/// The bus behind memory accesses outside of RAM.
pub type MmioBus = Bus;

#[derive(Clone)]
struct Claim {
    end: u64,
    device: Arc<dyn BusDevice>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_list()
            .entries(
                devices
                    .iter()
                    .map(|(start, claim)| format!("{start:#x}..{:#x}", claim.end)),
            )
            .finish()
    }
}

impl Bus {
    /// A bus that nobody answers on yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer for `range`.
    ///
    /// # Errors
    /// [`AddressTaken`] if the range is empty or meets one that is claimed already.
    pub fn register(&self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<()> {
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        let meets = devices
            .range(..range.end)
            .next_back()
            .is_some_and(|(_, claim)| claim.end > range.start);
        if range.is_empty() || meets {
            return Err(AddressTaken {
                start: range.start,
                end: range.end,
            }
            .into());
        }
        devices.insert(
            range.start,
            Claim {
                end: range.end,
                device,
            },
        );
        Ok(())
    }

    /// The guest reads at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    /// The device is cloned out of the lock: a device may take long, or register another.
    fn find(&self, address: u64) -> Option<(u64, Arc<dyn BusDevice>)> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let (start, claim) = devices.range(..=address).next_back()?;
        (address < claim.end).then(|| (address - start, Arc::clone(&claim.device)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Probe(Mutex<Vec<u64>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push(offset);
            data.fill(0x5a);
        }

        fn write(&self, offset: u64, _: &[u8]) {
            self.0.lock().unwrap().push(offset);
        }
    }

    #[test]
    fn an_access_reaches_the_device_that_claims_it_and_no_other() {
        let bus = Bus::new();
        let probe = Arc::new(Probe::default());
        bus.register(0x10..0x20, probe.clone()).unwrap();
        let mut data = [0; 2];
        for (address, expected) in [(0xf, 0xff), (0x10, 0x5a), (0x1f, 0x5a), (0x20, 0xff)] {
            bus.read(address, &mut data);
            assert_eq!(data, [expected; 2], "{address:#x}");
        }
        bus.write(0x12, &[1]);
        bus.write(u64::MAX, &[1]);
        assert_eq!(*probe.0.lock().unwrap(), [0, 0xf, 2]);
    }

    #[test]
    fn overlapping_claims_are_refused() {
        let bus = Bus::new();
        let probe = Arc::new(Probe::default());
        bus.register(0x10..0x20, probe.clone()).unwrap();
        for range in [0x1f..0x21, 0x8..0x11, 0x12..0x13, 0x0..0x100, 0x30..0x30] {
            assert!(bus.register(range, probe.clone()).is_err());
        }
        bus.register(0x20..0x21, probe.clone()).unwrap();
        bus.register(0x0..0x10, probe).unwrap();
    }
}
