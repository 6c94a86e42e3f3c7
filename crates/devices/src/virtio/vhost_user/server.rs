//! The socket that front-ends connect to.
//!
//! One thread accepts and serves, one front-end after the other. To stop it, its event is signalled
//! and the connection is shut down, which wakes it wherever it waits; then the rings are drained.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use strake_observe::{Because, Observation, OsContext, Result, State, recorder};
use strake_state::Records;
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::session::Session;
use crate::lifecycle::{Component, Phase, PhaseCell};
use crate::observations::{DeviceUnusable, FrontEndBroke, QuiesceTimeout};
use crate::throttle::Throttle;
use crate::virtio::VirtioDevice;
use crate::virtio::guest::as_fd;
use crate::virtio::worker::QUIESCE_BOUND;

/// How long accepting rests when the process has no descriptors left.
const REST: Duration = Duration::from_millis(100);

/// A device that front-ends reach over a unix socket.
///
/// As a [`Component`] it listens while it is running. Quiesced, its front-end is disconnected and
/// nothing is in flight; one that knows how to reconnect does so after a resume.
pub struct VhostUserServer {
    name: String,
    device: Arc<dyn VirtioDevice>,
    listener: Arc<UnixListener>,
    phase: PhaseCell,
    running: Mutex<Option<Running>>,
    shared: Arc<Shared>,
}

struct Running {
    stop: Arc<Stop>,
    /// Hangs up when the thread has ended.
    ended: Receiver<()>,
}

/// What the threads of a server have in common, one after the other.
#[derive(Default)]
struct Shared {
    /// Whether a front-end is connected.
    connected: AtomicBool,
    reports: Throttle,
}

struct Stop {
    asked: AtomicBool,
    event: EventFd,
    connection: Mutex<Option<UnixStream>>,
}

impl std::fmt::Debug for VhostUserServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostUserServer")
            .field("device", &self.name)
            .field("phase", &self.phase.get())
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VhostUserServer {
    /// Serves `device` at `listener`, a listening unix stream socket.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn new(device: Arc<dyn VirtioDevice>, listener: OwnedFd) -> Result<Self> {
        let name = device.name().to_owned();
        let listener = UnixListener::from(listener);
        listener
            .set_nonblocking(true)
            .os("fcntl", &name)
            .because_of(|| DeviceUnusable {
                device: name.clone(),
                doing: "listening".to_owned(),
            })?;
        Ok(Self {
            name,
            device,
            listener: Arc::new(listener),
            phase: PhaseCell::default(),
            running: Mutex::default(),
            shared: Arc::default(),
        })
    }

    /// Whether a front-end is connected.
    #[must_use]
    pub fn connected(&self) -> bool {
        self.shared.connected.load(Ordering::Relaxed)
    }

    fn launch(&self) -> Result<()> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).os("eventfd", &self.name)?;
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            event,
            connection: Mutex::default(),
        });
        let (alive, ended) = channel();
        let thread = Thread {
            device: Arc::clone(&self.device),
            listener: Arc::clone(&self.listener),
            stop: Arc::clone(&stop),
            shared: Arc::clone(&self.shared),
        };
        std::thread::Builder::new()
            .name("vhost-user".to_owned())
            .spawn(move || {
                thread.run();
                drop(alive);
            })
            .os("clone", &self.name)
            .because_of(|| DeviceUnusable {
                device: self.name.clone(),
                doing: "starting its server".to_owned(),
            })?;
        *lock(&self.running) = Some(Running { stop, ended });
        Ok(())
    }

    fn end(&self, bound: Duration) -> Result<()> {
        let mut running = lock(&self.running);
        let Some(thread) = running.as_ref() else {
            return Ok(());
        };
        thread.stop.ask();
        if thread.ended.recv_timeout(bound) == Err(RecvTimeoutError::Timeout) {
            return Err(QuiesceTimeout {
                device: self.name.clone(),
                waited_ms: u64::try_from(bound.as_millis()).unwrap_or(u64::MAX),
            }
            .into());
        }
        *running = None;
        Ok(())
    }
}

impl Component for VhostUserServer {
    fn name(&self) -> &str {
        &self.name
    }

    fn phase(&self) -> Phase {
        self.phase.get()
    }

    fn start(&self) -> Result<()> {
        let step = (Phase::Prepared, Phase::Running);
        self.phase.step(&self.name, "start", step, || self.launch())
    }

    /// Bounded by [`QUIESCE_BOUND`]. If that passes, the front-end is gone all the same; what the
    /// disk still has in flight is finished, and another call waits for it again.
    fn quiesce(&self) -> Result<()> {
        let step = (Phase::Running, Phase::Quiesced);
        self.phase
            .step(&self.name, "quiesce", step, || self.end(QUIESCE_BOUND))
    }

    fn resume(&self) -> Result<()> {
        let step = (Phase::Quiesced, Phase::Running);
        self.phase
            .step(&self.name, "resume", step, || self.launch())
    }

    /// Nothing: what the guest sees is its front-end's, which says it again to the next server.
    fn save(&self, _: &mut Records) -> Result<()> {
        let step = (Phase::Quiesced, Phase::Quiesced);
        self.phase.step(&self.name, "be saved", step, || Ok(()))
    }

    fn sketch(&self, _: &mut Records) -> Result<()> {
        Ok(()) // It has nothing that takes long.
    }

    fn prepare(&self, _: &mut Records) -> Result<()> {
        Ok(())
    }

    fn restore(&self, _: &mut Records) -> Result<()> {
        let step = (Phase::Prepared, Phase::Quiesced);
        self.phase.step(&self.name, "be restored", step, || Ok(()))
    }
}

impl Drop for VhostUserServer {
    fn drop(&mut self) {
        if let Some(running) = lock(&self.running).take() {
            running.stop.ask();
            let _ = running.ended.recv();
        }
    }
}

impl Stop {
    fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        let _ = self.event.write(1);
        if let Some(connection) = &*lock(&self.connection) {
            // One that is gone already needs no end.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }

    fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

struct Thread {
    device: Arc<dyn VirtioDevice>,
    listener: Arc<UnixListener>,
    stop: Arc<Stop>,
    shared: Arc<Shared>,
}

impl Thread {
    fn run(&self) {
        while !self.stop.asked() {
            self.wait(self.listener.as_fd());
            match self.listener.accept() {
                Ok((stream, _)) => self.serve(stream),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // A front-end that is gone already, or no descriptors: not for ever.
                Err(_) => std::thread::sleep(REST),
            }
        }
    }

    /// Until `source` has something to say or the end is asked for.
    fn wait(&self, source: std::os::fd::BorrowedFd<'_>) {
        let mut fds = [
            PollFd::from_borrowed_fd(as_fd(&self.stop.event), PollFlags::IN),
            PollFd::from_borrowed_fd(source, PollFlags::IN),
        ];
        let _ = poll(&mut fds, None);
    }

    /// From the first message of a front-end to the end of what it had in flight.
    fn serve(&self, stream: UnixStream) {
        let kept = stream.set_nonblocking(false).and(stream.try_clone());
        let Ok(kept) = kept else {
            return;
        };
        *lock(&self.stop.connection) = Some(kept);
        self.shared.connected.store(true, Ordering::Relaxed);
        let session = Arc::new(Mutex::new(Session::new(Arc::clone(&self.device))));
        let ended = self.converse(stream, &session);
        if let Err(error) = ended
            && !self.stop.asked()
            && self.shared.reports.pass()
        {
            let told = lock(&session).take_refusal();
            let broke = FrontEndBroke {
                device: self.device.name().to_owned(),
                reason: told.unwrap_or_else(|| error.to_string()),
            };
            recorder().record(Observation::from(broke), State::Open);
        }
        // The rings are drained.
        drop(session);
        self.device.reset();
        self.shared.connected.store(false, Ordering::Relaxed);
        *lock(&self.stop.connection) = None;
    }

    fn converse(
        &self,
        stream: UnixStream,
        session: &Arc<Mutex<Session>>,
    ) -> std::result::Result<(), Error> {
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(session));
        // The end may have been asked for before there was a connection to shut down.
        while !self.stop.asked() {
            match handler.handle_request() {
                Ok(()) | Err(Error::SocketRetry(_)) => {}
                Err(Error::Disconnected | Error::SocketBroken(_)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
