//! A datastore's directory.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access, statvfs};
use strake_api::spec::Bytes;
use strake_observe::{Because, Observation, OsContext, Result};

use crate::config::show;
use crate::observations::{DatastoreFull, DatastoreRefused, DatastoreUnavailable};

/// What must stay free on a datastore beyond what a migration will copy: the guest goes on
/// writing, and a store that is full to the last byte harms every VM on it.
pub(crate) const ROOM_MARGIN: u64 = 16 << 20;

/// The room on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) size: u64,
    pub(crate) free: u64,
}

/// Checks that `path` can be a datastore and gives its canonical form.
pub(crate) fn admit(name: &str, path: &str) -> Result<PathBuf> {
    let refused = |reason: &str| DatastoreRefused {
        datastore: name.to_owned(),
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    if !path.starts_with('/') {
        return Err(refused("it is not an absolute path").into());
    }
    let canonical = std::fs::canonicalize(path)
        .os("open", path)
        .because_of(|| refused("it cannot be reached"))?;
    if !canonical.is_dir() {
        return Err(refused("it is not a directory").into());
    }
    if canonical.to_str().is_none() {
        return Err(refused("its path is not UTF-8").into());
    }
    access(&canonical, Access::WRITE_OK | Access::EXEC_OK)
        .os("access", path)
        .because_of(|| refused("the daemon may not write to it"))?;
    Ok(canonical)
}

/// The room on the datastore.
pub(crate) fn room(name: &str, path: &Path) -> Result<Room> {
    let unavailable = || DatastoreUnavailable {
        datastore: name.to_owned(),
        path: show(path),
    };
    let is_directory = std::fs::metadata(path)
        .os("stat", path.display())
        .because_of(unavailable)?
        .is_dir();
    if !is_directory {
        return Err(unavailable().into());
    }
    let stat = statvfs(path)
        .os("statvfs", path.display())
        .because_of(unavailable)?;
    Ok(Room {
        size: stat.f_blocks.saturating_mul(stat.f_frsize),
        free: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

/// Refuses a datastore that has not the room for `bytes` and the margin.
pub(crate) fn require_room(name: &str, path: &Path, bytes: u64) -> Result<()> {
    let room = room(name, path)?;
    let needed = bytes.saturating_add(ROOM_MARGIN);
    if room.free < needed {
        return Err(DatastoreFull {
            datastore: name.to_owned(),
            free: room.free,
            needed,
            shortage: format!(
                "it has {} free and needs {}",
                rounded(room.free),
                rounded(needed)
            ),
        }
        .into());
    }
    Ok(())
}

/// Bytes for people, rounded down to whole mebibytes where there are any.
fn rounded(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{bytes} bytes"),
        whole => Bytes(whole << 20).to_string(),
    }
}

/// Makes the creation or removal of names in `directory` durable.
pub(crate) fn sync(directory: &Path) -> Result<()> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .os("fsync", directory.display())
}

/// Whether both names are of one file or directory.
pub(crate) fn same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| {
        std::fs::metadata(path)
            .map(|meta| (meta.dev(), meta.ino()))
            .ok()
    };
    identity(a).is_some() && identity(a) == identity(b)
}

/// Removes a file that may already be gone.
pub(crate) fn remove_file(path: &Path) -> Result<(), Observation> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.os("unlink", path.display()),
    }
}
