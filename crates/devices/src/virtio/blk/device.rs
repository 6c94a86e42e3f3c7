//! What the guest sees of a disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use strake_block::{DiskQueue, LiveDisk, SECTOR_BYTES};
use strake_observe::{Because, Observation, Result};
use strake_state::Records;
use strake_state::observations::ShapeDiffers;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::request::{DISCARD_SEGMENTS, RANGE_SECTORS, SEGMENT_BYTES, SEGMENTS};
use super::worker::BlkWork;
use crate::observations::DeviceUnusable;
use crate::virtio::{Activation, ConfigSignal, Kind, VirtioDevice, Work, feature, read_bytes};

/// Most queues of a disk: one for each of a guest's vCPUs.
pub const MAX_QUEUES: u16 = 16;

/// Chains per queue.
pub const QUEUE_SIZE: u16 = 256;

/// Bytes of a disk's serial number.
pub const SERIAL_BYTES: usize = 20;

/// Physical blocks are 4 KiB: guests then align what they write, which spares read-modify-write
/// on every modern store. Logical blocks stay at 512 bytes, which every guest can boot from.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
const PHYSICAL_BLOCK: u32 = 8;

const WRITEBACK_OFFSET: usize = 32;

/// What a disk is like.
#[derive(Debug, Clone)]
pub struct BlkConfig {
    /// How many virtqueues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// What the guest sees as its serial number, at most [`SERIAL_BYTES`] bytes.
    pub serial: String,
    /// Whether the guest may not write. A disk whose image may not be written is so anyway.
    pub read_only: bool,
}

strake_state::saved! {
    /// What the guest sees of a disk, and what it chose.
    pub record SavedBlk("virtio-blk", version 1) {
        /// Its size.
        1 => sectors: u64,
        /// Its serial number.
        2 => serial: [u8; 20],
        /// Whether the guest keeps the write cache on.
        3 => writeback: bool,
    }
}

/// A disk.
#[derive(Debug)]
pub struct VirtioBlk {
    name: String,
    disk: Arc<LiveDisk>,
    queues: u16,
    read_only: bool,
    serial: [u8; SERIAL_BYTES],
    /// Whether the guest keeps the write cache on; a guest that turns it off gets each write
    /// flushed before it hears of it.
    writeback: Arc<AtomicBool>,
    /// Queues on the disk that were opened before they are needed.
    spare: Mutex<Vec<(u16, DiskQueue)>>,
    signal: OnceLock<ConfigSignal>,
}

impl VirtioBlk {
    /// A disk named `name` over `disk`.
    ///
    /// # Errors
    /// The number of queues or the length of the serial number is impossible.
    pub fn new(name: impl Into<String>, disk: Arc<LiveDisk>, config: &BlkConfig) -> Result<Self> {
        let name = name.into();
        let unusable = |doing: &str| {
            Observation::from(DeviceUnusable {
                device: name.clone(),
                doing: doing.to_owned(),
            })
        };
        if config.queues == 0 || config.queues > MAX_QUEUES {
            return Err(unusable(&format!("giving it {} queues", config.queues)));
        }
        let mut serial = [0; SERIAL_BYTES];
        serial
            .get_mut(..config.serial.len())
            .ok_or_else(|| unusable("giving it a serial number of more than 20 bytes"))?
            .copy_from_slice(config.serial.as_bytes());
        Ok(Self {
            read_only: config.read_only || disk.read_only(),
            name,
            disk,
            queues: config.queues,
            serial,
            writeback: Arc::new(AtomicBool::new(true)),
            spare: Mutex::default(),
            signal: OnceLock::new(),
        })
    }

    /// A queue on the disk for a virtqueue of this size.
    fn take_queue(&self, size: u16) -> Result<DiskQueue> {
        let mut spare = self.spare();
        match spare.iter().position(|(of, _)| *of == size) {
            Some(at) => Ok(spare.swap_remove(at).1),
            None => self.open_queue(size),
        }
    }

    fn open_queue(&self, size: u16) -> Result<DiskQueue> {
        self.disk
            .queue(u32::from(size))
            .because_of(|| DeviceUnusable {
                device: self.name.clone(),
                doing: "opening a queue of its disk".to_owned(),
            })
    }

    fn spare(&self) -> MutexGuard<'_, Vec<(u16, DiskQueue)>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration structure of the standard, section 5.2.4.
    fn config(&self) -> Vec<u8> {
        let sectors = self.disk.size() / SECTOR_BYTES;
        let mut bytes = Vec::with_capacity(60);
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(SEGMENT_BYTES.to_le_bytes());
        bytes.extend(SEGMENTS.to_le_bytes());
        bytes.extend([0; 4]); // geometry: not offered
        bytes.extend(512u32.to_le_bytes());
        bytes.extend([PHYSICAL_BLOCK_EXPONENT, 0]);
        bytes.extend(1u16.to_le_bytes()); // minimal I/O: one logical block
        bytes.extend(0u32.to_le_bytes()); // no optimal I/O size
        bytes.extend([u8::from(self.writeback.load(Ordering::Acquire)), 0]);
        bytes.extend(self.queues.to_le_bytes());
        bytes.extend(RANGE_SECTORS.to_le_bytes());
        bytes.extend(DISCARD_SEGMENTS.to_le_bytes());
        bytes.extend(PHYSICAL_BLOCK.to_le_bytes()); // alignment of discards
        bytes.extend(RANGE_SECTORS.to_le_bytes());
        bytes.extend(1u32.to_le_bytes()); // segments of a write-zeroes request
        bytes.extend([1, 0, 0, 0]); // write-zeroes may unmap
        bytes
    }
}

impl VirtioDevice for VirtioBlk {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> Kind {
        Kind {
            id: 2,
            class: 0x01_80_00, // storage, other
        }
    }

    fn features(&self) -> u64 {
        let mut features = feature(VIRTIO_BLK_F_SIZE_MAX)
            | feature(VIRTIO_BLK_F_SEG_MAX)
            | feature(VIRTIO_BLK_F_BLK_SIZE)
            | feature(VIRTIO_BLK_F_FLUSH)
            | feature(VIRTIO_BLK_F_TOPOLOGY)
            | feature(VIRTIO_BLK_F_CONFIG_WCE);
        if self.queues > 1 {
            features |= feature(VIRTIO_BLK_F_MQ);
        }
        if self.read_only {
            features |= feature(VIRTIO_BLK_F_RO);
        } else {
            features |= feature(VIRTIO_BLK_F_DISCARD) | feature(VIRTIO_BLK_F_WRITE_ZEROES);
        }
        features
    }

    fn accepts(&self, _: u64) -> bool {
        // None of them depends on another.
        true
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        if let (WRITEBACK_OFFSET, [value]) = (offset, data) {
            self.writeback.store(value & 1 != 0, Ordering::Release);
        }
    }

    fn connect(&self, signal: ConfigSignal) {
        // Kept for a disk that grows; nothing changes from outside yet.
        let _ = self.signal.set(signal);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Work>>> {
        let memory = activation.memory;
        // A driver that knows no flush counts on every write being durable.
        let flushes = activation.features & feature(VIRTIO_BLK_F_FLUSH) != 0;
        let mut works: Vec<Box<dyn Work>> = Vec::new();
        for active in activation.queues.into_iter().flatten() {
            let queue = self.take_queue(active.queue.size())?;
            works.push(Box::new(BlkWork::new(
                format!("{}-{}", self.name, active.queue.index()),
                active,
                queue,
                Arc::clone(&memory),
                super::request::Rules {
                    sectors: self.disk.size() / SECTOR_BYTES,
                    read_only: self.read_only,
                    serial: self.serial,
                },
                flushes.then(|| Arc::clone(&self.writeback)),
            )));
        }
        Ok(works)
    }

    fn reset(&self) {
        self.writeback.store(true, Ordering::Release);
    }

    fn prepare(&self, sizes: &[u16]) -> Result<()> {
        let mut spare = self.spare();
        for size in sizes.iter().take(usize::from(self.queues)) {
            spare.push((*size, self.open_queue(*size)?));
        }
        Ok(())
    }

    fn save(&self, records: &mut Records) -> Result<()> {
        records.put(
            &self.name,
            &SavedBlk {
                sectors: self.disk.size() / SECTOR_BYTES,
                serial: self.serial,
                writeback: self.writeback.load(Ordering::Acquire),
            },
        )
    }

    fn restore(&self, records: &mut Records) -> Result<()> {
        let saved: SavedBlk = records.take(&self.name)?;
        let differs = |what: &str, saved: String, found: String| -> Result<()> {
            Err(ShapeDiffers {
                component: self.name.clone(),
                what: what.to_owned(),
                saved,
                found,
            }
            .into())
        };
        let sectors = self.disk.size() / SECTOR_BYTES;
        if saved.sectors != sectors {
            return differs("sectors:", saved.sectors.to_string(), sectors.to_string());
        }
        if saved.serial != self.serial {
            let text = |serial: &[u8]| format!("'{}'", String::from_utf8_lossy(serial));
            return differs("the serial number", text(&saved.serial), text(&self.serial));
        }
        self.writeback.store(saved.writeback, Ordering::Release);
        Ok(())
    }
}
