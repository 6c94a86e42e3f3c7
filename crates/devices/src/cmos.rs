//! The real-time clock and its CMOS memory, as far as a kernel reads them at boot: the time of the
//! host in UTC, and no alarm.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use strake_observe::Result;

use crate::bus::BusDevice;
use crate::lifecycle::{PhaseCell, Registers};

const INDEX_BITS: u8 = 0x7f; // the top bit masks NMIs
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// The usual divider and rate; no update is ever in progress.
const A_VALUE: u8 = 0x26;
/// 24 hours, binary-coded decimal.
const B_VALUE: u8 = 0x02;
/// The battery is good.
const D_VALUE: u8 = 0x80;

/// The clock: an index port and a data port.
pub struct Cmos {
    name: String,
    phase: PhaseCell,
    index: AtomicU8,
    memory: Mutex<[u8; 128]>,
    now: fn() -> u64,
}

impl fmt::Debug for Cmos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cmos").finish_non_exhaustive()
    }
}

crate::registers_only!(Cmos);

strake_state::saved! {
    /// The clock's memory; its time is the host's.
    pub record SavedCmos("cmos", version 1) {
        /// The register that the data port means.
        1 => index: u8,
        /// The memory beside the clock.
        2 => memory: [u8; 128],
    }
}

impl Registers for Cmos {
    type Saved = SavedCmos;

    fn registers(&self) -> SavedCmos {
        SavedCmos {
            index: self.index.load(Ordering::Relaxed),
            memory: *self.memory.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn set_registers(&self, saved: SavedCmos) -> Result<()> {
        self.index
            .store(saved.index & INDEX_BITS, Ordering::Relaxed);
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = saved.memory;
        Ok(())
    }
}

impl Cmos {
    /// A clock that shows the host's time.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::with_clock(host_seconds)
    }

    fn with_clock(now: fn() -> u64) -> Arc<Self> {
        Arc::new(Self {
            name: "cmos".to_owned(),
            phase: PhaseCell::default(),
            index: AtomicU8::new(0),
            memory: Mutex::new([0; 128]),
            now,
        })
    }

    fn value(&self, index: u8) -> u8 {
        let time = Time::of((self.now)());
        match index {
            0x00 => bcd(time.second),
            0x02 => bcd(time.minute),
            0x04 => bcd(time.hour),
            0x06 => bcd(time.weekday),
            0x07 => bcd(time.day),
            0x08 => bcd(time.month),
            0x09 => bcd(time.year % 100),
            CENTURY => bcd(time.year / 100),
            REGISTER_A => A_VALUE,
            REGISTER_B => B_VALUE,
            REGISTER_C => 0,
            REGISTER_D => D_VALUE,
            _ => {
                let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
                memory.get(usize::from(index)).copied().unwrap_or(0)
            }
        }
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.value(self.index.load(Ordering::Relaxed));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(value) = data.first() else {
            return;
        };
        if offset == 0 {
            self.index.store(value & INDEX_BITS, Ordering::Relaxed);
        } else {
            // The clock cannot be set; the memory beside it can.
            let index = usize::from(self.index.load(Ordering::Relaxed));
            let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(byte) = memory.get_mut(index) {
                *byte = *value;
            }
        }
    }
}

fn host_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[allow(clippy::cast_possible_truncation)] // of a value below 100
fn bcd(value: u64) -> u8 {
    let value = value % 100;
    (((value / 10) << 4) | (value % 10)) as u8
}

struct Time {
    second: u64,
    minute: u64,
    hour: u64,
    weekday: u64,
    day: u64,
    month: u64,
    year: u64,
}

impl Time {
    /// The civil time of a number of seconds since 1970, by counting days from 1 March of year 0
    /// in eras of 400 years, where leap days come last.
    fn of(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        Self {
            second: seconds % 60,
            minute: seconds / 60 % 60,
            hour: seconds / 3_600 % 24,
            weekday: (days + 4) % 7 + 1, // 1 January 1970 was a Thursday; Sunday is 1
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            month,
            year: era * 400 + year_of_era + u64::from(month <= 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cmos: &Cmos, index: u8) -> u8 {
        let mut data = [0];
        cmos.write(0, &[index]);
        cmos.read(1, &mut data);
        data[0]
    }

    #[test]
    fn it_shows_the_time_in_binary_coded_decimal() {
        // 2024-02-29 23:59:58 UTC, a Thursday
        let cmos = Cmos::with_clock(|| 1_709_251_198);
        let shown: Vec<u8> = [0x32, 9, 8, 7, 6, 4, 2, 0]
            .into_iter()
            .map(|index| read(&cmos, index))
            .collect();
        assert_eq!(shown, [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
        assert_eq!(read(&cmos, REGISTER_A) & 0x80, 0, "no update in progress");
        assert_eq!(read(&cmos, REGISTER_D), 0x80);
    }

    #[test]
    fn known_days() {
        for (seconds, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (951_868_800, 2000, 3, 1, 4),
            (4_102_444_799, 2099, 12, 31, 5),
        ] {
            let time = Time::of(seconds);
            assert_eq!(
                (time.year, time.month, time.day, time.weekday),
                (year, month, day, weekday)
            );
        }
    }

    #[test]
    fn memory_keeps_what_is_written_and_any_access_is_harmless() {
        let cmos = Cmos::new();
        cmos.write(0, &[0x40]);
        cmos.write(1, &[7]);
        assert_eq!(read(&cmos, 0x40), 7);
        for offset in [0, 1, 2, u64::MAX] {
            for len in [0, 1, 8] {
                let mut data = vec![0xff; len];
                cmos.read(offset, &mut data);
                cmos.write(offset, &data);
            }
        }
    }
}
