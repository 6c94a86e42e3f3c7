//! Making a vCPU leave the guest.
//!
//! The vCPU's thread sits in KVM_RUN, or is on its way into it, or handles an exit. The kicker
//! first sets `immediate_exit` in the page that it shares with KVM, then sends the thread a signal
//! whose handler does nothing. In KVM_RUN the signal ends it; on the way into it the flag does;
//! while an exit is handled the flag ends the next KVM_RUN at once.
//!
//! Whoever kicks says what is wanted *before* the kick, in a variable of its own; the vCPU's thread
//! clears `immediate_exit` *before* it reads that variable. All of it is sequentially consistent:
//! if the clearing wiped out a kick, then what that kick was for is read afterwards.
#![allow(unsafe_code)] // Installs a signal handler, sends signals, and shares one byte with KVM.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use strake_observe::{Because, OsContext, Result};

use crate::observations::KickFailed;

/// Kicks one vCPU. Clones kick the same one.
#[derive(Debug, Clone)]
pub struct Kicker {
    vcpu: u8,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    /// `immediate_exit` of the vCPU; none once the vCPU is gone.
    flag: Option<Flag>,
    /// The thread that runs it, once there is one.
    thread: Option<libc::pid_t>,
}

/// The address of `immediate_exit`.
#[derive(Debug, Clone, Copy)]
struct Flag(*mut u8);

// SAFETY: the byte is only ever accessed atomically, and only while the vCPU's mapping exists:
// `Shared::flag` is cleared, under the lock, before the mapping goes.
unsafe impl Send for Flag {}

impl Kicker {
    /// # Safety
    /// `flag` points to a byte that is valid until [`Kicker::retire`] has returned.
    pub(crate) unsafe fn new(vcpu: u8, flag: *mut u8) -> Self {
        install_handler();
        Self {
            vcpu,
            shared: Arc::new(Mutex::new(Shared {
                flag: Some(Flag(flag)),
                thread: None,
            })),
        }
    }

    /// Makes the vCPU leave the guest, or not enter it: its next [`crate::Vcpu::run`] gives
    /// [`crate::Exit::Interrupted`]. Does nothing if the vCPU is gone.
    ///
    /// # Errors
    /// [`KickFailed`]: the signal could not be sent.
    pub fn kick(&self) -> Result<()> {
        let shared = self.lock();
        let Some(flag) = shared.flag else {
            return Ok(());
        };
        flag.store(1);
        let Some(thread) = shared.thread else {
            return Ok(());
        };
        // SAFETY: `tgkill` takes numbers only. The thread exists: it takes itself out of `shared`
        // before it ends, and the lock is held.
        let sent =
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        if sent == 0 {
            return Ok(());
        }
        Err(std::io::Error::last_os_error())
            .os("tgkill", format!("thread {thread}"))
            .because_of(|| KickFailed { vcpu: self.vcpu })
    }

    /// The calling thread runs the vCPU from now on.
    pub(crate) fn adopt(&self) {
        // SAFETY: no arguments, always succeeds.
        let thread = unsafe { libc::gettid() };
        self.lock().thread = Some(thread);
    }

    /// The vCPU does not enter the guest at its next run; called by its own thread.
    pub(crate) fn ask(&self) {
        if let Some(flag) = self.lock().flag {
            flag.store(1);
        }
    }

    /// Takes back what [`Kicker::kick`] set. Before the caller looks at what the kick was for.
    pub(crate) fn acknowledge(&self) {
        if let Some(flag) = self.lock().flag {
            flag.store(0);
        }
    }

    /// The vCPU goes: kicks have no effect any more.
    pub(crate) fn retire(&self) {
        let mut shared = self.lock();
        shared.flag = None;
        shared.thread = None;
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flag {
    fn store(self, value: u8) {
        // SAFETY: valid by the contract of `Kicker::new`; KVM reads the byte, nobody else accesses
        // it other than through here.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}

/// The first real-time signal: no library uses it for something else.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed `sigaction` is a valid one; the handler does nothing and so is safe at
        // any instant. Without SA_RESTART, so that KVM_RUN returns.
        let set = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
            libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut())
        };
        debug_assert_eq!(set, 0, "sigaction refuses only signals that do not exist");
    });
}
