//! A vCPU.
#![allow(unsafe_code)] // KVM_SET_XSAVE takes a structure of a length that KVM knows.

use kvm_bindings::{
    CpuId, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, VcpuFd};
use strake_observe::{Because, Observation, OsContext, Result};

use super::{monotonic_ns, plain, tsc};
use crate::Vcpu;
use crate::observations::StateRefused;

/// The time-stamp counter, and the time at which it raises an interrupt.
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

strake_state::saved! {
    /// A vCPU between two entries into the guest.
    pub record SavedVcpu("kvm-x86-vcpu", version 1) {
        /// What the guest sees as its CPU: `kvm_cpuid_entry2`, one after another.
        1 => cpuid: strake_state::Blob,
        /// `kvm_regs`.
        2 => regs: strake_state::Blob,
        /// `kvm_sregs`.
        3 => sregs: strake_state::Blob,
        /// `kvm_fpu`, on a host without the next.
        4 => fpu: Option<strake_state::Blob>,
        /// `kvm_xsave`.
        5 => xsave: Option<strake_state::Blob>,
        /// `kvm_xcrs`.
        6 => xcrs: Option<strake_state::Blob>,
        /// `kvm_debugregs`.
        7 => debugregs: Option<strake_state::Blob>,
        /// `kvm_lapic_state`.
        8 => lapic: strake_state::Blob,
        /// `kvm_mp_state`.
        9 => mp_state: Option<strake_state::Blob>,
        /// `kvm_vcpu_events`.
        10 => events: Option<strake_state::Blob>,
        /// Model-specific registers, but for the time-stamp counter.
        11 => msrs: Vec<SavedMsr>,
        /// The time-stamp counter.
        12 => tsc: u64,
        /// Its rate in kHz; 0 if it is not known.
        13 => tsc_khz: u32,
        /// Its offset from the host's, where the kernel tells.
        14 => tsc_offset: Option<u64>,
        /// When it was read, in nanoseconds of the host's monotonic clock.
        15 => taken_at_ns: u64,
    }

    /// A model-specific register.
    pub part SavedMsr {
        /// Its number.
        1 => index: u32,
        /// Its value.
        2 => value: u64,
    }
}

/// What this host's KVM can tell of a vCPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Abilities {
    xsave: bool,
    xcrs: bool,
    debugregs: bool,
    mp_state: bool,
    events: bool,
    tsc_khz: bool,
}

impl Abilities {
    pub(crate) fn of(kvm: &kvm_ioctls::Kvm) -> Self {
        Self {
            xsave: kvm.check_extension(Cap::Xsave),
            xcrs: kvm.check_extension(Cap::Xcrs),
            debugregs: kvm.check_extension(Cap::Debugregs),
            mp_state: kvm.check_extension(Cap::MpState),
            events: kvm.check_extension(Cap::VcpuEvents),
            tsc_khz: kvm.check_extension(Cap::GetTscKhz),
        }
    }
}

impl Vcpu {
    /// Finds out which model-specific registers there are to save. Takes long the first time, so
    /// it is called before anybody waits.
    pub fn prepare_save(&self) {
        self.vm
            .msrs
            .get_or_init(|| readable(&self.fd, &self.vm.msr_list));
    }

    /// What it is now. The thread that runs it calls this after [`Vcpu::finish_exit`].
    ///
    /// # Errors
    /// [`StateRefused`] with what KVM does not tell.
    pub fn save(&self) -> Result<SavedVcpu> {
        self.prepare_save();
        let fd = &self.fd;
        let can = self.vm.abilities;
        let name = || format!("vCPU {}", self.index());
        let refused = |what: &str| self.refused("tell", what);
        // First: to tell it KVM may deliver what waits, which changes the rest.
        let mp_state = can
            .mp_state
            .then(|| fd.get_mp_state().os("KVM_GET_MP_STATE", name()))
            .transpose()
            .because_of(|| refused("state among CPUs"))?;
        // The guest sees no time pass between this and its next entry.
        let tsc_offset = tsc::offset(fd);
        let taken_at_ns = monotonic_ns();
        let mut msrs = self
            .read_msrs()
            .because_of(|| refused("model-specific registers"))?;
        let tsc = msrs.iter().position(|msr| msr.index == MSR_TSC);
        let tsc = tsc.map_or(0, |at| msrs.remove(at).value);
        let xsave = can
            .xsave
            .then(|| fd.get_xsave().os("KVM_GET_XSAVE", name()))
            .transpose()
            .because_of(|| refused("extended registers"))?;
        let fpu = (!can.xsave)
            .then(|| fd.get_fpu().os("KVM_GET_FPU", name()))
            .transpose()
            .because_of(|| refused("FPU"))?;
        let xcrs = can
            .xcrs
            .then(|| fd.get_xcrs().os("KVM_GET_XCRS", name()))
            .transpose()
            .because_of(|| refused("extended control registers"))?;
        let debugregs = can
            .debugregs
            .then(|| fd.get_debug_regs().os("KVM_GET_DEBUGREGS", name()))
            .transpose()
            .because_of(|| refused("debug registers"))?;
        let events = can
            .events
            .then(|| fd.get_vcpu_events().os("KVM_GET_VCPU_EVENTS", name()))
            .transpose()
            .because_of(|| refused("pending events"))?;
        let lapic = fd.get_lapic().os("KVM_GET_LAPIC", name());
        Ok(SavedVcpu {
            cpuid: cpuid_bytes(&self.cpuid),
            regs: plain::bytes(&self.regs()?),
            sregs: plain::bytes(&self.sregs()?),
            fpu: fpu.as_ref().map(plain::bytes),
            xsave: xsave.as_ref().map(plain::xsave_bytes),
            xcrs: xcrs.as_ref().map(plain::bytes),
            debugregs: debugregs.as_ref().map(plain::bytes),
            lapic: plain::bytes(&lapic.because_of(|| refused("local APIC"))?),
            mp_state: mp_state.as_ref().map(plain::bytes),
            events: events.as_ref().map(plain::bytes),
            msrs,
            tsc,
            tsc_khz: if can.tsc_khz {
                fd.get_tsc_khz().unwrap_or(0)
            } else {
                0
            },
            tsc_offset,
            taken_at_ns,
        })
    }

    /// Makes it what was saved. Before it ran for the first time, by the thread that runs it.
    ///
    /// # Errors
    /// [`StateRefused`] with what KVM does not take.
    pub fn restore(&mut self, saved: &SavedVcpu) -> Result<()> {
        self.restore_cpuid(saved)?;
        let name = format!("vCPU {}", self.index());
        let refused = |what: &str| self.refused("take over", what);
        let fd = &self.fd;
        if let Some(mp_state) =
            self.part::<kvm_mp_state>(saved.mp_state.as_ref(), "state among CPUs")?
        {
            fd.set_mp_state(mp_state)
                .os("KVM_SET_MP_STATE", &name)
                .because_of(|| refused("state among CPUs"))?;
        }
        if let Some(regs) = self.part::<kvm_regs>(Some(&saved.regs), "registers")? {
            self.set_regs(&regs)?;
        }
        if let Some(sregs) = self.part::<kvm_sregs>(Some(&saved.sregs), "special registers")? {
            self.set_sregs(&sregs)?;
        }
        if let Some(fpu) = self.part::<kvm_fpu>(saved.fpu.as_ref(), "FPU")? {
            fd.set_fpu(&fpu)
                .os("KVM_SET_FPU", &name)
                .because_of(|| refused("FPU"))?;
        }
        if let Some(xsave) = &saved.xsave {
            let xsave = plain::xsave_value(xsave)
                .ok_or_else(|| Observation::from(refused("extended registers")))?;
            // SAFETY: KVM reads the 4 KiB of this structure, and more only for a guest that was
            // given features beyond, for which the monitor never asks.
            unsafe { fd.set_xsave(&xsave) }
                .os("KVM_SET_XSAVE", &name)
                .because_of(|| refused("extended registers"))?;
        }
        if let Some(xcrs) =
            self.part::<kvm_xcrs>(saved.xcrs.as_ref(), "extended control registers")?
        {
            fd.set_xcrs(&xcrs)
                .os("KVM_SET_XCRS", &name)
                .because_of(|| refused("extended control registers"))?;
        }
        if let Some(debugregs) =
            self.part::<kvm_debugregs>(saved.debugregs.as_ref(), "debug registers")?
        {
            fd.set_debug_regs(&debugregs)
                .os("KVM_SET_DEBUGREGS", &name)
                .because_of(|| refused("debug registers"))?;
        }
        if let Some(lapic) = self.part::<kvm_lapic_state>(Some(&saved.lapic), "local APIC")? {
            fd.set_lapic(&lapic)
                .os("KVM_SET_LAPIC", &name)
                .because_of(|| refused("local APIC"))?;
        }
        self.restore_msrs(saved)
            .because_of(|| refused("model-specific registers"))?;
        if let Some(events) =
            self.part::<kvm_vcpu_events>(saved.events.as_ref(), "pending events")?
        {
            fd.set_vcpu_events(&events)
                .os("KVM_SET_VCPU_EVENTS", &name)
                .because_of(|| refused("pending events"))?;
        }
        Ok(())
    }

    /// The guest goes on seeing the CPU that it has seen, also if this monitor would show it another.
    fn restore_cpuid(&mut self, saved: &SavedVcpu) -> Result<()> {
        if cpuid_bytes(&self.cpuid) == saved.cpuid {
            return Ok(());
        }
        let size = size_of::<kvm_cpuid_entry2>();
        let entries: Option<Vec<kvm_cpuid_entry2>> = saved
            .cpuid
            .0
            .chunks(size)
            .map(|entry| plain::value(&strake_state::Blob(entry.to_vec())))
            .collect();
        let entries = entries
            .filter(|entries| CpuId::from_entries(entries).is_ok())
            .ok_or_else(|| Observation::from(self.refused("take over", "CPU features")))?;
        self.set_cpuid(&entries)
    }

    /// The TSC comes first, its deadline last: a deadline is compared with it when it is set.
    fn restore_msrs(&self, saved: &SavedVcpu) -> Result<()> {
        if !saved
            .tsc_offset
            .is_some_and(|offset| tsc::set_offset(&self.fd, offset))
        {
            let passed = monotonic_ns().saturating_sub(saved.taken_at_ns);
            let ticks = u128::from(passed) * u128::from(saved.tsc_khz) / 1_000_000;
            let ticks = u64::try_from(ticks).unwrap_or(0);
            self.write_msrs(&[SavedMsr {
                index: MSR_TSC,
                value: saved.tsc.wrapping_add(ticks),
            }])?;
        }
        let (deadline, others): (Vec<_>, Vec<_>) = saved
            .msrs
            .iter()
            .cloned()
            .partition(|msr| msr.index == MSR_TSC_DEADLINE);
        self.write_msrs(&others)?;
        self.write_msrs(&deadline)
    }

    fn read_msrs(&self) -> Result<Vec<SavedMsr>> {
        let numbers = self.vm.msrs.get().map_or(&[][..], Vec::as_slice);
        let mut all = Vec::with_capacity(numbers.len());
        for chunk in numbers.chunks(KVM_MAX_MSR_ENTRIES) {
            let mut msrs = entries(chunk.iter().map(|index| (*index, 0)))
                .ok_or_else(|| Observation::from(self.refused("tell", "so many registers")))?;
            let read = self.fd.get_msrs(&mut msrs).os("KVM_GET_MSRS", "a vCPU")?;
            if read != chunk.len() {
                let index = chunk.get(read).copied().unwrap_or_default();
                return Err(std::io::Error::from_raw_os_error(libc::EINVAL))
                    .os("KVM_GET_MSRS", format!("register {index:#x}"));
            }
            all.extend(msrs.as_slice().iter().map(|msr| SavedMsr {
                index: msr.index,
                value: msr.data,
            }));
        }
        Ok(all)
    }

    /// Those that KVM does not take although it gave them are left as they are if they are
    /// what was saved already (registers that only the host may change).
    fn write_msrs(&self, msrs: &[SavedMsr]) -> Result<()> {
        let mut rest = msrs;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
            let list = entries(now.iter().map(|msr| (msr.index, msr.value)))
                .ok_or_else(|| Observation::from(self.refused("take over", "so many registers")))?;
            let written = self.fd.set_msrs(&list).os("KVM_SET_MSRS", "a vCPU")?;
            let Some(refused) = now.get(written) else {
                rest = later;
                continue;
            };
            if self.msr(refused.index) != Some(refused.value) {
                return Err(std::io::Error::from_raw_os_error(libc::EINVAL))
                    .os("KVM_SET_MSRS", format!("register {:#x}", refused.index));
            }
            rest = rest.get(written + 1..).unwrap_or_default();
        }
        Ok(())
    }

    fn msr(&self, index: u32) -> Option<u64> {
        let mut msrs = entries([(index, 0)].into_iter())?;
        (self.fd.get_msrs(&mut msrs).ok()? == 1)
            .then(|| msrs.as_slice().first().map(|msr| msr.data))
            .flatten()
    }

    fn part<T: plain::Plain>(
        &self,
        saved: Option<&strake_state::Blob>,
        what: &str,
    ) -> Result<Option<T>> {
        match saved {
            None => Ok(None),
            Some(saved) => match plain::value(saved) {
                Some(value) => Ok(Some(value)),
                None => Err(self.refused("take over", what).into()),
            },
        }
    }

    fn refused(&self, step: &str, what: &str) -> StateRefused {
        StateRefused {
            of: format!("vCPU {}", self.index()),
            step: step.to_owned(),
            what: what.to_owned(),
        }
    }
}

fn cpuid_bytes(entries: &[kvm_cpuid_entry2]) -> strake_state::Blob {
    strake_state::Blob(
        entries
            .iter()
            .flat_map(|entry| plain::bytes(entry).0)
            .collect(),
    )
}

fn entries(msrs: impl Iterator<Item = (u32, u64)>) -> Option<Msrs> {
    let entries: Vec<_> = msrs
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).ok()
}

/// Those of the registers that a vCPU has: KVM reads them in order and stops at the first that is
/// none of this guest's CPU.
fn readable(fd: &VcpuFd, list: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = list.to_vec();
    if !all.contains(&MSR_TSC) {
        all.push(MSR_TSC);
    }
    let mut known = Vec::with_capacity(all.len());
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let now = rest
            .get(..rest.len().min(KVM_MAX_MSR_ENTRIES))
            .unwrap_or_default();
        let read = entries(now.iter().map(|index| (*index, 0)))
            .and_then(|mut msrs| fd.get_msrs(&mut msrs).ok())
            .unwrap_or(0);
        known.extend(now.iter().take(read));
        // The one at which it stopped is left out.
        let passed = if read < now.len() { read + 1 } else { read };
        rest = rest.get(passed..).unwrap_or_default();
    }
    known
}
