//! What a guest asks of its disk, understood.
//!
//! A request is a header (16 bytes, readable), data (readable for a write, writable for a read)
//! and a status byte, the last of what is writable; the descriptors may cut it anywhere. Three
//! things can come of a chain:
//!
//! * [`Parsed::Start`]: steps for the disk, all within its size and within guest RAM;
//! * [`Parsed::Answer`]: a status at once, for what needs no disk or cannot be done;
//! * [`Parsed::Broken`]: there is no place for a status. The driver does not keep to the protocol
//!   and the device waits for its reset.

use std::collections::VecDeque;

use strake_block::{Buffer, Operation, SECTOR_BYTES};
use strake_memory::GuestMemory;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::device::SERIAL_BYTES;
use crate::virtio::Chain;

/// Most data segments of a request that a driver is told of: a full queue's worth of descriptors
/// less the header's and the status byte's.
pub(super) const SEGMENTS: u32 = 254;
/// The largest segment that a driver is told of.
pub(super) const SEGMENT_BYTES: u32 = 1 << 20;
/// Data of one request: somewhat more than what the two above make.
const DATA_LIMIT: u64 = 256 << 20;
/// Ranges of one discard request.
pub(super) const DISCARD_SEGMENTS: u32 = 16;
/// Sectors of one range: 1 GiB, so that one request cannot hold up a drain for long.
pub(super) const RANGE_SECTORS: u32 = 1 << 21;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// The status of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Error,
    Unsupported,
}

impl Status {
    #[allow(clippy::cast_possible_truncation)] // 0, 1 and 2
    pub(super) fn byte(self) -> u8 {
        match self {
            Self::Ok => VIRTIO_BLK_S_OK as u8,
            Self::Error => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// What requests are held against.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    pub(super) serial: [u8; SERIAL_BYTES],
}

/// One request to the live disk.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) op: Operation,
    pub(super) offset: u64,
    pub(super) buffers: Vec<Buffer>,
}

impl Step {
    pub(super) fn flush() -> Self {
        Self {
            op: Operation::Flush,
            offset: 0,
            buffers: Vec::new(),
        }
    }
}

/// What comes of a chain.
#[derive(Debug)]
pub(super) enum Parsed {
    /// Steps, one after the other; at least one.
    Start(VecDeque<Step>),
    /// A status at once.
    Answer(Status),
    /// Nothing that could be answered.
    Broken(&'static str),
}

/// Understands a chain.
pub(super) fn parse(chain: &Chain, memory: &GuestMemory, rules: &Rules) -> Parsed {
    // The status byte comes first: without it there is no answer of any kind. Writing an error
    // now proves that it is in RAM, and stands if anything goes wrong later.
    if write_status(chain, memory, Status::Error).is_err() {
        return Parsed::Broken("a request has no place for its status");
    }
    let mut header = [0; HEADER];
    if chain.readable.read(memory, 0, &mut header).is_err() {
        return Parsed::Answer(Status::Error);
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let parsed = match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => read(chain, memory, rules, sector),
        VIRTIO_BLK_T_OUT => write(chain, memory, rules, sector),
        VIRTIO_BLK_T_FLUSH => Ok(VecDeque::from([Step::flush()])),
        VIRTIO_BLK_T_GET_ID => identify(chain, memory, rules),
        VIRTIO_BLK_T_DISCARD => ranges(chain, memory, rules, Ranges::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => ranges(chain, memory, rules, Ranges::WriteZeroes),
        _ => Err(Status::Unsupported),
    };
    match parsed {
        Ok(steps) if steps.is_empty() => Parsed::Answer(Status::Ok),
        Ok(steps) => Parsed::Start(steps),
        Err(status) => Parsed::Answer(status),
    }
}

/// Writes the status byte, the last of what is writable.
pub(super) fn write_status(
    chain: &Chain,
    memory: &GuestMemory,
    status: Status,
) -> Result<(), crate::virtio::OutsideMemory> {
    let at = chain
        .writable
        .len()
        .checked_sub(1)
        .ok_or(crate::virtio::OutsideMemory)?;
    chain.writable.write(memory, at, &[status.byte()])
}

fn read(
    chain: &Chain,
    memory: &GuestMemory,
    rules: &Rules,
    sector: u64,
) -> Result<VecDeque<Step>, Status> {
    let len = chain.writable.len().saturating_sub(1);
    let offset = within(rules, sector, len)?;
    let buffers = chain
        .writable
        .for_disk(memory, 0, len)
        .map_err(|_| Status::Error)?;
    Ok(transfer(Operation::Read, offset, buffers))
}

fn write(
    chain: &Chain,
    memory: &GuestMemory,
    rules: &Rules,
    sector: u64,
) -> Result<VecDeque<Step>, Status> {
    if rules.read_only {
        return Err(Status::Error);
    }
    let len = chain.readable.len().saturating_sub(HEADER as u64);
    let offset = within(rules, sector, len)?;
    let buffers = chain
        .readable
        .for_disk(memory, HEADER as u64, len)
        .map_err(|_| Status::Error)?;
    Ok(transfer(Operation::Write, offset, buffers))
}

fn transfer(op: Operation, offset: u64, buffers: Vec<Buffer>) -> VecDeque<Step> {
    if buffers.is_empty() {
        return VecDeque::new();
    }
    VecDeque::from([Step {
        op,
        offset,
        buffers,
    }])
}

fn identify(chain: &Chain, memory: &GuestMemory, rules: &Rules) -> Result<VecDeque<Step>, Status> {
    let room = chain.writable.len().saturating_sub(1);
    let fits = usize::try_from(room)
        .unwrap_or(usize::MAX)
        .min(SERIAL_BYTES);
    let serial = rules.serial.get(..fits).unwrap_or_default();
    chain
        .writable
        .write(memory, 0, serial)
        .map_err(|_| Status::Error)?;
    Ok(VecDeque::new())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ranges {
    Discard,
    WriteZeroes,
}

fn ranges(
    chain: &Chain,
    memory: &GuestMemory,
    rules: &Rules,
    kind: Ranges,
) -> Result<VecDeque<Step>, Status> {
    if rules.read_only {
        return Err(Status::Error);
    }
    let bytes = chain.readable.len().saturating_sub(HEADER as u64);
    let most = match kind {
        Ranges::Discard => u64::from(DISCARD_SEGMENTS),
        Ranges::WriteZeroes => 1,
    };
    let count = bytes / RANGE as u64;
    if !bytes.is_multiple_of(RANGE as u64) || count == 0 || count > most {
        return Err(Status::Error);
    }
    let mut steps = VecDeque::new();
    for index in 0..count {
        let mut range = [0; RANGE];
        chain
            .readable
            .read(memory, HEADER as u64 + index * RANGE as u64, &mut range)
            .map_err(|_| Status::Error)?;
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            n0,
            n1,
            n2,
            n3,
            f0,
            f1,
            f2,
            f3,
        ] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (unmap && kind == Ranges::Discard) {
            return Err(Status::Unsupported);
        }
        if count == 0 || count > RANGE_SECTORS {
            return Err(Status::Error);
        }
        let len = u64::from(count) * SECTOR_BYTES;
        let offset = in_disk(rules, sector, len)?;
        steps.push_back(Step {
            op: match kind {
                Ranges::Discard => Operation::Discard { len },
                Ranges::WriteZeroes => Operation::WriteZeroes { len, unmap },
            },
            offset,
            buffers: Vec::new(),
        });
    }
    Ok(steps)
}

/// The offset in bytes of `len` bytes of data at `sector`, if the disk has them.
fn within(rules: &Rules, sector: u64, len: u64) -> Result<u64, Status> {
    if len > DATA_LIMIT {
        return Err(Status::Error);
    }
    in_disk(rules, sector, len)
}

fn in_disk(rules: &Rules, sector: u64, len: u64) -> Result<u64, Status> {
    let sectors = len / SECTOR_BYTES;
    let fits = sector
        .checked_add(sectors)
        .is_some_and(|end| end <= rules.sectors);
    if !fits || !len.is_multiple_of(SECTOR_BYTES) {
        return Err(Status::Error);
    }
    sector.checked_mul(SECTOR_BYTES).ok_or(Status::Error)
}
