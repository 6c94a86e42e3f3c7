//! Which files disks may have below them, and who shares a file with whom.
//!
//! A file that is below a disk must not change: the disk would read something else. So no disk may
//! be written whose file is below another disk, whether or not either VM runs now; while they run,
//! locks see to it, and against other programs too.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use strake_observe::Result;

use super::Host;
use super::create::in_use;
use crate::storage::chain;

impl Host {
    /// Which files may be below others: those in a datastore of this host. Images' headers name
    /// them, and whoever made an image must not reach any other file by it.
    pub(super) fn allowed_below(&self) -> Result<impl Fn(&Path) -> bool + use<>> {
        let stores: Vec<PathBuf> = self
            .inventory
            .datastores()?
            .into_iter()
            .map(|store| store.path)
            .collect();
        Ok(move |path: &Path| stores.iter().any(|store| path.starts_with(store)))
    }

    /// Refuses a chain of files, from the top, that a disk of some VM keeps from being used: its
    /// top is another disk or, if it may be written, below one; or a disk that may be written is
    /// below it.
    pub(super) fn refuse_shared(&self, files: &[PathBuf], read_only: bool) -> Result<()> {
        let Some((top, below)) = files.split_first() else {
            return Ok(());
        };
        let allowed = self.allowed_below()?;
        for vm in self.inventory.vms()? {
            for disk in &vm.disks {
                let user = format!("disk '{}' of VM '{}'", disk.name, vm.name);
                let Ok(theirs) = disk.image.file() else {
                    continue;
                };
                // Under other names of the same file, locks tell.
                if theirs == top && !(read_only && disk.read_only) {
                    return Err(in_use(top, &user));
                }
                if !disk.read_only
                    && let Some(shared) = below.iter().find(|file| same(theirs, file))
                {
                    return Err(in_use(shared, &user));
                }
                // A chain that cannot be listed cannot be started either.
                let Ok(Some(looks)) = chain::look(&disk.image, &allowed) else {
                    continue;
                };
                if !read_only && looks.files.iter().skip(1).any(|file| same(file, top)) {
                    return Err(in_use(top, &format!("{user}, which has it below its own")));
                }
            }
        }
        Ok(())
    }
}

/// Whether both are one file, by name or by what the names lead to.
fn same(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.dev(), meta.ino()))
    };
    a == b || identity(a).is_some_and(|a| identity(b) == Some(a))
}
