//! What the lab host is made of: a cached base (busybox, kernel modules, its first process) and
//! the files of one run.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use strake_observe::{OsContext, Result};

use crate::cpio::Tree;
use crate::kernel::Kernel;
use crate::observations::{BadFile, PackageUnexpected};
use crate::{packages, programs, tool, workspace};

const INIT: &str = include_str!("init.sh");

/// What a KVM host with taps, bridges, file systems on virtio disks and fault injection needs.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "ext4",
    "kvm",
    "kvm-amd",
    "tun",
    "bridge",
    "loop",
    "dm-mod",
];

/// Programs of this machine that the lab gets too, where they are installed: busybox has none of
/// their kind.
const HOST_PROGRAMS: &[&str] = &["dmsetup", "qemu-img", "mke2fs", "e2fsck"];

/// The base archive, from the cache if nothing that it is made of has changed.
///
/// # Errors
/// If a package or a module cannot be had.
pub(super) fn base(kernel: &Kernel) -> Result<PathBuf> {
    let path = workspace::lab_dir()?.join("base.cpio");
    let programs: Vec<PathBuf> = HOST_PROGRAMS
        .iter()
        .filter_map(|name| tool::path_of(name))
        .collect();
    let inputs = format!("{}\n{MODULES:?}\n{programs:?}\n{INIT}", kernel.version);
    if workspace::is_fresh(&path, &inputs) {
        return Ok(path);
    }
    let mut tree = Tree::default();
    for folder in [
        "proc", "sys", "dev", "tmp", "run", "root", "out", "stores", "var/tmp", "etc",
    ] {
        tree.directory(folder);
    }
    tree.device("dev/console", 5, 1);
    tree.device("dev/null", 1, 3);
    tree.file("init", 0o755, INIT);
    tree.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
    tree.file("etc/group", 0o644, "root:x:0:\n");
    tree.file("bin/busybox", 0o755, busybox()?);
    kernel.add_modules(&mut tree, "lab/modules", MODULES)?;
    for program in &programs {
        programs::add(
            &mut tree,
            program,
            &format!("/usr/local/bin/{}", name_of(program)),
        )?;
    }
    write(&tree, &path, None)?;
    workspace::mark_fresh(&path, &inputs)?;
    Ok(path)
}

/// Debian's static busybox.
///
/// # Errors
/// If its package cannot be had.
pub(crate) fn busybox() -> Result<Vec<u8>> {
    let dir = packages::unpacked("busybox-static")?;
    ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .find_map(|place| fs::read(dir.join(place)).ok())
        .ok_or_else(|| {
            PackageUnexpected {
                package: "busybox-static".to_owned(),
                wanted: "busybox".to_owned(),
            }
            .into()
        })
}

/// Adds a host file, or a folder with all below it. Programs come with their libraries.
pub(super) fn add_file(tree: &mut Tree, host: &Path, place: &str) -> Result<()> {
    let bad = |reason: &str| BadFile {
        given: format!("{}:{place}", host.display()),
        reason: reason.to_owned(),
    };
    if !place.starts_with('/') {
        return Err(bad("the path in the lab is not absolute").into());
    }
    if host.is_dir() {
        tree.directory(place);
        for entry in fs::read_dir(host).os("readdir", host.display())?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            add_file(tree, &entry.path(), &format!("{place}/{name}"))?;
        }
        return Ok(());
    }
    if !host.is_file() {
        return Err(bad("there is no such file on the host").into());
    }
    if programs::is_elf(host) {
        return programs::add(tree, host, place);
    }
    let content = fs::read(host).os("read", host.display())?;
    tree.file(place, mode_of(host), content);
    Ok(())
}

/// Writes the archive, after a copy of `before` if there is one.
pub(crate) fn write(tree: &Tree, path: &Path, before: Option<&Path>) -> Result<()> {
    let part = path.with_extension("part");
    if let Some(before) = before {
        fs::copy(before, &part).os("copy", before.display())?;
    } else {
        let _ = fs::remove_file(&part);
    }
    let file = File::options()
        .create(true)
        .append(true)
        .open(&part)
        .os("open", part.display())?;
    let mut out = std::io::BufWriter::new(file);
    tree.write(&mut out)
        .and_then(|()| out.flush())
        .os("write", part.display())?;
    fs::rename(&part, path).os("rename", path.display())
}

fn mode_of(file: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(file).map_or(0o644, |metadata| metadata.permissions().mode() & 0o777)
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
