//! The server.
//!
//! Threads: one per listener, which accepts; one per client, which does all for it (`session`).
//! They share the exports and nothing else. Stopping signals one event that all of them poll.
//!
//! * `negotiation`: the options, without a socket;
//! * `request`: what a client may ask for, without a socket;
//! * `session`: the loop of one client; `flights`: its requests at the export; `replies`: the way
//!   back.

mod flights;
pub mod negotiation;
mod replies;
pub mod request;
mod session;
#[cfg(test)]
mod tests;

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use strake_block::Event;
use strake_observe::{Because, Observation, OsContext, Result, State, recorder};

use self::negotiation::Offer;
use self::session::{Session, Welcome};
use crate::channel::Channel;
use crate::export::{Access, Export};
use crate::socket::Socket;
use crate::tls::TlsServer;
use crate::{ListenFailed, SessionFailed, TooManyClients};

/// The most clients of a server at once. Each may use about 100 MiB.
pub const MAX_CLIENTS: usize = 64;

/// How long accepting rests when the process has no descriptors left.
const REST: Duration = Duration::from_millis(100);

/// Where a server listens.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    /// The socket's file, if it is ours to remove.
    path: Option<PathBuf>,
}

#[derive(Debug)]
enum Listening {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// A new unix socket, removed when the server ends.
    ///
    /// # Errors
    /// When there is something at that path, or its directory cannot be written.
    pub fn unix(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path)
            .os("bind", path.display())
            .because_of(|| ListenFailed {
                address: path.display().to_string(),
            })?;
        let mut new = Self::from_unix(listener)?;
        new.path = Some(path.to_owned());
        Ok(new)
    }

    /// A TCP port; port 0 is any free one.
    ///
    /// # Errors
    /// When the port is taken or the address is not this host's.
    pub fn tcp(address: impl ToSocketAddrs + std::fmt::Debug) -> Result<Self> {
        let shown = format!("{address:?}");
        let listener = TcpListener::bind(address)
            .os("bind", &shown)
            .because_of(|| ListenFailed {
                address: shown.clone(),
            })?;
        Self::from_tcp(listener)
    }

    /// A socket that listens already.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn from_unix(listener: UnixListener) -> Result<Self> {
        listener.set_nonblocking(true).os("fcntl", "a listener")?;
        Ok(Self {
            socket: Listening::Unix(listener),
            path: None,
        })
    }

    /// A socket that listens already.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn from_tcp(listener: TcpListener) -> Result<Self> {
        listener.set_nonblocking(true).os("fcntl", "a listener")?;
        Ok(Self {
            socket: Listening::Tcp(listener),
            path: None,
        })
    }

    /// Its TCP address, if it has one.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Listening::Tcp(listener) => listener.local_addr().ok(),
            Listening::Unix(_) => None,
        }
    }

    fn accept(&self) -> std::io::Result<(Socket, String)> {
        match &self.socket {
            Listening::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                let who = rustix::net::sockopt::socket_peercred(&stream).map_or_else(
                    |_| "a local process".to_owned(),
                    |peer| format!("process {}", peer.pid.as_raw_nonzero()),
                );
                Ok((Socket::Unix(stream), who))
            }
            Listening::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                Ok((Socket::Tcp(stream), peer.to_string()))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Listening::Unix(listener) => listener.as_fd(),
            Listening::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What a server serves, and to whom.
#[derive(Debug, Default)]
pub struct ServerConfig {
    /// The exports by name. A client that names none gets the only one.
    pub exports: Vec<(String, Arc<dyn Export>)>,
    /// With it, only TLS clients are served.
    pub tls: Option<TlsServer>,
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    exports: Vec<Arc<dyn Export>>,
    offers: Vec<Offer>,
    tls: Option<TlsServer>,
    stop: Event,
    clients: Arc<AtomicUsize>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Nothing under the lock can panic half way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Serves at these listeners until it is stopped.
    ///
    /// # Errors
    /// When no event or thread can be made.
    pub fn start(config: ServerConfig, listeners: Vec<Listener>) -> Result<Self> {
        let offers = config
            .exports
            .iter()
            .map(|(name, export)| Offer {
                name: name.clone(),
                description: export.description(),
                size: export.size(),
                writable: export.access() == Access::ReadWrite,
            })
            .collect();
        let shared = Arc::new(Shared {
            exports: config
                .exports
                .into_iter()
                .map(|(_, export)| export)
                .collect(),
            offers,
            tls: config.tls,
            stop: Event::new()?,
            clients: Arc::new(AtomicUsize::new(0)),
            threads: Mutex::new(Vec::new()),
        });
        let mut server = Self {
            shared: Arc::clone(&shared),
            listeners: Vec::new(),
        };
        for listener in listeners {
            let shared = Arc::clone(&shared);
            // If this one fails, dropping the server stops those before it.
            let thread = std::thread::Builder::new()
                .name("nbd-accept".to_owned())
                .spawn(move || accept(&shared, &listener))
                .os("clone", "a listener's thread")?;
            server.listeners.push(thread);
        }
        Ok(server)
    }

    /// How many clients are connected.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.shared.clients.load(Ordering::Relaxed)
    }

    /// Takes no more clients and no more requests, and waits until the last one was answered.
    pub fn stop(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.signal();
        for thread in self.listeners.drain(..) {
            let _ = thread.join();
        }
        let threads = std::mem::take(&mut *lock(&self.shared.threads));
        for thread in threads {
            let _ = thread.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &Listener) {
    loop {
        let mut fds = [
            PollFd::new(&shared.stop, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        let _ = poll(&mut fds, None);
        if shared.stop.wait(Duration::ZERO) {
            return;
        }
        match listener.accept() {
            Ok((socket, who)) => admit(shared, socket, who),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => {
                // A client that has gone already, or no descriptors: not for ever.
                let _ = shared.stop.wait(REST);
            }
        }
    }
}

/// Counts a client for as long as it lives.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn admit(shared: &Arc<Shared>, socket: Socket, who: String) {
    let place = Place(Arc::clone(&shared.clients));
    if shared.clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
        let limit = MAX_CLIENTS as u64;
        observe(TooManyClients { limit }.into());
        return;
    }
    let for_thread = Arc::clone(shared);
    let spawned = std::thread::Builder::new()
        .name("nbd-client".to_owned())
        .spawn(move || {
            let _place = place;
            serve(&for_thread, socket, &who);
        })
        .os("clone", "a client's thread");
    let mut threads = lock(&shared.threads);
    threads.retain(|thread| !thread.is_finished());
    match spawned {
        Ok(thread) => threads.push(thread),
        Err(seen) => observe(seen),
    }
}

fn serve(shared: &Shared, socket: Socket, who: &str) {
    let mut export = String::new();
    let session = || -> Result<()> {
        let mut channel = Channel::new(socket)?;
        let welcome = Welcome {
            offers: &shared.offers,
            tls: shared.tls.as_ref(),
            stop: &shared.stop,
        };
        let Some(agreed) = welcome.negotiate(&mut channel)? else {
            return Ok(());
        };
        if let Some(offer) = shared.offers.get(agreed.export) {
            export.clone_from(&offer.name);
        }
        let Some(served) = shared.exports.get(agreed.export) else {
            return Ok(());
        };
        Session::new(channel, Arc::clone(served), agreed)?.serve(&shared.stop)
    };
    if let Err(seen) = session() {
        let client = who.to_owned();
        observe(Observation::from(SessionFailed { client, export }).because(seen));
    }
}

fn observe(seen: Observation) {
    recorder().record(seen, State::Open);
}
