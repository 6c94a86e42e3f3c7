//! A driver that finds its device on the bus and drives it through its registers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::host::{ECAM, Host, Line, WINDOW64};
use super::ring::{Piece, Ring};
use crate::virtio::{EVENT_IDX, INDIRECT_DESC, VERSION_1};

pub const NO_VECTOR: u16 = 0xffff;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;

/// A driver of the device in one slot.
#[derive(Debug)]
pub struct Driver<'h> {
    pub host: &'h Host,
    pub slot: u8,
    pub common: u64,
    pub isr: u64,
    pub device: u64,
    pub notify: u64,
    pub notify_step: u64,
    pub table: u64,
    pub pending: u64,
    pub msix: u64,
    pub pci_access: u64,
    pub features: u64,
    pub lines: Vec<Arc<Line>>,
    pub rings: Vec<Ring>,
}

impl<'h> Driver<'h> {
    /// Probes the slot: walks the capabilities, sizes and enables the BAR.
    ///
    /// `lines` are those that the device got when it was built, in order.
    pub fn probe(host: &'h Host, slot: u8, lines: Vec<Arc<Line>>) -> Self {
        let mut driver = Self {
            host,
            slot,
            common: 0,
            isr: 0,
            device: 0,
            notify: 0,
            notify_step: 0,
            table: 0,
            pending: 0,
            msix: 0,
            pci_access: 0,
            features: 0,
            lines,
            rings: Vec::new(),
        };
        assert_eq!(driver.config16(0), 0x1af4);
        assert!(driver.config16(2) >= 0x1040);
        assert!(driver.config8(8) >= 1, "a modern device");
        // Size the BAR as kernels do, then put its address back.
        let (low, high) = (driver.config32(0x10), driver.config32(0x14));
        assert_eq!(low & 0xf, 4, "64-bit memory, not prefetchable");
        driver.set_config(0x10, &[0xff; 4]);
        driver.set_config(0x14, &[0xff; 4]);
        let mask = u64::from(driver.config32(0x14)) << 32 | u64::from(driver.config32(0x10) & !0xf);
        assert_eq!(!mask + 1, 0x8000);
        driver.set_config(0x10, &low.to_le_bytes());
        driver.set_config(0x14, &high.to_le_bytes());
        let bar = u64::from(high) << 32 | u64::from(low & !0xf);
        assert!(WINDOW64.contains(&bar));
        driver.set_config(4, &6u16.to_le_bytes());
        driver.find(bar);
        driver
    }

    fn find(&mut self, bar: u64) {
        assert!(self.config16(6) & 0x10 != 0, "there is a capability list");
        let mut at = u64::from(self.config8(0x34));
        let mut seen = 0;
        while at != 0 {
            seen += 1;
            assert!(seen < 48, "the capability list ends");
            let kind = self.config8(at + 3);
            let offset = bar + u64::from(self.config32(at + 8));
            match self.config8(at) {
                0x11 => {
                    self.msix = at;
                    self.table = bar + u64::from(self.config32(at + 4) & !7);
                    self.pending = bar + u64::from(self.config32(at + 8) & !7);
                }
                0x09 => match kind {
                    1 => self.common = offset,
                    2 => {
                        self.notify = offset;
                        self.notify_step = u64::from(self.config32(at + 16));
                    }
                    3 => self.isr = offset,
                    4 => self.device = offset,
                    5 => self.pci_access = at,
                    other => panic!("virtio capability {other}"),
                },
                other => panic!("capability {other}"),
            }
            at = u64::from(self.config8(at + 1));
        }
    }

    // Configuration space.

    pub fn config(&self, offset: u64, data: &mut [u8]) {
        let at = ECAM + (u64::from(self.slot) << 15) + offset;
        self.host.read(at, data);
    }

    pub fn config8(&self, offset: u64) -> u8 {
        let mut data = [0; 1];
        self.config(offset, &mut data);
        data[0]
    }

    pub fn config16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.config(offset, &mut data);
        u16::from_le_bytes(data)
    }

    pub fn config32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn set_config(&self, offset: u64, data: &[u8]) {
        let at = ECAM + (u64::from(self.slot) << 15) + offset;
        self.host.write(at, data);
    }

    // BAR.

    pub fn get8(&self, at: u64) -> u8 {
        let mut data = [0; 1];
        self.host.read(at, &mut data);
        data[0]
    }

    pub fn get16(&self, at: u64) -> u16 {
        let mut data = [0; 2];
        self.host.read(at, &mut data);
        u16::from_le_bytes(data)
    }

    pub fn get32(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.host.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn put8(&self, at: u64, value: u8) {
        self.host.write(at, &[value]);
    }

    pub fn put16(&self, at: u64, value: u16) {
        self.host.write(at, &value.to_le_bytes());
    }

    pub fn put32(&self, at: u64, value: u32) {
        self.host.write(at, &value.to_le_bytes());
    }

    pub fn put64(&self, at: u64, value: u64) {
        // By halves, as drivers do.
        self.put32(at, (value & 0xffff_ffff) as u32);
        self.put32(at + 4, (value >> 32) as u32);
    }

    // The protocol.

    pub fn status(&self) -> u8 {
        self.get8(self.common + 20)
    }

    pub fn add_status(&self, bit: u8) {
        self.put8(self.common + 20, self.status() | bit);
    }

    /// Resets the device and waits until it is done.
    pub fn reset(&self) {
        self.put8(self.common + 20, 0);
        let until = Instant::now() + Duration::from_secs(10);
        while self.status() != 0 {
            assert!(Instant::now() < until, "the device does not reset");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn offered(&self) -> u64 {
        self.put32(self.common, 0);
        let low = self.get32(self.common + 4);
        self.put32(self.common, 1);
        u64::from(self.get32(self.common + 4)) << 32 | u64::from(low)
    }

    pub fn accept(&mut self, features: u64) {
        self.put32(self.common + 8, 0);
        self.put32(self.common + 12, (features & 0xffff_ffff) as u32);
        self.put32(self.common + 8, 1);
        self.put32(self.common + 12, (features >> 32) as u32);
        self.features = features;
    }

    /// Goes up to FEATURES_OK with what is offered of `wanted`; says whether the device agrees.
    pub fn negotiate(&mut self, wanted: u64) -> bool {
        self.reset();
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        let features = self.offered() & wanted;
        self.accept(features);
        self.add_status(FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Everything: features, MSI-X with a vector per queue (and the last one for the
    /// configuration), queues of `size`, DRIVER_OK.
    pub fn bring_up(&mut self, wanted: u64, size: u16) {
        assert!(self.negotiate(wanted | VERSION_1));
        self.enable_msix();
        let count = self.get16(self.common + 18);
        self.put16(self.common + 16, count);
        assert_eq!(self.get16(self.common + 16), count);
        self.rings.clear();
        for index in 0..count {
            self.set_up_queue(index, size);
        }
        self.ready();
    }

    pub fn ready(&self) {
        self.add_status(DRIVER_OK);
    }

    /// Where the rings of queue `index` are.
    pub fn ring_base(index: u16) -> u64 {
        0x10_0000 + u64::from(index) * Ring::BYTES
    }

    pub fn set_up_queue(&mut self, index: u16, size: u16) {
        let event_idx = self.features & EVENT_IDX != 0;
        let ring = Ring::new(self.host.memory(), Self::ring_base(index), size, event_idx);
        self.put16(self.common + 22, index);
        assert!(self.get16(self.common + 24) >= size);
        self.put16(self.common + 24, size);
        self.put16(self.common + 26, index);
        assert_eq!(self.get16(self.common + 26), index);
        self.put64(self.common + 32, ring.descriptors());
        self.put64(self.common + 40, ring.avail());
        self.put64(self.common + 48, ring.used());
        self.put16(self.common + 28, 1);
        assert_eq!(self.get16(self.common + 28), 1);
        self.rings.push(ring);
    }

    /// Sets a message for each vector, unmasks it, and enables MSI-X.
    pub fn enable_msix(&self) {
        self.set_msix_control(0x8000 | 0x4000);
        for vector in 0..self.lines.len() as u64 {
            let entry = self.table + vector * 16;
            self.put32(entry, 0xfee0_0000);
            self.put32(entry + 4, 0);
            self.put32(entry + 8, 0x40 + vector as u32);
            self.put32(entry + 12, 0);
        }
        self.set_msix_control(0x8000);
    }

    pub fn set_msix_control(&self, control: u16) {
        self.set_config(self.msix + 2, &control.to_le_bytes());
    }

    pub fn kick(&self, queue: u16) {
        self.put16(self.notify + u64::from(queue) * self.notify_step, queue);
    }

    /// Adds a chain to queue `queue` and kicks if the device wants it.
    pub fn submit(&mut self, queue: u16, pieces: &[Piece]) -> u16 {
        let ring = &mut self.rings[usize::from(queue)];
        let before = ring.available();
        let head = ring.add(pieces);
        if ring.wants_kick(before) {
            self.kick(queue);
        }
        head
    }

    /// Waits for the next completion of a queue.
    #[track_caller]
    pub fn complete(&mut self, queue: u16) -> (u16, u32) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(done) = self.rings[usize::from(queue)].reap() {
                return done;
            }
            assert!(Instant::now() < until, "queue {queue} completes nothing");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// What a modern driver wants of the rings.
    pub fn ring_features() -> u64 {
        VERSION_1 | EVENT_IDX | INDIRECT_DESC
    }

    /// Waits until the device asks for its reset.
    #[track_caller]
    pub fn expect_needs_reset(&self) {
        super::host::eventually(|| self.status() & NEEDS_RESET != 0);
    }
}
