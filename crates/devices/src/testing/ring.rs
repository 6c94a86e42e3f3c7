//! The driver's half of a split virtqueue.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use strake_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    pub at: u64,
    pub len: u32,
    pub write: bool,
}

impl Piece {
    pub fn readable(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            write: false,
        }
    }

    pub fn writable(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            write: true,
        }
    }
}

/// A split virtqueue in guest memory, at `base`: descriptors, available ring, used ring, each on
/// pages of its own.
#[derive(Debug)]
pub struct Ring {
    pub memory: Arc<GuestMemory>,
    pub size: u16,
    pub base: u64,
    event_idx: bool,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

impl Ring {
    /// Bytes of guest memory that a ring takes.
    pub const BYTES: u64 = 0x4000;

    pub fn new(memory: Arc<GuestMemory>, base: u64, size: u16, event_idx: bool) -> Self {
        let ring = Self {
            memory,
            size,
            base,
            event_idx,
            next_descriptor: 0,
            available: 0,
            seen: 0,
        };
        let zeroes = vec![0; usize::try_from(Self::BYTES).unwrap()];
        ring.memory
            .write_slice(&zeroes, GuestAddress(base))
            .unwrap();
        ring
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn avail(&self) -> u64 {
        self.base + 0x2000
    }

    pub fn used(&self) -> u64 {
        self.base + 0x3000
    }

    /// Writes one descriptor of the table at `table`.
    pub fn describe(&self, table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let entry = GuestAddress(table + u64::from(index) * 16);
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&at.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&raw, entry).unwrap();
    }

    /// Puts a chain into the table and makes it available; its head.
    pub fn add(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (index, piece) in pieces.iter().enumerate() {
            let this = self.next_descriptor;
            self.next_descriptor = (this + 1) % self.size;
            let last = index + 1 == pieces.len();
            let flags = if last { 0 } else { NEXT } | if piece.write { WRITE } else { 0 };
            self.describe(
                self.base,
                this,
                piece.at,
                piece.len,
                flags,
                self.next_descriptor,
            );
        }
        self.publish(head);
        head
    }

    /// The same by an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, pieces: &[Piece]) -> u16 {
        for (index, piece) in (0u16..).zip(pieces) {
            let last = usize::from(index) + 1 == pieces.len();
            let flags = if last { 0 } else { NEXT } | if piece.write { WRITE } else { 0 };
            self.describe(table, index, piece.at, piece.len, flags, index + 1);
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        let bytes = u32::try_from(pieces.len() * 16).unwrap();
        self.describe(self.base, head, table, bytes, INDIRECT, 0);
        self.publish(head);
        head
    }

    /// Makes a head available.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size) * 2;
        self.memory
            .write_obj(head.to_le(), GuestAddress(self.avail() + 4 + slot))
            .unwrap();
        self.available = self.available.wrapping_add(1);
        self.publish_index(self.available);
    }

    /// Writes the available index, which need not make sense.
    pub fn publish_index(&mut self, index: u16) {
        fence(Ordering::SeqCst);
        self.memory
            .store(
                index.to_le(),
                GuestAddress(self.avail() + 2),
                Ordering::Release,
            )
            .unwrap();
        fence(Ordering::SeqCst);
    }

    /// Whether the device wants a kick for what was made available since `before`.
    pub fn wants_kick(&self, before: u16) -> bool {
        if self.event_idx {
            let at = self.used() + 4 + u64::from(self.size) * 8;
            let event = self.load(at);
            self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(before)
        } else {
            self.load(self.used()) & 1 == 0
        }
    }

    pub fn available(&self) -> u16 {
        self.available
    }

    fn load(&self, at: u64) -> u16 {
        let value: u16 = self
            .memory
            .load(GuestAddress(at), Ordering::Acquire)
            .unwrap();
        u16::from_le(value)
    }

    /// Asks for no interrupts, the way without event indices.
    pub fn suppress_interrupts(&self) {
        self.memory
            .write_obj(1u16.to_le(), GuestAddress(self.avail()))
            .unwrap();
    }

    /// Asks for an interrupt when the used index passes `index`, the way with event indices.
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail() + 4 + u64::from(self.size) * 2;
        self.memory
            .store(index.to_le(), GuestAddress(at), Ordering::SeqCst)
            .unwrap();
    }

    /// The next completed chain: its head and how much was written.
    pub fn reap(&mut self) -> Option<(u16, u32)> {
        if self.load(self.used() + 2) == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.size) * 8;
        self.seen = self.seen.wrapping_add(1);
        let [head, written]: [u32; 2] = self
            .memory
            .read_obj(GuestAddress(self.used() + 4 + slot))
            .unwrap();
        Some((
            u16::try_from(u32::from_le(head)).unwrap(),
            u32::from_le(written),
        ))
    }

    /// How many chains were completed in all.
    pub fn used_index(&self) -> u16 {
        self.load(self.used() + 2)
    }
}
