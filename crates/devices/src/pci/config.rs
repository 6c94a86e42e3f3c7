//! The configuration space of a function: 256 bytes, of which the guest may change some bits.
//!
//! Each byte has a mask of the bits that the guest may write. That mask also makes BAR sizing work
//! as on hardware: of all ones written, a BAR keeps those above its size.

use strake_observe::Result;
use strake_state::observations::ShapeDiffers;

/// Bytes of configuration space. There are no extended capabilities: beyond it, ECAM reads zero.
pub(crate) const CONFIG_SIZE: usize = 256;

/// Capability identifier of MSI-X.
pub const MSIX_CAPABILITY: u8 = 0x11;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const COMMAND_INTX_DISABLE: u8 = 1 << 2; // in the register's second byte
const STATUS_CAPABILITIES: u8 = 1 << 4;

const BAR_KIND_64: u8 = 0b100;

/// What a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass, programming interface: `0xCCSSPP`.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// Where a BAR may lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarWidth {
    /// Below 4 GiB.
    Bits32,
    /// Anywhere; takes two BAR registers.
    Bits64,
}

/// A BAR as the function declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarSize {
    /// Its register, 0 to 5.
    pub index: u8,
    /// Bytes, a power of two of at least 16.
    pub size: u64,
    /// Where it may lie.
    pub width: BarWidth,
}

/// A BAR as the guest placed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRange {
    /// Its register.
    pub index: u8,
    /// Its first address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// The configuration space of one function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    data: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bars: Vec<BarSize>,
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            data: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            bars: Vec::new(),
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITY_POINTER,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        let [interface, subclass, class, _] = identity.class.to_le_bytes();
        space.put(0x08, &[identity.revision, interface, subclass, class]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(
            COMMAND,
            &[COMMAND_MEMORY | COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE],
        );
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds a memory BAR, not prefetchable, at address zero.
    pub fn add_bar(&mut self, bar: BarSize) {
        debug_assert!(bar.size.is_power_of_two() && bar.size >= 16);
        let at = BAR0 + usize::from(bar.index) * 4;
        let mask = (!(bar.size - 1)).to_le_bytes();
        match bar.width {
            BarWidth::Bits32 => self.allow(at, &mask[..4]),
            BarWidth::Bits64 => {
                self.allow(at, &mask);
                self.put(at, &[BAR_KIND_64]);
            }
        }
        self.bars.push(bar);
    }

    /// Adds a capability whose body (behind identifier and link) is `body`, of which the guest may
    /// write the bits set in `writable`. Returns where the capability starts.
    ///
    /// Capabilities are declared by devices, not by guests: one that does not fit is a fault of
    /// the device, which its tests see.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        debug_assert!(at + 2 + body.len() <= CONFIG_SIZE);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        #[allow(clippy::cast_possible_truncation)] // at < CONFIG_SIZE
        self.put(self.last_link, &[at as u8]);
        self.last_link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        at
    }

    /// The guest reads. Beyond the space everything is zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self
                .data
                .get(offset.saturating_add(index))
                .copied()
                .unwrap_or(0);
        }
    }

    /// The guest writes; only writable bits change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let bytes = self.data.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, mask), value) in bytes.zip(data) {
            *byte = (*byte & !mask) | (value & mask);
        }
    }

    /// The device changes its own bytes.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.data.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    /// All of it, as the guest would read it.
    #[must_use]
    pub fn bytes(&self) -> [u8; CONFIG_SIZE] {
        self.data
    }

    /// Takes over what the guest wrote in another process. What it cannot write is what the function
    /// is, and must be the same.
    ///
    /// # Errors
    /// [`ShapeDiffers`].
    pub fn restore(&mut self, component: &str, saved: &[u8; CONFIG_SIZE]) -> Result<()> {
        let bytes = self.data.iter().zip(&self.writable).zip(saved);
        let differs = bytes
            .clone()
            .position(|((now, mask), saved)| (now ^ saved) & !mask != 0);
        if let Some(at) = differs {
            let of = |bytes: &[u8; CONFIG_SIZE]| format!("{:#04x}", bytes.get(at).unwrap_or(&0));
            return Err(ShapeDiffers {
                component: component.to_owned(),
                what: format!("byte {at:#x} of its PCI configuration"),
                saved: of(saved),
                found: of(&self.data),
            }
            .into());
        }
        self.data = *saved;
        Ok(())
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (byte, value) in self.writable.iter_mut().skip(offset).zip(mask) {
            *byte = *value;
        }
    }

    /// The BARs, as declared.
    #[must_use]
    pub fn bars(&self) -> &[BarSize] {
        &self.bars
    }

    /// Places a BAR, as firmware would.
    pub fn place(&mut self, index: u8, base: u64) {
        if let Some(bar) = self.bars.iter().find(|bar| bar.index == index) {
            let at = BAR0 + usize::from(index) * 4;
            match bar.width {
                BarWidth::Bits32 => self.write(at, &base.to_le_bytes()[..4]),
                BarWidth::Bits64 => self.write(at, &base.to_le_bytes()),
            }
        }
    }

    /// The BARs that answer at this moment: none while memory decoding is off.
    #[must_use]
    pub fn decoded(&self) -> Vec<BarRange> {
        let mut command = [0];
        self.read(COMMAND, &mut command);
        if command[0] & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let range = |bar: &BarSize| {
            let at = BAR0 + usize::from(bar.index) * 4;
            let mut bytes = [0; 8];
            match bar.width {
                BarWidth::Bits32 => self.read(at, &mut bytes[..4]),
                BarWidth::Bits64 => self.read(at, &mut bytes),
            }
            let base = u64::from_le_bytes(bytes) & !(bar.size - 1);
            // Address zero means unplaced; one that wraps is what sizing leaves for a moment.
            (base != 0 && base.checked_add(bar.size).is_some()).then_some(BarRange {
                index: bar.index,
                base,
                size: bar.size,
            })
        };
        self.bars.iter().filter_map(range).collect()
    }
}
