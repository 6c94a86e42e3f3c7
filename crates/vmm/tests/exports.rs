//! Exports with the daemon as a library and the monitor as it is, jail included: served to other
//! programs, moved under them, killed and revived.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use strake_api::job::{MigrationLimits, Phase};
use strake_api::rest::{AddDatastore, CreateExport, CreateVm, Export, Job, MigrateDisk, VmState};
use strake_block::{Access, Blocking, Operation};
use strake_host::{Host, HostConfig};
use strake_nbd::{Address, NbdImage, Uri};

const SIZE: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    host: Arc<Host>,
    dir: tempfile::TempDir,
}

impl World {
    /// A daemon with the datastores `slow` and `fast`, and an image `slow:data.raw`.
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["slow", "fast", "state", "run", "sockets"] {
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
            host.add_datastore(&AddDatastore {
                name: name.to_owned(),
                path: path(name).to_str().unwrap().to_owned(),
            })
            .unwrap();
        }
        std::fs::File::create(path("slow/data.raw"))
            .unwrap()
            .set_len(SIZE)
            .unwrap();
        Self { host, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn request(&self, name: &str, source: &str) -> CreateExport {
        CreateExport {
            name: name.to_owned(),
            source: source.to_owned(),
            format: None,
            read_only: false,
            vhost_user: Some(self.text("sockets/vhost.sock")),
            nbd: Some(self.text("sockets/nbd.sock").parse().unwrap()),
            tls_dir: None,
        }
    }

    fn export(&self, source: &str) -> Export {
        self.host.create_export(&self.request("e", source)).unwrap()
    }

    fn client(&self) -> NbdImage {
        let address = Address::Unix(self.path("sockets/nbd.sock"));
        NbdImage::connect(&Uri::new(address, "e"), Access::ReadWrite).unwrap()
    }

    fn migrate(&self, name: &str, disk: &str, to: &str) -> Job {
        let request = MigrateDisk {
            to: to.to_owned(),
            format: None,
            limits: MigrationLimits::default(),
            remove_source: false,
        };
        let job = self.host.migrate(name, disk, &request).unwrap();
        soon("the job ends", || {
            let job = self.host.job(&job.status.job).unwrap();
            job.status.phase.is_final().then_some(job)
        })
    }

    fn create_vm(&self) {
        std::fs::write(self.path("kernel"), b"a file").unwrap();
        let spec = serde_json::from_value(json!({
            "cpus": 1, "memory": "64M",
            "boot": { "from": "kernel", "kernel": self.text("kernel") },
            "disk": [{ "name": "root", "image": "slow:web1.raw", "size": SIZE }],
        }))
        .unwrap();
        self.host
            .create(&CreateVm {
                name: "web1".to_owned(),
                spec,
            })
            .unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for export in self.host.exports().unwrap_or_default() {
            let _ = self.host.remove_export(&export.name);
        }
    }
}

fn soon<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a program of somebody else's is here; `cargo xtask test` installs them.
fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    assert!(
        found || std::env::var_os("STRAKE_REQUIRE_PEERS").is_none(),
        "{program} is missing"
    );
    if !found {
        eprintln!("skipped: no {program}");
    }
    found
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_export_is_served_listed_moved_and_ended() {
    let world = World::new();
    let export = world.export("slow:data.raw");
    assert_eq!(export.state, VmState::Running);
    assert_eq!(export.disk.image, world.text("slow/data.raw"));
    assert!(world.host.vms().unwrap().is_empty(), "it is no VM");
    assert_eq!(world.host.vm("e").unwrap_err().id(), "host.not-a-vm");
    let client = world.client();
    let mut queue = Blocking::new(&client).unwrap();
    queue.write(0, &[5; 65536]).unwrap();
    let job = world.migrate("e", "disk", "fast");
    assert_eq!(
        job.status.phase,
        Phase::Completed,
        "{:?}",
        job.status.failure
    );
    queue.write(65536, &[6; 65536]).unwrap();
    queue.operate(Operation::Flush, 0).unwrap();
    let export = world.host.export("e").unwrap();
    assert_eq!(export.disk.image, world.text("fast/data.raw"));
    assert!(export.disk.counters.unwrap().writes >= 2);
    drop((queue, client));
    world.host.remove_export("e").unwrap();
    assert!(!world.path("sockets/nbd.sock").exists());
    assert!(!world.path("sockets/vhost.sock").exists());
    let mut found = vec![0; 131_072];
    let file = std::fs::File::open(world.path("fast/data.raw")).unwrap();
    file.read_exact_at(&mut found, 0).unwrap();
    assert_eq!((found[0], found[65535], found[65536]), (5, 5, 6));
    assert_eq!(
        world.host.export("e").unwrap_err().id(),
        "host.no-such-export"
    );
}

#[test]
fn other_programs_see_the_same_disk() {
    let programs = ["nbdinfo", "nbdcopy", "qemu-img", "qemu-io"];
    if !programs.into_iter().all(have) {
        return;
    }
    let world = World::new();
    // As qcow2, with content by somebody else.
    let image = world.text("slow/data.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"]);
    run(
        "qemu-io",
        &["-c", "write -q -P 9 1M 2M", "-f", "qcow2", &image],
    );
    let export = world.export("slow:data.qcow2");
    let uri = export.nbd_uri.unwrap();
    let about: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
    let size = &about["exports"][0]["export-size"];
    assert_eq!(size.as_u64(), Some(SIZE), "{about}");
    let reads = |what: &str| run("qemu-io", &["-r", "-f", "raw", "-c", what, &uri]);
    assert!(!reads("read -P 9 1M 2M").contains("failed"));
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -q -P 3 5M 1M",
            "-c",
            "flush",
            &uri,
        ],
    );
    let copy = world.text("copy.raw");
    run("nbdcopy", &[&uri, &copy]);
    let job = world.migrate("e", "disk", "fast");
    assert_eq!(
        job.status.phase,
        Phase::Completed,
        "{:?}",
        job.status.failure
    );
    assert!(!reads("read -P 3 5M 1M").contains("failed"));
    world.host.remove_export("e").unwrap();
    let moved = world.text("fast/data.qcow2");
    run("qemu-img", &["check", "-q", "-f", "qcow2", &moved]);
    run(
        "qemu-img",
        &["compare", "-q", "-f", "raw", "-F", "qcow2", &copy, &moved],
    );
}

#[test]
fn the_disk_of_a_stopped_vm_moves_with_its_export() {
    let world = World::new();
    world.create_vm();
    world.export("web1/root");
    // Who has the VM's disk meanwhile.
    let seen = world.host.start("web1").unwrap_err();
    assert!(seen.find("host.disk-exported").is_some(), "{seen}");
    let keep = strake_host::Images::Keep;
    let seen = world.host.remove("web1", keep).unwrap_err();
    assert!(seen.find("host.disk-exported").is_some(), "{seen}");
    let again = CreateExport {
        vhost_user: None,
        nbd: Some(world.text("sockets/other.sock").parse().unwrap()),
        ..world.request("other", "web1/root")
    };
    let seen = world.host.create_export(&again).unwrap_err();
    assert!(seen.find("host.disk-exported").is_some(), "{seen}");
    let again = CreateExport {
        source: "slow:web1.raw".to_owned(),
        ..again
    };
    let seen = world.host.create_export(&again).unwrap_err();
    assert!(seen.find("host.image-in-use").is_some(), "{seen}");
    let job = world.migrate("e", "root", "fast");
    assert_eq!(
        job.status.phase,
        Phase::Completed,
        "{:?}",
        job.status.failure
    );
    let vm = world.host.vm("web1").unwrap();
    assert_eq!(vm.disks[0].image, world.text("fast/web1.raw"));
    assert_eq!(vm.disks[0].datastore.as_deref(), Some("fast"));
    world.host.remove_export("e").unwrap();
    world.host.remove("web1", keep).unwrap();
}

/// Its clients write without pause while it moves back and forth; every acknowledged write is there.
#[test]
fn clients_write_while_it_moves_back_and_forth() {
    let world = World::new();
    world.export("slow:data.raw");
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..2u64)
        .map(|writer| {
            let client = world.client();
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut queue = Blocking::new(&client).unwrap();
                let blocks = SIZE / 4096 / 2;
                let mut last = vec![0u8; usize::try_from(blocks).unwrap()];
                let mut count = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    count += 1;
                    let index = count.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks;
                    let value = u8::try_from(count % 251).unwrap() + 1;
                    let offset = (index * 2 + writer) * 4096;
                    queue.write(offset, &[value; 4096]).unwrap();
                    last[usize::try_from(index).unwrap()] = value;
                }
                for (index, value) in (0u64..).zip(&last) {
                    let mut found = vec![0; 4096];
                    queue.read((index * 2 + writer) * 4096, &mut found).unwrap();
                    assert!(found.iter().all(|of| of == value), "block {index}");
                }
                count
            })
        })
        .collect();
    for round in 0..4 {
        let (from, to) = if round % 2 == 0 {
            ("slow", "fast")
        } else {
            ("fast", "slow")
        };
        let job = world.migrate("e", "disk", to);
        assert_eq!(
            job.status.phase,
            Phase::Completed,
            "{:?}",
            job.status.failure
        );
        std::fs::remove_file(world.path(from).join("data.raw")).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let counts: Vec<u64> = writers.into_iter().map(|of| of.join().unwrap()).collect();
    assert!(counts.iter().all(|count| *count > 0));
}

#[test]
fn a_monitor_that_is_killed_is_replaced() {
    let world = World::new();
    let export = world.export("slow:data.raw");
    let client = world.client();
    let mut queue = Blocking::new(&client).unwrap();
    queue.write(0, &[1; 4096]).unwrap();
    let pid = export.pid.unwrap();
    let process = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    assert!(
        queue.write(0, &[2; 4096]).is_err(),
        "the connection is gone"
    );
    let export = soon("another monitor", || {
        let export = world.host.export("e").unwrap();
        let other = export.pid.is_some_and(|other| other != pid);
        (export.state == VmState::Running && other).then_some(export)
    });
    assert!(export.uptime_ms.is_some());
    let client = world.client();
    let mut queue = Blocking::new(&client).unwrap();
    let mut found = vec![0; 4096];
    queue.read(0, &mut found).unwrap();
    assert!(found == vec![1; 4096] || found == vec![2; 4096]);
}

#[test]
fn what_cannot_be_exported_is_refused_and_leaves_nothing() {
    let world = World::new();
    let base = world.request("e", "slow:data.raw");
    let not_a_socket = world.text("slow/data.raw");
    let requests = [
        (
            "host.bad-name",
            CreateExport {
                name: "a/b".into(),
                ..base.clone()
            },
        ),
        (
            "host.image-refused",
            CreateExport {
                source: "slow:none.raw".into(),
                ..base.clone()
            },
        ),
        (
            "host.no-such-vm",
            CreateExport {
                source: "web9/root".into(),
                ..base.clone()
            },
        ),
        (
            "host.request-refused",
            CreateExport {
                vhost_user: None,
                nbd: None,
                ..base.clone()
            },
        ),
        (
            "host.listen-refused",
            CreateExport {
                vhost_user: Some(not_a_socket),
                ..base.clone()
            },
        ),
        (
            "host.listen-refused",
            CreateExport {
                nbd: Some("192.0.2.1:1".parse().unwrap()),
                ..base.clone()
            },
        ),
        (
            "nbd.tls-unusable",
            CreateExport {
                tls_dir: Some(world.text("fast")),
                ..base.clone()
            },
        ),
    ];
    for (id, request) in requests {
        let seen = world.host.create_export(&request).unwrap_err();
        let found = seen.find(id).is_some()
            || (id.starts_with("nbd") && seen.find("os.call-failed").is_some());
        assert!(found, "{id}: {seen:?}");
        assert!(world.host.exports().unwrap().is_empty(), "{id}");
    }
    // And what was refused can be done right afterwards.
    world.host.create_export(&base).unwrap();
    assert_eq!(std::fs::read_dir(world.path("sockets")).unwrap().count(), 2);
}
