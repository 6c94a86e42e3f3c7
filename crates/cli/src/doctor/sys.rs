//! System calls of the doctor that have no safe wrapper.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::mm::{UserfaultfdFlags, userfaultfd};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Opens a userfaultfd for faults of this process's own code, and closes it.
pub(super) fn try_userfaultfd(flags: UserfaultfdFlags) -> io::Result<()> {
    // SAFETY: the descriptor is dropped at once, no range is ever registered with it.
    let opened = unsafe { userfaultfd(flags) };
    opened.map(drop).map_err(io::Error::from)
}

/// The version of landlock's interface.
pub(super) fn landlock_version() -> io::Result<i64> {
    const CREATE_RULESET_VERSION: u32 = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the kernel reads no attributes and makes no descriptor; it returns
    // the version.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            none,
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    if version < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(version)
    }
}

/// Whether a child may have namespaces of its own. The child is this program's own `--version`.
pub(super) fn try_namespaces(flags: UnshareFlags) -> io::Result<()> {
    let mut child = Command::new("/proc/self/exe");
    child
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec there is one system call, which allocates nothing and shares
    // no file table.
    unsafe {
        child.pre_exec(move || unshare_unsafe(flags).map_err(io::Error::from));
    }
    // What the child does after the exec is of no interest: under a test harness it is not even
    // `strake`. That it came so far says that the namespaces exist.
    let mut child = child.spawn()?;
    let _ = child.wait();
    Ok(())
}
