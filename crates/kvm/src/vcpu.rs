//! A vCPU.
#![allow(unsafe_code)] // Reads the page that it shares with KVM.

use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_run,
    kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use strake_observe::{Because, Observation, OsCallFailed, OsContext, Result};

use crate::exit::{Exit, Failure, PortIn, PortOut};
use crate::kick::Kicker;
use crate::observations::{RunFailed, VcpuFailed};
use crate::registers::Registers;
use crate::vm::Inner;

/// The local APIC's registers for its two pins, and what a BIOS programs: the 8259 pair comes in
/// on LINT0, NMIs on LINT1.
const APIC_LVT_LINT0: (usize, u32) = (0x350, 0x700);
const APIC_LVT_LINT1: (usize, u32) = (0x360, 0x400);

/// The x87 control word and the SSE control register after a reset.
const FPU_CONTROL: u16 = 0x37f;
const SSE_CONTROL: u32 = 0x1f80;

/// One vCPU. Owned by the thread that runs it.
#[derive(Debug)]
pub struct Vcpu {
    index: u8,
    kicker: Kicker,
    run: NonNull<kvm_run>,
    pub(crate) fd: VcpuFd,
    /// What the guest sees as its CPU.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// The VM must not go before its vCPUs do.
    pub(crate) vm: Arc<Inner>,
}

// SAFETY: `run` points into the mapping that `fd` owns; both move together, and only the owner
// reads through it.
unsafe impl Send for Vcpu {}

impl Vcpu {
    pub(crate) fn new(vm: Arc<Inner>, index: u8) -> Result<Self> {
        let failed = |step: &str| VcpuFailed {
            vcpu: index,
            step: step.to_owned(),
        };
        let mut fd = vm
            .fd
            .create_vcpu(u64::from(index))
            .os("KVM_CREATE_VCPU", format!("vCPU {index}"))
            .because_of(|| failed("the creation"))?;
        let run = NonNull::from(fd.get_kvm_run());
        // SAFETY: the field lies in the mapping that `fd` owns; `Drop` retires the kicker before
        // `fd` goes.
        let kicker = unsafe { Kicker::new(index, &raw mut (*run.as_ptr()).immediate_exit) };
        Ok(Self {
            index,
            kicker,
            run,
            fd,
            cpuid: Vec::new(),
            vm,
        })
    }

    /// Its number.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// What makes it leave the guest.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    /// Shows the guest this CPU.
    ///
    /// # Errors
    /// [`VcpuFailed`].
    pub fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<()> {
        let cpuid = CpuId::from_entries(entries)
            .map_err(|_| Observation::from(self.failed("take more CPUID entries than it knows")))?;
        self.fd
            .set_cpuid2(&cpuid)
            .os("KVM_SET_CPUID2", self.name())
            .because_of(|| self.failed("set the CPU features"))?;
        self.cpuid = entries.to_vec();
        Ok(())
    }

    /// Sets the FPU and the local APIC to what firmware leaves behind.
    ///
    /// # Errors
    /// [`VcpuFailed`].
    pub fn set_reset_state(&self) -> Result<()> {
        self.fd
            .set_fpu(&kvm_fpu {
                fcw: FPU_CONTROL,
                mxcsr: SSE_CONTROL,
                ..Default::default()
            })
            .os("KVM_SET_FPU", self.name())
            .because_of(|| self.failed("set the FPU"))?;
        self.connect_apic()
            .because_of(|| self.failed("set the local APIC"))
    }

    /// Sets model-specific registers: numbers and values.
    ///
    /// # Errors
    /// [`VcpuFailed`], caused by the first register that KVM refuses.
    pub fn set_msrs(&self, values: impl IntoIterator<Item = (u32, u64)>) -> Result<()> {
        for (index, data) in values {
            self.set_msr(index, data)
                .because_of(|| self.failed("set the model-specific registers"))?;
        }
        Ok(())
    }

    /// The general registers.
    ///
    /// # Errors
    /// [`VcpuFailed`].
    pub fn regs(&self) -> Result<kvm_regs> {
        self.fd
            .get_regs()
            .os("KVM_GET_REGS", self.name())
            .because_of(|| self.failed("read the registers"))
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// [`VcpuFailed`].
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.fd
            .set_regs(regs)
            .os("KVM_SET_REGS", self.name())
            .because_of(|| self.failed("set the registers"))
    }

    /// The special registers.
    ///
    /// # Errors
    /// [`VcpuFailed`].
    pub fn sregs(&self) -> Result<kvm_sregs> {
        self.fd
            .get_sregs()
            .os("KVM_GET_SREGS", self.name())
            .because_of(|| self.failed("read the special registers"))
    }

    /// Sets the special registers.
    ///
    /// # Errors
    /// [`VcpuFailed`].
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.fd
            .set_sregs(sregs)
            .os("KVM_SET_SREGS", self.name())
            .because_of(|| self.failed("set the special registers"))
    }

    /// The registers for a report, if they can be read.
    #[must_use]
    pub fn registers(&self) -> Option<Registers> {
        Some(Registers::new(&self.regs().ok()?, &self.sregs().ok()?))
    }

    /// Tells the guest's clock that it was paused, so that its watchdogs do not blame the guest.
    /// Before the vCPU runs again.
    pub fn note_pause(&self) {
        if self.vm.clock_control {
            // EINVAL says that the guest does not use the paravirtual clock.
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    /// The calling thread runs this vCPU from now on: kicks go to it.
    pub fn adopt(&self) {
        self.kicker.adopt();
    }

    /// After [`Exit::Interrupted`], before looking at what was asked for.
    pub fn acknowledge_kick(&self) {
        self.kicker.acknowledge();
    }

    /// Makes the next [`Vcpu::run`] only finish the instruction that the last exit interrupted: it
    /// returns [`Exit::Interrupted`] as soon as that is done, or a further exit of the same
    /// instruction. What KVM keeps of an unfinished one is in no state that can be saved.
    pub fn finish_exit(&self) {
        self.kicker.ask();
    }

    /// Runs the guest until something is for the monitor to do.
    pub fn run(&mut self) -> Exit<'_> {
        let run = self.run;
        let index = self.index;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Exit::Interrupted;
            }
            Err(error) => {
                let error = std::io::Error::from_raw_os_error(error.errno());
                let cause = OsCallFailed::new("KVM_RUN", format!("vCPU {index}"), &error);
                return Exit::Failed(Failure {
                    reason: "KVM refuses to run it".to_owned(),
                    cause: Some(cause.into()),
                });
            }
        };
        match exit {
            VcpuExit::IoIn(port, data) => Exit::PortIn(PortIn {
                port,
                width: io_width(run),
                data,
            }),
            VcpuExit::IoOut(port, data) => Exit::PortOut(PortOut {
                port,
                width: io_width(run),
                data,
            }),
            VcpuExit::MmioRead(address, data) => Exit::MmioRead { address, data },
            VcpuExit::MmioWrite(address, data) => Exit::MmioWrite { address, data },
            VcpuExit::Intr => Exit::Interrupted,
            VcpuExit::Shutdown => Exit::TripleFault,
            VcpuExit::Hlt => Exit::Halted,
            VcpuExit::FailEntry(reason, cpu) => failed(format!(
                "the hardware refuses to enter the guest: reason {reason:#x} on CPU {cpu}"
            )),
            VcpuExit::InternalError => failed(internal_error(run)),
            VcpuExit::MemoryFault { gpa, size, .. } => failed(format!(
                "{size} bytes of memory at guest address {gpa:#x} are not accessible"
            )),
            other => failed(format!("exit {other:?} was not asked for")),
        }
    }

    /// What to report after [`Exit::Failed`].
    #[must_use]
    pub fn run_failed(&self, failure: Failure) -> Observation {
        let seen = Observation::from(RunFailed {
            vcpu: self.index,
            reason: failure.reason,
            registers: self.registers(),
        });
        seen.because_all(failure.cause)
    }

    fn set_msr(&self, index: u32, data: u64) -> Result<()> {
        let object = || format!("register {index:#x}");
        let msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }])
        .map_err(|_| Observation::from(self.failed("take one register")))?;
        let set = self.fd.set_msrs(&msrs).os("KVM_SET_MSRS", object())?;
        if set != 1 {
            return Err(std::io::Error::from_raw_os_error(libc::EINVAL))
                .os("KVM_SET_MSRS", object());
        }
        Ok(())
    }

    fn connect_apic(&self) -> Result<()> {
        let mut apic = self.fd.get_lapic().os("KVM_GET_LAPIC", self.name())?;
        for (offset, mode) in [APIC_LVT_LINT0, APIC_LVT_LINT1] {
            let masked_off = apic_register(&apic, offset) & !0x700;
            set_apic_register(&mut apic, offset, masked_off | mode);
        }
        self.fd.set_lapic(&apic).os("KVM_SET_LAPIC", self.name())
    }

    fn name(&self) -> String {
        format!("vCPU {}", self.index)
    }

    fn failed(&self, step: &str) -> VcpuFailed {
        VcpuFailed {
            vcpu: self.index,
            step: step.to_owned(),
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kicker.retire();
    }
}

fn failed<'a>(reason: String) -> Exit<'a> {
    Exit::Failed(Failure {
        reason,
        cause: None,
    })
}

/// Bytes of one access of the port exit that was just returned.
fn io_width(run: NonNull<kvm_run>) -> usize {
    // SAFETY: the mapping is alive (the caller borrows the vCPU), KVM does not write to it before
    // the next run, and after a port exit this member of the union is the valid one.
    let width = unsafe { (*run.as_ptr()).__bindgen_anon_1.io.size };
    usize::from(width)
}

/// What KVM says about an internal error.
fn internal_error(run: NonNull<kvm_run>) -> String {
    // SAFETY: as in `io_width`; after this exit `internal` is the valid member.
    let internal = unsafe { (*run.as_ptr()).__bindgen_anon_1.internal };
    let name = match internal.suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "simultaneous exceptions",
        3 => "an exception while an event was delivered",
        4 => "an exit that KVM did not expect",
        _ => "an unknown kind",
    };
    let count = usize::try_from(internal.ndata).unwrap_or(0);
    let data: Vec<String> = internal
        .data
        .iter()
        .take(count)
        .map(|word| format!("{word:#x}"))
        .collect();
    format!(
        "internal error {} ({name}), data [{}]",
        internal.suberror,
        data.join(", ")
    )
}

fn apic_register(apic: &kvm_lapic_state, offset: usize) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(apic.regs.iter().skip(offset)) {
        *to = from.cast_unsigned();
    }
    u32::from_le_bytes(bytes)
}

fn set_apic_register(apic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (to, from) in apic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *to = from.cast_signed();
    }
}
