//! ACPI's fixed hardware: the power button, soft-off and the reset register.
//!
//! The PM1 event block holds status bits (cleared by writing ones) and enable bits; an enabled
//! status raises the SCI. The control block starts a sleep state: S5 is the only one. Both blocks
//! are small enough that a mutex over all of it is the whole design.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strake_observe::Result;

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::lifecycle::{PhaseCell, Registers as Savable};

/// `SLP_TYP` of S5, as the DSDT's `_S5` object says it.
pub const S5_SLEEP_TYPE: u16 = 5;
/// What a write to the reset register must be, as the FADT says it.
pub const RESET_VALUE: u8 = 1;

const POWER_BUTTON: u16 = 1 << 8;
/// Status bits that hardware may set; the others read as zero.
const STATUS_BITS: u16 = POWER_BUTTON;
/// Enable bits: the power button's, and the global lock's, which kernels turn on and off.
const ENABLE_BITS: u16 = POWER_BUTTON | (1 << 5);
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;

/// What the guest does to its power.
pub trait PowerEvents: Send + Sync {
    /// The guest powered off. Called by a vCPU; must not wait for that vCPU.
    fn power_off(&self);

    /// The guest asked for a reset. Called by a vCPU; must not wait for that vCPU.
    fn reset(&self);
}

/// ACPI's fixed hardware.
pub struct AcpiPm {
    name: String,
    phase: PhaseCell,
    sci: Arc<dyn IrqLine>,
    events: Arc<dyn PowerEvents>,
    registers: Mutex<Registers>,
}

#[derive(Default)]
struct Registers {
    status: u16,
    enable: u16,
}

impl fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcpiPm").finish_non_exhaustive()
    }
}

crate::registers_only!(AcpiPm);

strake_state::saved! {
    /// ACPI's fixed hardware.
    pub record SavedAcpiPm("acpi-pm", version 1) {
        /// Status bits.
        1 => status: u16,
        /// Enable bits.
        2 => enable: u16,
    }
}

impl Savable for AcpiPm {
    type Saved = SavedAcpiPm;

    fn registers(&self) -> SavedAcpiPm {
        let registers = self.lock();
        SavedAcpiPm {
            status: registers.status,
            enable: registers.enable,
        }
    }

    fn set_registers(&self, saved: SavedAcpiPm) -> Result<()> {
        let mut registers = self.lock();
        registers.status = saved.status & STATUS_BITS;
        registers.enable = saved.enable & ENABLE_BITS;
        self.settle(&registers);
        Ok(())
    }
}

impl AcpiPm {
    /// The hardware that raises `sci` and tells `events`.
    #[must_use]
    pub fn new(sci: Arc<dyn IrqLine>, events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Arc::new(Self {
            name: "acpi-pm".to_owned(),
            phase: PhaseCell::default(),
            sci,
            events,
            registers: Mutex::default(),
        })
    }

    /// Presses the power button: asks the guest to shut down. Does nothing in a guest without
    /// ACPI, and nothing yet in one that has not come so far: the press is then kept.
    pub fn press_power_button(&self) {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.settle(&registers);
    }

    /// The PM1a event block (4 ports).
    #[must_use]
    pub fn event_block(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(EventBlock(Arc::clone(self)))
    }

    /// The PM1a control block (2 ports).
    #[must_use]
    pub fn control_block(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ControlBlock(Arc::clone(self)))
    }

    /// The reset register (1 port).
    #[must_use]
    pub fn reset_register(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ResetRegister(Arc::clone(self)))
    }

    fn settle(&self, registers: &Registers) {
        if registers.status & registers.enable != 0 {
            self.sci.raise();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies a register file out, bytes beyond it as zero.
fn answer(registers: &[u8], offset: u64, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        let at = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_add(index));
        *byte = at.and_then(|at| registers.get(at)).copied().unwrap_or(0);
    }
}

/// The bytes that an access writes at each of `N` register bytes, if it does.
fn written<const N: usize>(offset: u64, data: &[u8]) -> [Option<u8>; N] {
    let mut bytes = [None; N];
    let places = usize::try_from(offset).map_or(&mut [][..], |offset| {
        bytes.get_mut(offset..).unwrap_or_default()
    });
    for (place, value) in places.iter_mut().zip(data) {
        *place = Some(*value);
    }
    bytes
}

/// A register after some of its bytes were written.
fn merged(old: u16, low: Option<u8>, high: Option<u8>) -> u16 {
    let [old_low, old_high] = old.to_le_bytes();
    u16::from_le_bytes([low.unwrap_or(old_low), high.unwrap_or(old_high)])
}

struct EventBlock(Arc<AcpiPm>);

impl BusDevice for EventBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.0.lock();
        let [s0, s1] = registers.status.to_le_bytes();
        let [e0, e1] = registers.enable.to_le_bytes();
        answer(&[s0, s1, e0, e1], offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [s0, s1, e0, e1] = written(offset, data);
        let mut registers = self.0.lock();
        registers.status &= !merged(0, s0, s1) & STATUS_BITS;
        registers.enable = merged(registers.enable, e0, e1) & ENABLE_BITS;
        // The line is an edge: what is still pending is said again.
        self.0.settle(&registers);
    }
}

struct ControlBlock(Arc<AcpiPm>);

impl BusDevice for ControlBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        answer(&SCI_ENABLED.to_le_bytes(), offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [low, high] = written(offset, data);
        let value = merged(0, low, high);
        if value & SLEEP_ENABLE != 0 && (value >> 10) & 0b111 == S5_SLEEP_TYPE {
            self.0.events.power_off();
        }
    }
}

struct ResetRegister(Arc<AcpiPm>);

impl BusDevice for ResetRegister {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data.first() == Some(&RESET_VALUE) {
            self.0.events.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Host {
        scis: AtomicU32,
        offs: AtomicU32,
        resets: AtomicU32,
    }

    impl IrqLine for Host {
        fn raise(&self) {
            self.scis.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl PowerEvents for Host {
        fn power_off(&self) {
            self.offs.fetch_add(1, Ordering::Relaxed);
        }

        fn reset(&self) {
            self.resets.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn machine() -> (Arc<Host>, Arc<AcpiPm>) {
        let host = Arc::new(Host::default());
        let pm = AcpiPm::new(host.clone(), host.clone());
        (host, pm)
    }

    #[test]
    fn a_press_before_the_kernel_is_up_is_kept_and_acknowledged_once() {
        let (host, pm) = machine();
        let block = pm.event_block();
        pm.press_power_button();
        assert_eq!(host.scis.load(Ordering::Relaxed), 0);
        block.write(2, &POWER_BUTTON.to_le_bytes());
        assert_eq!(host.scis.load(Ordering::Relaxed), 1);
        let mut status = [0; 4];
        block.read(0, &mut status);
        assert_eq!(status, [0, 1, 0, 1]);
        block.write(0, &POWER_BUTTON.to_le_bytes());
        block.read(0, &mut status);
        assert_eq!(status, [0, 0, 0, 1]);
        assert_eq!(host.scis.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn only_s5_powers_off_and_only_its_value_resets() {
        let (host, pm) = machine();
        let control = pm.control_block();
        let mut value = [0; 2];
        control.read(0, &mut value);
        assert_eq!(value, [1, 0]);
        control.write(0, &(S5_SLEEP_TYPE << 10).to_le_bytes());
        control.write(0, &(SLEEP_ENABLE | (3 << 10)).to_le_bytes());
        assert_eq!(host.offs.load(Ordering::Relaxed), 0);
        control.write(0, &(SLEEP_ENABLE | (S5_SLEEP_TYPE << 10)).to_le_bytes());
        assert_eq!(host.offs.load(Ordering::Relaxed), 1);
        pm.reset_register().write(0, &[0]);
        assert_eq!(host.resets.load(Ordering::Relaxed), 0);
        pm.reset_register().write(0, &[RESET_VALUE]);
        assert_eq!(host.resets.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn any_access_is_harmless() {
        let (_, pm) = machine();
        for device in [pm.event_block(), pm.control_block(), pm.reset_register()] {
            for offset in [0, 1, 3, 4, u64::MAX] {
                for len in [0, 1, 2, 4, 8] {
                    let mut data = vec![0xff; len];
                    device.read(offset, &mut data);
                    device.write(offset, &data);
                }
            }
        }
    }
}
