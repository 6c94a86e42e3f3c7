//! Where things are: the workspace, the lab's cache, the built programs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use strake_observe::{OsContext, Result};

/// The workspace's root folder.
#[must_use]
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// The cache of the lab: packages, images, the last run. It stays under the workspace's `target`
/// even if cargo builds elsewhere, so that everyone shares one.
///
/// # Errors
/// If it cannot be made.
pub fn lab_dir() -> Result<PathBuf> {
    let dir = root().join("target/lab");
    fs::create_dir_all(&dir).os("mkdir", dir.display())?;
    Ok(dir)
}

/// Where cargo puts what it builds.
#[must_use]
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// A lock that keeps two runs from building the same cached thing at once. Held until dropped.
#[derive(Debug)]
pub struct CacheLock(#[allow(dead_code)] File);

impl CacheLock {
    /// Waits until it is ours.
    ///
    /// # Errors
    /// If the lock file cannot be opened or locked.
    pub fn take() -> Result<Self> {
        let path = lab_dir()?.join(".lock");
        let file = File::create(&path).os("open", path.display())?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .map_err(std::io::Error::from)
            .os("flock", path.display())?;
        Ok(Self(file))
    }
}

/// Whether a cached file was made from just these inputs: a neighbour `FILE.inputs` says so.
#[must_use]
pub fn is_fresh(file: &Path, inputs: &str) -> bool {
    file.exists() && fs::read_to_string(inputs_of(file)).is_ok_and(|text| text == inputs)
}

/// Notes which inputs a cached file was made from.
///
/// # Errors
/// If the neighbour cannot be written.
pub fn mark_fresh(file: &Path, inputs: &str) -> Result<()> {
    let path = inputs_of(file);
    fs::write(&path, inputs).os("write", path.display())
}

fn inputs_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".inputs");
    PathBuf::from(name)
}
