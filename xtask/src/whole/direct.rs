//! The lab's layout on this machine, below a folder of its own, for a host whose KVM runs stock
//! kernels.
//!
//! The command runs in its own mount, process and network namespaces: stores, taps and addresses
//! are its own, and when it ends, or is killed at its limit, everything that it started or mounted
//! goes with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use strake_observe::{OsContext, Result};

use crate::lab::{LabCommand, Output, STORES, busybox};
use crate::observations::DirectTimedOut;
use crate::{setup, tool};

/// Names the folder that stands for `/`, to the tests.
const PREFIX: &str = "STRAKE_TEST_PREFIX";

/// Makes the namespaces ready and runs the rest of its words. `$PREFIX` is the folder.
const SCRIPT: &str = r#"
ip link set lo up
for image in "$STRAKE_TEST_PREFIX"/store-*.raw; do
    name=${image##*/store-}
    folder=$STRAKE_TEST_PREFIX/stores/${name%.raw}
    mkdir -p "$folder"
    mount -t ext4 -o loop,noatime "$image" "$folder" || exit 125
done
"$@"
"#;

pub(super) fn run(command: &LabCommand) -> Result<i32> {
    setup::require(&["mke2fs", "dmsetup", "qemu-img", "ip"])?;
    // Built into some kernels, loaded already on others: what is missing shows itself soon.
    for module in ["tun", "loop", "dm_mod"] {
        let _ = tool::run(tool::command("modprobe").arg(module));
    }
    let folder = Folder::make()?;
    folder.lay_out(command)?;
    let mut path = folder.place("/usr/bin").into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut unshare = tool::command("unshare");
    unshare
        .args(["--mount", "--net", "--pid", "--fork", "--kill-child"])
        .args(["--mount-proc", "sh", "-c", SCRIPT, "sh"])
        .args(&command.words)
        .env("PATH", path)
        .env(PREFIX, &folder.0)
        .envs(command.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null());
    if command.output == Output::Quiet {
        unshare.stdout(Stdio::null()).stderr(Stdio::null());
    }
    let child = unshare.spawn().os("exec", "unshare")?;
    let status = to_the_end(child, command.timeout)?;
    if let Some(out) = &command.files_out {
        fs::create_dir_all(out).os("mkdir", out.display())?;
        tool::run(
            tool::command("cp")
                .arg("-r")
                .arg(folder.place("/out/."))
                .arg(out),
        )?;
    }
    Ok(status)
}

fn to_the_end(mut child: Child, limit: Duration) -> Result<i32> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().os("waitpid", "unshare")? {
            return Ok(status.code().unwrap_or(1));
        }
        if started.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            return Err(DirectTimedOut {
                limit_s: limit.as_secs(),
            }
            .into());
        }
        thread::sleep(Duration::from_millis(30));
    }
}

/// The folder that stands for `/`. Gone when dropped.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self> {
        // Short: a socket's path below it has 107 bytes at most.
        let path = PathBuf::from(format!("/tmp/sk{}", std::process::id()));
        fs::create_dir_all(&path).os("mkdir", path.display())?;
        Ok(Self(path))
    }

    fn place(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    fn lay_out(&self, command: &LabCommand) -> Result<()> {
        for folder in ["tmp", "out", "stores", "usr/bin", "dev/disks"] {
            let path = self.place(folder);
            fs::create_dir_all(&path).os("mkdir", path.display())?;
        }
        for (host, place) in &command.files {
            let to = self.place(place);
            if let Some(folder) = to.parent() {
                fs::create_dir_all(folder).os("mkdir", folder.display())?;
            }
            copy(host, &to)?;
        }
        // The tests use what a host of theirs has: busybox among it.
        let to = self.place("usr/bin/busybox");
        fs::write(&to, busybox()?).os("write", to.display())?;
        tool::run(tool::command("chmod").arg("755").arg(&to))?;
        for (name, image) in &command.disks {
            copy(image, &self.place("dev/disks").join(name))?;
        }
        for (name, size) in STORES {
            let path = self.0.join(format!("store-{name}.raw"));
            let file = File::create(&path).os("create", path.display())?;
            file.set_len(*size).os("truncate", path.display())?;
            tool::run(
                tool::command("mke2fs")
                    .args(["-q", "-F", "-t", "ext4", "-m", "0"])
                    .arg(&path),
            )?;
        }
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // The mounts went with their namespace.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A copy that keeps holes and mode: what a test writes must not reach the cache.
fn copy(from: &Path, to: &Path) -> Result<()> {
    tool::run(
        tool::command("cp")
            .args(["-r", "--sparse=always", "--reflink=auto"])
            .arg(from)
            .arg(to),
    )
    .map(drop)
}
