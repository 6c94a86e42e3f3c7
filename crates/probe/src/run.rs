//! One guest of the probe, run to its end.
#![allow(unsafe_code)] // KVM's memory slots, see `build`.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use libc::{c_int, c_void, siginfo_t};
use strake_observe::{Observation, OsContext, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::guest;
use crate::observations::{GuestEnded, GuestHangs};

/// How long a thread that was signalled may take to leave `KVM_RUN`, and how often it is told.
const LEAVE: Duration = Duration::from_millis(20);
const LEAVE_TRIES: u32 = 25;

/// Exits to this program that a guest may take: the families make one or two.
const MOST_EXITS: u32 = 16;

/// The handler does nothing: what counts is that `KVM_RUN` returns `EINTR`.
extern "C" fn woken(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Runs `code` with `rbx = count` in a thread of its own and says how long the guest took, or why
/// it did not reach its end.
pub(crate) fn in_thread(
    device: PathBuf,
    code: &'static [u8],
    count: u64,
    limit: Duration,
) -> Result<Duration> {
    let signal = SIGRTMIN();
    register_signal_handler(signal, woken)
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
        .os("sigaction", "the probe's signal")?;
    let (say, hear) = channel();
    let thread = thread::Builder::new()
        .name("probe-vcpu".to_owned())
        .spawn(move || {
            // The receiver may have given up: then nobody needs the answer.
            let _ = say.send(guest(&device, code, count));
        })
        .os("clone", "the probe's thread")?;

    let hangs = || {
        let waited_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        Observation::from(GuestHangs { waited_ms })
    };
    match hear.recv_timeout(limit) {
        Ok(answer) => {
            let _ = thread.join();
            answer
        }
        Err(RecvTimeoutError::Disconnected) => {
            let _ = thread.join();
            Err(ended("a panic of the probe"))
        }
        Err(RecvTimeoutError::Timeout) => {
            // A signal just before KVM_RUN is lost, hence several.
            for _ in 0..LEAVE_TRIES {
                let _ = thread.kill(signal);
                if !matches!(hear.recv_timeout(LEAVE), Err(RecvTimeoutError::Timeout)) {
                    let _ = thread.join();
                    break;
                }
            }
            Err(hangs())
        }
    }
}

fn ended(how: impl Into<String>) -> Observation {
    GuestEnded { how: how.into() }.into()
}

/// Gives the failure of a KVM call its name.
fn kvm<T>(result: std::result::Result<T, kvm_ioctls::Error>, call: &str) -> Result<T> {
    result
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
        .os(call, "the probe's VM")
}

/// A built guest. The fields drop in this order: the vCPU and the VM before their memory.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

fn guest(device: &std::path::Path, code: &[u8], count: u64) -> Result<Duration> {
    let mut guest = build(&crate::open(device)?, code, count)?;
    let began = Instant::now();
    for _ in 0..MOST_EXITS {
        match guest.vcpu.run() {
            Ok(VcpuExit::Hlt) => {
                let took = began.elapsed();
                let rax = kvm(guest.vcpu.get_regs(), "KVM_GET_REGS")?.rax;
                return if rax == guest::MARKER {
                    Ok(took)
                } else {
                    Err(ended(format!("a wrong result (rax {rax:#x})")))
                };
            }
            Ok(VcpuExit::IoOut(..)) => {}
            Ok(VcpuExit::Shutdown) => return Err(ended("a triple fault")),
            Ok(VcpuExit::InternalError) => {
                let at = guest.vcpu.get_regs().map_or(0, |regs| regs.rip);
                let offset = at.wrapping_sub(guest::CODE);
                return Err(ended(format!("an emulation failure at byte {offset:#x}")));
            }
            Ok(other) => return Err(ended(format!("exit {other:?}"))),
            Err(errno) => {
                let error = io::Error::from_raw_os_error(errno.errno());
                return Err(error).os("KVM_RUN", "the probe's vCPU");
            }
        }
    }
    Err(ended("too many exits"))
}

fn build(system: &Kvm, code: &[u8], count: u64) -> Result<Guest> {
    let vm = kvm(system.create_vm(), "KVM_CREATE_VM")?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), guest::MEMORY)])
        .map_err(io::Error::other)
        .os("mmap", "the probe's memory")?;
    memory
        .write_slice(&guest::image(code), GuestAddress(0))
        .map_err(io::Error::other)
        .os("write", "the probe's memory")?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(io::Error::other)
        .os("find", "the probe's memory")?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: guest::MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the slot is exactly the mapping made above, nothing else refers to that memory, and
    // `Guest` drops the VM before it.
    let set = unsafe { vm.set_user_memory_region(slot) };
    kvm(set, "KVM_SET_USER_MEMORY_REGION")?;

    let vcpu = kvm(vm.create_vcpu(0), "KVM_CREATE_VCPU")?;
    let cpuid = kvm(
        system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        "KVM_GET_SUPPORTED_CPUID",
    )?;
    kvm(vcpu.set_cpuid2(&cpuid), "KVM_SET_CPUID2")?;
    long_mode(&vcpu)?;
    let regs = kvm_regs {
        rip: guest::CODE,
        rsp: guest::STACK,
        rsi: guest::SCRATCH,
        rbx: count,
        rflags: 2,
        ..kvm_regs::default()
    };
    kvm(vcpu.set_regs(&regs), "KVM_SET_REGS")?;
    Ok(Guest {
        vcpu,
        _vm: vm,
        _memory: memory,
    })
}

/// Puts the vCPU where a stock kernel's 64-bit entry finds it: long mode, paging, ring 0, SSE on.
fn long_mode(vcpu: &VcpuFd) -> Result<()> {
    const CR0: u64 = 0x8000_0033; // PG, NE, ET, MP, PE
    const CR4: u64 = 0x620; // OSXMMEXCPT, OSFXSR, PAE
    const EFER: u64 = 0x500; // LMA, LME
    let mut sregs = kvm(vcpu.get_sregs(), "KVM_GET_SREGS")?;
    let segment = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment {
        selector: guest::CODE_SELECTOR,
        type_: 0xb,
        l: 1,
        ..segment
    };
    let data = kvm_segment {
        selector: guest::DATA_SELECTOR,
        type_: 0x3,
        db: 1,
        ..segment
    };
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt = kvm_dtable {
        base: guest::GDT,
        limit: 0x17,
        ..kvm_dtable::default()
    };
    sregs.idt = kvm_dtable {
        base: guest::IDT,
        limit: 0x6f,
        ..kvm_dtable::default()
    };
    sregs.cr3 = guest::PML4;
    sregs.cr0 = CR0;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    kvm(vcpu.set_sregs(&sregs), "KVM_SET_SREGS")
}
