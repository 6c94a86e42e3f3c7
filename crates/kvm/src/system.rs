//! `/dev/kvm`.
#![allow(unsafe_code)] // Takes over an open descriptor as a `kvm_ioctls::Kvm`.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;
use strake_observe::{Because, OsContext, Result};

use crate::observations::{Unusable, VmFailed};
use crate::state::Abilities;

/// The only version of KVM's interface that there is.
const API_VERSION: i32 = 12;

/// What the monitor builds on, and what to call it.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "an in-kernel interrupt controller"),
    (Cap::UserMemory, "user memory regions"),
    (Cap::SetTssAddr, "KVM_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "extended CPUID"),
    (Cap::Pit2, "an in-kernel timer"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::ImmediateExit, "immediate exits"),
];

/// What the host's KVM can show a guest as its CPU.
pub type HostCpuid = Vec<kvm_cpuid_entry2>;

/// The host's KVM.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Takes `/dev/kvm`, opened by somebody else, and checks that it can do what is needed.
    ///
    /// # Errors
    /// [`Unusable`] with what it lacks.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        // SAFETY: the descriptor is owned and given away here; that it is `/dev/kvm` is checked by
        // the first ioctl, which any other file refuses.
        let fd = unsafe { kvm_ioctls::Kvm::from_raw_fd(fd.into_raw_fd()) };
        let version = fd.get_api_version();
        if version != API_VERSION {
            return Err(unusable(format!(
                "its interface in version {API_VERSION} (the descriptor answers {version})"
            )));
        }
        for (cap, name) in NEEDED {
            if !fd.check_extension(*cap) {
                return Err(unusable((*name).to_owned()));
            }
        }
        Ok(Self { fd })
    }

    /// Opens `/dev/kvm`, for processes that may open things.
    ///
    /// # Errors
    /// If it cannot be opened, or [`Unusable`].
    pub fn open() -> Result<Self> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .os("open", "/dev/kvm")?;
        Self::from_fd(file.into())
    }

    /// What the host's KVM can show a guest as its CPU.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn supported_cpuid(&self) -> Result<HostCpuid> {
        let cpuid = self
            .fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .os("KVM_GET_SUPPORTED_CPUID", "/dev/kvm")
            .because_of(|| VmFailed {
                step: "tell which CPU features it supports".to_owned(),
            })?;
        Ok(cpuid.as_slice().to_vec())
    }

    /// How many vCPUs a VM can have at most.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.fd.get_max_vcpus()
    }

    pub(crate) fn create_vm(&self) -> Result<kvm_ioctls::VmFd> {
        loop {
            match self.fd.create_vm() {
                // KVM gives up with EINTR when a signal arrives while it builds the VM.
                Err(error) if error.errno() == libc::EINTR => {}
                other => return other.os("KVM_CREATE_VM", "/dev/kvm"),
            }
        }
    }

    /// The model-specific registers that a guest may have.
    pub(crate) fn msr_list(&self) -> Result<Vec<u32>> {
        let list = self
            .fd
            .get_msr_index_list()
            .os("KVM_GET_MSR_INDEX_LIST", "/dev/kvm")
            .because_of(|| VmFailed {
                step: "tell which model-specific registers there are".to_owned(),
            })?;
        Ok(list.as_slice().to_vec())
    }

    pub(crate) fn abilities(&self) -> Abilities {
        Abilities::of(&self.fd)
    }

    pub(crate) fn has_clock_control(&self) -> bool {
        self.fd.check_extension(Cap::KvmclockCtrl)
    }
}

fn unusable(missing: String) -> strake_observe::Observation {
    Unusable { missing }.into()
}
