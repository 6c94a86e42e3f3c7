//! A guest of another VMM on one of our disks: Debian's kernel under Debian's QEMU, by software
//! emulation, with an export as its `vhost-user-blk` disk. It writes and verifies without pause while
//! the disk is moved back and forth, and while the export's monitor is killed under it.
//!
//! `cargo xtask test` brings the guest (`STRAKE_GUEST_KERNEL` and `STRAKE_GUEST_INITRD`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use strake_api::job::{MigrationLimits, Phase};
use strake_api::rest::{AddDatastore, CreateExport, MigrateDisk, VmState};
use strake_host::{Host, HostConfig};

const SIZE: u64 = 64 << 20;

/// Emulation on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// A guest and its serial console.
struct Guest {
    qemu: Child,
    input: ChildStdin,
    said: Arc<Mutex<String>>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            eprintln!("---- the guest said\n{}", self.said.lock().unwrap());
        }
    }
}

impl Guest {
    fn boot(kernel: &str, initrd: &str, socket: &Path) -> Self {
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "256"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
            .args(["-machine", "q35,memory-backend=mem"])
            .args(["-kernel", kernel, "-initrd", initrd])
            .args(["-append", "console=ttyS0 panic=-1"])
            .args(["-chardev", "stdio,id=console", "-serial", "chardev:console"])
            .arg("-chardev")
            .arg(format!(
                "socket,id=disk,path={},reconnect=1",
                socket.display()
            ))
            .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=2"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut output = qemu.stdout.take().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let heard = Arc::clone(&said);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = output.read(&mut bytes) {
                if count == 0 {
                    return;
                }
                let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
                heard.lock().unwrap().push_str(&text);
            }
        });
        let mut guest = Self {
            input: qemu.stdin.take().unwrap(),
            qemu,
            said,
        };
        guest.hears("guest: ready", 0);
        guest
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// Waits for a text behind `from`; where it ends.
    fn hears(&mut self, text: &str, from: usize) -> usize {
        let end = Instant::now() + PATIENCE;
        loop {
            let said = self.said.lock().unwrap();
            if let Some(at) = said.get(from..).and_then(|said| said.find(text)) {
                return from + at + text.len();
            }
            drop(said);
            assert!(Instant::now() < end, "the guest never says {text:?}");
            let ended = self.qemu.try_wait().unwrap();
            assert!(ended.is_none(), "QEMU has ended: {ended:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn heard(&self) -> usize {
        self.said.lock().unwrap().len()
    }

    /// Waits until writes were acknowledged that it had not told of before.
    fn writes_on(&mut self) {
        let mut from = self.heard();
        for _ in 0..2 {
            from = self.hears("stamp: writes=", from);
        }
    }
}

struct World {
    host: Arc<Host>,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["slow", "fast", "state", "run"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        let host = Host::open(HostConfig {
            state_dir: path("state"),
            run_dir: path("run"),
            vmm: PathBuf::from(env!("CARGO_BIN_EXE_strake-vmm")),
            kvm: PathBuf::from("/dev/null"),
        })
        .unwrap();
        for name in ["slow", "fast"] {
            let path = path(name).to_str().unwrap().to_owned();
            let name = name.to_owned();
            host.add_datastore(&AddDatastore { name, path }).unwrap();
        }
        let image = std::fs::File::create(path("slow/disk.raw")).unwrap();
        image.set_len(SIZE).unwrap();
        Self { host, dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("v.sock")
    }

    fn migrate(&self, from: &str, to: &str) {
        let request = MigrateDisk {
            to: to.to_owned(),
            format: None,
            limits: MigrationLimits::default(),
            remove_source: false,
        };
        let job = self.host.migrate("e", "disk", &request).unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            let job = self.host.job(&job.status.job).unwrap();
            if job.status.phase.is_final() {
                let failure = job.status.failure;
                assert_eq!(job.status.phase, Phase::Completed, "{failure:?}");
                break;
            }
            assert!(Instant::now() < end, "the job does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
        std::fs::remove_file(self.dir.path().join(from).join("disk.raw")).unwrap();
    }

    /// Kills the export's monitor and waits for the next one.
    fn kill_monitor(&self) {
        let pid = self.host.export("e").unwrap().pid.unwrap();
        let process = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            let export = self.host.export("e").unwrap();
            if export.state == VmState::Running && export.pid.is_some_and(|other| other != pid) {
                return;
            }
            assert!(Instant::now() < end, "no other monitor comes: {export:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.host.remove_export("e");
    }
}

#[test]
fn a_guest_under_qemu_keeps_its_disk_while_it_moves() {
    let given = |name: &str| std::env::var(name).ok();
    let (Some(kernel), Some(initrd)) = (given("STRAKE_GUEST_KERNEL"), given("STRAKE_GUEST_INITRD"))
    else {
        eprintln!("skipped: no guest is given, see the head of this file");
        return;
    };
    let world = World::new();
    world
        .host
        .create_export(&CreateExport {
            name: "e".to_owned(),
            source: "slow:disk.raw".to_owned(),
            format: None,
            read_only: false,
            vhost_user: Some(world.socket().to_str().unwrap().to_owned()),
            nbd: None,
            tls_dir: None,
        })
        .unwrap();
    let mut guest = Guest::boot(&kernel, &initrd, &world.socket());
    guest.tell("strake-guest-stamp /dev/vda --threads 8 --seconds 3000 </dev/null &");
    guest.writes_on();
    for (from, to) in [("slow", "fast"), ("fast", "slow")] {
        world.migrate(from, to);
        guest.writes_on();
    }
    // Requests that are in flight then are done by the next one.
    for _ in 0..3 {
        world.kill_monitor();
        guest.writes_on();
    }
    world.migrate("slow", "fast");
    guest.writes_on();
    let from = guest.heard();
    guest.tell("kill -TERM $(pidof strake-guest-stamp)");
    guest.hears("stamp: ok sectors=", from);
    // What is on the disk is what the guest was told.
    drop(guest);
    world.host.remove_export("e").unwrap();
    assert!(world.dir.path().join("fast/disk.raw").exists());
}
