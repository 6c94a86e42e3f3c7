//! A whole Debian on a disk image: GPT, one ext4 partition, the distribution's own kernel, initial
//! RAM disk and systemd. A guest is booted from it with `boot.from = "disk"`.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use strake_observe::{OsContext, Result};

use super::remove;
use crate::{lab, setup, tool, workspace};

/// The distribution's release; the lab itself takes whatever this machine runs.
const RELEASE: &str = "bookworm";

/// What `debootstrap --variant=minbase` lacks of a machine that boots by itself.
const PACKAGES: &str =
    "systemd-sysv,dbus,udev,kmod,zstd,initramfs-tools,iproute2,linux-image-cloud-amd64";

const SIZE: u64 = 1536 << 20;
const PARTITION_START: u64 = 1 << 20;
/// A GPT keeps its second copy in the last 33 sectors.
const PARTITION_END: u64 = SIZE - (1 << 20);

/// Tells the test over the serial console, and gives it a shell, as the small guest does.
const UNIT: &str = "[Unit]
Description=Answers Strake's tests
After=network.target
[Service]
ExecStart=/usr/local/sbin/strake-test
[Install]
WantedBy=multi-user.target
";

const SCRIPT: &str = "#!/bin/sh
for word in $(cat /proc/cmdline); do
    case $word in
    strake.ip=*)
        for nic in /sys/class/net/e*; do
            ip addr add \"${word#strake.ip=}\" dev \"${nic##*/}\"
            ip link set \"${nic##*/}\" up
        done ;;
    esac
done
echo \"debian: ready, $(nproc) vCPUs, init $(cat /proc/1/comm)\" >/dev/ttyS0
exec /usr/local/sbin/busybox nc -ll -p 1000 -e /bin/sh
";

/// The image, built at the first use: about a minute and a half, most of it downloads.
///
/// # Errors
/// If a tool fails or we are not root, which debootstrap must be.
pub fn image() -> Result<PathBuf> {
    let _lock = workspace::CacheLock::take()?;
    let path = workspace::lab_dir()?.join("debian.raw");
    let inputs = format!("{RELEASE}\n{PACKAGES}\n{SIZE}\n{UNIT}{SCRIPT}");
    if workspace::is_fresh(&path, &inputs) {
        return Ok(path);
    }
    setup::require(&["debootstrap", "mke2fs", "sfdisk"])?;
    let tree = workspace::lab_dir()?.join("debian.root");
    if !workspace::is_fresh(&tree, PACKAGES) {
        eprintln!("lab: building a Debian image with debootstrap (once, about a minute)");
        remove(&tree)?;
        tool::run(
            tool::command("debootstrap")
                .arg("--variant=minbase")
                .arg(format!("--include={PACKAGES}"))
                .arg(RELEASE)
                .arg(&tree),
        )?;
        workspace::mark_fresh(&tree, PACKAGES)?;
    }
    configure(&tree)?;
    make_disk(&tree, &path)?;
    workspace::mark_fresh(&path, &inputs)?;
    Ok(path)
}

fn configure(tree: &Path) -> Result<()> {
    let put = |place: &str, mode: u32, content: &[u8]| -> Result<()> {
        let path = tree.join(place);
        fs::write(&path, content).os("write", path.display())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).os("chmod", path.display())
    };
    put("etc/hostname", 0o644, b"debian\n")?;
    put("etc/fstab", 0o644, b"LABEL=strake-root / ext4 rw 0 1\n")?;
    put("usr/local/sbin/busybox", 0o755, &lab::busybox()?)?;
    put("usr/local/sbin/strake-test", 0o755, SCRIPT.as_bytes())?;
    put(
        "etc/systemd/system/strake-test.service",
        0o644,
        UNIT.as_bytes(),
    )?;
    let wants = tree.join("etc/systemd/system/multi-user.target.wants/strake-test.service");
    remove(&wants)?;
    std::os::unix::fs::symlink("/etc/systemd/system/strake-test.service", &wants)
        .os("symlink", wants.display())
}

fn make_disk(tree: &Path, path: &Path) -> Result<()> {
    let part = path.with_extension("part");
    remove(&part)?;
    let file = File::create(&part).os("create", part.display())?;
    file.set_len(SIZE).os("truncate", part.display())?;
    let script = part.with_extension("sfdisk");
    let sectors = (PARTITION_END - PARTITION_START) / 512;
    fs::write(
        &script,
        format!(
            "label: gpt\nstart={}, size={sectors}, type=linux\n",
            PARTITION_START / 512
        ),
    )
    .os("write", script.display())?;
    let input = File::open(&script).os("open", script.display())?;
    let output = tool::command("sfdisk")
        .arg("--quiet")
        .arg(&part)
        .stdin(input)
        .output()
        .os("exec", "sfdisk")?;
    remove(&script)?;
    if !output.status.success() {
        return Err(crate::observations::ToolFailed {
            command: format!("sfdisk {}", part.display()),
            status: output.status.to_string(),
            tail: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
        .into());
    }
    tool::run(
        tool::command("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-L", "strake-root", "-d"])
            .arg(tree)
            .args(["-E", &format!("offset={PARTITION_START}")])
            .arg(&part)
            .arg(format!("{}k", (PARTITION_END - PARTITION_START) / 1024)),
    )?;
    fs::rename(&part, path).os("rename", path.display())
}
