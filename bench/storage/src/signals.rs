//! What is left when a bench is interrupted: nothing. Its directory is removed, its children end.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use strake_observe::{OsContext, Result};

const CAUGHT: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

fn caught() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set; the signals exist.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in CAUGHT {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// From now on a signal that ends the bench removes `dir` first. To be called before other threads
/// are started.
pub(crate) fn remove_at_end(dir: PathBuf) -> Result<()> {
    let set = caught();
    // SAFETY: the set is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let mut signal = 0;
            // SAFETY: both point to what this thread owns.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                let _ = std::fs::remove_dir_all(&dir);
                std::process::exit(128 + signal);
            }
        })
        .os("clone", "the thread for signals")?;
    Ok(())
}

/// Makes a child end when the thread that starts it ends, and take signals as usual.
pub(crate) fn ends_with_us(command: &mut Command) {
    let set = caught();
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            Ok(())
        });
    }
}
