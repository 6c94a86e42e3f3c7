//! The test guests: Debian's own kernel with a small first file system of ours, and a whole Debian
//! on a disk image.

pub mod debian;

use std::fs;
use std::path::{Path, PathBuf};

use strake_observe::{OsContext, Result};

use crate::cpio::Tree;
use crate::{build, kernel, lab, workspace};

const INIT: &str = include_str!("init.sh");

/// What the guest uses of our devices, and what turns the power button into an event.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "button",
    "evdev",
];

/// A guest to be booted from files of the host.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Debian's unmodified kernel.
    pub kernel: PathBuf,
    /// Its first file system.
    pub initrd: PathBuf,
}

/// The small guest, made at the first use and when one of its programs changed.
///
/// # Errors
/// If a package or a program of ours cannot be had.
pub fn small() -> Result<Guest> {
    let programs = build::guest_programs()?;
    let _lock = workspace::CacheLock::take()?;
    let kernel = kernel::cloud()?;
    let initrd = workspace::lab_dir()?.join("guest.cpio");
    let inputs = format!(
        "{}\n{MODULES:?}\n{INIT}\n{}",
        kernel.version,
        ages(&programs)
    );
    if !workspace::is_fresh(&initrd, &inputs) {
        let mut tree = Tree::default();
        for folder in ["proc", "sys", "dev", "etc"] {
            tree.directory(folder);
        }
        tree.device("dev/console", 5, 1);
        tree.device("dev/null", 1, 3);
        tree.file("init", 0o755, INIT);
        tree.file("etc/passwd", 0o644, "root:x:0:0:root:/:/bin/sh\n");
        tree.file("bin/busybox", 0o755, lab::busybox()?);
        kernel.add_modules(&mut tree, "guest/modules", MODULES)?;
        for program in &programs {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            crate::programs::add(&mut tree, program, &format!("/strake/{name}"))?;
        }
        lab::write_archive(&tree, &initrd, None)?;
        workspace::mark_fresh(&initrd, &inputs)?;
    }
    Ok(Guest {
        kernel: kernel.image,
        initrd,
    })
}

fn ages(files: &[PathBuf]) -> String {
    let age = |file: &Path| {
        let metadata = fs::metadata(file).ok()?;
        Some(format!(
            "{} {:?}\n",
            metadata.len(),
            metadata.modified().ok()?
        ))
    };
    files.iter().filter_map(|file| age(file)).collect()
}

/// Removes a half-made thing of the cache, whatever it is.
fn remove(path: &Path) -> Result<()> {
    if path.is_dir() {
        return fs::remove_dir_all(path).os("rmdir", path.display());
    }
    // A dangling link is there too.
    if path.symlink_metadata().is_ok() {
        return fs::remove_file(path).os("unlink", path.display());
    }
    Ok(())
}
