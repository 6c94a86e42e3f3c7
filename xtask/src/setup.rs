//! What a fresh Debian machine lacks: programs that we install, and packages that we only unpack.

use std::process::Command;

use strake_observe::Result;

use crate::observations::ToolsMissing;
use crate::tool;

/// Programs that the commands run on the host, and the Debian packages that bring them. The one
/// place where this list stands.
const TOOLS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("nbdkit", "nbdkit"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("mke2fs", "e2fsprogs"),
    ("debootstrap", "debootstrap"),
    ("sfdisk", "fdisk"),
    ("dmsetup", "dmsetup"),
    ("strip", "binutils"),
    ("xz", "xz-utils"),
    ("cc", "gcc"),
    ("c++", "g++"),
    ("ip", "iproute2"),
];

/// Installs what is missing of the tools named, or of all if none is.
///
/// # Errors
/// If something is missing and we are not root, or apt fails.
pub fn require(tools: &[&str]) -> Result<()> {
    let missing: Vec<&(&str, &str)> = TOOLS
        .iter()
        .filter(|(tool, _)| tools.is_empty() || tools.contains(tool))
        .filter(|(tool, _)| !tool::exists(tool))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    if !rustix::process::geteuid().is_root() {
        return Err(ToolsMissing {
            tools: missing
                .iter()
                .map(|(tool, _)| *tool)
                .collect::<Vec<_>>()
                .join(", "),
            packages: packages.join(" "),
        }
        .into());
    }
    eprintln!("setup: installing {}", packages.join(" "));
    if install(&packages).is_err() {
        // The package lists of a fresh machine may be absent or old.
        tool::run(apt().arg("update"))?;
        install(&packages)?;
    }
    Ok(())
}

/// All tools at once: what continuous integration does first.
///
/// # Errors
/// As [`require`].
pub fn all() -> Result<()> {
    require(&[])
}

fn install(packages: &[&str]) -> Result<String> {
    tool::run(
        apt()
            .args(["install", "--yes", "--no-install-recommends"])
            .args(packages),
    )
}

/// apt-get that asks nothing.
#[must_use]
pub fn apt() -> Command {
    let mut command = tool::command("apt-get");
    command
        .arg("--quiet")
        .env("DEBIAN_FRONTEND", "noninteractive");
    command
}
