//! The sockets at which clients find an export. The monitor is handed them; it binds nothing.
//!
//! Whoever may connect may read and write the disk. A unix socket therefore belongs to the user and
//! the group that its directory belongs to, and nobody else may connect: to let a VMM in, give its
//! user the directory. It is made under another name and then renamed, so that it never is there with
//! other rights, and so that it takes the place of one whose listener is gone.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid};
use strake_observe::{Because, Observation, OsContext, Result};

use crate::config::show;
use crate::observations::ListenRefused;
use crate::storage::store::remove_file;

/// The longest path of a unix socket, in bytes, less the zero at its end.
const PATH_MAX: usize = 107;

/// What a socket is called until it is ready.
const UNFINISHED: &str = ".new";

fn refused(address: &str, reason: impl Into<String>) -> Observation {
    ListenRefused {
        address: address.to_owned(),
        reason: reason.into(),
    }
    .into()
}

/// Refuses a path at which no socket can be made, or at which something is that is none of ours.
pub(crate) fn admit(path: &Path) -> Result<()> {
    let shown = show(path);
    if !path.is_absolute() {
        return Err(refused(&shown, "it is not an absolute path"));
    }
    if path.as_os_str().len() + UNFINISHED.len() > PATH_MAX {
        let most = PATH_MAX - UNFINISHED.len();
        return Err(refused(&shown, format!("it is longer than {most} bytes")));
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.is_dir() {
        return Err(refused(&shown, "its directory does not exist"));
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).os("stat", &shown),
        Ok(meta) if !meta.file_type().is_socket() => {
            Err(refused(&shown, "there is a file of another kind"))
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            Err(refused(&shown, "another program listens there"))
        }
        Ok(_) => Ok(()),
    }
}

/// A listening unix socket at `path`.
pub(crate) fn unix(path: &Path) -> Result<OwnedFd> {
    admit(path)?;
    let shown = show(path);
    let unfinished = PathBuf::from(format!("{shown}{UNFINISHED}"));
    remove_file(&unfinished)?;
    let failed = || ListenRefused {
        address: shown.clone(),
        reason: "it cannot be made".to_owned(),
    };
    let listener = UnixListener::bind(&unfinished)
        .os("bind", unfinished.display())
        .because_of(failed)?;
    let made = give(&unfinished, path)
        .and_then(|()| std::fs::rename(&unfinished, path).os("rename", unfinished.display()));
    match made {
        Ok(()) => Ok(listener.into()),
        Err(seen) => {
            let _ = remove_file(&unfinished);
            Err(seen).because_of(failed)
        }
    }
}

/// The socket is for those to whom the directory belongs.
fn give(socket: &Path, path: &Path) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let owner = std::fs::metadata(directory).os("stat", directory.display())?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660))
        .os("chmod", socket.display())?;
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (Uid::from_raw(owner.uid()), Gid::from_raw(owner.gid()));
        rustix::fs::chown(socket, Some(uid), Some(gid)).os("chown", socket.display())?;
    }
    Ok(())
}

/// A listening TCP socket.
pub(crate) fn tcp(host: &str, port: u16) -> Result<OwnedFd> {
    TcpListener::bind((host, port))
        .os("bind", format!("{host}:{port}"))
        .map(OwnedFd::from)
        .because_of(|| ListenRefused {
            address: format!("{host}:{port}"),
            reason: "the port cannot be had".to_owned(),
        })
}

/// Removes a socket that nobody listens at any more.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() && UnixStream::connect(path).is_err() => {
            remove_file(path)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_takes_the_place_of_a_dead_one_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let first = unix(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        assert!(UnixStream::connect(&path).is_ok());
        assert_eq!(unix(&path).unwrap_err().id(), "host.listen-refused");
        remove(&path).unwrap();
        assert!(path.exists(), "somebody listens there");
        drop(first);
        let second = unix(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(second);
        remove(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        std::fs::write(&path, b"mine").unwrap();
        assert!(unix(&path).is_err());
        remove(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        let long = dir.path().join("x".repeat(120));
        for wrong in [Path::new("a.sock"), Path::new("/nowhere/a.sock"), &long] {
            assert!(unix(wrong).is_err(), "{}", wrong.display());
        }
    }
}
