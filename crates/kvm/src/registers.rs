//! The registers that a report about a broken vCPU needs.

use kvm_bindings::{kvm_regs, kvm_sregs};
use serde::Serialize;

/// Where a vCPU was. Hexadecimal text: JSON numbers lose the upper bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Registers {
    /// Instruction pointer.
    pub rip: String,
    /// Stack pointer.
    pub rsp: String,
    /// Flags.
    pub rflags: String,
    /// General registers: rax, rbx, rcx, rdx, rsi, rdi, rbp, r8 to r15.
    pub general: Vec<String>,
    /// CR0.
    pub cr0: String,
    /// CR2: the address of the last page fault.
    pub cr2: String,
    /// CR3.
    pub cr3: String,
    /// CR4.
    pub cr4: String,
    /// EFER.
    pub efer: String,
    /// Code segment: selector and base.
    pub cs: [String; 2],
}

impl Registers {
    pub(crate) fn new(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        Self {
            rip: hex(regs.rip),
            rsp: hex(regs.rsp),
            rflags: hex(regs.rflags),
            general: [
                regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.r8,
                regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
            ]
            .map(hex)
            .to_vec(),
            cr0: hex(sregs.cr0),
            cr2: hex(sregs.cr2),
            cr3: hex(sregs.cr3),
            cr4: hex(sregs.cr4),
            efer: hex(sregs.efer),
            cs: [hex(u64::from(sregs.cs.selector)), hex(sregs.cs.base)],
        }
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}
