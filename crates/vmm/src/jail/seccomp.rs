//! Which system calls each kind of thread may make.
//!
//! A thread inherits the filter of the one that starts it and adds its own; a call passes if every
//! filter lets it. The lists are nested as the threads are:
//!
//! ```text
//!   control (main)  ⊇  vCPUs, which start the workers when the guest's drivers are ready  ⊇  workers
//! ```
//!
//! The main thread's other children (the console, migrations) keep its list. Another call raises
//! SIGSYS, whose handler names it and ends the process.
//!
//! No list has a call that opens a file, makes a process, or makes memory executable. What the C
//! library tries all the same fails as if the kernel did not know it ([`UNKNOWN`]).

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use strake_machine::{ThreadKind, set_confinement};
use strake_observe::{Observation, OsCallFailed, Result};

/// What every thread needs: memory, waiting, time, descriptors it holds, its own start and end.
const COMMON: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_eventfd2,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What vCPU threads need beside: starting workers.
const VCPU: &[libc::c_long] = &[libc::SYS_epoll_create1, libc::SYS_fcntl, libc::SYS_seccomp];

/// The kinds of `ioctl` that are let through, by the second byte of their number.
const KVM: u32 = 0xae;
const BLOCK_DEVICE: u32 = 0x12;

/// `ioctl`s that are let through one by one: their kind, that of terminals, has others that reach
/// out of the process.
const TAP_AND_SOCKETS: &[u32] = &[
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x5421,      // FIONBIO
];

/// What only the control thread needs: its socket, the restriction of its own threads, and, when
/// the machine is built, the size and kind of what it was given.
const CONTROL: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_socketpair,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_fstatfs,
    libc::SYS_memfd_create,
    libc::SYS_rt_sigaction,
];

/// Restricts the calling thread, and every thread from now on.
pub(super) fn install() -> Result<()> {
    let control = compile(ThreadKind::Control)?;
    let vcpu = compile(ThreadKind::Vcpu)?;
    let worker = compile(ThreadKind::Worker)?;
    set_confinement(Box::new(move |kind| match kind {
        ThreadKind::Vcpu => apply(&vcpu),
        ThreadKind::Worker => apply(&worker),
        // It is what the main thread was given below.
        ThreadKind::Control => Ok(()),
    }));
    apply(&compile_unknown()?)?;
    apply(&control)
}

fn apply(program: &BpfProgram) -> Result<()> {
    apply_filter(program).map_err(failed)
}

/// The list of a kind of thread as a program.
fn compile(kind: ThreadKind) -> Result<BpfProgram> {
    program(rules(kind)?, SeccompAction::Trap, SeccompAction::Allow)
}

/// Calls that the C library tries and can do without, answered as unknown ones: `clone3`, whose
/// flags a filter cannot see (it takes `clone` instead, which may only make threads), and `openat`,
/// by which its allocator, once there are more than a few threads, would count the processors (it
/// asks `sched_getaffinity` then).
const UNKNOWN: &[libc::c_long] = &[libc::SYS_clone3, libc::SYS_openat];

/// [`UNKNOWN`] as a program of its own: one program has one answer for what it matches.
fn compile_unknown() -> Result<BpfProgram> {
    let enosys = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let rules = UNKNOWN.iter().map(|call| (*call, Vec::new())).collect();
    program(rules, SeccompAction::Allow, enosys)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram> {
    let filter =
        SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64).map_err(failed)?;
    filter.try_into().map_err(failed)
}

fn rules(kind: ThreadKind) -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        COMMON.iter().map(|call| (*call, Vec::new())).collect();
    // Answered by the other program; among several filters the strictest answer counts.
    rules.extend(UNKNOWN.iter().map(|call| (*call, Vec::new())));
    let mut process_control = vec![equals(0, libc::PR_SET_NAME)?, equals(0, libc::PR_SET_VMA)?];
    let mut device_control = vec![of_kind(BLOCK_DEVICE)?];
    rules.insert(libc::SYS_mmap, vec![not_executable(2)?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable(2)?]);
    if kind == ThreadKind::Worker {
        // The standard library of a build with assertions looks whether a descriptor is open before
        // it closes it. Workers close: the last one to leave an image drops it.
        rules.insert(libc::SYS_fcntl, vec![equals(1, libc::F_GETFD)?]);
    } else {
        rules.extend(VCPU.iter().map(|call| (*call, Vec::new())));
        rules.insert(libc::SYS_clone, vec![threads_only()?]);
        // For the filters of the threads that it starts, which have this one, too.
        process_control.push(equals(0, libc::PR_SET_NO_NEW_PRIVS)?);
        process_control.push(equals(0, libc::PR_SET_SECCOMP)?);
        device_control.push(of_kind(KVM)?);
        for number in TAP_AND_SOCKETS {
            device_control.push(equals(1, number.cast_signed())?);
        }
    }
    if kind == ThreadKind::Control {
        rules.extend(CONTROL.iter().map(|call| (*call, Vec::new())));
    }
    rules.insert(libc::SYS_ioctl, device_control);
    rules.insert(libc::SYS_prctl, process_control);
    Ok(rules)
}

/// `clone` with the flags of a thread: same memory, same process.
fn threads_only() -> Result<SeccompRule> {
    let flags = u64::from((libc::CLONE_VM | libc::CLONE_THREAD).unsigned_abs());
    rule(SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::MaskedEq(flags),
        flags,
    ))
}

fn not_executable(argument: u8) -> Result<SeccompRule> {
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    rule(SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(executable),
        0,
    ))
}

/// An `ioctl` of this kind.
fn of_kind(kind: u32) -> Result<SeccompRule> {
    rule(SeccompCondition::new(
        1,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(0xff00),
        u64::from(kind << 8),
    ))
}

/// The argument is `value`.
fn equals(argument: u8, value: libc::c_int) -> Result<SeccompRule> {
    rule(SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        u64::from(value.unsigned_abs()),
    ))
}

fn rule(
    condition: std::result::Result<SeccompCondition, seccompiler::BackendError>,
) -> Result<SeccompRule> {
    SeccompRule::new(vec![condition.map_err(failed)?]).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> Observation {
    OsCallFailed::new(
        "seccomp",
        "the monitor's system calls",
        &std::io::Error::other(error.to_string()),
    )
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ThreadKind; 3] = [ThreadKind::Control, ThreadKind::Vcpu, ThreadKind::Worker];

    #[test]
    fn the_lists_are_nested() {
        let [control, vcpu, worker] = KINDS.map(|kind| rules(kind).unwrap());
        assert!(worker.keys().all(|call| vcpu.contains_key(call)));
        assert!(vcpu.keys().all(|call| control.contains_key(call)));
        assert!(worker.len() < vcpu.len() && vcpu.len() < control.len());
    }

    #[test]
    fn what_is_answered_as_unknown_ends_no_thread() {
        for kind in KINDS {
            let rules = rules(kind).unwrap();
            assert!(UNKNOWN.iter().all(|call| rules.contains_key(call)));
        }
    }

    #[test]
    fn every_thread_may_close_what_it_holds() {
        for kind in KINDS {
            let program = compile(kind).unwrap();
            let closed = std::thread::spawn(move || {
                let (read, write) = std::io::pipe().unwrap();
                apply(&program).unwrap();
                // A call that is not let through would end the whole test program.
                drop((read, write));
            });
            closed.join().unwrap();
        }
    }

    /// The files of lower layers get their rings when a worker first reads there.
    #[test]
    fn a_worker_reads_and_writes_through_a_chain_of_images() {
        use std::sync::Arc;
        use strake_block::{Access, Blocking, Image};
        use strake_qcow2::{ChainPart, CreateOptions, FileStore, Format, create, open_chain};
        let dir = tempfile::tempdir().unwrap();
        let part = |name: &str, format, access| {
            let mut options = std::fs::File::options();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(dir.path().join(name)).unwrap();
            ChainPart {
                store: Arc::new(FileStore::from_fd(file.into(), name, access).unwrap()),
                format,
                access,
            }
        };
        std::fs::write(dir.path().join("base"), vec![7; 1 << 20]).unwrap();
        let mut below = ("base", Format::Raw);
        for name in ["middle", "top"] {
            let store = part(name, Format::Qcow2, Access::ReadWrite).store;
            let options = CreateOptions::new(1 << 20).backing(below.0, below.1);
            create(&*store, &options).unwrap();
            below = (name, Format::Qcow2);
        }
        let chain = open_chain(vec![
            part("top", Format::Qcow2, Access::ReadWrite),
            part("middle", Format::Qcow2, Access::ReadOnly),
            part("base", Format::Raw, Access::ReadOnly),
        ])
        .unwrap();
        let program = compile(ThreadKind::Worker).unwrap();
        let worker = std::thread::spawn(move || {
            let mut queue = Blocking::new(&*chain).unwrap();
            apply(&program).unwrap();
            let mut data = [0; 4096];
            queue.read(4096, &mut data).unwrap();
            assert_eq!(data, [7; 4096]);
            queue.write(512, &[9; 512]).unwrap();
            queue.read(0, &mut data).unwrap();
            assert_eq!((data[511], data[512], data[1024]), (7, 9, 7));
            chain.flush().unwrap();
            // The last one to leave an image drops it.
            drop((queue, chain));
        });
        worker.join().unwrap();
    }

    #[test]
    fn nothing_reaches_out_of_the_process() {
        for call in [
            libc::SYS_open,
            libc::SYS_openat2,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_mount,
            libc::SYS_bpf,
        ] {
            for kind in KINDS {
                assert!(!rules(kind).unwrap().contains_key(&call), "{call}");
            }
        }
    }
}
