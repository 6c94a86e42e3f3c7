//! KVM, safe from outside: all `unsafe` that the hypervisor interface needs lies here.
//!
//! * [`Kvm`]: `/dev/kvm`, handed in as a descriptor, and what it can do.
//! * [`Vm`]: one guest's address space and interrupt chips. Clones share it.
//! * [`MsiVector`]: one message-signalled interrupt that an eventfd raises.
//! * [`Vcpu`]: owned by the one thread that runs it; [`Vcpu::run`] gives typed [`Exit`]s.
//! * [`Kicker`]: makes that thread leave the guest, from any other thread.
//!
//! # Threads
//! A [`Vcpu`] belongs to its thread. [`Vm`] is shared and its calls are safe from any thread. The
//! routing table of the MSIs has a lock of its own; a vector's lock is taken before it, never
//! after.

mod exit;
mod kick;
mod msi;
pub mod observations;
mod registers;
mod state;
mod system;
mod vcpu;
mod vm;

pub use exit::{Exit, Failure, PortIn, PortOut};
pub use kick::Kicker;
pub use msi::{MSI_MAX, MsiVector};
pub use registers::Registers;
pub use state::{SavedMsr, SavedVcpu, SavedVm, monotonic_ns};
pub use system::{HostCpuid, Kvm};
pub use vcpu::Vcpu;
pub use vm::{DoorbellWidth, LegacyIrq, Vm};

pub use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_sregs};
pub use vmm_sys_util::eventfd::EventFd;

#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;
