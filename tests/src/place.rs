//! Where the tests find things, as `xtask` laid them out: the same paths in the lab and, below a
//! folder of their own, on a host.

use std::path::PathBuf;

/// Names the folder that stands for `/` where the tests do not own the machine.
pub const PREFIX: &str = "STRAKE_TEST_PREFIX";

/// A path as in the lab.
#[must_use]
pub fn at(path: &str) -> PathBuf {
    let prefix = std::env::var(PREFIX).unwrap_or_default();
    PathBuf::from(format!("{prefix}{path}"))
}

/// A path as in the lab, as text for command lines and specs.
#[must_use]
pub fn text(path: &str) -> String {
    at(path).display().to_string()
}

/// Debian's kernel for the small guest.
#[must_use]
pub fn kernel() -> String {
    text("/guest/vmlinuz")
}

/// The small guest's first file system.
#[must_use]
pub fn initrd() -> String {
    text("/guest/initrd.cpio")
}

/// The disk image with a whole Debian, if this run has one.
#[must_use]
pub fn debian() -> Option<PathBuf> {
    let path = at("/dev/disks/debian");
    path.exists().then_some(path)
}

/// A file system of its own: `a` and `b` are large, `small` is 64 MiB.
#[must_use]
pub fn store(name: &str) -> PathBuf {
    at(&format!("/stores/{name}"))
}
