//! What the probe sees.

strake_observe::catalog! {
    /// The observations of this crate.
    pub static CATALOG;

    /// The KVM device cannot be opened.
    NoKvm("probe.no-kvm") {
        /// The device.
        path: String,
    }
    text "{path} cannot be opened, so no VM can run here";
    remedy "switch virtualisation on in the firmware, load kvm_intel or kvm_amd (`modprobe`), and let the account read and write {path} (group kvm); inside a VM, switch nested virtualisation on in its host";

    /// KVM speaks another version of its API.
    WrongApiVersion("probe.wrong-api-version") {
        /// What it says.
        found: i32,
        /// What is needed.
        wanted: i32,
    }
    text "KVM has API version {found}, not {wanted}";
    remedy "use a kernel with a current KVM (Linux 5.10 or newer)";

    /// KVM lacks capabilities.
    CapabilitiesMissing("probe.capabilities-missing") {
        /// Their names.
        names: String,
    }
    text "this KVM lacks {names}";
    remedy "use a kernel with a complete KVM (Linux 5.10 or newer on x86-64)";

    /// Ring 0 is interpreted.
    RingZeroSlow("probe.ring-zero-slow") {
        /// Instructions per second.
        rate: u64,
        /// How many are enough.
        enough: u64,
    }
    text "this KVM runs only {rate} ring-0 instructions per second (a stock kernel needs {enough}): it interprets them";
    remedy "run VMs on a host with hardware virtualisation, or try everything in the lab: `cargo xtask lab`";

    /// Ring 0 lacks instructions.
    InstructionsMissing("probe.instructions-missing") {
        /// Which families.
        families: String,
    }
    text "this KVM does not run ring-0 instructions that stock kernels use: {families}";
    remedy "run VMs on a host with hardware virtualisation, or try everything in the lab: `cargo xtask lab`";

    /// Not even the plain loop ran.
    RingZeroBroken("probe.ring-zero-broken") {}
    text "this KVM does not run a plain loop in ring 0";
    remedy "run VMs on a host with hardware virtualisation, or try everything in the lab: `cargo xtask lab`";

    /// A guest of the probe ended otherwise than by its `hlt`.
    GuestEnded("probe.guest-ended") {
        /// How.
        how: String,
    }
    text "the probe's guest ended with {how}";
    remedy "see the kernel's log for what KVM could not run";

    /// A guest of the probe did not end.
    GuestHangs("probe.guest-hangs") {
        /// How long it was waited for, in milliseconds.
        waited_ms: u64,
    }
    text "the probe's guest did not end within {waited_ms} ms";
    remedy "see the kernel's log for what KVM could not run";
}
