//! The host's end of a console: a log file, and any number of terminals that come and go.
//!
//! ```text
//!  guest ─▶ write() ─▶ backlog (1 MiB) ─▶ hub thread ─▶ log file
//!                                                    ─▶ each attached stream
//!  guest ◀─ ConsoleInput::offer ◀──────── hub thread ◀─ each attached stream
//! ```
//!
//! The guest's side only appends to the backlog under a mutex that the thread holds for an
//! exchange, never over I/O: a full disk or a terminal that does not read cannot stop a vCPU. What
//! does not fit is lost and counted, the oldest first. The log is bounded too, because its content
//! is the guest's: at [`LOG_LIMIT`] it starts anew.
//!
//! *Quiesced*, the thread has written all that there was and stands still: nobody reads from the
//! terminals. They are saved as descriptors ([`ConsoleHub::streams`]) and go on in another process
//! with the input that waited here; until that one is resumed, it does not read from them either.

mod thread;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strake_observe::{Because, OsContext, Result};
use strake_state::observations::Damaged;
use strake_state::{Blob, Records};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::thread::Hub;
use crate::lifecycle::{Component, Phase, PhaseCell};
use crate::observations::{DeviceUnusable, QuiesceTimeout};
use crate::serial::{ConsoleInput, ConsoleOutput};

/// Output that waits for the hub's thread.
pub const BACKLOG_LIMIT: usize = 1 << 20;

/// The size at which the log starts anew.
pub const LOG_LIMIT: u64 = 64 << 20;

/// Streams attached at a time; further ones are refused.
pub const STREAM_LIMIT: usize = 16;

const WAKE: u64 = u64::MAX;
const CHUNK: usize = 4096;
/// How soon input is offered again that the guest had no room for.
const RETRY_MS: i32 = 20;
/// How long the input of a terminal that has left waits for the guest to have room: what was piped
/// into it shall arrive, but a guest that never reads must not keep its place for ever.
const LEFT_LIMIT: Duration = Duration::from_secs(2);

/// How long the thread may take to write what there is before it stands still.
const QUIESCE_BOUND: Duration = Duration::from_secs(2);

strake_state::saved! {
    /// The terminals at a console.
    pub record SavedConsoleHub("console-hub", version 1) {
        /// For each terminal the input that waits for the guest to have room.
        1 => waiting: Vec<Blob>,
    }
}

/// The host's end of a console.
pub struct ConsoleHub {
    phase: PhaseCell,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    name: String,
    wake: EventFd,
    state: Mutex<State>,
    /// The thread stands still, or shall no longer.
    moved: Condvar,
}

#[derive(Default)]
struct State {
    backlog: Vec<u8>,
    lost: u64,
    /// Streams that the thread does not know yet.
    arrived: Vec<Arrival>,
    /// Streams of another process that are to be restored.
    brought: Vec<OwnedFd>,
    streams: usize,
    /// The thread shall stand still.
    still: bool,
    /// It does, with these streams.
    standing: Option<Vec<Held>>,
    input: Option<Arc<dyn ConsoleInput>>,
    closing: bool,
}

/// A stream that the thread does not know yet.
struct Arrival {
    socket: UnixStream,
    /// How much of the backlog is older.
    older: usize,
    /// Input that was read from it elsewhere.
    pending: Vec<u8>,
}

/// A stream of a thread that stands still; none if it could not be shared.
struct Held(Option<UnixStream>, Vec<u8>);

impl fmt::Debug for ConsoleHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleHub")
            .field("name", &self.shared.name)
            .finish_non_exhaustive()
    }
}

impl ConsoleHub {
    /// A hub named `name` that appends to `log`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn new(name: impl Into<String>, mut log: File) -> Result<Arc<Self>> {
        let name = name.into();
        let unusable = || DeviceUnusable {
            device: name.clone(),
            doing: "starting its hub".to_owned(),
        };
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .os("eventfd", &name)
            .because_of(unusable)?;
        let poller = Epoll::new()
            .os("epoll_create1", &name)
            .because_of(unusable)?;
        poller
            .ctl(
                ControlOperation::Add,
                wake.as_raw_fd(),
                EpollEvent::new(EventSet::IN, WAKE),
            )
            .os("epoll_ctl", &name)
            .because_of(unusable)?;
        // A log that cannot be sought in (a pipe) is as good.
        let written = log.seek(SeekFrom::End(0)).unwrap_or(0);
        let shared = Arc::new(Shared {
            name: name.clone(),
            wake,
            state: Mutex::default(),
            moved: Condvar::new(),
        });
        let hub = Hub {
            shared: Arc::clone(&shared),
            poller,
            log,
            written,
            streams: BTreeMap::new(),
            next: 0,
            reported: false,
        };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || hub.run())
            .os("spawn a thread", &name)
            .because_of(unusable)?;
        Ok(Arc::new(Self {
            phase: PhaseCell::default(),
            shared,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Attaches a stream socket: it gets the output from now on, and what it sends is input.
    ///
    /// # Errors
    /// There are [`STREAM_LIMIT`] already, or the stream is none.
    pub fn attach(&self, stream: OwnedFd) -> Result<()> {
        let stream = UnixStream::from(stream);
        stream
            .set_nonblocking(true)
            .os("FIONBIO", &self.shared.name)?;
        let mut state = self.shared.lock();
        if state.streams >= STREAM_LIMIT {
            return Err(DeviceUnusable {
                device: self.shared.name.clone(),
                doing: format!("attaching more than {STREAM_LIMIT} terminals"),
            }
            .into());
        }
        state.streams += 1;
        let older = state.backlog.len();
        state.arrived.push(Arrival {
            socket: stream,
            older,
            pending: Vec::new(),
        });
        drop(state);
        self.shared.wake();
        Ok(())
    }

    /// The terminals' streams, in the order of their record, while it is quiesced.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn streams(&self) -> Result<Vec<OwnedFd>> {
        let state = self.shared.lock();
        let held = state
            .standing
            .iter()
            .flatten()
            .filter_map(|held| held.0.as_ref());
        held.map(|socket| socket.try_clone().map(OwnedFd::from))
            .collect::<std::io::Result<_>>()
            .os("dup", &self.shared.name)
    }

    /// Gives it the streams of the process whose records it will be restored from.
    pub fn bring(&self, streams: Vec<OwnedFd>) {
        self.shared.lock().brought = streams;
    }

    /// Sends input to `input` from now on.
    pub fn connect_input(&self, input: Arc<dyn ConsoleInput>) {
        self.shared.lock().input = Some(input);
    }

    /// Writes what is left and ends the thread. What comes afterwards is lost.
    pub fn close(&self) {
        self.shared.lock().closing = true;
        self.shared.moved.notify_all();
        self.shared.wake();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Drop for ConsoleHub {
    fn drop(&mut self) {
        self.close();
    }
}

impl ConsoleOutput for ConsoleHub {
    fn write(&self, bytes: &[u8]) {
        let mut state = self.shared.lock();
        let idle = state.backlog.is_empty();
        state.backlog.extend(bytes);
        let over = state.backlog.len().saturating_sub(BACKLOG_LIMIT);
        if over > 0 {
            // A quarter at once, so that not every further byte moves the whole backlog.
            let cut = (over + BACKLOG_LIMIT / 4).min(state.backlog.len());
            state.backlog.drain(..cut);
            state.lost += cut as u64;
            for arrival in &mut state.arrived {
                arrival.older = arrival.older.saturating_sub(cut);
            }
        }
        drop(state);
        if idle {
            self.shared.wake();
        }
    }
}

impl Component for ConsoleHub {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn phase(&self) -> Phase {
        self.phase.get()
    }

    fn start(&self) -> Result<()> {
        let name = &self.shared.name;
        self.phase
            .step(name, "start", (Phase::Prepared, Phase::Running), || Ok(()))
    }

    fn quiesce(&self) -> Result<()> {
        let name = &self.shared.name;
        let steps = (Phase::Running, Phase::Quiesced);
        self.phase
            .step(name, "quiesce", steps, || self.shared.stop())
    }

    fn resume(&self) -> Result<()> {
        let name = &self.shared.name;
        let steps = (Phase::Quiesced, Phase::Running);
        self.phase.step(name, "resume", steps, || {
            self.shared.go_on();
            Ok(())
        })
    }

    fn sketch(&self, _: &mut Records) -> Result<()> {
        Ok(()) // It has nothing that takes long.
    }

    fn prepare(&self, _: &mut Records) -> Result<()> {
        Ok(())
    }

    fn save(&self, records: &mut Records) -> Result<()> {
        let name = &self.shared.name;
        let steps = (Phase::Quiesced, Phase::Quiesced);
        self.phase.step(name, "be saved", steps, || {
            let state = self.shared.lock();
            let held = state
                .standing
                .iter()
                .flatten()
                .filter(|held| held.0.is_some());
            let waiting = held.map(|held| Blob(held.1.clone())).collect();
            records.put(name, &SavedConsoleHub { waiting })
        })
    }

    fn restore(&self, records: &mut Records) -> Result<()> {
        let name = &self.shared.name;
        let steps = (Phase::Prepared, Phase::Quiesced);
        self.phase.step(name, "be restored", steps, || {
            let saved: SavedConsoleHub = records.take(name)?;
            self.shared.restore(saved.waiting)
        })
    }
}

impl Shared {
    /// Makes the thread stand still.
    fn stop(&self) -> Result<()> {
        let mut state = self.lock();
        state.still = true;
        self.wake();
        let until = Instant::now() + QUIESCE_BOUND;
        while state.standing.is_none() && !state.closing {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.still = false;
                return Err(QuiesceTimeout {
                    device: self.name.clone(),
                    waited_ms: u64::try_from(QUIESCE_BOUND.as_millis()).unwrap_or(u64::MAX),
                }
                .into());
            }
            state = self
                .moved
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
        Ok(())
    }

    fn go_on(&self) {
        self.lock().still = false;
        self.moved.notify_all();
    }

    /// The streams that were brought are there from now on, but nobody reads from them yet.
    fn restore(&self, waiting: Vec<Blob>) -> Result<()> {
        let mut state = self.lock();
        let brought = std::mem::take(&mut state.brought);
        if brought.len() != waiting.len() || brought.len() > STREAM_LIMIT {
            return Err(Damaged {
                record: format!("'console-hub' of '{}'", self.name),
                reason: format!(
                    "{} terminals were saved and {} came",
                    waiting.len(),
                    brought.len()
                ),
            }
            .into());
        }
        state.still = true;
        for (stream, Blob(pending)) in brought.into_iter().zip(waiting) {
            let socket = UnixStream::from(stream);
            socket.set_nonblocking(true).os("FIONBIO", &self.name)?;
            let older = state.backlog.len();
            state.streams += 1;
            state.arrived.push(Arrival {
                socket,
                older,
                pending,
            });
        }
        drop(state);
        self.wake();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = self.wake.write(1);
    }
}

#[cfg(test)]
mod tests;
