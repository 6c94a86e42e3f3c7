//! A server in a thread and a daemon's side of its socket.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use strake_api::control::{
    Body, BootConfig, ConsoleKind, Event, ExitReason, FdIndex, MachineConfig, MemoryConfig,
    PROTOCOL_VERSION, Packet, Reply, Request,
};
use strake_observe::Result;

use crate::control::{Connection, Received, Sent, Server, ServerConfig};
use crate::{Descriptors, Mailbox};

/// How long anything may take here.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// RAM of the test guests.
pub(super) const RAM: u64 = 64 << 20;

/// A monitor without process.
pub(super) struct Monitor {
    pub(super) directory: tempfile::TempDir,
    pub(super) mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<Result<ExitReason>>>,
    signals: std::io::PipeWriter,
}

/// A daemon's connection.
pub(super) struct Daemon {
    connection: Connection,
    next: u64,
    events: Vec<Event>,
}

impl Monitor {
    pub(super) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = socket();
        let address = SocketAddrUnix::new(directory.path().join("control.sock")).unwrap();
        bind(&socket, &address).unwrap();
        listen(&socket, 8).unwrap();
        let mailbox = Mailbox::new().unwrap();
        let (terminate, signals) = std::io::pipe().unwrap();
        let config = ServerConfig {
            listener: socket,
            terminate: Some(terminate.into()),
            version: "test".to_owned(),
        };
        let mut server = Server::new(config, Arc::clone(&mailbox));
        let thread = std::thread::spawn(move || server.serve());
        Self {
            directory,
            mailbox,
            thread: Some(thread),
            signals,
        }
    }

    /// A connection that has not said hello.
    pub(super) fn connect(&self) -> Daemon {
        let socket = socket();
        let address = SocketAddrUnix::new(self.directory.path().join("control.sock")).unwrap();
        connect(&socket, &address).unwrap();
        Daemon {
            connection: Connection::new(socket),
            next: 1,
            events: Vec::new(),
        }
    }

    /// A connection that has.
    pub(super) fn daemon(&self) -> Daemon {
        let mut daemon = self.connect();
        let hello = daemon.ask(Request::Hello {
            version: PROTOCOL_VERSION,
        });
        assert!(matches!(hello, Reply::Hello { .. }), "{hello:?}");
        daemon
    }

    /// As SIGTERM does.
    pub(super) fn terminate(&mut self) {
        self.signals.write_all(b"t").unwrap();
    }

    /// Whether its server has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Waits for its end.
    pub(super) fn join(mut self) -> ExitReason {
        let thread = self.thread.take().unwrap();
        let end = Instant::now() + PATIENCE;
        while !thread.is_finished() {
            assert!(Instant::now() < end, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        thread.join().unwrap().unwrap()
    }

    pub(super) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(content).unwrap();
        path
    }

    pub(super) fn console(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("console.log")).unwrap_or_default()
    }

    pub(super) fn wait_for_console(&self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !String::from_utf8_lossy(&self.console()).contains(text) {
            assert!(
                Instant::now() < end,
                "the console never said {text:?}: {:?}",
                String::from_utf8_lossy(&self.console())
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A machine without devices that boots `kernel`, and its descriptors.
    pub(super) fn machine(&self, kernel: &[u8], cpus: u8) -> (MachineConfig, Vec<OwnedFd>) {
        let kernel = std::fs::File::open(self.file("kernel", kernel)).unwrap();
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.path().join("console.log"))
            .unwrap();
        let kvm = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap();
        let fds = vec![
            kvm.into(),
            strake_memory::create_memfd("test", RAM).unwrap(),
            kernel.into(),
            log.into(),
        ];
        let config = MachineConfig {
            vm: "test".to_owned(),
            cpus,
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
        (config, fds)
    }
}

impl Daemon {
    pub(super) fn ask(&mut self, request: Request) -> Reply {
        self.ask_with(request, &[])
    }

    pub(super) fn ask_with(&mut self, request: Request, fds: &[OwnedFd]) -> Reply {
        let id = self.send(request, fds);
        self.answer(id)
    }

    /// Sends a request whose answer is for later.
    pub(super) fn send(&mut self, request: Request, fds: &[OwnedFd]) -> u64 {
        let id = self.next;
        self.next += 1;
        let fds: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
        let packet = Packet {
            id,
            body: Body::Request(request),
        };
        assert_eq!(
            self.connection.send_with(&packet, &fds).unwrap(),
            Sent::Done
        );
        id
    }

    /// The answer to [`send`](Self::send).
    pub(super) fn answer(&mut self, id: u64) -> Reply {
        self.answer_with_fds(id).0
    }

    pub(super) fn answer_with_fds(&mut self, id: u64) -> (Reply, Descriptors) {
        loop {
            match self.receive_with_fds().expect("the server hung up") {
                (
                    Packet {
                        id: found,
                        body: Body::Reply(reply),
                    },
                    fds,
                ) => {
                    assert_eq!(found, id);
                    return (reply, fds);
                }
                (
                    Packet {
                        id: 0,
                        body: Body::Event(event),
                    },
                    _,
                ) => self.events.push(event),
                other => panic!("{other:?}"),
            }
        }
    }

    pub(super) fn done(&mut self, request: Request) {
        let reply = self.ask(request);
        assert!(matches!(reply, Reply::Done), "{reply:?}");
    }

    /// The first event that `wanted` accepts, those that came with replies included.
    pub(super) fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
        if let Some(index) = self.events.iter().position(&wanted) {
            return self.events.remove(index);
        }
        loop {
            match self.receive().expect("the server hung up").body {
                Body::Event(event) if wanted(&event) => return event,
                Body::Event(event) => self.events.push(event),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next packet; none if the server hung up.
    pub(super) fn receive(&self) -> Option<Packet> {
        self.receive_with_fds().map(|(packet, _)| packet)
    }

    fn receive_with_fds(&self) -> Option<(Packet, Descriptors)> {
        loop {
            let mut fds = [PollFd::from_borrowed_fd(
                self.connection.as_fd(),
                PollFlags::IN,
            )];
            let patience = Timespec {
                tv_sec: PATIENCE.as_secs().cast_signed(),
                tv_nsec: 0,
            };
            let ready = poll(&mut fds, Some(&patience)).unwrap();
            assert!(ready > 0, "nothing came");
            match self.connection.receive().unwrap() {
                Received::Packet(packet, fds) => return Some((packet, fds)),
                Received::Closed => return None,
                Received::Nothing => {}
                Received::Damaged(_, seen) => panic!("{seen}"),
            }
        }
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

/// Whether guests can run here.
pub(super) fn have_kvm() -> bool {
    let found = strake_kvm::Kvm::open().is_ok();
    if !found {
        eprintln!("skipped: no usable /dev/kvm");
    }
    found
}
