//! What the kernel offers beside KVM.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create, statfs};
use rustix::mm::UserfaultfdFlags;
use rustix::thread::UnshareFlags;
use strake_observe::{Because, Observation, OsContext, Result};

use super::observations::{
    NoCgroups, NoHugePages, NoIoUring, NoLandlock, NoMemfd, NoNamespaces, NoSeccomp, NoTun,
    NoUserfaultfd, OldCgroups,
};
use super::{Check, Need, sys};

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2: u64 = 0x6367_7270;

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check::of("memfd", Need::Required, memfd()),
        Check::of("io_uring", Need::Required, io_uring()),
        Check::of("userfaultfd", Need::Useful, uffd()),
        Check::of("tap devices", Need::Useful, tun()),
        Check::of(
            "cgroups",
            Need::Useful,
            cgroups(Path::new("/sys/fs/cgroup")),
        ),
        namespaces(),
        Check::of("landlock", Need::Useful, landlock()),
        Check::of("seccomp", Need::Useful, seccomp()),
        Check::of(
            "huge pages",
            Need::Useful,
            huge_pages(Path::new("/sys/kernel/mm")),
        ),
    ]
}

fn memfd() -> Result<String> {
    memfd_create(
        "strake-doctor",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .os("memfd_create", "strake-doctor")
    .because_of(|| NoMemfd {})?;
    Ok("with seals".to_owned())
}

fn io_uring() -> Result<String> {
    let ring = io_uring::IoUring::new(8)
        .os("io_uring_setup", "a ring of 8 entries")
        .because_of(|| NoIoUring {})?;
    let mut probe = io_uring::Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .os("io_uring_register", "a probe of its operations")
        .because_of(|| NoIoUring {})?;
    let needed = [
        ("READV", io_uring::opcode::Readv::CODE),
        ("WRITEV", io_uring::opcode::Writev::CODE),
        ("FSYNC", io_uring::opcode::Fsync::CODE),
        ("FALLOCATE", io_uring::opcode::Fallocate::CODE),
    ];
    for (name, code) in needed {
        if !probe.is_supported(code) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
                .os("io_uring_register", format!("operation {name}"))
                .because_of(|| NoIoUring {});
        }
    }
    Ok("reads, writes, fsync, fallocate".to_owned())
}

fn uffd() -> Result<String> {
    let everything = sys::try_userfaultfd(UserfaultfdFlags::CLOEXEC);
    if everything.is_ok() {
        return Ok("for all faults".to_owned());
    }
    // Device emulation touches guest memory from this program only, but the kernel does so too
    // (KVM, direct I/O): faults of user code alone are not enough.
    everything
        .os("userfaultfd", "faults of the kernel")
        .because_of(|| NoUserfaultfd {})
        .map(|()| String::new())
}

fn tun() -> Result<String> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .os("open", "/dev/net/tun")
        .because_of(|| NoTun {})?;
    Ok("/dev/net/tun opens".to_owned())
}

pub(super) fn cgroups(root: &Path) -> Result<String> {
    let kind = statfs(root)
        .os("statfs", root.display())
        .because_of(|| NoCgroups {})?;
    if u64::try_from(kind.f_type) == Ok(CGROUP2) {
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        return Ok(format!("version 2: {}", controllers.trim()));
    }
    if root.join("unified").is_dir() {
        let found = "the hybrid of versions 1 and 2".to_owned();
        return Err(OldCgroups { found }.into());
    }
    if root.join("memory").is_dir() || root.join("cpu").is_dir() {
        let found = "version 1".to_owned();
        return Err(OldCgroups { found }.into());
    }
    Err(NoCgroups {}.into())
}

fn namespaces() -> Check {
    let wanted = [
        ("user", UnshareFlags::NEWUSER),
        ("mount", UnshareFlags::NEWUSER | UnshareFlags::NEWNS),
        ("network", UnshareFlags::NEWUSER | UnshareFlags::NEWNET),
        ("process", UnshareFlags::NEWUSER | UnshareFlags::NEWPID),
        ("ipc", UnshareFlags::NEWUSER | UnshareFlags::NEWIPC),
    ];
    let mut can = Vec::new();
    let mut cannot = Vec::new();
    let mut why: Option<Observation> = None;
    for (name, flags) in wanted {
        match sys::try_namespaces(flags).os("unshare", format!("the {name} namespace")) {
            Ok(()) => can.push(name),
            Err(cause) => {
                cannot.push(name);
                why.get_or_insert(cause);
            }
        }
    }
    match why {
        None => Check::ok("namespaces", can.join(", ")),
        Some(cause) => {
            let which = cannot.join(", ");
            let problem = Observation::from(NoNamespaces { which }).because(cause);
            Check::cannot("namespaces", Need::Useful, problem)
        }
    }
}

fn landlock() -> Result<String> {
    let version = sys::landlock_version()
        .os("landlock_create_ruleset", "its version")
        .because_of(|| NoLandlock {})?;
    Ok(format!("version {version}"))
}

fn seccomp() -> Result<String> {
    const ACTIONS: &str = "/proc/sys/kernel/seccomp/actions_avail";
    let actions = fs::read_to_string(ACTIONS)
        .os("read", ACTIONS)
        .because_of(|| NoSeccomp {})?;
    Ok(actions.trim().to_owned())
}

pub(super) fn huge_pages(mm: &Path) -> Result<String> {
    let number = |name: &str| -> u64 {
        fs::read_to_string(mm.join("hugepages/hugepages-2048kB").join(name))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    let (reserved, free) = (number("nr_hugepages"), number("free_hugepages"));
    let shared = mm.join("transparent_hugepage/shmem_enabled");
    let setting = fs::read_to_string(shared).unwrap_or_default();
    // The chosen word is in brackets: `always within_size [advise] never deny force`.
    let chosen = setting
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("never", |(word, _)| word);
    if reserved == 0 && matches!(chosen, "never" | "deny") {
        return Err(NoHugePages {}.into());
    }
    Ok(format!(
        "{free} of {reserved} reserved 2 MiB pages free, transparent ones: {chosen}"
    ))
}

/// Reads a small file of the kernel.
pub(super) fn read(path: &str) -> Result<String> {
    let file = File::open(path).os("open", path)?;
    io::read_to_string(file).os("read", path)
}
