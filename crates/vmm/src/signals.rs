//! Signals, and descriptors by number.
//!
//! SIGTERM and SIGINT make a pipe readable that the control thread waits on: the guest is stopped
//! as by a request. A forbidden system call (SIGSYS) is named on standard error before the process
//! ends. Everything else keeps its default, SIGPIPE being ignored by Rust's runtime.
#![allow(unsafe_code)] // Installs signal handlers, which use async-signal-safe calls only.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};
use strake_observe::{OsContext, Result};

/// The exit status after a forbidden system call: what a shell shows for a death by SIGSYS.
const FORBIDDEN: i32 = 128 + libc::SIGSYS;

/// Where the handler writes; never closed.
static TERMINATE: AtomicI32 = AtomicI32::new(-1);

/// Installs the handlers. The descriptor is readable once the process was asked to end.
pub(crate) fn install() -> Result<OwnedFd> {
    use std::os::fd::IntoRawFd;
    let (reader, writer) =
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).os("pipe2", "the signals")?;
    TERMINATE.store(writer.into_raw_fd(), Ordering::SeqCst);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        handle(signal, on_terminate as *const () as libc::sighandler_t, 0)?;
    }
    handle(
        libc::SIGSYS,
        on_forbidden as *const () as libc::sighandler_t,
        libc::SA_SIGINFO,
    )?;
    Ok(reader)
}

/// Takes over an inherited descriptor, if it is open.
pub(crate) fn take_fd(number: i32) -> Option<OwnedFd> {
    // SAFETY: asks only.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return None;
    }
    // SAFETY: it is open, was inherited for this purpose, and nobody else in this process has it:
    // this is called once, before anything is opened. It is not passed on.
    unsafe {
        libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC);
        Some(OwnedFd::from_raw_fd(number))
    }
}

fn handle(signal: libc::c_int, handler: libc::sighandler_t, flags: libc::c_int) -> Result<()> {
    // SAFETY: a zeroed `sigaction` is valid; the handlers are async-signal-safe.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags | libc::SA_RESTART;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    };
    if done == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error()).os("sigaction", format!("signal {signal}"))
}

extern "C" fn on_terminate(_: libc::c_int) {
    // SAFETY: `write` is async-signal-safe; a full pipe says what is to be said. The error number
    // of the interrupted code is kept.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(TERMINATE.load(Ordering::SeqCst), [1u8].as_ptr().cast(), 1);
        *libc::__errno_location() = errno;
    }
}

extern "C" fn on_forbidden(_: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
    /// Where the kernel puts the number of the system call.
    const SI_SYSCALL: usize = 24;
    let mut text = *b"strake-vmm: forbidden system call ....\n";
    // SAFETY: the kernel gives a valid `siginfo_t` of 128 bytes.
    let number = unsafe {
        info.cast::<u8>()
            .add(SI_SYSCALL)
            .cast::<i32>()
            .read_unaligned()
    };
    let mut rest = number.unsigned_abs();
    for place in (34..38).rev() {
        // Always a digit.
        #[allow(clippy::cast_possible_truncation, clippy::indexing_slicing)]
        {
            text[place] = b'0' + (rest % 10) as u8;
        }
        rest /= 10;
    }
    // SAFETY: both are async-signal-safe.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::_exit(FORBIDDEN);
    }
}
