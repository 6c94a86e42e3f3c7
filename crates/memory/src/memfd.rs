//! Creation of the memfd.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use strake_observe::{Because, OsContext, Result};

use crate::observations::CreateFailed;
use crate::ram::check_size;

/// Creates a memfd of `size` bytes whose size nobody can change any more. No page is allocated.
///
/// # Errors
/// [`CreateFailed`], or a size that no guest can have.
pub fn create_memfd(name: &str, size: u64) -> Result<OwnedFd> {
    check_size(size)?;
    create(name, size).because_of(|| CreateFailed {
        name: name.to_owned(),
        size,
    })
}

fn create(name: &str, size: u64) -> Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .os("memfd_create", name)?;
    ftruncate(&fd, size).os("ftruncate", name)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .os("fcntl(F_ADD_SEALS)", name)?;
    Ok(fd)
}
