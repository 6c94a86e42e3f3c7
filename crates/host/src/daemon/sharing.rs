//! Which files disks may have below them, and who shares a file with whom.
//!
//! A file that is below a disk must not change: the disk would read something else. So no disk may
//! be written whose file is below another disk, whether or not either VM runs now; while they run,
//! locks see to it, and against other programs too.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use strake_observe::Result;

use super::Host;
use super::create::in_use;
use crate::Binding;
use crate::storage::chain;

impl Host {
    /// Which files may be below others: those in a datastore of this host, and those that this daemon
    /// itself has put below others. Images' headers name them, and whoever made an image must not
    /// reach any other file by it.
    pub(super) fn allowed_below(&self) -> Result<impl Fn(&Path) -> bool + use<>> {
        let stores: Vec<PathBuf> = self
            .inventory
            .datastores()?
            .into_iter()
            .map(|store| store.path)
            .collect();
        let ours: HashSet<PathBuf> = self
            .inventory
            .vms()?
            .iter()
            .flat_map(|vm| &vm.disks)
            .flat_map(|disk| {
                let layers = disk.layers.iter().map(|layer| &layer.image);
                layers.chain([&disk.image])
            })
            .filter_map(|image| image.file().ok())
            .map(Path::to_owned)
            .collect();
        Ok(move |path: &Path| {
            ours.contains(path) || stores.iter().any(|store| path.starts_with(store))
        })
    }

    /// Whether an image is a layer of some disk, or below the image of one.
    pub(super) fn is_below_others(&self, image: &Binding) -> Result<bool> {
        let path = image.file()?;
        let allowed = self.allowed_below()?;
        let is_below = |other: &Binding| {
            let looks = chain::look(other, &allowed).ok().flatten();
            looks.is_some_and(|looks| looks.files.iter().skip(1).any(|file| same(file, path)))
        };
        Ok(self
            .inventory
            .vms()?
            .iter()
            .flat_map(|vm| &vm.disks)
            .any(|disk| {
                let mut layers = disk.layers.iter().map(|layer| &layer.image);
                layers.any(|layer| layer.location == image.location || is_below(layer))
                    || is_below(&disk.image)
            }))
    }

    /// Whether the image of another disk than this one has a file below it.
    pub(super) fn is_below_other_disks(&self, vm: &str, name: &str, path: &Path) -> Result<bool> {
        let allowed = self.allowed_below()?;
        let vms = self.inventory.vms()?;
        let mut images = vms
            .iter()
            .flat_map(|of| of.disks.iter().map(move |disk| (of, disk)))
            .filter(|(of, disk)| of.name != vm || disk.name != name)
            .flat_map(|(_, disk)| {
                let layers = disk.layers.iter().map(|layer| &layer.image);
                layers.chain([&disk.image])
            });
        Ok(images.any(|image| {
            let looks = chain::look(image, &allowed).ok().flatten();
            looks.is_some_and(|looks| looks.files.iter().any(|file| same(file, path)))
        }))
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
                let mut layers = disk
                    .layers
                    .iter()
                    .filter_map(|layer| layer.image.file().ok());
                if !read_only && layers.any(|layer| same(layer, top)) {
                    return Err(in_use(top, &format!("{user}, which has it below its own")));
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
