//! MSI-X: the vector table and the pending bits of a function.
//!
//! A vector is *live* while MSI-X is enabled and neither the function nor the vector is masked.
//! An interrupt of a live vector goes out at once; of another one it becomes a pending bit, which
//! goes out when the vector becomes live. The route is set when a vector becomes live with a
//! message that was not routed yet, and when the message of a live vector changes: a kernel writes
//! the three words of a masked entry one by one, and only the last state matters.
//!
//! Threads: vCPUs (table, control) and workers (`trigger`), all under one mutex that is held for
//! one eventfd write or one route change.

use std::sync::{Arc, Mutex, PoisonError};

use strake_observe::{Because, Result, State, recorder};

use strake_state::observations::ShapeDiffers;

use crate::interrupt::{MsiBroker, MsiLine};
use crate::observations::{DeviceUnusable, RouteRefused};
use crate::throttle::Throttle;

/// Bytes of one table entry.
pub const TABLE_ENTRY_SIZE: usize = 16;

const CONTROL: usize = 12;
const CONTROL_MASKED: u8 = 1;

strake_state::saved! {
    /// A vector of a function.
    pub part SavedVector {
        /// Its entry in the table.
        1 => raw: [u8; 16],
        /// Whether an interrupt waits for it to be unmasked.
        2 => pending: bool,
    }
}

/// The MSI-X state of a function.
#[derive(Debug)]
pub struct Msix {
    device: String,
    table: Mutex<Table>,
    reports: Throttle,
}

#[derive(Debug)]
struct Table {
    enabled: bool,
    masked: bool,
    entries: Vec<Vector>,
}

#[derive(Debug)]
struct Vector {
    raw: [u8; TABLE_ENTRY_SIZE],
    pending: bool,
    live: bool,
    routed: Option<(u64, u32)>,
    line: Arc<dyn MsiLine>,
}

impl Vector {
    fn message(&self) -> (u64, u32) {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = self.raw;
        (
            u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            u32::from_le_bytes([d0, d1, d2, d3]),
        )
    }

    fn masked(&self) -> bool {
        self.raw
            .get(CONTROL)
            .is_none_or(|c| c & CONTROL_MASKED != 0)
    }

    /// Brings line and pending bit in accord with what the guest wrote.
    fn settle(&mut self, allowed: bool) -> Result<()> {
        let live = allowed && !self.masked();
        let message = self.message();
        if live && self.routed != Some(message) {
            self.line.route(message.0, message.1)?;
            self.routed = Some(message);
        }
        if live != self.live {
            self.live = live;
            if live {
                self.line.unmask()?;
            } else {
                self.line.mask()?;
            }
        }
        if live && std::mem::take(&mut self.pending) {
            self.raise();
        }
        Ok(())
    }

    fn raise(&self) {
        // A full eventfd counter means that the interrupt is on its way already.
        let _ = self.line.event().write(1);
    }
}

impl Msix {
    /// A table of `vectors` entries, all masked, with a line for each.
    ///
    /// # Errors
    /// The broker has no lines left.
    pub fn new(device: &str, vectors: u16, broker: &dyn MsiBroker) -> Result<Self> {
        let vector = || {
            let mut raw = [0; TABLE_ENTRY_SIZE];
            raw[CONTROL] = CONTROL_MASKED;
            Ok(Vector {
                raw,
                pending: false,
                live: false,
                routed: None,
                line: broker.allocate()?,
            })
        };
        let entries = (0..vectors)
            .map(|_| vector())
            .collect::<Result<Vec<_>>>()
            .because_of(|| DeviceUnusable {
                device: device.to_owned(),
                doing: format!("getting {vectors} interrupt lines"),
            })?;
        Ok(Self {
            device: device.to_owned(),
            table: Mutex::new(Table {
                enabled: false,
                masked: false,
                entries,
            }),
            reports: Throttle::default(),
        })
    }

    /// The guest wrote the message control register.
    pub fn control(&self, enabled: bool, masked: bool) {
        let mut table = self.lock();
        table.enabled = enabled;
        table.masked = masked;
        let allowed = enabled && !masked;
        for index in 0..table.entries.len() {
            self.settle(&mut table, index, allowed);
        }
    }

    /// Whether MSI-X is enabled.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.lock().enabled
    }

    /// How many vectors there are.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.lock().entries.len()).unwrap_or(u16::MAX)
    }

    /// Interrupts the guest by `vector`. One that does not exist, or any while MSI-X is off, is
    /// dropped.
    pub fn trigger(&self, vector: u16) {
        let mut table = self.lock();
        let enabled = table.enabled;
        if let Some(entry) = table.entries.get_mut(usize::from(vector)) {
            if entry.live {
                entry.raise();
            } else if enabled {
                entry.pending = true;
            }
        }
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = split(at)
                .and_then(|(index, at)| table.entries.get(index)?.raw.get(at).copied())
                .unwrap_or(0);
        }
    }

    /// The guest writes the table.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut table = self.lock();
        let mut touched = None;
        for (value, position) in data.iter().zip(offset..) {
            let Some((index, at)) = split(position) else {
                continue;
            };
            if touched.is_some_and(|touched| touched != index) {
                self.settle_one(&mut table, touched);
            }
            touched = Some(index);
            let writable = match at {
                0 => 0xfc, // messages are aligned to four bytes
                1..CONTROL => 0xff,
                CONTROL => CONTROL_MASKED,
                _ => 0,
            };
            if let Some(byte) = table
                .entries
                .get_mut(index)
                .and_then(|entry| entry.raw.get_mut(at))
            {
                *byte = value & writable;
            }
        }
        self.settle_one(&mut table, touched);
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(at).ok().and_then(|at| at.checked_mul(8));
            *byte = (0..8)
                .filter(|bit| {
                    first
                        .and_then(|first| table.entries.get(first.checked_add(*bit)?))
                        .is_some_and(|entry| entry.pending)
                })
                .fold(0, |byte, bit| byte | (1 << bit));
        }
    }

    /// What the guest and the device made of it.
    pub(crate) fn save(&self) -> (bool, bool, Vec<SavedVector>) {
        let table = self.lock();
        let vectors = table.entries.iter().map(|entry| SavedVector {
            raw: entry.raw,
            pending: entry.pending,
        });
        (table.enabled, table.masked, vectors.collect())
    }

    /// Makes it what was saved: routes and masks follow, and what is pending and may go out goes out.
    ///
    /// # Errors
    /// The number of vectors is another one, or the hypervisor refuses a route.
    pub(crate) fn restore(&self, enabled: bool, masked: bool, saved: &[SavedVector]) -> Result<()> {
        let mut table = self.lock();
        if table.entries.len() != saved.len() {
            return Err(ShapeDiffers {
                component: self.device.clone(),
                what: "interrupt vectors:".to_owned(),
                saved: saved.len().to_string(),
                found: table.entries.len().to_string(),
            }
            .into());
        }
        table.enabled = enabled;
        table.masked = masked;
        for (index, (entry, saved)) in (0..).zip(table.entries.iter_mut().zip(saved)) {
            entry.raw = saved.raw;
            entry.pending = saved.pending;
            entry
                .settle(enabled && !masked)
                .because_of(|| RouteRefused {
                    device: self.device.clone(),
                    vector: index,
                })?;
        }
        Ok(())
    }

    fn settle_one(&self, table: &mut Table, index: Option<usize>) {
        let allowed = table.enabled && !table.masked;
        if let Some(index) = index {
            self.settle(table, index, allowed);
        }
    }

    fn settle(&self, table: &mut Table, index: usize, allowed: bool) {
        let Some(entry) = table.entries.get_mut(index) else {
            return;
        };
        let settled = entry.settle(allowed).because_of(|| RouteRefused {
            device: self.device.clone(),
            vector: u16::try_from(index).unwrap_or(u16::MAX),
        });
        if let Err(seen) = settled
            && self.reports.pass()
        {
            recorder().record(seen, State::Open);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which entry and which byte of it.
fn split(offset: u64) -> Option<(usize, usize)> {
    let offset = usize::try_from(offset).ok()?;
    Some((offset / TABLE_ENTRY_SIZE, offset % TABLE_ENTRY_SIZE))
}
