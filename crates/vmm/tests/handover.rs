//! Two monitors as jailed processes, and a guest that moves between them. Guests need `/dev/kvm`, the
//! whole jail needs root; what cannot be had here is skipped and said.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use strake_api::control::{
    Body, BootConfig, ConsoleKind, DiskConfig, FdIndex, ImageConfig, Lent, MachineConfig,
    MemoryConfig, PROTOCOL_VERSION, Packet, Reply, Request,
};
use strake_machine::Descriptors;
use strake_machine::control::{Connection, Received};

#[path = "../../machine/src/control/tests/guests.rs"]
#[allow(dead_code)]
mod guests;

const PATIENCE: Duration = Duration::from_secs(20);
const RAM: u64 = 64 << 20;
const CPUS: u8 = 3;

struct Monitor {
    child: Child,
    connection: Connection,
    next: u64,
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
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = socket();
        let address = SocketAddrUnix::new(directory.path().join("control.sock")).unwrap();
        bind(&listener, &address).unwrap();
        listen(&listener, 4).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_strake-vmm"));
        command.args(["--name", "test"]);
        if !rustix::process::geteuid().is_root() {
            eprintln!("without the jail, which needs root");
            command.arg("--no-jail");
        }
        inherit(&mut command, &listener);
        let child = command.spawn().unwrap();
        let ours = socket();
        connect(&ours, &address).unwrap();
        let mut monitor = Self {
            child,
            connection: Connection::new(ours),
            next: 1,
            directory,
        };
        let version = PROTOCOL_VERSION;
        let hello = monitor.ask(Request::Hello { version }, &[]);
        assert!(matches!(hello, Reply::Hello { .. }), "{hello:?}");
        monitor
    }

    fn configure(&mut self, boot: Boot, memory: OwnedFd, disk: OwnedFd) {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let log = File::options()
            .append(true)
            .create(true)
            .open(self.directory.path().join("console.log"));
        let mut fds = vec![kvm.unwrap().into(), memory, log.unwrap().into(), disk];
        let boot = match boot {
            Boot::Predecessor => BootConfig::Predecessor,
            Boot::Kernel(kernel) => {
                let path = self.directory.path().join("kernel");
                std::fs::write(&path, kernel).unwrap();
                fds.push(File::open(&path).unwrap().into());
                BootConfig::Kernel {
                    kernel: FdIndex(4),
                    kernel_path: "kernel".to_owned(),
                    initrd: None,
                    cmdline: String::new(),
                }
            }
        };
        let config = MachineConfig {
            vm: "test".to_owned(),
            cpus: CPUS,
            kvm: FdIndex(0),
            memory: MemoryConfig {
                size: RAM,
                memfd: FdIndex(1),
            },
            boot,
            disks: vec![DiskConfig {
                name: "root".to_owned(),
                slot: 1,
                image: ImageConfig::Raw {
                    file: FdIndex(3),
                    path: "root.raw".to_owned(),
                },
                read_only: false,
                serial: "root".to_owned(),
                queues: 2,
                limits: strake_api::control::DiskLimits::default(),
            }],
            nics: Vec::new(),
            console: ConsoleKind::default(),
            console_log: FdIndex(2),
            observations: None,
        };
        let reply = self.ask(Request::Configure(Box::new(config)), &fds);
        assert!(matches!(reply, Reply::Done), "{reply:?}");
    }

    fn send(&mut self, request: Request, fds: &[OwnedFd]) {
        let id = self.next;
        self.next += 1;
        let body = Body::Request(request);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.connection
            .send_with(&Packet { id, body }, &fds)
            .unwrap();
    }

    fn ask(&mut self, request: Request, fds: &[OwnedFd]) -> Reply {
        self.send(request, fds);
        self.answer().0
    }

    fn answer(&mut self) -> (Reply, Descriptors) {
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
                Received::Packet(packet, fds) => match packet.body {
                    Body::Reply(reply) => return (reply, fds),
                    Body::Event(_) => {}
                    Body::Request(_) => panic!("a monitor asks for nothing"),
                },
                Received::Nothing => assert!(Instant::now() < end, "nothing came"),
                other => panic!("{other:?}"),
            }
        }
    }

    fn lend(&mut self) -> (Lent, Descriptors) {
        self.send(Request::Lend, &[]);
        match self.answer() {
            (Reply::Lent(lent), fds) => (lent, fds),
            (other, _) => panic!("{other:?}"),
        }
    }
}

enum Boot {
    Kernel(Vec<u8>),
    Predecessor,
}

#[test]
fn a_guest_moves_between_jailed_processes() {
    if File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        eprintln!("skipped: no usable /dev/kvm");
        return;
    }
    let memory = strake_memory::create_memfd("test", RAM).unwrap();
    let looked_at = File::from(memory.try_clone().unwrap());
    let count = || {
        let mut bytes = [0; 4];
        let at = u64::from(guests::COUNTER);
        looked_at.read_exact_at(&mut bytes, at).unwrap();
        u32::from_le_bytes(bytes)
    };
    let counts = || {
        let before = count();
        let end = Instant::now() + PATIENCE;
        while count() == before {
            assert!(Instant::now() < end, "the guest does not run");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = image.reopen().unwrap();
    let mut here = Monitor::start();
    here.configure(
        Boot::Kernel(guests::elf(&[guests::count()])),
        memory,
        disk.into(),
    );
    assert_eq!(here.ask(Request::Start, &[]), Reply::Done);
    counts();
    for _ in 0..3 {
        let (lent, mut fds) = here.lend();
        let memory = fds.take(lent.memory, "a test").unwrap();
        assert_eq!(lent.images.len(), 1);
        let disk = fds.take(lent.images[0], "a test").unwrap();
        let mut next = Monitor::start();
        next.configure(Boot::Predecessor, memory, disk);
        let (from, to) = UnixStream::pair().unwrap();
        let records = FdIndex(0);
        next.send(Request::Receive { records }, &[to.into()]);
        let handed = here.ask(Request::HandOver { records }, &[from.into()]);
        assert_eq!(handed, Reply::Done);
        assert_eq!(next.answer().0, Reply::Done);
        let stood = count();
        let took_over = next.ask(Request::TakeOver, &[]);
        assert!(matches!(took_over, Reply::TookOver { .. }), "{took_over:?}");
        assert_eq!(here.ask(Request::Retire, &[]), Reply::Done);
        assert!(here.child.wait().unwrap().success());
        assert!(count() >= stood);
        counts();
        here = next;
    }
    assert_eq!(here.ask(Request::Stop, &[]), Reply::Done);
}
