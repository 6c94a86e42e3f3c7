//! What all vCPUs share: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use strake_observe::{Because, Observation, OsContext, Result};
use strake_state::Blob;

use super::{monotonic_ns, plain};
use crate::Vm;
use crate::observations::StateRefused;

strake_state::saved! {
    /// The interrupt controllers, the timer and the clock of a VM.
    pub record SavedVm("kvm-x86-vm", version 1) {
        /// The first 8259, as `kvm_irqchip`.
        1 => pic_master: Blob,
        /// The second.
        2 => pic_slave: Blob,
        /// The I/O APIC.
        3 => ioapic: Blob,
        /// The 8254, as `kvm_pit_state2`.
        4 => pit: Blob,
        /// The paravirtual clock, in nanoseconds.
        5 => clock_ns: u64,
        /// When it was read, in nanoseconds of the host's monotonic clock.
        6 => taken_at_ns: u64,
    }
}

impl Vm {
    /// What they are now. While no vCPU runs.
    ///
    /// # Errors
    /// [`StateRefused`] with what KVM does not tell.
    pub fn save(&self) -> Result<SavedVm> {
        let fd = &self.inner.fd;
        let clock = fd
            .get_clock()
            .os("KVM_GET_CLOCK", "the VM")
            .because_of(|| refused("tell", "clock"))?;
        let taken_at_ns = monotonic_ns();
        let pit = fd
            .get_pit2()
            .os("KVM_GET_PIT2", "the VM")
            .because_of(|| refused("tell", "timer"))?;
        Ok(SavedVm {
            pic_master: self.chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: self.chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: self.chip(KVM_IRQCHIP_IOAPIC)?,
            pit: plain::bytes(&pit),
            clock_ns: clock.clock,
            taken_at_ns,
        })
    }

    /// Makes them what was saved, the clock moved on by what passed since. After the vCPUs.
    ///
    /// # Errors
    /// [`StateRefused`] with what KVM does not take.
    pub fn restore(&self, saved: &SavedVm) -> Result<()> {
        let fd = &self.inner.fd;
        for chip in [&saved.pic_master, &saved.pic_slave, &saved.ioapic] {
            let chip: kvm_irqchip =
                plain::value(chip).ok_or_else(|| lost("interrupt controllers"))?;
            fd.set_irqchip(&chip)
                .os("KVM_SET_IRQCHIP", "the VM")
                .because_of(|| refused("take over", "interrupt controllers"))?;
        }
        let pit = plain::value(&saved.pit).ok_or_else(|| lost("timer"))?;
        fd.set_pit2(&pit)
            .os("KVM_SET_PIT2", "the VM")
            .because_of(|| refused("take over", "timer"))?;
        let passed = monotonic_ns().saturating_sub(saved.taken_at_ns);
        let clock = kvm_clock_data {
            clock: saved.clock_ns.saturating_add(passed),
            ..Default::default()
        };
        fd.set_clock(&clock)
            .os("KVM_SET_CLOCK", "the VM")
            .because_of(|| refused("take over", "clock"))
    }

    fn chip(&self, id: u32) -> Result<Blob> {
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        self.inner
            .fd
            .get_irqchip(&mut chip)
            .os("KVM_GET_IRQCHIP", format!("chip {id}"))
            .because_of(|| refused("tell", "interrupt controllers"))?;
        Ok(plain::bytes(&chip))
    }
}

fn refused(step: &str, what: &str) -> StateRefused {
    StateRefused {
        of: "the VM".to_owned(),
        step: step.to_owned(),
        what: what.to_owned(),
    }
}

fn lost(what: &str) -> Observation {
    refused("take over", what).into()
}
