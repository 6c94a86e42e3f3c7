//! One connection to a monitor.
//!
//! A reader thread owns the receiving side. It hands each reply to the caller that waits for it
//! and each event to the events' channel, and says [`Incoming::Closed`] as its last word, after it
//! has failed every caller that still waits. Callers send from their own threads; a `sendmsg` on a
//! packet socket is atomic, so they need no lock among themselves. The one lock (`waiting`) is
//! held only to enter or leave the table, never while anything waits.
//!
//! The events' channel is bounded: a monitor that floods it is read no further until the
//! supervisor has caught up.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
    socket_with, sockopt,
};
use strake_api::control::{Body, Event, PROTOCOL_VERSION, Packet, Reply, Request};
use strake_observe::{Because, OsContext, Result};

use super::packet::{self, Received};
use crate::observations::{MonitorLost, MonitorMismatch, MonitorRefused, MonitorSilent};

/// How many events may wait for the supervisor.
const EVENT_BACKLOG: usize = 256;

/// How long a send may wait for a monitor that does not read.
const SEND_PATIENCE: Duration = Duration::from_secs(10);

/// How long a monitor may take for a request that only looks or switches something.
pub(crate) const QUICK: Duration = Duration::from_secs(10);

/// What comes from a monitor unasked.
#[derive(Debug)]
pub(crate) enum Incoming {
    Event(Event),
    /// The connection has ended; nothing more comes.
    Closed,
}

/// What a monitor says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Greeting {
    /// The VM it runs, once it is configured.
    pub(crate) vm: Option<String>,
    /// Its process, as this host counts.
    pub(crate) pid: Option<u32>,
}

/// A reply and the process that sent it.
struct Answer {
    reply: Reply,
    pid: Option<u32>,
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
    pub(crate) fn open(path: &Path) -> Result<(Self, Greeting, Receiver<Incoming>)> {
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
        let (events, incoming) = sync_channel(EVENT_BACKLOG);
        let this = Self {
            socket: Arc::new(socket),
            waiting: Arc::new(Mutex::new(Some(HashMap::new()))),
            next: AtomicU64::new(1),
        };
        this.read(events)?;
        let greeting = this.hello()?;
        Ok((this, greeting, incoming))
    }

    fn read(&self, events: SyncSender<Incoming>) -> Result<()> {
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
                let _ = events.send(Incoming::Closed);
            })
            .os("clone", "a reader thread")
            .map(drop)
    }

    fn hello(&self) -> Result<Greeting> {
        let version = PROTOCOL_VERSION;
        let answer = self.ask("hello", Request::Hello { version }, &[], QUICK)?;
        let mismatch = |said: String| MonitorMismatch {
            said,
            expected: format!("one of protocol {PROTOCOL_VERSION}"),
        };
        match answer.reply {
            Reply::Hello {
                version: PROTOCOL_VERSION,
                vm,
                ..
            } => Ok(Greeting {
                vm,
                pid: answer.pid,
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
        match self.ask(name, request, fds, patience)?.reply {
            Reply::Failed(seen) => Err(seen).because_of(|| MonitorRefused {
                request: name.to_owned(),
            }),
            reply => Ok(reply),
        }
    }

    fn ask(
        &self,
        name: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<Answer> {
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

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, Option<HashMap<u64, SyncSender<Answer>>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands on what came; `false` if nobody listens any more.
fn dispatch(received: Received, waiting: &Waiting, events: &SyncSender<Incoming>) -> bool {
    match received.packet.body {
        Body::Reply(reply) => {
            let caller = lock(waiting)
                .as_mut()
                .and_then(|waiting| waiting.remove(&received.packet.id));
            // A reply that nobody waits for came after its caller had given up.
            if let Some(caller) = caller {
                let _ = caller.try_send(Answer {
                    reply,
                    pid: received.pid,
                });
            }
            true
        }
        Body::Event(event) => events.send(Incoming::Event(event)).is_ok(),
        Body::Request(_) => true,
    }
}
