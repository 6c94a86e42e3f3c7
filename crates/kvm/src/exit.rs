//! Why a vCPU left the guest.

use strake_observe::Observation;

/// Why a vCPU left the guest. Where it reads, the answer is written into `data` before the vCPU
/// runs again.
#[derive(Debug)]
pub enum Exit<'a> {
    /// It reads from ports.
    PortIn(PortIn<'a>),
    /// It writes to ports.
    PortOut(PortOut<'a>),
    /// It reads where there is no memory.
    MmioRead {
        /// The guest address.
        address: u64,
        /// At most 8 bytes.
        data: &'a mut [u8],
    },
    /// It writes where there is no memory.
    MmioWrite {
        /// The guest address.
        address: u64,
        /// At most 8 bytes.
        data: &'a [u8],
    },
    /// It was kicked, or another signal came.
    Interrupted,
    /// A triple fault: the guest's CPU shut down, which resets a PC.
    TripleFault,
    /// It executed `hlt` and KVM does not wait for its interrupts (never with in-kernel interrupt
    /// controllers).
    Halted,
    /// KVM cannot go on.
    Failed(Failure),
}

/// Why KVM cannot go on with a vCPU.
#[derive(Debug)]
pub struct Failure {
    /// In words.
    pub reason: String,
    /// What the system said, if it was a call to it that failed.
    pub cause: Option<Observation>,
}

/// An `in` instruction, repeated ones as a whole.
#[derive(Debug)]
pub struct PortIn<'a> {
    /// The port.
    pub port: u16,
    /// Bytes of one access: 1, 2 or 4.
    pub width: usize,
    /// One or more accesses of that width.
    pub data: &'a mut [u8],
}

/// An `out` instruction, repeated ones as a whole.
#[derive(Debug)]
pub struct PortOut<'a> {
    /// The port.
    pub port: u16,
    /// Bytes of one access: 1, 2 or 4.
    pub width: usize,
    /// One or more accesses of that width.
    pub data: &'a [u8],
}

impl PortIn<'_> {
    /// The single accesses, in order.
    pub fn accesses(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.data.chunks_mut(self.width.max(1))
    }
}

impl PortOut<'_> {
    /// The single accesses, in order.
    pub fn accesses(&self) -> impl Iterator<Item = &[u8]> {
        self.data.chunks(self.width.max(1))
    }
}
