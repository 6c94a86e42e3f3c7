//! The guests of the probe: their memory, and their code as bytes with its assembly beside it.
//!
//! A guest is one long-mode ring-0 program of a few instructions in 64 KiB of memory, identity
//! mapped. It says that it reached its end by [`MARKER`] in `eax` at a `hlt`. Whatever it raises
//! ends in a triple fault, because the interrupt table is empty but for invalid opcode (`ud2`),
//! whose handler says [`MARKER`] too.

/// What a guest leaves in `eax` at its last `hlt`.
pub const MARKER: u64 = 0x600d;

/// Bytes of guest memory.
pub const MEMORY: usize = 0x1_0000;

/// Top of the page tables.
pub const PML4: u64 = 0x1000;
/// The global descriptor table.
pub const GDT: u64 = 0x4000;
/// The interrupt descriptor table.
pub const IDT: u64 = 0x5000;
/// Where the stack begins, downwards.
pub const STACK: u64 = 0x8000;
/// Where the code is.
pub const CODE: u64 = 0x8000;
/// Where the handler of `ud2` is.
pub const HANDLER: u64 = 0x9000;
/// What `rsi` points to: memory that the code may write.
pub const SCRATCH: u64 = 0xa000;

/// The selector of the code segment.
pub const CODE_SELECTOR: u16 = 0x08;
/// The selector of the data segment.
pub const DATA_SELECTOR: u16 = 0x10;

/// A family of privileged instructions.
#[derive(Debug, Clone, Copy)]
pub struct FamilyCode {
    /// What the instructions are.
    pub name: &'static str,
    /// A program that uses them.
    pub code: &'static [u8],
}

/// Every family that a stock kernel cannot do without.
pub const FAMILIES: &[FamilyCode] = &[
    FamilyCode {
        name: "cpuid",
        code: CPUID,
    },
    FamilyCode {
        name: "rdmsr, wrmsr",
        code: MSR,
    },
    FamilyCode {
        name: "mov to and from control and debug registers",
        code: CR,
    },
    FamilyCode {
        name: "invlpg",
        code: INVLPG,
    },
    FamilyCode {
        name: "lgdt, lidt, lldt, str",
        code: TABLES,
    },
    FamilyCode {
        name: "fxsave, fxrstor",
        code: FX,
    },
    FamilyCode {
        name: "SSE2",
        code: SSE,
    },
    FamilyCode {
        name: "pushf, popf, cli, sti",
        code: FLAGS,
    },
    FamilyCode {
        name: "swapgs",
        code: SWAPGS,
    },
    FamilyCode {
        name: "iretq",
        code: IRETQ,
    },
    FamilyCode {
        name: "lretq",
        code: FAR,
    },
    FamilyCode {
        name: "syscall",
        code: SYSCALL,
    },
    FamilyCode {
        name: "exceptions through the IDT",
        code: EXCEPTION,
    },
    FamilyCode {
        name: "locked operations",
        code: ATOMIC,
    },
    FamilyCode {
        name: "cmpxchg16b",
        code: CMPXCHG16B,
    },
    FamilyCode {
        name: "rep stos, rep movs",
        code: STRING,
    },
    FamilyCode {
        name: "rdtsc",
        code: TSC,
    },
    FamilyCode {
        name: "out",
        code: PIO,
    },
];

/// How many instructions one turn of [`LOOP`] is.
pub const LOOP_LENGTH: u64 = 8;

/// The guest's memory with `code` in it.
#[must_use]
pub fn image(code: &[u8]) -> Vec<u8> {
    let mut memory = vec![0_u8; MEMORY];
    let mut put = |at: u64, bytes: &[u8]| {
        let room = usize::try_from(at)
            .ok()
            .and_then(|at| memory.get_mut(at..at + bytes.len()));
        if let Some(room) = room {
            room.copy_from_slice(bytes);
        }
    };
    // One entry per level; the last is a 2 MiB page: present, writable, and large.
    put(PML4, &(0x2000_u64 | 0x3).to_le_bytes());
    put(0x2000, &(0x3000_u64 | 0x3).to_le_bytes());
    put(0x3000, &(0x83_u64).to_le_bytes());
    // null, 64-bit code, data.
    put(GDT + 8, &0x00af_9b00_0000_ffff_u64.to_le_bytes());
    put(GDT + 16, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
    // Vector 6: a 64-bit interrupt gate, present.
    let gate = (HANDLER & 0xffff)
        | u64::from(CODE_SELECTOR) << 16
        | 0x8e00 << 32
        | (HANDLER >> 16 & 0xffff) << 48;
    put(IDT + 6 * 16, &gate.to_le_bytes());
    put(CODE, code);
    put(HANDLER, SAY_MARKER);
    memory
}

/// Ordinary instructions, `rbx` times round: what the speed is measured with.
#[rustfmt::skip]
pub const LOOP: &[u8] = &[
    0x48, 0x83, 0xc0, 0x01,                              // add $0x1,%rax
    0x48, 0x89, 0x06,                                    // mov %rax,(%rsi)
    0x48, 0x33, 0x16,                                    // xor (%rsi),%rdx
    0x48, 0x8d, 0x4c, 0x10, 0x03,                        // lea 0x3(%rax,%rdx,1),%rcx
    0x48, 0xd1, 0xe1,                                    // shl %rcx
    0x48, 0x39, 0xca,                                    // cmp %rcx,%rdx
    0x48, 0xff, 0xcb,                                    // dec %rbx
    0x75, 0xe6,                                          // jne the hlt
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// The handler of `ud2`.
#[rustfmt::skip]
const SAY_MARKER: &[u8] = &[
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Cpuid.
#[rustfmt::skip]
const CPUID: &[u8] = &[
    0x31, 0xc0,                                          // xor %eax,%eax
    0x0f, 0xa2,                                          // cpuid
    0xb8, 0x01, 0x00, 0x00, 0x00,                        // mov $0x1,%eax
    0x0f, 0xa2,                                          // cpuid
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Rdmsr, wrmsr.
#[rustfmt::skip]
const MSR: &[u8] = &[
    0xb9, 0x80, 0x00, 0x00, 0xc0,                        // mov $0xc0000080,%ecx
    0x0f, 0x32,                                          // rdmsr
    0x0f, 0x30,                                          // wrmsr
    0xb9, 0x00, 0x01, 0x00, 0xc0,                        // mov $0xc0000100,%ecx
    0xb8, 0x34, 0x12, 0x00, 0x00,                        // mov $0x1234,%eax
    0x31, 0xd2,                                          // xor %edx,%edx
    0x0f, 0x30,                                          // wrmsr
    0x31, 0xc0,                                          // xor %eax,%eax
    0x0f, 0x32,                                          // rdmsr
    0x3d, 0x34, 0x12, 0x00, 0x00,                        // cmp $0x1234,%eax
    0x75, 0x05,                                          // jne the hlt
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Mov to and from control and debug registers.
#[rustfmt::skip]
const CR: &[u8] = &[
    0x0f, 0x20, 0xc0,                                    // mov %cr0,%rax
    0x0f, 0x22, 0xc0,                                    // mov %rax,%cr0
    0x0f, 0x20, 0xd8,                                    // mov %cr3,%rax
    0x0f, 0x22, 0xd8,                                    // mov %rax,%cr3
    0x0f, 0x20, 0xe0,                                    // mov %cr4,%rax
    0x0f, 0x22, 0xe0,                                    // mov %rax,%cr4
    0x0f, 0x06,                                          // clts
    0x0f, 0x21, 0xf8,                                    // mov %db7,%rax
    0x0f, 0x23, 0xf8,                                    // mov %rax,%db7
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Invlpg.
#[rustfmt::skip]
const INVLPG: &[u8] = &[
    0x0f, 0x01, 0x3e,                                    // invlpg (%rsi)
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Lgdt, lidt, lldt, str.
#[rustfmt::skip]
const TABLES: &[u8] = &[
    0x0f, 0x01, 0x06,                                    // sgdt (%rsi)
    0x0f, 0x01, 0x16,                                    // lgdt (%rsi)
    0x0f, 0x01, 0x4e, 0x10,                              // sidt 0x10(%rsi)
    0x0f, 0x01, 0x5e, 0x10,                              // lidt 0x10(%rsi)
    0x66, 0x0f, 0x00, 0xc8,                              // str %ax
    0x31, 0xc0,                                          // xor %eax,%eax
    0x0f, 0x00, 0xd0,                                    // lldt %ax
    0xb8, 0x10, 0x00, 0x00, 0x00,                        // mov $0x10,%eax
    0x8e, 0xd8,                                          // mov %eax,%ds
    0x8e, 0xd0,                                          // mov %eax,%ss
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Fxsave, fxrstor.
#[rustfmt::skip]
const FX: &[u8] = &[
    0xdb, 0xe3,                                          // fninit
    0x0f, 0xae, 0x06,                                    // fxsave (%rsi)
    0x0f, 0xae, 0x0e,                                    // fxrstor (%rsi)
    0x48, 0x0f, 0xae, 0x06,                              // fxsave64 (%rsi)
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// SSE2.
#[rustfmt::skip]
const SSE: &[u8] = &[
    0x66, 0x0f, 0xef, 0xc0,                              // pxor %xmm0,%xmm0
    0xf3, 0x0f, 0x7f, 0x06,                              // movdqu %xmm0,(%rsi)
    0x66, 0x0f, 0xd4, 0xc0,                              // paddq %xmm0,%xmm0
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Pushf, popf, cli, sti.
#[rustfmt::skip]
const FLAGS: &[u8] = &[
    0x9c,                                                // pushf
    0x58,                                                // pop %rax
    0x50,                                                // push %rax
    0x9d,                                                // popf
    0xfa,                                                // cli
    0xfb,                                                // sti
    0x90,                                                // nop
    0xfa,                                                // cli
    0xfc,                                                // cld
    0x9c,                                                // pushf
    0x58,                                                // pop %rax
    0xa9, 0x00, 0x02, 0x00, 0x00,                        // test $0x200,%eax
    0x75, 0x05,                                          // jne the hlt
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Swapgs.
#[rustfmt::skip]
const SWAPGS: &[u8] = &[
    0x0f, 0x01, 0xf8,                                    // swapgs
    0x0f, 0x01, 0xf8,                                    // swapgs
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Iretq.
#[rustfmt::skip]
const IRETQ: &[u8] = &[
    0x48, 0x89, 0xe2,                                    // mov %rsp,%rdx
    0x8c, 0xd0,                                          // mov %ss,%eax
    0x50,                                                // push %rax
    0x52,                                                // push %rdx
    0x9c,                                                // pushf
    0x8c, 0xc8,                                          // mov %cs,%eax
    0x50,                                                // push %rax
    0x48, 0x8d, 0x05, 0x04, 0x00, 0x00, 0x00,            // lea 0x4(%rip),%rax
    0x50,                                                // push %rax
    0x48, 0xcf,                                          // iretq
    0xf4,                                                // hlt
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Lretq.
#[rustfmt::skip]
const FAR: &[u8] = &[
    0x6a, 0x08,                                          // push $0x8
    0x48, 0x8d, 0x05, 0x04, 0x00, 0x00, 0x00,            // lea 0x4(%rip),%rax
    0x50,                                                // push %rax
    0x48, 0xcb,                                          // lretq
    0xf4,                                                // hlt
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Syscall.
#[rustfmt::skip]
const SYSCALL: &[u8] = &[
    0xb9, 0x80, 0x00, 0x00, 0xc0,                        // mov $0xc0000080,%ecx
    0x0f, 0x32,                                          // rdmsr
    0x83, 0xc8, 0x01,                                    // or $0x1,%eax
    0x0f, 0x30,                                          // wrmsr
    0xb9, 0x81, 0x00, 0x00, 0xc0,                        // mov $0xc0000081,%ecx
    0x31, 0xc0,                                          // xor %eax,%eax
    0xba, 0x08, 0x00, 0x13, 0x00,                        // mov $0x130008,%edx
    0x0f, 0x30,                                          // wrmsr
    0xb9, 0x84, 0x00, 0x00, 0xc0,                        // mov $0xc0000084,%ecx
    0x31, 0xc0,                                          // xor %eax,%eax
    0x31, 0xd2,                                          // xor %edx,%edx
    0x0f, 0x30,                                          // wrmsr
    0xb9, 0x82, 0x00, 0x00, 0xc0,                        // mov $0xc0000082,%ecx
    0x48, 0x8d, 0x05, 0x07, 0x00, 0x00, 0x00,            // lea 0x7(%rip),%rax
    0x31, 0xd2,                                          // xor %edx,%edx
    0x0f, 0x30,                                          // wrmsr
    0x0f, 0x05,                                          // syscall
    0xf4,                                                // hlt
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Exceptions through the IDT.
#[rustfmt::skip]
const EXCEPTION: &[u8] = &[
    0x0f, 0x0b,                                          // ud2
    0xf4,                                                // hlt
];

/// Locked operations.
#[rustfmt::skip]
const ATOMIC: &[u8] = &[
    0xb8, 0x05, 0x00, 0x00, 0x00,                        // mov $0x5,%eax
    0xf0, 0x48, 0x0f, 0xc1, 0x06,                        // lock xadd %rax,(%rsi)
    0x48, 0x87, 0x06,                                    // xchg %rax,(%rsi)
    0x0f, 0xae, 0xf0,                                    // mfence
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// A 16-byte compare and exchange; the memory and `rdx:rax` are zero.
#[rustfmt::skip]
const CMPXCHG16B: &[u8] = &[
    0x31, 0xc0,                                          // xor %eax,%eax
    0x31, 0xd2,                                          // xor %edx,%edx
    0xbb, 0x01, 0x00, 0x00, 0x00,                        // mov $0x1,%ebx
    0xb9, 0x02, 0x00, 0x00, 0x00,                        // mov $0x2,%ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0e,                        // lock cmpxchg16b (%rsi)
    0x75, 0x05,                                          // jne the hlt
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Rep stos, rep movs.
#[rustfmt::skip]
const STRING: &[u8] = &[
    0x48, 0x89, 0xf7,                                    // mov %rsi,%rdi
    0xb8, 0x5a, 0x00, 0x00, 0x00,                        // mov $0x5a,%eax
    0xb9, 0x40, 0x00, 0x00, 0x00,                        // mov $0x40,%ecx
    0xf3, 0x48, 0xab,                                    // rep stos %rax,%es:(%rdi)
    0x48, 0x8d, 0xbe, 0x00, 0x02, 0x00, 0x00,            // lea 0x200(%rsi),%rdi
    0xb9, 0x40, 0x00, 0x00, 0x00,                        // mov $0x40,%ecx
    0xf3, 0x48, 0xa5,                                    // rep movsq %ds:(%rsi),%es:(%rdi)
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Rdtsc.
#[rustfmt::skip]
const TSC: &[u8] = &[
    0x0f, 0x31,                                          // rdtsc
    0x89, 0xc3,                                          // mov %eax,%ebx
    0x0f, 0x31,                                          // rdtsc
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];

/// Out.
#[rustfmt::skip]
const PIO: &[u8] = &[
    0xb8, 0xaa, 0x00, 0x00, 0x00,                        // mov $0xaa,%eax
    0xba, 0x80, 0x00, 0x00, 0x00,                        // mov $0x80,%edx
    0xee,                                                // out %al,(%dx)
    0xb8, 0x0d, 0x60, 0x00, 0x00,                        // mov $0x600d,%eax
    0xf4,                                                // hlt
];
