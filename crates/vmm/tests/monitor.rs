//! The monitor as a process: its jail, its guests, its end. Guests need `/dev/kvm`, the whole jail
//! needs root; what cannot be had here is skipped and said.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use strake_api::control::{
    Body, BootConfig, ConsoleKind, Event, ExitReason, FdIndex, MachineConfig, MemoryConfig,
    PROTOCOL_VERSION, Packet, Reply, Request, RunState,
};
use strake_machine::control::{Connection, Received};

#[path = "../../machine/src/control/tests/guests.rs"]
#[allow(dead_code)]
mod guests;

const BINARY: &str = env!("CARGO_BIN_EXE_strake-vmm");
const PATIENCE: Duration = Duration::from_secs(20);
const RAM: u64 = 64 << 20;

/// More threads than the C library's allocator has arenas for on a small host: it looks around then
/// as it does not with few.
const CPUS: u8 = 12;

struct Monitor {
    child: Child,
    connection: Connection,
    next: u64,
    events: Vec<Event>,
    directory: tempfile::TempDir,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket() -> OwnedFd {
    socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap()
}

/// The monitor with `fd` as its descriptor 3.
fn command(program: impl AsRef<OsStr>, fd: &OwnedFd, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stderr(Stdio::piped());
    inherit(&mut command, fd);
    command
}

#[allow(unsafe_code)]
fn inherit(command: &mut Command, fd: &OwnedFd) {
    let fd = fd.as_raw_fd();
    // SAFETY: between fork and exec only `dup2` and `fcntl` are called.
    unsafe {
        command.pre_exec(move || {
            let done = if fd == 3 {
                libc::fcntl(fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, 3)
            };
            if done < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

impl Monitor {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = socket();
        let address = SocketAddrUnix::new(directory.path().join("control.sock")).unwrap();
        bind(&listener, &address).unwrap();
        listen(&listener, 4).unwrap();
        let mut line = vec!["--name", "test"];
        line.extend(arguments);
        let child = command(BINARY, &listener, &line).spawn().unwrap();
        let ours = socket();
        connect(&ours, &address).unwrap();
        let mut monitor = Self {
            child,
            connection: Connection::new(ours),
            next: 1,
            events: Vec::new(),
            directory,
        };
        let hello = monitor.ask(
            Request::Hello {
                version: PROTOCOL_VERSION,
            },
            &[],
        );
        assert!(matches!(hello, Reply::Hello { .. }), "{hello:?}");
        monitor
    }

    /// With a guest that is built; none where no guest can run.
    fn with_guest(arguments: &[&str], parts: &[Vec<u8>]) -> Option<Self> {
        let kvm = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        let Ok(kvm) = kvm else {
            eprintln!("skipped: no usable /dev/kvm");
            return None;
        };
        let mut monitor = Self::start(arguments);
        let kernel = monitor.directory.path().join("kernel");
        std::fs::write(&kernel, guests::elf(parts)).unwrap();
        let log = std::fs::File::create(monitor.directory.path().join("console.log")).unwrap();
        let fds = [
            kvm.into(),
            strake_memory::create_memfd("test", RAM).unwrap(),
            std::fs::File::open(&kernel).unwrap().into(),
            log.into(),
        ];
        let config = MachineConfig {
            vm: "test".to_owned(),
            cpus: CPUS,
            kvm: FdIndex(0),
            memory: MemoryConfig {
                size: RAM,
                memfd: FdIndex(1),
            },
            boot: BootConfig::Kernel {
                kernel: FdIndex(2),
                kernel_path: "kernel".to_owned(),
                initrd: None,
                cmdline: String::new(),
            },
            disks: Vec::new(),
            nics: Vec::new(),
            console: ConsoleKind::default(),
            console_log: FdIndex(3),
            observations: None,
        };
        let reply = monitor.ask(Request::Configure(Box::new(config)), &fds);
        assert!(matches!(reply, Reply::Done), "{reply:?}");
        Some(monitor)
    }

    fn ask(&mut self, request: Request, fds: &[OwnedFd]) -> Reply {
        let id = self.next;
        self.next += 1;
        let packet = Packet {
            id,
            body: Body::Request(request),
        };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.connection.send_with(&packet, &fds).unwrap();
        loop {
            match self.receive().body {
                Body::Reply(reply) => return reply,
                Body::Event(event) => self.events.push(event),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Why it ended; a daemon that did not ask for the end says that it knows.
    fn exited(&mut self) -> ExitReason {
        let reason = self.heard_end();
        if reason != ExitReason::Stopped {
            assert_eq!(self.ask(Request::Dismiss, &[]), Reply::Done);
        }
        reason
    }

    fn heard_end(&mut self) -> ExitReason {
        loop {
            while !self.events.is_empty() {
                if let Event::State(RunState::Exited(reason)) = self.events.remove(0) {
                    return reason;
                }
            }
            match self.receive().body {
                Body::Event(event) => self.events.push(event),
                other => panic!("{other:?}"),
            }
        }
    }

    fn receive(&mut self) -> Packet {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut fds = [PollFd::from_borrowed_fd(
                self.connection.as_fd(),
                PollFlags::IN,
            )];
            let second = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            poll(&mut fds, Some(&second)).unwrap();
            match self.connection.receive().unwrap() {
                Received::Packet(packet, _) => return packet,
                Received::Nothing => assert!(Instant::now() < end, "nothing came"),
                other => panic!("{other:?}: {}", self.errors()),
            }
        }
    }

    fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the monitor does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it wrote to standard error; once it has ended.
    fn errors(&mut self) -> String {
        let _ = self.child.kill();
        let mut text = String::new();
        if let Some(mut errors) = self.child.stderr.take() {
            let _ = errors.read_to_string(&mut text);
        }
        text
    }

    /// Names and states of its threads.
    fn threads(&self) -> Vec<(String, String)> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks
            .map(|task| {
                let task = task.unwrap().path();
                let read = |file: &str| std::fs::read_to_string(task.join(file)).unwrap();
                (read("comm"), read("status"))
            })
            .collect()
    }

    fn proc(&self, name: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.child.id())).unwrap_or_default()
    }
}

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(|rest| rest.split_whitespace().collect())
        .unwrap_or_default()
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: not root");
    }
    root
}

#[test]
fn the_jail_is_closed() {
    if !is_root() {
        return;
    }
    let Some(mut monitor) =
        Monitor::with_guest(&["--uid", "12345", "--gid", "12346"], &[guests::chatter()])
    else {
        return;
    };
    monitor.ask(Request::Start, &[]);
    let status = monitor.proc("status");
    assert_eq!(field(&status, "Uid"), ["12345"; 4]);
    assert_eq!(field(&status, "Gid"), ["12346"; 4]);
    assert!(field(&status, "Groups").is_empty());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), ["1"]);
    assert_eq!(field(&status, "Seccomp"), ["2"]);

    let pid = monitor.child.id();
    let root = std::fs::read_dir(format!("/proc/{pid}/root")).unwrap();
    assert_eq!(root.count(), 0, "the root directory is not empty");
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    // Two filters of the process, one more of its kind for each vCPU. A thread that has just begun
    // has no name yet.
    let end = Instant::now() + PATIENCE;
    let mut vcpus = 0;
    while vcpus < usize::from(CPUS) {
        assert!(Instant::now() < end, "only {vcpus} vCPUs are confined");
        vcpus = monitor
            .threads()
            .iter()
            .filter(|(name, status)| {
                assert_eq!(field(status, "Seccomp"), ["2"], "{name}");
                name.starts_with("vcpu") && field(status, "Seccomp_filters") == ["3"]
            })
            .count();
    }
    monitor.ask(Request::Stop, &[]);
    assert_eq!(monitor.exited(), ExitReason::Stopped);
    assert!(monitor.wait().success());
}

#[test]
fn the_exit_status_tells_the_reason() {
    for (part, reason, code) in [
        (guests::power_off(), ExitReason::GuestPowerOff, 0),
        (guests::reset(), ExitReason::GuestReset, 10),
    ] {
        let Some(mut monitor) = Monitor::with_guest(&[], &[part]) else {
            return;
        };
        monitor.ask(Request::Start, &[]);
        assert_eq!(monitor.exited(), reason);
        assert_eq!(monitor.wait().code(), Some(code));
    }
}

#[test]
fn a_signal_stops_the_guest() {
    let Some(mut monitor) = Monitor::with_guest(&[], &[guests::spin()]) else {
        return;
    };
    monitor.ask(Request::Start, &[]);
    let pid = rustix::process::Pid::from_child(&monitor.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(monitor.exited(), ExitReason::Stopped);
    assert!(monitor.wait().success());
}

#[test]
fn without_a_jail_it_runs_as_it_was_started() {
    let Some(mut monitor) = Monitor::with_guest(&["--no-jail"], &[guests::power_off()]) else {
        return;
    };
    assert_eq!(field(&monitor.proc("status"), "Seccomp"), ["0"]);
    monitor.ask(Request::Start, &[]);
    assert_eq!(monitor.exited(), ExitReason::GuestPowerOff);
}

#[test]
fn what_is_not_its_socket_is_refused() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let pair = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    for fd in [file.into(), pair.0] {
        let output = command(BINARY, &fd, &["--name", "test"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(errors.contains("vmm.no-listener"), "{errors}");
    }
}

#[test]
fn a_wrong_command_line_is_refused() {
    let file = std::fs::File::open("/dev/null").unwrap().into();
    let output = command(BINARY, &file, &["--nonsense"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

/// Started by somebody who is not root: with user namespaces the jail is whole, without them the
/// monitor says what it lacks; either way the guest runs.
#[test]
fn an_ordinary_user_gets_what_the_host_gives() {
    if !is_root() {
        return;
    }
    // The binary's directory may be closed to others.
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    rustix::fs::chmod(directory.path(), rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    let binary = directory.path().join("strake-vmm");
    std::fs::copy(BINARY, &binary).unwrap();
    let listener = socket();
    let address = SocketAddrUnix::new(directory.path().join("control.sock")).unwrap();
    bind(&listener, &address).unwrap();
    listen(&listener, 4).unwrap();
    let child = command(&binary, &listener, &["--name", "test"])
        .uid(12345)
        .gid(12345)
        .spawn()
        .unwrap();
    let ours = socket();
    connect(&ours, &address).unwrap();
    let mut monitor = Monitor {
        child,
        connection: Connection::new(ours),
        next: 1,
        events: Vec::new(),
        directory,
    };
    let hello = monitor.ask(
        Request::Hello {
            version: PROTOCOL_VERSION,
        },
        &[],
    );
    assert!(matches!(hello, Reply::Hello { .. }), "{hello:?}");
    let status = monitor.proc("status");
    assert_eq!(field(&status, "Uid"), ["12345"; 4]);
    assert_eq!(field(&status, "CapEff"), ["0000000000000000"]);
    assert_eq!(field(&status, "Seccomp"), ["2"]);
    monitor.ask(Request::Stop, &[]);
    assert!(monitor.wait().success());
}
