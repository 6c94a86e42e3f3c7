//! What KVM knows of a guest, in a form that another process can give to another VM.
//!
//! The kernel's own structures are saved as bytes ([`plain`]): they are part of its stable interface,
//! so their form is as lasting as a record's has to be, and only their length is checked here. What
//! is in them KVM itself checks, and refuses.
//!
//! # Order
//! A vCPU is saved between two entries into the guest, after [`crate::Vcpu::finish_exit`], by the
//! thread that runs it. All vCPUs are restored before the VM's interrupt controllers: those may hold
//! an interrupt that goes to a local APIC at once. The clock comes last.
//!
//! # Time
//! The guest's clocks go on as if nothing had happened. The TSC of a vCPU is the host's with an
//! offset, and the offset is what is saved; a kernel without a way to ask for it gets the value,
//! moved on by what passed. The paravirtual clock is read with the time of day of the host's
//! monotonic clock and moved on by the difference.

mod plain;
mod tsc;
mod vcpu;
mod vm;

pub use vcpu::{SavedMsr, SavedVcpu};
pub use vm::SavedVm;

pub(crate) use vcpu::Abilities;

/// Nanoseconds of the host's monotonic clock, which all its processes share.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = vmm_clock();
    u64::try_from(now.tv_sec)
        .unwrap_or(0)
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

#[allow(unsafe_code)]
fn vmm_clock() -> libc::timespec {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes the structure that it is given; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now
}
