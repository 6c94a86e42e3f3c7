//! Which file a file is.
//!
//! A path says where a file is looked for, not which one it is: between two looks somebody may
//! have put another one in its place. Whatever is destroyed or declared authoritative long after it
//! was made is compared with what was recorded then.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use strake_observe::{OsContext, Result};

/// A file's identity. The inode's number alone is not one: file systems give it again as soon as
/// the file is gone, often to the next file that is created. The time of birth tells the two apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// The file system's device number, which another boot may give to another file system.
    pub dev: u64,
    /// The boot in which that number counts.
    pub boot: String,
    /// The inode's number.
    pub ino: u64,
    /// When it was created, in nanoseconds since the epoch, where the file system knows.
    pub born_ns: Option<u64>,
}

impl FileIdentity {
    /// The identity of an open file.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let meta = file.metadata().os("fstat", path.display())?;
        Ok(Self::from_meta(&meta))
    }

    /// The identity of what `path` names now, without following a link at its end; `None` if there
    /// is nothing.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn at(path: &Path) -> Result<Option<Self>> {
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            meta => Ok(Some(Self::from_meta(&meta.os("stat", path.display())?))),
        }
    }

    fn from_meta(meta: &Metadata) -> Self {
        let born = meta.created().ok();
        Self {
            dev: meta.dev(),
            boot: boot_id(),
            ino: meta.ino(),
            born_ns: born
                .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
                .and_then(|since| u64::try_from(since.as_nanos()).ok()),
        }
    }

    /// Whether both are certainly the same file. After a reboot the device's number says nothing;
    /// then only the time of birth can.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let same_boot = self.boot == other.boot;
        let born_alike = self.born_ns == other.born_ns;
        let placed_alike = if same_boot {
            self.dev == other.dev
        } else {
            self.born_ns.is_some()
        };
        self.ino == other.ino && born_alike && placed_alike
    }
}

/// What tells that nobody has written to a file in between: its size and when it was last changed. Not
/// enough against somebody who forges times, which only root and the owner can.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Bytes.
    pub size: u64,
    /// When its content was last changed, in seconds since the epoch and nanoseconds.
    pub changed: (i64, i64),
}

impl Stamp {
    /// Of an open file.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let meta = file.metadata().os("fstat", path.display())?;
        Ok(Self {
            size: meta.len(),
            changed: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_itself_under_every_name_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&a).unwrap();
        let first = FileIdentity::of(&file, &a).unwrap();
        std::fs::rename(&a, &b).unwrap();
        assert!(FileIdentity::at(&a).unwrap().is_none());
        assert!(first.is(&FileIdentity::at(&b).unwrap().unwrap()));
        File::create(&a).unwrap();
        assert!(!first.is(&FileIdentity::at(&a).unwrap().unwrap()));
    }

    #[test]
    fn an_inode_that_was_given_again_is_another_file() {
        let file = FileIdentity {
            dev: 1,
            boot: "this".into(),
            ino: 7,
            born_ns: Some(5),
        };
        let but = |change: &dyn Fn(&mut FileIdentity)| {
            let mut other = file.clone();
            change(&mut other);
            other
        };
        assert!(file.is(&file));
        assert!(!file.is(&but(&|other| other.born_ns = Some(6))));
        assert!(!file.is(&but(&|other| other.dev = 2)));
        // Device numbers change with a reboot; births do not.
        let rebooted = but(&|other| {
            other.dev = 2;
            other.boot = "next".into();
        });
        assert!(file.is(&rebooted));
        let unborn = but(&|other| other.born_ns = None);
        let rebooted = FileIdentity {
            boot: "next".into(),
            ..unborn.clone()
        };
        assert!(unborn.is(&unborn));
        assert!(!unborn.is(&rebooted));
    }
}
