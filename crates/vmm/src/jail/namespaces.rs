//! Namespaces of the monitor's own, and an empty root.
#![allow(unsafe_code)] // `unshare`.

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move,
    mount_remount, unmount,
};
use rustix::process::{chdir, chroot, getegid, geteuid, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use strake_observe::{Because, OsContext, Result};

use crate::observations::JailReduced;

/// Directories that every host has; one of them is covered with the empty root.
const MOUNT_POINTS: [&str; 3] = ["/run", "/tmp", "/proc"];

/// As root.
pub(super) fn enter() -> Result<()> {
    unshare(own())?;
    empty_root()
}

/// As an ordinary user: in a user namespace in which only that user exists.
pub(super) fn enter_as_user() -> Result<()> {
    as_user().because_of(|| JailReduced {
        missing: "namespaces of its own and an empty root directory".to_owned(),
    })
}

fn as_user() -> Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    unshare(UnshareFlags::NEWUSER)?;
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("{uid} {uid} 1"))?;
    write("/proc/self/gid_map", &format!("{gid} {gid} 1"))?;
    unshare(own())?;
    empty_root()
}

fn own() -> UnshareFlags {
    UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS
}

fn unshare(flags: UnshareFlags) -> Result<()> {
    // SAFETY: the process has one thread and none of these flags concern its descriptors.
    unsafe { unshare_unsafe(flags) }.os("unshare", format!("{flags:?}"))
}

/// Makes an empty, read-only file system the root.
fn empty_root() -> Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .os("mount", "/")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let place = MOUNT_POINTS.into_iter().find(|place| {
        mount(
            "strake",
            *place,
            "tmpfs",
            flags,
            c"size=4k,nr_inodes=1,mode=0555",
        )
        .is_ok()
    });
    let Some(place) = place else {
        return Err(Errno::NOENT).os("mount", MOUNT_POINTS.join(", "));
    };
    chdir(place).os("chdir", place)?;
    match pivot_root(".", ".") {
        // The old root lies over the new one now, as the current directory's mount.
        Ok(()) => unmount(".", UnmountFlags::DETACH).os("umount", "the host's root")?,
        // A host that runs from its initial RAM disk: that root cannot be put away, but covered.
        Err(Errno::INVAL) => {
            mount_move(".", "/").os("mount", "the empty root")?;
            chroot(".").os("chroot", "the empty root")?;
        }
        Err(error) => return Err(error).os("pivot_root", place),
    }
    chdir("/").os("chdir", "/")?;
    mount_remount("/", flags | MountFlags::RDONLY, c"").os("mount", "the empty root")
}

fn write(path: &str, text: &str) -> Result<()> {
    let file = rustix::fs::openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .os("open", path)?;
    rustix::io::write(&file, text.as_bytes()).os("write", path)?;
    Ok(())
}
