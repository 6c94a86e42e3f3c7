//! What the targets share: a guest that is made of the fuzzer's bytes.
//!
//! A fully random descriptor points nowhere and is refused at once, so an input is a *script* of
//! steps that are mostly sensible: the fuzzer gets at what lies behind the first checks, and can
//! still make each field wrong.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use strake_devices::testing::{Bare, HIGH_RAM_AT, INDIRECT, NEXT, Piece, WRITE};
use strake_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// Where scripts put their data.
pub const DATA: u64 = 0x20_0000;
/// Queue entries of the scripts' rings.
pub const SIZE: u16 = 16;
/// Steps of a script that are looked at.
const STEPS: usize = 200;

/// Guest RAM as the devices see it.
#[must_use]
pub fn memory() -> Arc<GuestMemory> {
    let ranges = [
        (GuestAddress(0), 8 << 20),
        (GuestAddress(HIGH_RAM_AT), 1 << 20),
    ];
    Arc::new(GuestMemory::from_ranges(&ranges).expect("memory for the guest"))
}

/// A guest-physical address: mostly in RAM, often at its edges, sometimes anywhere.
#[derive(Debug, Clone, Copy)]
pub struct Address(pub u64);

impl<'a> Arbitrary<'a> for Address {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let offset = u64::from(u.arbitrary::<u16>()?);
        Ok(Self(match u.arbitrary::<u8>()? % 12 {
            0..=5 => DATA + offset,
            6 => HIGH_RAM_AT + offset,
            7 => (8 << 20) - (offset & 0xff),
            8 => HIGH_RAM_AT + (1 << 20) - (offset & 0xff),
            // The rings themselves.
            9 => 0x10_0000 + offset,
            10 => u64::MAX - (offset & 0xff),
            _ => u.arbitrary()?,
        }))
    }
}

/// A length: mostly small, sometimes anything.
#[derive(Debug, Clone, Copy)]
pub struct Length(pub u32);

impl<'a> Arbitrary<'a> for Length {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            0..=39 => 16,
            40..=79 => 1,
            80..=159 => 512 * u32::from(u.arbitrary::<u8>()?),
            160..=239 => u32::from(u.arbitrary::<u16>()?),
            _ => u.arbitrary()?,
        }))
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Buffer {
    at: Address,
    len: Length,
    write: bool,
}

impl Buffer {
    fn piece(self) -> Piece {
        Piece {
            at: self.at.0,
            len: self.len.0,
            write: self.write,
        }
    }
}

/// One step of a guest.
#[derive(Debug, Clone, Arbitrary)]
pub enum Step {
    /// Writes data where buffers point.
    Fill { offset: u16, bytes: [u8; 16] },
    /// A request with a header, of a type that may exist.
    Request {
        queue: u8,
        kind: u8,
        sector: u16,
        buffers: Vec<Buffer>,
        status: Address,
    },
    /// A chain.
    Chain { queue: u8, buffers: Vec<Buffer> },
    /// The same by an indirect table.
    Indirect { queue: u8, buffers: Vec<Buffer> },
    /// One descriptor, as wrong as one likes.
    Descriptor {
        queue: u8,
        index: u16,
        at: Address,
        len: Length,
        flags: u8,
        next: u16,
    },
    /// Makes a head available.
    Publish { queue: u8, head: u16 },
    /// Sets the available index.
    Index { queue: u8, index: u16 },
    /// Sets when the guest wants an interrupt.
    UsedEvent { queue: u8, index: u16 },
    /// Lets the device work.
    Run,
}

/// Plays a script on a device. `backend` is called before each time the device works.
pub fn play(bare: &mut Bare, steps: &[Step], mut backend: impl FnMut()) {
    for (number, step) in steps.iter().take(STEPS).enumerate() {
        play_step(bare, number, step, &mut backend);
    }
    backend();
    bare.run();
}

fn play_step(bare: &mut Bare, number: usize, step: &Step, backend: &mut impl FnMut()) {
    let count = bare.rings.len();
    let ring = |queue: &u8| usize::from(*queue) % count;
    match step {
        Step::Fill { offset, bytes } => {
            let at = GuestAddress(DATA + u64::from(*offset));
            let _ = bare.rings[0].memory.write_slice(bytes, at);
        }
        Step::Request {
            queue,
            kind,
            sector,
            buffers,
            status,
        } => {
            let mut header = [0; 16];
            header[0] = kind % 16;
            header[8..10].copy_from_slice(&sector.to_le_bytes());
            let at = 0x1f_0000 + number as u64 * 16;
            let ring = &mut bare.rings[ring(queue)];
            let _ = ring.memory.write_slice(&header, GuestAddress(at));
            let mut pieces = vec![Piece::readable(at, 16)];
            pieces.extend(buffers.iter().take(12).map(|buffer| buffer.piece()));
            pieces.sort_by_key(|piece| piece.write);
            pieces.push(Piece::writable(status.0, 1));
            ring.add(&pieces);
        }
        Step::Chain { queue, buffers } if !buffers.is_empty() => {
            let pieces: Vec<Piece> = buffers.iter().take(15).map(|b| b.piece()).collect();
            bare.rings[ring(queue)].add(&pieces);
        }
        Step::Indirect { queue, buffers } if !buffers.is_empty() => {
            let pieces: Vec<Piece> = buffers.iter().take(100).map(|b| b.piece()).collect();
            let table = 0x1a_0000 + number as u64 * 2048;
            bare.rings[ring(queue)].add_indirect(table, &pieces);
        }
        Step::Descriptor {
            queue,
            index,
            at,
            len,
            flags,
            next,
        } => {
            let ring = &bare.rings[ring(queue)];
            let flags = u16::from(*flags) & (NEXT | WRITE | INDIRECT);
            let next = if *next & 0x8000 == 0 {
                next % SIZE
            } else {
                *next
            };
            ring.describe(ring.base, index % SIZE, at.0, len.0, flags, next);
        }
        Step::Publish { queue, head } => {
            let head = if *head & 0x8000 == 0 {
                head % SIZE
            } else {
                *head
            };
            bare.rings[ring(queue)].publish(head);
        }
        Step::Index { queue, index } => bare.rings[ring(queue)].publish_index(*index),
        Step::UsedEvent { queue, index } => bare.rings[ring(queue)].set_used_event(*index),
        Step::Run => {
            backend();
            bare.run();
        }
        Step::Chain { .. } | Step::Indirect { .. } => {}
    }
}

/// One access of a guest to a port or an address.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Access {
    pub write: bool,
    pub width: u8,
    pub value: u64,
}

impl Access {
    /// The bytes of the access: 1, 2, 4 or 8.
    pub fn bytes(&self) -> ([u8; 8], usize) {
        (self.value.to_le_bytes(), 1 << (self.width % 4))
    }
}
