//! "Please end": SIGTERM and SIGINT set a flag.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn ask(_signal: libc::c_int) {
    // The only thing done here, and it is safe in a signal handler.
    ASKED.store(true, Ordering::Relaxed);
}

/// From now on SIGTERM and SIGINT only set the flag of [`end_asked`].
pub fn catch() {
    let handler: extern "C" fn(libc::c_int) = ask;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: `ask` has the type that the system wants of a handler, lives as long as the
        // program, and does nothing but a store to an atomic. `signal` cannot fail for these two.
        unsafe { libc::signal(signal, handler as *const () as libc::sighandler_t) };
    }
}

/// Sets the flag as a signal would.
pub fn ask_end() {
    ASKED.store(true, Ordering::Relaxed);
}

/// Whether the program was asked to end.
#[must_use]
pub fn end_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}
