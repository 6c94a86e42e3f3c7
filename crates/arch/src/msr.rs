//! Model-specific registers that firmware would have set before a kernel runs.

/// `IA32_TIME_STAMP_COUNTER`.
pub const IA32_TSC: u32 = 0x10;
/// `IA32_MISC_ENABLE`.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// `IA32_MTRR_DEF_TYPE`.
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// One register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// What to set it to.
    pub value: u64,
}

/// What each vCPU's registers are set to before its first instruction. Every other one keeps the
/// value KVM gives it at reset.
///
/// All memory is cached by default (type 6, write-back, MTRRs enabled): a kernel that finds the
/// reset value would take all of its RAM for uncached. String instructions are fast. The time
/// stamp counter begins at zero on every vCPU, so that the guest finds them in step.
#[must_use]
pub const fn boot_msrs() -> [Msr; 3] {
    [
        Msr {
            index: IA32_TSC,
            value: 0,
        },
        Msr {
            index: IA32_MISC_ENABLE,
            value: 1,
        },
        Msr {
            index: IA32_MTRR_DEF_TYPE,
            value: 1 << 11 | 6,
        },
    ]
}
