//! The lab as a QEMU process: its processor, its ports and its disks.

use std::fs::File;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use strake_observe::{OsContext, Result};

use super::LabCommand;
use crate::tool;

/// The lab's memory in MiB: three hosts' worth of test guests, within what small runners have.
const MEMORY_MIB: u32 = 3072;

/// The stores: each its own disk and file system, so that a migration between two crosses devices
/// and the small one can be filled. Sparse files; mounted at `/stores/NAME`.
pub(crate) const STORES: &[(&str, u64)] = &[("a", 8 << 30), ("b", 8 << 30), ("small", 64 << 20)];

/// Everything that the emulation has, with nested virtualisation, and without XSAVE and what needs it:
/// the emulation lets a guest's `xsetbv` through to the register of its host.
const PROCESSOR: &str = "max,+svm,+npt,-xsave,-avx,-avx2,-fma,-f16c,-vaes,-vpclmulqdq,-pku";

/// A running lab. Killed when dropped.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) child: Child,
}

impl Machine {
    /// Starts QEMU. The logs and disks of the run stand in `folder`.
    pub(super) fn start(
        of: &LabCommand,
        kernel: &Path,
        archive: &Path,
        folder: &Path,
    ) -> Result<Self> {
        // If we are killed, the lab must not stay behind.
        let mut qemu = tool::command("setpriv");
        qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", PROCESSOR]);
        qemu.args(["-smp", &of.cpus.to_string(), "-m", &MEMORY_MIB.to_string()]);
        qemu.args([
            "-display",
            "none",
            "-monitor",
            "none",
            "-vga",
            "none",
            "-nodefaults",
        ]);
        qemu.arg("-no-reboot");
        qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(archive);
        qemu.args(["-append", "console=ttyS0 panic=-1 reboot=t quiet"]);
        qemu.arg("-serial")
            .arg(format!("file:{}", folder.join("console.log").display()));
        qemu.args(["-device", "virtio-serial-pci"]);
        // Not `stdio`: the end of our empty standard input would close the port for output too.
        qemu.args(["-chardev", "file,id=output,path=/dev/stdout"]);
        port(&mut qemu, "output");
        for (name, file) in [("control", "control.log"), ("files", "files.tar")] {
            let path = folder.join(file);
            File::create(&path).os("create", path.display())?;
            qemu.arg("-chardev")
                .arg(format!("file,id={name},path={}", path.display()));
            port(&mut qemu, name);
        }
        for (name, size) in STORES {
            let path = folder.join(format!("store-{name}.raw"));
            make_store(&path, *size)?;
            disk(
                &mut qemu,
                &format!("store-{name}"),
                &path,
                "discard=unmap,cache=unsafe",
            );
        }
        for (name, path) in &of.disks {
            disk(&mut qemu, name, path, "snapshot=on,cache=unsafe");
        }
        let log = folder.join("qemu.log");
        let log = File::create(&log).os("create", log.display())?;
        let child = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .os("exec", "qemu-system-x86_64")?;
        Ok(Self { child })
    }

    /// What the command prints.
    pub(super) fn output(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn port(qemu: &mut Command, name: &str) {
    qemu.arg("-device")
        .arg(format!("virtserialport,chardev={name},name={name}"));
}

fn disk(qemu: &mut Command, name: &str, path: &Path, options: &str) {
    // A comma in a path would end the option; QEMU reads it doubled.
    let file = path.display().to_string().replace(',', ",,");
    qemu.arg("-drive").arg(format!(
        "if=none,id={name},format=raw,file={file},{options}"
    ));
    qemu.arg("-device")
        .arg(format!("virtio-blk-pci,drive={name},serial={name}"));
}

fn make_store(path: &Path, size: u64) -> Result<()> {
    let file = File::create(path).os("create", path.display())?;
    file.set_len(size).os("truncate", path.display())?;
    tool::run(
        tool::command("mke2fs")
            .args([
                "-q",
                "-t",
                "ext4",
                "-m",
                "0",
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1",
            ])
            .arg(path),
    )?;
    Ok(())
}
