//! Locks on images.
//!
//! An *open file description* lock belongs to the opened file, not to the process: the daemon takes
//! it, passes the descriptor to the monitor and closes its own copy, and the lock lives exactly as
//! long as the monitor holds the image. A writer's lock excludes everyone, a reader's only writers.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Who may hold the image beside this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Nobody.
    Alone,
    /// Other readers.
    WithReaders,
}

/// Takes the lock on the whole file, or changes the one that it has, or tells that somebody else's is
/// in the way (`Ok(false)`): then it has what it had before.
///
/// # Errors
/// When the file system has no locks, or the descriptor does not allow this one.
pub fn take(file: impl AsFd, share: Share) -> io::Result<bool> {
    // SAFETY: `flock` is plain data for which zeroes are valid: from offset 0 to the end.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = match share {
        Share::Alone => short(libc::F_WRLCK),
        Share::WithReaders => short(libc::F_RDLCK),
    };
    range.l_whence = short(libc::SEEK_SET);
    // SAFETY: the descriptor is open for as long as the borrow, and `range` is valid for reading.
    let result = unsafe {
        libc::fcntl(
            file.as_fd().as_raw_fd(),
            libc::F_OFD_SETLK,
            &raw const range,
        )
    };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// The kernel's constants for this structure fit its fields.
#[expect(
    clippy::cast_possible_truncation,
    reason = "F_RDLCK, F_WRLCK and SEEK_SET are 0 and 1"
)]
const fn short(constant: i32) -> libc::c_short {
    constant as libc::c_short
}
