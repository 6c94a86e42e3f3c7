//! Removal of files that this daemon made or was told to remove, long after it learnt of them.
//!
//! What bears the name now may be another file by then, and what is the same file may have got
//! another user. So a file goes only if it is the one that is meant, and only under a lock that
//! nobody else can have at the same time. Linux cannot remove "this name if it is that file" in one
//! step: between the last look and the removal remains a moment in which somebody with the right
//! to write to the directory could exchange the file.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use strake_observe::{OsContext, Result};

use super::identity::FileIdentity;
use super::image::{self, Mode};
use super::store;

/// How long to wait for a lock. A monitor lets a migrated disk's source go when each of the disk's
/// queues has seen the new one, and its kernel takes the old rings down after that.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why nobody is harmed by a removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The file may have users: it goes only if nobody has it locked.
    Unused,
    /// The file was made for a purpose that has failed: whoever has it open works for that.
    Ours,
}

/// What a removal found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removal {
    /// The file has no such name any more.
    Gone,
    /// The name is another file's, which stays.
    Another,
}

/// Removes `path` if it is the file `meant`.
///
/// # Errors
/// Somebody else has it locked, or the file system refuses.
pub(crate) fn remove(path: &Path, meant: &FileIdentity, claim: Claim) -> Result<Removal> {
    match FileIdentity::at(path)? {
        None => return Ok(Removal::Gone),
        Some(found) if !found.is(meant) => return Ok(Removal::Another),
        Some(_) => {}
    }
    // Held until the name is gone: the lock lives as long.
    let _file = match claim {
        Claim::Ours => None,
        Claim::Unused => {
            let Some(file) = open(path)? else {
                return Ok(Removal::Gone);
            };
            if !FileIdentity::of(&file, path)?.is(meant) {
                return Ok(Removal::Another);
            }
            image::take_lock(&file, path, Mode::Write, PATIENCE, somebody)?;
            // While the lock was waited for, the name may have passed on.
            match FileIdentity::at(path)? {
                None => return Ok(Removal::Gone),
                Some(found) if !found.is(meant) => return Ok(Removal::Another),
                Some(_) => Some(file),
            }
        }
    };
    unlink(path)?;
    Ok(Removal::Gone)
}

/// Removes a file of a name that only Strake gives, whatever file it is, unless it is in use.
///
/// # Errors
/// Somebody has it locked, or the file system refuses.
pub(crate) fn remove_stale(path: &Path) -> Result<()> {
    let Some(file) = open(path)? else {
        return Ok(());
    };
    image::take_lock(&file, path, Mode::Write, PATIENCE, somebody)?;
    unlink(path)
}

fn somebody() -> String {
    "another process, which has it locked".to_owned()
}

fn open(path: &Path) -> Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path);
    match opened {
        Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(None),
        file => Ok(Some(file.os("open", path.display())?)),
    }
}

fn unlink(path: &Path) -> Result<()> {
    store::remove_file(path)?;
    match path.parent() {
        Some(directory) => store::sync(directory),
        None => Ok(()),
    }
}
