//! The control thread.
//!
//! ```text
//!   wait ─▶ accept ─▶ one request ─▶ reply ─▶ events ─┐
//!    ▲                                                │
//!    └────────────────────────────────────────────────┘
//!                 guest ended ─▶ machine at rest ─▶ daemon knows ─▶ done
//! ```
//!
//! A guest that ends by itself does so while nobody waits for it, and what has been sent need not
//! have been read: the monitor stays until a daemon has dismissed it ([`Request::Dismiss`]), and
//! tells each new one again. Where the daemon itself asked for the end, the news on its way will do.
//!
//! It is the process's main thread and owns the machine. Everything that other threads have to say
//! comes through the [`Mailbox`]. It waits only in `poll`, and for bounded times in requests that
//! pause or stop the guest.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
#[cfg(doc)]
use strake_api::control::Request;
use strake_api::control::{Event, ExitReason, Reply, RunState};
use strake_observe::{Because, OsContext, Result};

use super::session::{Life, Session};
use super::wire::{Connection, Received};
use crate::observations::ControlFailed;
use crate::{Machine, Mailbox};

/// How long a monitor without a machine waits for a daemon.
const UNCONFIGURED_LIMIT: Duration = Duration::from_secs(60);

/// How long the end of a guest waits for a daemon to hear of it. A daemon that is being replaced
/// is back much earlier; one that never comes back leaves nobody who would ask.
const LINGER_LIMIT: Duration = Duration::from_secs(3600);

/// How long the end of a guest waits for the decision of a job that awaits its commit.
const DECISION_LIMIT: Duration = Duration::from_secs(10);

/// What a server starts with.
#[derive(Debug)]
pub struct ServerConfig {
    /// The listening `SOCK_SEQPACKET` socket.
    pub listener: OwnedFd,
    /// Readable once the process was asked to end by a signal.
    pub terminate: Option<OwnedFd>,
    /// The version of the monitor's binary.
    pub version: String,
}

/// Serves daemons until the guest has ended.
#[derive(Debug)]
pub struct Server {
    pub(super) config: ServerConfig,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) machine: Option<Arc<Machine>>,
    session: Option<Session>,
    end: End,
    /// A daemon knows of the end and needs this process no more.
    dismissed: bool,
    /// The process was asked to end by a signal: it waits for no daemon.
    terminated: bool,
    /// Since when there is neither machine nor daemon.
    idle_since: Instant,
}

/// How far the end is.
#[derive(Debug)]
enum End {
    /// The guest lives, or is not there yet.
    NotYet,
    /// It has ended; jobs wait for their decision.
    Deciding { reason: ExitReason, since: Instant },
    /// All is at rest; the daemon is being told.
    Telling { reason: ExitReason, since: Instant },
}

/// What woke the control thread.
#[derive(Debug, Default)]
struct Awake {
    accept: bool,
    request: bool,
    terminate: bool,
}

impl Server {
    /// A server without a machine.
    #[must_use]
    pub fn new(config: ServerConfig, mailbox: Arc<Mailbox>) -> Self {
        Self {
            config,
            mailbox,
            machine: None,
            session: None,
            end: End::NotYet,
            dismissed: false,
            terminated: false,
            idle_since: Instant::now(),
        }
    }

    /// Serves until the guest has ended and a daemon knows. The machine is still there, at rest:
    /// the caller ends the process.
    ///
    /// # Errors
    /// [`ControlFailed`] if the listening socket does not work.
    pub fn serve(&mut self) -> Result<ExitReason> {
        loop {
            let awake = self.wait()?;
            self.mailbox.acknowledge();
            if awake.accept {
                self.accept()?;
            }
            if awake.request {
                self.answer_one();
            }
            if awake.terminate {
                self.config.terminate = None;
                self.terminated = true;
                self.mailbox.exit(ExitReason::Stopped);
            }
            self.mailbox.take_recorded(None);
            self.advance_end();
            self.deliver();
            if let Some(reason) = self.finished() {
                return Ok(reason);
            }
        }
    }

    fn wait(&self) -> Result<Awake> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.mailbox.readable(), PollFlags::IN),
            PollFd::new(&self.config.listener, PollFlags::IN),
        ];
        let terminate = self.config.terminate.as_ref().map(|fd| {
            fds.push(PollFd::new(fd, PollFlags::IN));
            fds.len() - 1
        });
        let session = self.session.as_ref().map(|session| {
            let mut flags = PollFlags::IN;
            if session.waits() {
                flags |= PollFlags::OUT;
            }
            fds.push(PollFd::from_borrowed_fd(
                session.connection().as_fd(),
                flags,
            ));
            fds.len() - 1
        });
        let timeout = self.timeout().map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Awake::default()),
            Err(error) => {
                return Err(error)
                    .os("poll", "the control socket")
                    .because_of(|| step("waiting"));
            }
        }
        let ready = |index: Option<usize>| {
            index
                .and_then(|index| fds.get(index))
                .is_some_and(|fd| !(fd.revents() - PollFlags::OUT).is_empty())
        };
        Ok(Awake {
            accept: ready(Some(1)),
            request: ready(session),
            terminate: ready(terminate),
        })
    }

    /// Until when the control thread may sleep.
    fn timeout(&self) -> Option<Duration> {
        let (since, limit) = match &self.end {
            End::NotYet if self.machine.is_none() && self.session.is_none() => {
                (self.idle_since, UNCONFIGURED_LIMIT)
            }
            End::NotYet => return None,
            End::Deciding { since, .. } => (*since, DECISION_LIMIT),
            End::Telling { since, .. } => (*since, LINGER_LIMIT),
        };
        // A little later, so that the limit has passed for certain.
        Some(limit.saturating_sub(since.elapsed()) + Duration::from_millis(1))
    }

    /// Takes a new connection; it replaces the one before.
    fn accept(&mut self) -> Result<()> {
        let socket = match accept_with(&self.config.listener, SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(Errno::INTR | Errno::AGAIN | Errno::CONNABORTED | Errno::MFILE | Errno::NFILE) => {
                return Ok(());
            }
            Err(error) => {
                return Err(error)
                    .os("accept", "the control socket")
                    .because_of(|| step("accepting"));
            }
        };
        let connection = Arc::new(Connection::new(socket));
        self.mailbox.set_connection(Some(Arc::clone(&connection)));
        self.session = Some(Session::new(connection));
        Ok(())
    }

    fn answer_one(&mut self) {
        let Some(session) = &self.session else {
            return;
        };
        let (id, (reply, fds)) = match session.receive() {
            Ok(Received::Packet(packet, fds)) => (packet.id, self.answer(packet.body, fds)),
            Ok(Received::Damaged(id, seen)) => (id, (Reply::Failed(seen), Vec::new())),
            Ok(Received::Nothing) => return,
            Ok(Received::Closed) => return self.hang_up(),
            Err(seen) => {
                strake_observe::recorder().record(seen, strake_observe::State::Open);
                return self.hang_up();
            }
        };
        if let Reply::Failed(told) = &reply {
            self.mailbox.take_recorded(Some(told));
        }
        let hello = matches!(reply, Reply::Hello { .. });
        let Some(session) = &mut self.session else {
            return;
        };
        let life = session.reply(id, reply, fds);
        if hello && !session.greeted {
            session.greeted = true;
            self.mailbox.set_heard();
            self.repeat_questions();
        }
        if life == Life::Over {
            self.hang_up();
        }
    }

    /// Whether this connection's daemon has said hello.
    pub(super) fn greeted(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.greeted)
    }

    /// Asks a daemon that has just come what its predecessor did not answer, and tells it of the
    /// end: its predecessor may have died over the news.
    fn repeat_questions(&self) {
        self.mailbox.forget_pending_commits();
        if let End::Telling { reason, .. } = &self.end {
            self.mailbox
                .post(Event::State(RunState::Exited(reason.clone())));
        }
        let Some(machine) = &self.machine else {
            return;
        };
        for job in machine.jobs_awaiting_commit() {
            self.mailbox.post(Event::JobAwaitsCommit { job });
        }
    }

    fn deliver(&mut self) {
        if let Some(session) = &mut self.session
            && session.deliver(&self.mailbox) == Life::Over
        {
            self.hang_up();
        }
    }

    fn hang_up(&mut self) {
        self.session = None;
        self.mailbox.set_connection(None);
        self.idle_since = Instant::now();
    }

    /// Goes on with the end of the guest, if it has come.
    fn advance_end(&mut self) {
        if matches!(self.end, End::NotYet)
            && let Some(reason) = self.mailbox.take_exit()
        {
            if let Some(machine) = &self.machine {
                machine.guest_ended();
            }
            self.end = End::Deciding {
                reason,
                since: Instant::now(),
            };
        }
        let End::Deciding { reason, since } = &self.end else {
            return;
        };
        let undecided = self
            .machine
            .as_ref()
            .is_some_and(|machine| !machine.jobs_awaiting_commit().is_empty());
        if undecided && since.elapsed() < DECISION_LIMIT {
            return;
        }
        let reason = reason.clone();
        if let Some(machine) = &self.machine {
            for seen in machine.stop() {
                self.mailbox.observe(seen);
            }
        }
        self.mailbox
            .post(Event::State(RunState::Exited(reason.clone())));
        self.end = End::Telling {
            reason,
            since: Instant::now(),
        };
    }

    /// Whether there is nothing left to do.
    fn finished(&mut self) -> Option<ExitReason> {
        match &self.end {
            End::NotYet => {
                let abandoned = self.machine.is_none()
                    && self.session.is_none()
                    && self.idle_since.elapsed() >= UNCONFIGURED_LIMIT;
                abandoned.then_some(ExitReason::Stopped)
            }
            End::Deciding { .. } => None,
            End::Telling { reason, since } => {
                let told = self
                    .session
                    .as_ref()
                    .is_some_and(|session| session.greeted && !session.waits())
                    && self.mailbox.is_empty();
                let known = self.dismissed || told && *reason == ExitReason::Stopped;
                let nobody = self.machine.is_none() || self.terminated;
                (known || nobody || since.elapsed() >= LINGER_LIMIT).then(|| reason.clone())
            }
        }
    }

    /// The guest runs in another monitor: nothing is stopped or flushed, the process only ends.
    pub(super) fn retire(&mut self) {
        self.dismissed = true;
        self.end = End::Telling {
            reason: ExitReason::Stopped,
            since: Instant::now(),
        };
    }

    /// A daemon says that it knows of the end.
    pub(super) fn dismiss(&mut self) -> Result<()> {
        match &self.end {
            End::Telling { .. } => {
                self.dismissed = true;
                Ok(())
            }
            End::NotYet | End::Deciding { .. } => Err(self.wrong_state("dismiss the monitor")),
        }
    }

    /// What the VM does.
    pub(super) fn run_state(&self) -> RunState {
        match (&self.end, &self.machine) {
            (End::Deciding { reason, .. } | End::Telling { reason, .. }, _) => {
                RunState::Exited(reason.clone())
            }
            (End::NotYet, Some(machine)) => machine.run_state(),
            (End::NotYet, None) => RunState::Unconfigured,
        }
    }
}

fn step(step: &str) -> ControlFailed {
    ControlFailed {
        step: step.to_owned(),
    }
}
