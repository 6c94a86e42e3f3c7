//! The daemon's side, in short: a jailed monitor, its control socket, and a guest that it drives.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use strake_api::control::{
    Body, Event, FdIndex, ImageConfig, LISTEN_FD, MachineConfig, PROTOCOL_VERSION, Packet, Reply,
    Request, RunState,
};
use strake_api::job::{JobId, MigrationLimits, Suspend};
use strake_machine::control::{Connection, Received};
use strake_observe::{Observation, OsContext, Result, Style, render};

use crate::Options;

struct Driver {
    connection: Connection,
    next: u64,
    jobs: u64,
    /// Why the guest ended.
    ended: Option<RunState>,
}

/// Until the guest ends.
pub(crate) fn run(
    monitor: &str,
    options: &Options,
    config: MachineConfig,
    fds: &[OwnedFd],
) -> Result<()> {
    let began = Instant::now();
    let (mut child, connection) = spawn(monitor)?;
    let mut driver = Driver {
        connection,
        next: 1,
        jobs: 0,
        ended: None,
    };
    driver.ask(
        Request::Hello {
            version: PROTOCOL_VERSION,
        },
        &[],
    )?;
    driver.ask(Request::Configure(Box::new(config)), fds)?;
    let (console, theirs) = UnixStream::pair().os("socketpair", "the console")?;
    let stream = Request::AttachConsole { stream: FdIndex(0) };
    driver.ask(stream, &[theirs.into()])?;
    eprintln!("built after {:?}", began.elapsed());
    driver.ask(Request::Start, &[])?;
    eprintln!("started after {:?}", began.elapsed());
    let reason = driver.watch(options, console, began)?;
    eprintln!("ended after {:?}: {reason:?}", began.elapsed());
    eprintln!("{:?}", child.wait().os("wait", monitor)?);
    Ok(())
}

fn spawn(monitor: &str) -> Result<(std::process::Child, Connection)> {
    let socket = || {
        socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .os("socket", "the control socket")
    };
    let listener = socket()?;
    let name = format!("strake-boot-{}", std::process::id());
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).os("bind", &name)?;
    bind(&listener, &address).os("bind", &name)?;
    listen(&listener, 4).os("listen", &name)?;
    let fd = listener.as_raw_fd();
    let mut command = Command::new(monitor);
    command.args(["--name", "boot"]);
    // SAFETY: between fork and exec only `dup2` and `fcntl` are called.
    unsafe {
        command.pre_exec(move || {
            let done = if fd == LISTEN_FD {
                libc::fcntl(fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, LISTEN_FD)
            };
            if done < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn().os("spawn", monitor)?;
    let ours = socket()?;
    connect(&ours, &address).os("connect", &name)?;
    Ok((child, Connection::new(ours)))
}

impl Driver {
    fn ask(&mut self, request: Request, fds: &[OwnedFd]) -> Result<Reply> {
        let id = self.next;
        self.next += 1;
        let packet = Packet {
            id,
            body: Body::Request(request),
        };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.connection.send_with(&packet, &fds)?;
        loop {
            match self.packet(Duration::from_secs(60))? {
                Some(Packet {
                    body: Body::Reply(Reply::Failed(seen)),
                    ..
                }) => return Err(seen),
                Some(Packet {
                    body: Body::Reply(reply),
                    ..
                }) => return Ok(reply),
                Some(packet) => self.event(packet)?,
                None => return Err(std::io::Error::other("no reply").into()),
            }
        }
    }

    fn packet(&self, patience: Duration) -> Result<Option<Packet>> {
        let mut fds = [PollFd::from_borrowed_fd(
            self.connection.as_fd(),
            PollFlags::IN,
        )];
        let patience = Timespec {
            tv_sec: patience.as_secs().cast_signed(),
            tv_nsec: patience.subsec_nanos().into(),
        };
        poll(&mut fds, Some(&patience)).os("poll", "the control socket")?;
        match self.connection.receive()? {
            Received::Packet(packet, _) => Ok(Some(packet)),
            Received::Nothing => Ok(None),
            Received::Damaged(_, seen) => Err(seen),
            Received::Closed => Err(std::io::Error::other("the monitor has gone").into()),
        }
    }

    fn event(&mut self, packet: Packet) -> Result<()> {
        match packet.body {
            Body::Event(Event::State(state @ RunState::Exited(_))) => self.ended = Some(state),
            Body::Event(Event::Observed(seen)) => {
                eprint!("{}", render(&seen, Style::Plain));
            }
            Body::Event(Event::JobAwaitsCommit { job }) => {
                // Its reply comes later and says nothing.
                let request = Request::JobDecision {
                    job,
                    committed: true,
                };
                let packet = Packet {
                    id: u64::MAX,
                    body: Body::Request(request),
                };
                self.connection.send(&packet)?;
            }
            Body::Event(event) => eprintln!("event: {event:?}"),
            _ => {}
        }
        Ok(())
    }

    fn watch(
        &mut self,
        options: &Options,
        mut console: UnixStream,
        began: Instant,
    ) -> Result<RunState> {
        console.set_nonblocking(true).os("FIONBIO", "the console")?;
        let mut paused = Instant::now();
        let mut pressed = false;
        let mut types = options.types.as_ref();
        let mut said = Vec::new();
        loop {
            if let Some(packet) = self.packet(Duration::from_millis(20))? {
                self.event(packet)?;
            }
            if let Some(reason) = self.ended.take() {
                self.ask(Request::Dismiss, &[])?;
                return Ok(reason);
            }
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = console.read(&mut chunk) {
                let chunk = chunk.get(..count).unwrap_or_default();
                let _ = std::io::stdout().write_all(chunk);
                said.extend(chunk);
            }
            if let Some(path) = &options.migrate_to
                && let Some(at) = find(&said, b"MIGRATE")
            {
                said.drain(..at + 7);
                self.migrate(options, path)?;
            }
            if let Some(text) = types
                && find(&said, b"help").is_some()
            {
                types = None;
                let line = format!("{text}\n");
                console
                    .write_all(line.as_bytes())
                    .os("write", "the console")?;
            }
            if let Some(every) = options.pause_every
                && paused.elapsed() >= Duration::from_millis(every)
            {
                self.ask(Request::Pause, &[])?;
                self.ask(Request::Resume, &[])?;
                paused = Instant::now();
            }
            if let Some(after) = options.button_after
                && !pressed
                && began.elapsed() >= Duration::from_secs(after)
            {
                self.ask(Request::PowerButton, &[])?;
                pressed = true;
            }
        }
    }

    fn migrate(&mut self, options: &Options, path: &str) -> Result<()> {
        self.jobs += 1;
        let file = |path: &str| {
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)
                .os("open", path)
        };
        let source = options.disks.first().cloned().unwrap_or_default();
        let size = std::fs::metadata(&source).os("stat", &source)?.len();
        let path = format!("{path}.{}", self.jobs);
        let destination = file(&path)?;
        destination.set_len(size).os("ftruncate", &path)?;
        let journal = file(&format!("{path}.journal"))?;
        let request = Request::MigrateDisk {
            job: JobId(format!("job{}", self.jobs)),
            disk: "disk0".to_owned(),
            destination: ImageConfig::Raw {
                file: FdIndex(0),
                path,
            },
            keep: None,
            journal: FdIndex(1),
            limits: MigrationLimits {
                suspend: Suspend::Vm,
                ..Default::default()
            },
        };
        let done: std::result::Result<_, Observation> =
            self.ask(request, &[destination.into(), journal.into()]);
        done.map(|_| ())
    }
}

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}
