//! The devices' traits for interrupts and doorbells, on KVM.

use std::sync::Arc;

use strake_devices::interrupt::{Doorbells, IrqLine, MsiBroker, MsiLine};
use strake_kvm::{DoorbellWidth, EventFd, LegacyIrq, MsiVector, Vm};
use strake_observe::Result;

/// Interrupts and doorbells of a VM, for devices.
#[derive(Debug, Clone)]
pub(crate) struct KvmPlatform(pub(crate) Vm);

#[derive(Debug)]
struct Line(MsiVector);

/// A line of the legacy interrupt controllers, for devices.
#[derive(Debug)]
pub(crate) struct Legacy(pub(crate) LegacyIrq);

impl MsiBroker for KvmPlatform {
    fn allocate(&self) -> Result<Arc<dyn MsiLine>> {
        Ok(Arc::new(Line(self.0.create_msi()?)))
    }
}

impl MsiLine for Line {
    fn event(&self) -> &EventFd {
        self.0.event()
    }

    fn route(&self, address: u64, data: u32) -> Result<()> {
        self.0.route(address, data)
    }

    fn mask(&self) -> Result<()> {
        self.0.mask()
    }

    fn unmask(&self) -> Result<()> {
        self.0.unmask()
    }
}

impl Doorbells for KvmPlatform {
    fn attach(&self, gpa: u64, _len: u8, event: &EventFd) -> Result<()> {
        // KVM looks up a doorbell that takes any width faster, and what it is rung with does not
        // matter.
        self.0.attach_doorbell(gpa, DoorbellWidth::Any, event)
    }

    fn detach(&self, gpa: u64, _len: u8, event: &EventFd) -> Result<()> {
        self.0.detach_doorbell(gpa, DoorbellWidth::Any, event)
    }
}

impl IrqLine for Legacy {
    fn raise(&self) {
        self.0.raise();
    }
}
