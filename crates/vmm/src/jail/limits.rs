//! Resource limits, and descriptors that nobody meant to hand over.
#![allow(unsafe_code)] // `close_range` by number.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use strake_observe::{OsContext, Result};

/// Descriptors: a machine with 31 devices of 16 queues each, every one with its eventfds.
const DESCRIPTORS: u64 = 4096;

/// Closes what is not standard input, output, error, or `listen_fd`'s socket or the signals' pipe,
/// and sets the limits.
pub(super) fn set(listen_fd: i32) -> Result<()> {
    close_strangers(listen_fd)?;
    // No memory of a guest in a core file.
    limit(Resource::Core, "RLIMIT_CORE", 0)?;
    let most = getrlimit(Resource::Nofile)
        .maximum
        .unwrap_or(u64::MAX)
        .min(DESCRIPTORS);
    limit(Resource::Nofile, "RLIMIT_NOFILE", most)
}

fn limit(resource: Resource, name: &str, most: u64) -> Result<()> {
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    setrlimit(resource, limit).os("setrlimit", name)
}

/// The monitor's own descriptors carry the close-on-exec flag; inherited ones do not, or they
/// would not be here.
fn close_strangers(listen_fd: i32) -> Result<()> {
    let most = getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS);
    let most = i32::try_from(most.min(DESCRIPTORS)).unwrap_or(i32::MAX);
    for fd in 3..most {
        if fd == listen_fd {
            continue;
        }
        // SAFETY: asks only.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        if flags >= 0 && flags & libc::FD_CLOEXEC == 0 {
            // SAFETY: it was inherited: nothing in this process, which opens everything with
            // close-on-exec, owns it.
            let closed = unsafe { libc::close(fd) };
            if closed != 0 {
                return Err(std::io::Error::last_os_error())
                    .os("close", format!("descriptor {fd}"));
            }
        }
    }
    Ok(())
}
