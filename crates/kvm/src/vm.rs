//! A VM: memory slots, interrupt chips, timer, doorbells.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes a host address.

use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use strake_memory::{GuestRam, Slot};
use strake_observe::{Because, OsContext, Result};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::msi::{MsiVector, Routes};
use crate::observations::VmFailed;
use crate::state::Abilities;
use crate::{Kvm, Vcpu};

/// Three pages for KVM's task state segment on old Intel CPUs, in the hole below 4 GiB.
const TSS_ADDRESS: usize = 0xFFFB_D000;

/// One page for KVM's identity map on old Intel CPUs, just below.
const IDENTITY_MAP_ADDRESS: u64 = 0xFFFB_C000;

/// One guest: its address space, its interrupt chips, its timer. Clones share it.
#[derive(Debug, Clone)]
pub struct Vm {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) fd: VmFd,
    pub(crate) routes: Routes,
    pub(crate) clock_control: bool,
    /// What KVM can tell of a vCPU.
    pub(crate) abilities: Abilities,
    /// The model-specific registers that there may be, and those that there are.
    pub(crate) msr_list: Vec<u32>,
    pub(crate) msrs: OnceLock<Vec<u32>>,
    /// The slots point into this mapping. Dropped after `fd`.
    _ram: GuestRam,
}

/// A line of the legacy interrupt controllers. Writing its eventfd is one edge.
#[derive(Debug)]
pub struct LegacyIrq {
    event: EventFd,
}

/// How wide the guest's writes to a doorbell are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoorbellWidth {
    /// Any width rings it.
    Any,
}

impl Vm {
    /// Makes a VM with in-kernel interrupt controllers, a timer, and `ram`.
    ///
    /// # Errors
    /// [`VmFailed`] with the step that KVM refused.
    pub fn new(kvm: &Kvm, ram: &GuestRam) -> Result<Self> {
        let fd = kvm.create_vm().because_of(|| step("create a VM"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .os("KVM_SET_TSS_ADDR", "the VM")
            .because_of(|| step("reserve its task state segment"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .os("KVM_SET_IDENTITY_MAP_ADDR", "the VM")
            .because_of(|| step("reserve its identity map"))?;
        fd.create_irq_chip()
            .os("KVM_CREATE_IRQCHIP", "the VM")
            .because_of(|| step("create the interrupt controllers"))?;
        // The dummy speaker makes KVM answer port 0x61, which guests use to calibrate clocks.
        fd.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .os("KVM_CREATE_PIT2", "the VM")
        .because_of(|| step("create the timer"))?;
        for slot in ram.slots() {
            set_slot(&fd, slot).because_of(|| step("map the guest's memory"))?;
        }
        Ok(Self {
            inner: Arc::new(Inner {
                fd,
                routes: Routes::default(),
                clock_control: kvm.has_clock_control(),
                abilities: kvm.abilities(),
                msr_list: kvm.msr_list()?,
                msrs: OnceLock::new(),
                _ram: ram.clone(),
            }),
        })
    }

    /// Makes vCPU number `index`. Number 0 starts where its registers say, the others wait for it
    /// to send them a start-up interrupt.
    ///
    /// # Errors
    /// [`crate::observations::VcpuFailed`].
    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu> {
        Vcpu::new(Arc::clone(&self.inner), index)
    }

    /// One message-signalled interrupt, masked and not yet routed.
    ///
    /// # Errors
    /// [`crate::observations::MsiExhausted`] or a refusal of the system.
    pub fn create_msi(&self) -> Result<MsiVector> {
        MsiVector::new(Arc::clone(&self.inner))
    }

    /// Connects an eventfd to line `gsi` (0 to 23) of the legacy interrupt controllers.
    ///
    /// # Errors
    /// [`VmFailed`].
    pub fn legacy_irq(&self, gsi: u32) -> Result<LegacyIrq> {
        let event = event_fd()?;
        self.inner
            .fd
            .register_irqfd(&event, gsi)
            .os("KVM_IRQFD", format!("line {gsi}"))
            .because_of(|| step("connect an interrupt line"))?;
        Ok(LegacyIrq { event })
    }

    /// From now on a guest's write to `gpa` signals `event` without an exit to the monitor.
    ///
    /// # Errors
    /// [`VmFailed`].
    pub fn attach_doorbell(&self, gpa: u64, width: DoorbellWidth, event: &EventFd) -> Result<()> {
        let DoorbellWidth::Any = width;
        self.inner
            .fd
            .register_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .os("KVM_IOEVENTFD", format!("guest address {gpa:#x}"))
            .because_of(|| step("attach a doorbell"))
    }

    /// Undoes [`Vm::attach_doorbell`] with the same arguments.
    ///
    /// # Errors
    /// [`VmFailed`].
    pub fn detach_doorbell(&self, gpa: u64, width: DoorbellWidth, event: &EventFd) -> Result<()> {
        let DoorbellWidth::Any = width;
        self.inner
            .fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch)
            .os("KVM_IOEVENTFD", format!("guest address {gpa:#x}"))
            .because_of(|| step("detach a doorbell"))
    }
}

impl LegacyIrq {
    /// The eventfd: writing it raises one edge.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Raises one edge.
    pub fn raise(&self) {
        // It fails only if the counter is full, and then an edge is on its way.
        let _ = self.event.write(1);
    }
}

fn set_slot(fd: &VmFd, slot: &Slot) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot: slot.index,
        flags: 0,
        guest_phys_addr: slot.gpa,
        memory_size: slot.size,
        userspace_addr: slot.host_addr,
    };
    // SAFETY: the range is mapped by the `GuestRam` that the VM keeps until its descriptor is
    // closed; it is shared memory that is only ever accessed as volatile bytes, and slots do not
    // overlap.
    unsafe { fd.set_user_memory_region(region) }
        .os("KVM_SET_USER_MEMORY_REGION", format!("slot {}", slot.index))
}

pub(crate) fn event_fd() -> Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).os("eventfd", "an interrupt")
}

pub(crate) fn step(step: &str) -> VmFailed {
    VmFailed {
        step: step.to_owned(),
    }
}
