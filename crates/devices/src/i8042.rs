//! The keyboard controller, of which only the reset line is of use.
//!
//! There is no keyboard. A kernel that probes for one reads data until the buffer is empty; here it
//! never is, so the probe ends after its sixteen reads with "no controller". The input buffer on
//! the other hand always has room, so that a kernel that resets by this way does not wait first.

use std::fmt;
use std::sync::Arc;

use strake_observe::Result;

use crate::acpi_pm::PowerEvents;
use crate::bus::BusDevice;
use crate::lifecycle::{PhaseCell, Registers};

const COMMAND: u64 = 4;
const PULSE_RESET: u8 = 0xfe;
const OUTPUT_FULL: u8 = 1;

/// The keyboard controller: ports 0x60 to 0x64.
pub struct I8042 {
    name: String,
    phase: PhaseCell,
    events: Arc<dyn PowerEvents>,
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("I8042").finish_non_exhaustive()
    }
}

crate::registers_only!(I8042);

strake_state::saved! {
    /// The keyboard controller, which remembers nothing.
    pub record SavedI8042("i8042", version 1) {}
}

impl Registers for I8042 {
    type Saved = SavedI8042;

    fn registers(&self) -> SavedI8042 {
        SavedI8042 {}
    }

    fn set_registers(&self, SavedI8042 {}: SavedI8042) -> Result<()> {
        Ok(())
    }
}

impl I8042 {
    /// One whose reset line ends at `events`.
    #[must_use]
    pub fn new(events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Arc::new(Self {
            name: "i8042".to_owned(),
            phase: PhaseCell::default(),
            events,
        })
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Port 0x61 belongs to the speaker and the timer's second channel, not to us: its bit for
        // the timer's output reads as set, so that a calibration loop over it ends.
        if let Some(byte) = data.first_mut() {
            *byte = match offset {
                COMMAND => OUTPUT_FULL,
                1 => 0x20,
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data.first() == Some(&PULSE_RESET) {
            self.events.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Host(AtomicU32);

    impl PowerEvents for Host {
        fn power_off(&self) {}

        fn reset(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_reset_command_resets_and_nothing_else_does() {
        let host = Arc::new(Host::default());
        let device = I8042::new(host.clone());
        for (offset, value) in [(0, 0xfe), (4, 0xaa), (4, 0xd1), (3, 0xfe)] {
            device.write(offset, &[value]);
        }
        device.write(4, &[]);
        assert_eq!(host.0.load(Ordering::Relaxed), 0);
        device.write(4, &[0xfe]);
        assert_eq!(host.0.load(Ordering::Relaxed), 1);
        let mut status = [0];
        device.read(4, &mut status);
        assert_eq!(status[0] & 2, 0, "there is always room for a command");
    }
}
