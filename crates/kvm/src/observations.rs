//! What this crate observes.

use crate::Registers;

strake_observe::catalog! {
    /// What goes wrong with KVM.
    pub static CATALOG;

    /// The host's KVM lacks something without which no guest runs.
    Unusable("kvm.unusable") {
        /// What it lacks.
        missing: String,
    }
    text "this host's KVM cannot run guests: it lacks {missing}";
    remedy "run `strake doctor`; a Linux kernel from 5.10 on has all that is needed";

    /// A VM could not be made.
    VmFailed("kvm.vm-failed") {
        /// What was being done.
        step: String,
    }
    text "KVM refuses to {step}";
    remedy "see the cause; `strake doctor` shows what this host's KVM can do";

    /// A vCPU could not be made or set up.
    VcpuFailed("kvm.vcpu-failed") {
        /// Which.
        vcpu: u8,
        /// What was being done.
        step: String,
    }
    text "KVM refuses to {step} of vCPU {vcpu}";
    remedy "see the cause; `strake doctor` shows what this host's KVM can do";

    /// A vCPU cannot go on.
    RunFailed("kvm.run-failed") {
        /// Which.
        vcpu: u8,
        /// Why.
        reason: String,
        /// Its registers, if they could be read.
        registers: Option<Registers>,
    }
    text "vCPU {vcpu} cannot go on: {reason}";
    remedy "report it with this observation: the guest did what KVM on this host cannot emulate";

    /// A part of the state of a guest cannot be read or set.
    StateRefused("kvm.state-refused") {
        /// Whose.
        of: String,
        /// What was being done.
        step: String,
        /// Which part.
        what: String,
    }
    text "KVM does not {step} the {what} of {of}";
    remedy "see the cause; the guest goes on in the monitor that it was in";

    /// There are no more interrupt vectors.
    MsiExhausted("kvm.msi-exhausted") {
        /// How many there are.
        limit: u32,
    }
    text "all {limit} interrupt vectors of the VM are in use";
    remedy "give the VM fewer devices or queues";

    /// A vCPU could not be kicked out of the guest.
    KickFailed("kvm.kick-failed") {
        /// Which.
        vcpu: u8,
    }
    text "vCPU {vcpu} could not be interrupted";
    remedy "this is a fault of the monitor: report it with its version";
}
