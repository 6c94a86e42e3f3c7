//! Failures of the operating system, at the bottom of most trees.

use std::io;

// `catalog!` names this crate as its users do.
use crate as strake_observe;
use crate::{Observation, Result};

crate::catalog! {
    /// What the operating system refuses.
    pub static CATALOG;

    /// A call to the operating system failed.
    OsCallFailed("os.call-failed") {
        /// What was called, for example `pwrite`.
        call: String,
        /// The thing that it was called on: a path, a device, a range.
        object: String,
        /// The error number, if the system gave one.
        errno: Option<i32>,
        /// Its symbolic name, for example `ENOSPC`, or the kind of the error.
        name: String,
        /// The system's own words.
        reason: String,
        /// What can be done about it.
        advice: String,
    }
    text "{call} on {object}: {reason} ({name})";
    remedy "{advice}";
}

/// Turns the failure of a system call into an observation that names the call and its object.
pub trait OsContext<T> {
    /// `call` is the system call or operation, `object` what it was done to.
    ///
    /// # Errors
    /// [`OsCallFailed`] with the call, the object and the error number.
    fn os(self, call: &str, object: impl std::fmt::Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> OsContext<T> for std::result::Result<T, E> {
    fn os(self, call: &str, object: impl std::fmt::Display) -> Result<T> {
        self.map_err(|error| OsCallFailed::new(call, object, &error.into()).into())
    }
}

impl OsCallFailed {
    /// The observation of `error`, which `call` on `object` returned.
    #[must_use]
    pub fn new(call: &str, object: impl std::fmt::Display, error: &io::Error) -> Self {
        let errno = error.raw_os_error();
        let name = errno
            .and_then(errno_name)
            .map_or_else(|| format!("{:?}", error.kind()), str::to_owned);
        let text = error.to_string();
        // std appends "(os error N)", which the symbolic name says better.
        let reason = match text.find(" (os error") {
            Some(end) => text[..end].to_owned(),
            None => text,
        };
        Self {
            call: call.to_owned(),
            object: object.to_string(),
            errno,
            name,
            reason,
            advice: advice(error).to_owned(),
        }
    }
}

impl From<io::Error> for Observation {
    /// Prefer [`OsContext::os`], which names the call and the object.
    fn from(error: io::Error) -> Self {
        OsCallFailed::new("a system call", "an unnamed object", &error).into()
    }
}

/// The symbolic name of an error number, of those that a storage and virtualisation host meets.
#[must_use]
pub fn errno_name(errno: i32) -> Option<&'static str> {
    Some(match errno {
        1 => "EPERM",
        2 => "ENOENT",
        4 => "EINTR",
        5 => "EIO",
        6 => "ENXIO",
        7 => "E2BIG",
        9 => "EBADF",
        11 => "EAGAIN",
        12 => "ENOMEM",
        13 => "EACCES",
        14 => "EFAULT",
        16 => "EBUSY",
        17 => "EEXIST",
        18 => "EXDEV",
        19 => "ENODEV",
        20 => "ENOTDIR",
        21 => "EISDIR",
        22 => "EINVAL",
        23 => "ENFILE",
        24 => "EMFILE",
        25 => "ENOTTY",
        26 => "ETXTBSY",
        27 => "EFBIG",
        28 => "ENOSPC",
        29 => "ESPIPE",
        30 => "EROFS",
        32 => "EPIPE",
        38 => "ENOSYS",
        61 => "ENODATA",
        75 => "EOVERFLOW",
        90 => "EMSGSIZE",
        95 => "EOPNOTSUPP",
        98 => "EADDRINUSE",
        103 => "ECONNABORTED",
        104 => "ECONNRESET",
        107 => "ENOTCONN",
        110 => "ETIMEDOUT",
        111 => "ECONNREFUSED",
        116 => "ESTALE",
        121 => "EREMOTEIO",
        122 => "EDQUOT",
        125 => "ECANCELED",
        _ => return None,
    })
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error().and_then(errno_name).unwrap_or("") {
        "EPERM" | "EACCES" => "give the account that runs it the permission, or run it as root",
        "ENOENT" => "check the path; the file or one of its directories does not exist",
        "EIO" | "EREMOTEIO" => {
            "the device failed to do it: look at the kernel's log and move the data off the device"
        }
        "ENOSPC" | "EDQUOT" => "free space on that file system or choose another datastore",
        "EROFS" => "remount that file system writable or choose another datastore",
        "ENOMEM" => "free memory on the host or give the VM less",
        "EMFILE" | "ENFILE" => "raise the limit of open files (ulimit -n, fs.file-max)",
        "EBUSY" | "ETXTBSY" => "something else is using it: stop that first",
        "EEXIST" => "remove or rename what is there",
        "ENODEV" | "ENXIO" => "the device or its driver is not there: load the module or check it",
        "EINVAL" | "EOPNOTSUPP" | "ENOSYS" | "ENOTTY" => {
            "the kernel or the file system does not support it: see `strake doctor`"
        }
        "ECONNREFUSED" | "ENOTCONN" | "ECONNRESET" | "EPIPE" => {
            "the other process is not there: check that it runs"
        }
        "ESTALE" | "ETIMEDOUT" => "the storage server does not answer: check it and its network",
        _ => "look at the kernel's log for the reason",
    }
}
