//! The PCI root: which function answers to a configuration access and to a BAR.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use strake_observe::Result;
use strake_state::Records;

use super::config::{BarRange, BarSize, BarWidth};
use super::host_bridge::HostBridge;
use crate::bus::BusDevice;
use crate::lifecycle::{Component, Phase, PhaseCell};
use crate::observations::SlotUnusable;

/// How many slots the bus has.
pub const SLOTS: u8 = 32;

const CONFIG_ENABLE: u32 = 1 << 31;

/// What of the address port is kept.
const ADDRESS_BITS: u32 = !0x7f00_0003;

/// A function of the bus (function 0 of a slot; there are no others).
pub trait PciFunction: Component {
    /// The guest reads configuration space.
    fn config_read(&self, offset: usize, data: &mut [u8]);

    /// The guest writes configuration space.
    fn config_write(&self, offset: usize, data: &[u8]);

    /// The BARs, as declared.
    fn bars(&self) -> Vec<BarSize>;

    /// Places a BAR before the guest starts, as firmware would.
    fn place(&self, bar: u8, base: u64);

    /// The BARs that answer at this moment.
    fn decoded(&self) -> Vec<BarRange>;

    /// The guest reads a BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// The guest writes a BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
}

/// Where BARs are placed. The guest may move them within both.
#[derive(Debug, Clone)]
pub struct PciWindows {
    /// Below 4 GiB.
    pub mmio32: Range<u64>,
    /// Above.
    pub mmio64: Range<u64>,
}

strake_state::saved! {
    /// The bus, without its functions.
    pub record SavedPciRoot("pci-root", version 1) {
        /// What was written to the address port.
        1 => address: u32,
    }
}

/// Bus 0. A component of its own, host bridge included; the other functions are theirs. Restored,
/// it looks at where their BARs are when it is resumed: by then they know.
pub struct PciRoot {
    name: String,
    phase: PhaseCell,
    bridge: Arc<HostBridge>,
    functions: RwLock<BTreeMap<u8, Arc<dyn PciFunction>>>,
    /// What the guest wrote to port 0xcf8. Real hardware has one for all CPUs too; a kernel locks.
    address: AtomicU32,
    /// Held over a write to configuration space and the change of the map that follows from it.
    configuring: Mutex<()>,
    /// By base, slot and BAR: a guest may well lay two BARs over each other.
    decoded: RwLock<BTreeMap<(u64, u8, u8), Decoded>>,
    free: Mutex<PciWindows>,
}

#[derive(Clone)]
struct Decoded {
    range: BarRange,
    function: Arc<dyn PciFunction>,
}

impl fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciRoot").finish_non_exhaustive()
    }
}

impl PciRoot {
    /// A bus with its host bridge at slot 0.
    #[must_use]
    pub fn new(windows: PciWindows) -> Arc<Self> {
        let bridge = Arc::new(HostBridge::default());
        let function: Arc<dyn PciFunction> = bridge.clone();
        Arc::new(Self {
            name: "pci".to_owned(),
            phase: PhaseCell::default(),
            bridge,
            functions: RwLock::new(BTreeMap::from([(0, function)])),
            address: AtomicU32::new(0),
            configuring: Mutex::new(()),
            decoded: RwLock::default(),
            free: Mutex::new(windows),
        })
    }

    /// Puts a function into a slot and places its BARs. Its memory decoding stays off until the
    /// guest turns it on.
    ///
    /// # Errors
    /// [`SlotUnusable`] if the slot is taken or does not exist, or if a BAR does not fit.
    pub fn add(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<()> {
        let unusable = |reason: &str| SlotUnusable {
            device: function.name().to_owned(),
            slot,
            reason: reason.to_owned(),
        };
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if slot >= SLOTS {
            return Err(unusable("there is no such slot").into());
        }
        if let Some(other) = functions.get(&slot) {
            return Err(unusable(&format!("'{}' is in it", other.name())).into());
        }
        let mut free = lock(&self.free);
        for bar in function.bars() {
            let window = match bar.width {
                BarWidth::Bits32 => &mut free.mmio32,
                BarWidth::Bits64 if free.mmio64.is_empty() => &mut free.mmio32,
                BarWidth::Bits64 => &mut free.mmio64,
            };
            let place = window
                .start
                .checked_next_multiple_of(bar.size)
                .and_then(|base| Some((base, base.checked_add(bar.size)?)))
                .filter(|(_, end)| *end <= window.end);
            let Some((base, end)) = place else {
                return Err(unusable("the window for its BARs is full").into());
            };
            window.start = end;
            function.place(bar.index, base);
        }
        functions.insert(slot, function);
        Ok(())
    }

    /// The configuration mechanism by ports: address at offset 0, data at offset 4 (8 ports).
    #[must_use]
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts(Arc::clone(self)))
    }

    /// The memory-mapped configuration space (1 MiB for the bus).
    #[must_use]
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// The BAR window that starts at `base`.
    #[must_use]
    pub fn window(self: &Arc<Self>, base: u64) -> Arc<dyn BusDevice> {
        Arc::new(Window {
            root: Arc::clone(self),
            base,
        })
    }

    /// The guest reads configuration space. A slot without a function reads as ones.
    pub fn config_read(&self, slot: u8, offset: usize, data: &mut [u8]) {
        match self.function(slot) {
            Some(function) => function.config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes configuration space.
    pub fn config_write(&self, slot: u8, offset: usize, data: &[u8]) {
        let Some(function) = self.function(slot) else {
            return;
        };
        let _configuring = lock(&self.configuring);
        function.config_write(offset, data);
        let ranges = function.decoded();
        let mut decoded = self.decoded.write().unwrap_or_else(PoisonError::into_inner);
        decoded.retain(|(_, owner, _), _| *owner != slot);
        for range in ranges {
            let function = Arc::clone(&function);
            decoded.insert((range.base, slot, range.index), Decoded { range, function });
        }
    }

    /// The guest reads at an address within a BAR window.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((found, offset)) => found.function.bar_read(found.range.index, offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes at an address within a BAR window.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((found, offset)) = self.find(address) {
            found.function.bar_write(found.range.index, offset, data);
        }
    }

    /// Looks where all BARs are.
    fn look_at_bars(&self) {
        let _configuring = lock(&self.configuring);
        let functions = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut decoded = BTreeMap::new();
        for (slot, function) in &*functions {
            for range in function.decoded() {
                let function = Arc::clone(function);
                let key = (range.base, *slot, range.index);
                decoded.insert(key, Decoded { range, function });
            }
        }
        *self.decoded.write().unwrap_or_else(PoisonError::into_inner) = decoded;
    }

    fn function(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        let functions = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        functions.get(&slot).cloned()
    }

    /// The nearest BAR below that reaches over `address`. Bounded by the number of BARs.
    fn find(&self, address: u64) -> Option<(Decoded, u64)> {
        let decoded = self.decoded.read().unwrap_or_else(PoisonError::into_inner);
        decoded
            .range(..=(address, u8::MAX, u8::MAX))
            .rev()
            .find_map(|(_, found)| {
                let offset = address.checked_sub(found.range.base)?;
                (offset < found.range.size).then(|| (found.clone(), offset))
            })
    }

    /// Bus, device and function of a configuration address; only function 0 of bus 0 exists.
    fn slot(bus: u32, device: u32, function: u32) -> Option<u8> {
        (bus == 0 && function == 0)
            .then(|| u8::try_from(device).ok())
            .flatten()
    }
}

impl Component for PciRoot {
    fn name(&self) -> &str {
        &self.name
    }

    fn phase(&self) -> Phase {
        self.phase.get()
    }

    fn start(&self) -> Result<()> {
        self.phase.step(
            &self.name,
            "start",
            (Phase::Prepared, Phase::Running),
            || self.bridge.start(),
        )
    }

    fn quiesce(&self) -> Result<()> {
        self.phase.step(
            &self.name,
            "quiesce",
            (Phase::Running, Phase::Quiesced),
            || self.bridge.quiesce(),
        )
    }

    fn resume(&self) -> Result<()> {
        self.phase.step(
            &self.name,
            "resume",
            (Phase::Quiesced, Phase::Running),
            || {
                self.look_at_bars();
                self.bridge.resume()
            },
        )
    }

    fn sketch(&self, _: &mut Records) -> Result<()> {
        Ok(()) // It has nothing that takes long.
    }

    fn prepare(&self, _: &mut Records) -> Result<()> {
        Ok(())
    }

    fn save(&self, records: &mut Records) -> Result<()> {
        let address = self.address.load(Ordering::Relaxed);
        records.put(&self.name, &SavedPciRoot { address })?;
        self.bridge.save(records)
    }

    fn restore(&self, records: &mut Records) -> Result<()> {
        self.phase.step(
            &self.name,
            "be restored",
            (Phase::Prepared, Phase::Quiesced),
            || {
                let saved: SavedPciRoot = records.take(&self.name)?;
                self.address
                    .store(saved.address & ADDRESS_BITS, Ordering::Relaxed);
                self.bridge.restore(records)
            },
        )
    }
}

struct ConfigPorts(Arc<PciRoot>);

impl ConfigPorts {
    /// The slot and the offset that the address register and the port's offset mean.
    fn target(&self, offset: u64) -> Option<(u8, usize)> {
        let address = self.0.address.load(Ordering::Relaxed);
        let within = offset.checked_sub(4).filter(|within| *within < 4)?;
        if address & CONFIG_ENABLE == 0 {
            return None;
        }
        let slot = PciRoot::slot(
            (address >> 16) & 0xff,
            (address >> 11) & 0x1f,
            (address >> 8) & 0x7,
        )?;
        let register = usize::try_from(u64::from(address & 0xfc) + within).ok()?;
        Some((slot, register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset < 4 {
            let address = self.0.address.load(Ordering::Relaxed).to_le_bytes();
            let start = usize::try_from(offset).unwrap_or(0);
            data.fill(0xff);
            for (byte, value) in data.iter_mut().zip(address.iter().skip(start)) {
                *byte = *value;
            }
            return;
        }
        match self.target(offset) {
            Some((slot, register)) => self.0.config_read(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            // Only a write of all four bytes is the address; a kernel probes with less.
            if let Ok(address) = <[u8; 4]>::try_from(data) {
                let address = u32::from_le_bytes(address) & ADDRESS_BITS;
                self.0.address.store(address, Ordering::Relaxed);
            }
        } else if let Some((slot, register)) = self.target(offset) {
            self.0.config_write(slot, register, data);
        }
    }
}

struct Ecam(Arc<PciRoot>);

impl Ecam {
    fn target(offset: u64) -> Option<(u8, usize)> {
        let address = u32::try_from(offset).ok()?;
        let slot = PciRoot::slot(address >> 20, (address >> 15) & 0x1f, (address >> 12) & 0x7)?;
        Some((slot, usize::try_from(address & 0xfff).ok()?))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((slot, register)) => self.0.config_read(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = Self::target(offset) {
            self.0.config_write(slot, register, data);
        }
    }
}

struct Window {
    root: Arc<PciRoot>,
    base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.root.mmio_read(self.base.saturating_add(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.root.mmio_write(self.base.saturating_add(offset), data);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
