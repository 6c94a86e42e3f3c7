//! How a device reaches the guest's interrupt controller, and how the guest's doorbells reach a
//! device, without this crate knowing of KVM: the machine brings adapters for these traits.

use std::fmt::Debug;
use std::sync::Arc;

use strake_observe::Result;
use vmm_sys_util::eventfd::EventFd;

/// Gives out interrupt lines for MSI-X vectors.
pub trait MsiBroker: Send + Sync {
    /// One more line, not routed yet. A device asks for all of its lines when it is built.
    ///
    /// # Errors
    /// The hypervisor has no line left.
    fn allocate(&self) -> Result<Arc<dyn MsiLine>>;
}

/// The line behind one MSI-X vector.
///
/// The device calls [`route`](MsiLine::route) before it raises the line for the first time and
/// whenever the guest changes the message. It never writes to the event while the vector is
/// masked (it keeps the pending bit itself), so `mask` and `unmask` are for adapters that hold
/// something for a line that is live.
pub trait MsiLine: Send + Sync + Debug {
    /// Writing to it raises the interrupt (an irqfd).
    fn event(&self) -> &EventFd;

    /// Sends the message `data` to `address` from now on.
    ///
    /// # Errors
    /// The hypervisor refuses the route.
    fn route(&self, address: u64, data: u32) -> Result<()>;

    /// The guest masked the vector.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn mask(&self) -> Result<()>;

    /// The guest unmasked the vector; its route is set.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn unmask(&self) -> Result<()>;
}

/// Connects addresses of the guest to events without an exit to user space (ioeventfd on MMIO).
pub trait Doorbells: Send + Sync {
    /// A guest's write of exactly `len` bytes (any value) at `gpa` signals `event` from now on.
    ///
    /// # Errors
    /// The hypervisor refuses; the device then serves the writes that exit instead.
    fn attach(&self, gpa: u64, len: u8, event: &EventFd) -> Result<()>;

    /// Undoes [`attach`](Doorbells::attach) with the same arguments.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn detach(&self, gpa: u64, len: u8, event: &EventFd) -> Result<()>;
}

/// A legacy interrupt line that is raised by an edge: the serial port's and the SCI.
pub trait IrqLine: Send + Sync {
    /// Raises it once.
    fn raise(&self);
}

/// A legacy line behind an irqfd.
#[derive(Debug)]
pub struct EventIrq(EventFd);

impl EventIrq {
    /// The line that `event` is bound to.
    #[must_use]
    pub fn new(event: EventFd) -> Self {
        Self(event)
    }
}

impl IrqLine for EventIrq {
    fn raise(&self) {
        // An eventfd refuses a write only when its counter is full: then the edge is already
        // there, which is all that a line can say.
        let _ = self.0.write(1);
    }
}
