//! One daemon for each state directory and each run directory.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use strake_observe::{OsContext, Result};

use crate::config::show;
use crate::observations::AlreadyRunning;

/// Holds a directory for as long as it lives.
#[derive(Debug)]
pub(crate) struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    pub(crate) fn take(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory).os("mkdir", directory.display())?;
        let path = directory.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .os("open", path.display())?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let _ = (&mut file).take(64).read_to_string(&mut holder);
                return Err(AlreadyRunning {
                    directory: show(directory),
                    holder: holder.trim().to_owned(),
                }
                .into());
            }
            Err(error) => return Err(error).os("flock", path.display()),
        }
        file.set_len(0).os("ftruncate", path.display())?;
        writeln!(file, "pid {}", std::process::id()).os("write", path.display())?;
        Ok(Self { _file: file })
    }
}
