//! One connection to a monitor.
//!
//! A reader thread owns the receiving side. It hands each reply to the caller that waits for it
//! and each event to the events' channel, and says [`Incoming::Closed`] as its last word, after it
//! has failed every caller that still waits. Callers send from their own threads; a `sendmsg` on a
//! packet socket is atomic, so they need no lock among themselves. The one lock (`waiting`) is
//! held only to enter or leave the table, never while anything waits.
//!
//! Events never hold up a reply: the reader waits for nobody. How many of them may wait for the
//! supervisor is bounded all the same. Observations beyond [`OBSERVED_BACKLOG`] are dropped, and a
//! monitor with more than [`EVENT_BACKLOG`] events of other kinds loses its connection; on the next
//! one the supervisor asks for the state and for the jobs, as after every loss.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
    socket_with, sockopt,
};
use strake_api::control::{
    Body, Event, ExitReason, PROTOCOL_VERSION, Packet, Reply, Request, RunState,
};
use strake_api::job::MigrationStatus;
use strake_observe::{Because, Observation, OsContext, Result};

use super::packet::{self, Received};
use crate::observations::{MonitorLost, MonitorMismatch, MonitorRefused, MonitorSilent};

/// How many events may wait for the supervisor before observations are dropped.
const OBSERVED_BACKLOG: usize = 256;

/// How many events may wait for the supervisor at all.
const EVENT_BACKLOG: usize = 1024;

/// How long a send may wait for a monitor that does not read.
const SEND_PATIENCE: Duration = Duration::from_secs(10);

/// How long a monitor may take for a request that only looks or switches something.
pub(crate) const QUICK: Duration = Duration::from_secs(10);

/// How deep an observation of a monitor may be nested. Monitors keep to it by themselves.
const CAUSE_LEVELS: usize = 32;

/// What comes from a monitor unasked.
#[derive(Debug)]
pub(crate) enum Incoming {
    Event(Event),
    /// The connection has ended; nothing more comes.
    Closed,
}

/// The supervisor's end of what comes unasked.
#[derive(Debug)]
pub(crate) struct Events {
    incoming: Receiver<Incoming>,
    waiting: Arc<AtomicUsize>,
}

impl Events {
    /// Waits for the next. After the connection's end it says nothing but `Closed`.
    pub(crate) fn next(&self) -> Incoming {
        self.taken(self.incoming.recv().ok())
    }

    /// The next, if one comes soon.
    pub(crate) fn next_within(&self, patience: Duration) -> Option<Incoming> {
        match self.incoming.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => None,
            incoming => Some(self.taken(incoming.ok())),
        }
    }

    fn taken(&self, incoming: Option<Incoming>) -> Incoming {
        if matches!(incoming, Some(Incoming::Event(_))) {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        // A channel without a sender says the same as the connection's last word.
        incoming.unwrap_or(Incoming::Closed)
    }
}

/// The reader's end of it.
struct EventSink {
    events: Sender<Incoming>,
    /// Only counts; what is counted is handed over by the channel.
    waiting: Arc<AtomicUsize>,
}

impl EventSink {
    /// Never waits; `false` if the monitor says more than anybody can follow.
    fn put(&self, event: Event) -> bool {
        let backlog = self.waiting.load(Ordering::Relaxed);
        if backlog >= OBSERVED_BACKLOG && matches!(event, Event::Observed(_)) {
            tracing::debug!("an observation of a monitor is dropped: too many wait");
            return true;
        }
        if backlog >= EVENT_BACKLOG {
            tracing::warn!("a monitor floods its connection with events");
            return false;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.events.send(Incoming::Event(event)).is_ok()
    }
}

/// What a monitor says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Greeting {
    /// The VM it runs, once it is configured.
    pub(crate) vm: Option<String>,
    /// Its process, as this host counts.
    pub(crate) pid: Option<u32>,
    /// The version of its binary.
    pub(crate) version: String,
}

/// A reply, its descriptors, and the process that sent it.
struct Answer {
    reply: Reply,
    fds: Vec<OwnedFd>,
    pid: Option<u32>,
}

/// A request that was sent and is waited for later.
#[derive(Debug)]
pub(crate) struct Begun {
    name: &'static str,
    id: u64,
    receiver: Receiver<Answer>,
}

/// Who waits for which reply; `None` once the connection has ended.
type Waiting = Mutex<Option<HashMap<u64, SyncSender<Answer>>>>;

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Arc<OwnedFd>,
    waiting: Arc<Waiting>,
    next: AtomicU64,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.reply.fmt(f)
    }
}

impl Connection {
    /// Connects to the control socket at `path` and says hello.
    pub(crate) fn open(path: &Path) -> Result<(Self, Greeting, Events)> {
        Self::open_within(path, QUICK)
    }

    /// The same, but the monitor has to answer the hello within `patience`.
    pub(crate) fn open_within(path: &Path, patience: Duration) -> Result<(Self, Greeting, Events)> {
        let object = path.display();
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .os("socket", &object)?;
        // So that the hello tells which process answers, whatever jail it sits in.
        sockopt::set_socket_passcred(&socket, true).os("setsockopt(SO_PASSCRED)", &object)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(SEND_PATIENCE))
            .os("setsockopt(SO_SNDTIMEO)", &object)?;
        let address = SocketAddrUnix::new(path).os("connect", &object)?;
        connect(&socket, &address).os("connect", &object)?;
        let (events, incoming) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let sink = EventSink {
            events,
            waiting: Arc::clone(&waiting),
        };
        let this = Self {
            socket: Arc::new(socket),
            waiting: Arc::new(Mutex::new(Some(HashMap::new()))),
            next: AtomicU64::new(1),
        };
        this.read(sink)?;
        let greeting = this.hello(patience)?;
        Ok((this, greeting, Events { incoming, waiting }))
    }

    /// Stands for a connection to a monitor that cannot be reached yet: every call fails at once.
    pub(crate) fn lost() -> Result<Self> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .os("socket", "a control socket")?;
        Ok(Self {
            socket: Arc::new(socket),
            waiting: Arc::new(Mutex::new(None)),
            next: AtomicU64::new(1),
        })
    }

    fn read(&self, events: EventSink) -> Result<()> {
        let socket = Arc::clone(&self.socket);
        let waiting = Arc::clone(&self.waiting);
        std::thread::Builder::new()
            .name("monitor-reader".to_owned())
            .spawn(move || {
                let mut buffer = Vec::new();
                loop {
                    match packet::receive(&*socket, &mut buffer) {
                        Ok(Some(received)) => {
                            if !dispatch(received, &waiting, &events) {
                                break;
                            }
                        }
                        Ok(None) => break,
                        Err(seen) => {
                            tracing::warn!(%seen, "a monitor's connection is given up");
                            break;
                        }
                    }
                }
                let _ = shutdown(&*socket, Shutdown::Both);
                drop(lock(&waiting).take());
                let _ = events.events.send(Incoming::Closed);
            })
            .os("clone", "a reader thread")
            .map(drop)
    }

    fn hello(&self, patience: Duration) -> Result<Greeting> {
        let version = PROTOCOL_VERSION;
        let answer = self.ask("hello", Request::Hello { version }, &[], patience)?;
        let mismatch = |said: String| MonitorMismatch {
            said,
            expected: format!("one of protocol {PROTOCOL_VERSION}"),
        };
        match answer.reply {
            Reply::Hello {
                version: PROTOCOL_VERSION,
                vm,
                monitor,
            } => Ok(Greeting {
                vm,
                pid: answer.pid,
                version: monitor,
            }),
            Reply::Hello {
                version, monitor, ..
            } => Err(mismatch(format!("strake-vmm {monitor} of protocol {version}")).into()),
            Reply::Failed(seen) => Err(seen).because_of(|| mismatch("unwilling".to_owned())),
            other => Err(mismatch(format!("one that answers hello with {other:?}")).into()),
        }
    }

    /// Sends a request and waits for its reply; a refusal is an error.
    pub(crate) fn call(
        &self,
        name: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<Reply> {
        done(name, self.ask(name, request, fds, patience)?).map(|(reply, _)| reply)
    }

    /// As [`call`](Self::call), for a reply that comes with descriptors.
    pub(crate) fn call_for_fds(
        &self,
        name: &'static str,
        request: Request,
        patience: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>)> {
        done(name, self.ask(name, request, &[], patience)?)
    }

    /// Sends a request and does not wait for its reply: [`finish`](Self::finish) does.
    pub(crate) fn begin(
        &self,
        name: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Begun> {
        let (id, receiver) = self.send(name, request, fds)?;
        Ok(Begun { name, id, receiver })
    }

    /// Waits for the reply to a request that was begun on this connection.
    pub(crate) fn finish(&self, begun: Begun, patience: Duration) -> Result<Reply> {
        let Begun { name, id, receiver } = begun;
        done(name, self.wait(name, id, &receiver, patience)?).map(|(reply, _)| reply)
    }

    fn ask(
        &self,
        name: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<Answer> {
        let (id, receiver) = self.send(name, request, fds)?;
        self.wait(name, id, &receiver, patience)
    }

    fn send(
        &self,
        name: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(u64, Receiver<Answer>)> {
        let lost = || MonitorLost {
            request: name.to_owned(),
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = sync_channel(1);
        match lock(&self.waiting).as_mut() {
            Some(waiting) => waiting.insert(id, sender),
            None => return Err(lost().into()),
        };
        let body = Body::Request(request);
        let sent = packet::send(&*self.socket, &Packet { id, body }, fds);
        if let Err(seen) = sent {
            self.forget(id);
            return Err(seen).because_of(lost);
        }
        Ok((id, receiver))
    }

    fn wait(
        &self,
        name: &'static str,
        id: u64,
        receiver: &Receiver<Answer>,
        patience: Duration,
    ) -> Result<Answer> {
        let lost = || MonitorLost {
            request: name.to_owned(),
        };
        match receiver.recv_timeout(patience) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) => Err(lost().into()),
            Err(RecvTimeoutError::Timeout) => {
                self.forget(id);
                Err(MonitorSilent {
                    request: name.to_owned(),
                    seconds: patience.as_secs(),
                }
                .into())
            }
        }
    }

    fn forget(&self, id: u64) {
        if let Some(waiting) = lock(&self.waiting).as_mut() {
            waiting.remove(&id);
        }
    }

    /// Ends the connection; the supervisor hears of it as if the monitor had.
    pub(crate) fn close(&self) {
        let _ = shutdown(self.socket.as_fd(), Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// What was answered; a refusal is an error.
fn done(name: &str, answer: Answer) -> Result<(Reply, Vec<OwnedFd>)> {
    match answer.reply {
        Reply::Failed(seen) => Err(seen).because_of(|| MonitorRefused {
            request: name.to_owned(),
        }),
        reply => Ok((reply, answer.fds)),
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, Option<HashMap<u64, SyncSender<Answer>>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands on what came, and waits for nobody; `false` if the connection is to end.
fn dispatch(received: Received, waiting: &Waiting, events: &EventSink) -> bool {
    match shallow(received.packet.body) {
        Body::Reply(reply) => {
            let caller = lock(waiting)
                .as_mut()
                .and_then(|waiting| waiting.remove(&received.packet.id));
            // A reply that nobody waits for came after its caller had given up.
            if let Some(caller) = caller {
                let _ = caller.try_send(Answer {
                    reply,
                    fds: received.fds,
                    pid: received.pid,
                });
            }
            true
        }
        Body::Event(event) => events.put(event),
        Body::Request(_) => true,
    }
}

/// Bounds how deep the observations of a packet are nested. A monitor is not trusted, and what it
/// says is kept in the inventory and shown to clients, with levels of the daemon's own above it.
fn shallow(body: Body) -> Body {
    let cut = |seen: Observation| seen.cut_below(CAUSE_LEVELS);
    let state = |state| match state {
        RunState::Exited(ExitReason::Failed(seen)) => {
            RunState::Exited(ExitReason::Failed(cut(seen)))
        }
        state => state,
    };
    let job = |mut status: MigrationStatus| {
        status.failure = status.failure.map(cut);
        status
    };
    match body {
        Body::Reply(Reply::Failed(seen)) => Body::Reply(Reply::Failed(cut(seen))),
        Body::Reply(Reply::Job(status)) => Body::Reply(Reply::Job(job(status))),
        Body::Reply(Reply::Status(mut status)) => {
            status.state = state(status.state);
            status.jobs = status.jobs.into_iter().map(job).collect();
            Body::Reply(Reply::Status(status))
        }
        Body::Event(Event::State(of)) => Body::Event(Event::State(state(of))),
        Body::Event(Event::JobEnded(status)) => Body::Event(Event::JobEnded(job(status))),
        Body::Event(Event::Observed(seen)) => Body::Event(Event::Observed(cut(seen))),
        body => body,
    }
}
