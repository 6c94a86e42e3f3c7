//! The thread of a worker.
//!
//! ```text
//!   spawn ─▶ start() ─▶ ┌─ wait ─▶ ready(token) ─▶ … ─┐
//!                       └──────────────◀──────────────┘
//!   stop asked ─▶ stop() ─▶ wait/ready until idle() ─▶ thread ends, hands its Work back
//!   stop taken back (the bound passed) ─▶ start() again
//! ```
//!
//! The work is in one thread or in the other, never in both: a spawned thread owns it and its end
//! gives it back, which is how a quiesced device is resumed and how a reset knows that nothing
//! touches guest memory any more.
//!
//! What is shared is `Control`: a [`Handshake`] about stopping, the event that wakes the thread to
//! look at it, and the count of ended threads behind a mutex.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strake_observe::{Because, Observation, OsContext, Result};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::guest::as_fd;
use super::handshake::Handshake;
use super::transport::Interrupter;
use crate::observations::{DeviceUnusable, GuestBrokeRing, WorkerDied};

/// How long a device may take to finish what is in flight before a quiesce fails.
pub const QUIESCE_BOUND: Duration = Duration::from_secs(5);

/// What each worker's thread does first.
pub type WorkerEntry = fn() -> Result<()>;

static ENTRY: OnceLock<WorkerEntry> = OnceLock::new();

/// Lets every worker's thread begin with `entry`: the machine confines it there. A thread whose
/// entry fails does no work; its device asks for a reset. Only the first call counts.
pub fn set_worker_entry(entry: WorkerEntry) {
    let _ = ENTRY.set(entry);
}

const WAKE: u64 = u64::MAX;
const EVENTS: usize = 8;

/// Why a worker cannot go on before its device is reset.
#[derive(Debug)]
pub struct Fault {
    queue: u16,
    reason: String,
    cause: Option<Observation>,
}

impl Fault {
    /// The driver broke a ring.
    #[must_use]
    pub fn ring(queue: u16, reason: impl Into<String>) -> Self {
        Self {
            queue,
            reason: reason.into(),
            cause: None,
        }
    }

    /// The backend broke.
    #[must_use]
    pub fn backend(queue: u16, cause: Observation) -> Self {
        Self {
            queue,
            reason: "its backend failed".to_owned(),
            cause: Some(cause),
        }
    }

    /// As an observation about `device`.
    #[must_use]
    pub fn observed(self, device: &str) -> Observation {
        match self.cause {
            Some(cause) => Observation::from(DeviceUnusable {
                device: device.to_owned(),
                doing: format!("serving queue {}", self.queue),
            })
            .because(cause),
            None => GuestBrokeRing {
                device: device.to_owned(),
                queue: self.queue,
                reason: self.reason,
            }
            .into(),
        }
    }
}

/// What a step of a worker left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing: wait for an event.
    Wait,
    /// The bound of a batch was reached: there is more to do at once.
    More,
}

/// Why a worker is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// A source that was watched is ready; its token.
    Source(u64),
    /// The last step left more to do.
    Again,
}

/// What a worker thread does for its device.
pub trait Work: Send {
    /// The thread's name.
    fn name(&self) -> String;

    /// Watches its sources. Called once in each thread that runs it.
    ///
    /// # Errors
    /// A source cannot be watched.
    fn watch(&self, poller: &Poller) -> Result<()>;

    /// Begins or goes on, and looks at everything: kicks may have come before.
    ///
    /// # Errors
    /// [`Fault`].
    fn start(&mut self) -> Result<Progress, Fault>;

    /// Does one bounded batch.
    ///
    /// # Errors
    /// [`Fault`].
    fn ready(&mut self, why: Ready, poller: &Poller) -> Result<Progress, Fault>;

    /// Takes nothing new from now on; what is in flight is finished.
    fn stop(&mut self);

    /// Whether nothing is in flight.
    fn idle(&self) -> bool;
}

/// What a worker waits on.
#[derive(Debug)]
pub struct Poller(Epoll);

impl Poller {
    pub(crate) fn new() -> Result<Self> {
        Epoll::new().os("epoll_create1", "a worker").map(Self)
    }

    /// Calls the work with `token` whenever `source` is readable.
    ///
    /// # Errors
    /// The kernel refuses the source.
    pub fn readable(&self, source: BorrowedFd<'_>, token: u64) -> Result<()> {
        self.add(source, token, EventSet::IN)
    }

    /// Calls the work with `token` whenever something new arrives at `source`.
    ///
    /// # Errors
    /// The kernel refuses the source.
    pub fn arrival(&self, source: BorrowedFd<'_>, token: u64) -> Result<()> {
        self.add(source, token, EventSet::IN | EventSet::EDGE_TRIGGERED)
    }

    fn add(&self, source: BorrowedFd<'_>, token: u64, events: EventSet) -> Result<()> {
        self.0
            .ctl(
                ControlOperation::Add,
                source.as_raw_fd(),
                EpollEvent::new(events, token),
            )
            .os("epoll_ctl", format!("source {token} of a worker"))
    }

    /// From now on also calls the work when `source`, watched by [`arrival`](Self::arrival), takes
    /// data again, or no longer.
    ///
    /// # Errors
    /// The kernel refuses the source.
    pub fn room(&self, source: BorrowedFd<'_>, token: u64, wanted: Wanted) -> Result<()> {
        let mut events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if wanted == Wanted::Yes {
            events |= EventSet::OUT;
        }
        self.0
            .ctl(
                ControlOperation::Modify,
                source.as_raw_fd(),
                EpollEvent::new(events, token),
            )
            .os("epoll_ctl", format!("source {token} of a worker"))
    }

    /// Stops watching.
    ///
    /// # Errors
    /// It was not watched.
    pub fn forget(&self, source: BorrowedFd<'_>) -> Result<()> {
        self.0
            .ctl(
                ControlOperation::Delete,
                source.as_raw_fd(),
                EpollEvent::default(),
            )
            .os("epoll_ctl", "a source of a worker")
    }
}

/// Whether an event is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// It is.
    Yes,
    /// It is not.
    No,
}

struct Control {
    handshake: Handshake,
    wake: EventFd,
    ended: Arc<Ended>,
}

impl Control {
    fn wake(&self) {
        // A full counter wakes as well.
        let _ = self.wake.write(1);
    }
}

#[derive(Default)]
struct Ended {
    count: Mutex<usize>,
    changed: Condvar,
}

/// Counts a thread as ended however it ends. After a panic the guest is told, so that it does not
/// wait for ever.
struct EndGuard {
    ended: Arc<Ended>,
    interrupter: Interrupter,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let device = self.interrupter.device().to_owned();
            let died = WorkerDied { device }.into();
            self.interrupter.fault(Fault::backend(0, died));
        }
        let mut count = lock(&self.ended.count);
        *count += 1;
        self.ended.changed.notify_all();
    }
}

struct Worker {
    control: Arc<Control>,
    thread: JoinHandle<Box<dyn Work>>,
}

/// What ended workers leave: their works, and what was seen of those that died.
pub(crate) type Rest = (Vec<Box<dyn Work>>, Vec<Observation>);

/// The workers of one device.
pub(crate) struct Workers {
    device: String,
    workers: Vec<Worker>,
    ended: Arc<Ended>,
}

impl Workers {
    /// Starts a thread for each work.
    pub(crate) fn spawn(
        device: &str,
        works: Vec<Box<dyn Work>>,
        interrupter: &Interrupter,
    ) -> Result<Self> {
        let mut set = Self {
            device: device.to_owned(),
            workers: Vec::new(),
            ended: Arc::default(),
        };
        for work in works {
            // On failure those that run already are stopped by the drop of the set.
            set.spawn_one(work, interrupter)
                .because_of(|| DeviceUnusable {
                    device: device.to_owned(),
                    doing: "starting a worker".to_owned(),
                })?;
        }
        Ok(set)
    }

    fn spawn_one(&mut self, work: Box<dyn Work>, interrupter: &Interrupter) -> Result<()> {
        let name = work.name();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).os("eventfd", &name)?;
        let control = Arc::new(Control {
            handshake: Handshake::new(),
            wake,
            ended: Arc::clone(&self.ended),
        });
        let poller = Poller::new()?;
        poller.readable(as_fd(&control.wake), WAKE)?;
        work.watch(&poller)?;
        let theirs = Arc::clone(&control);
        let interrupter = interrupter.clone();
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                let _end = EndGuard {
                    ended: Arc::clone(&theirs.ended),
                    interrupter: interrupter.clone(),
                };
                run(work, &theirs, &poller, &interrupter)
            })
            .os("spawn a thread", &name)?;
        self.workers.push(Worker { control, thread });
        Ok(())
    }

    /// Asks all of them to finish what is in flight and to end.
    pub(crate) fn ask_to_stop(&self) {
        for worker in &self.workers {
            worker.control.handshake.ask();
            worker.control.wake();
        }
    }

    /// Waits until all have ended, at most until `bound` has passed. Says whether they have.
    pub(crate) fn wait(&self, bound: Duration) -> bool {
        let until = Instant::now() + bound;
        let mut count = lock(&self.ended.count);
        while *count < self.workers.len() {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            (count, _) = self
                .ended
                .changed
                .wait_timeout(count, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Ends them, however long it takes, and gives their works back. A worker that died of a
    /// panic gives nothing but an observation.
    pub(crate) fn join(mut self) -> Rest {
        self.ask_to_stop();
        let mut works = Vec::new();
        let mut seen = Vec::new();
        for worker in self.workers.drain(..) {
            match worker.thread.join() {
                Ok(work) => works.push(work),
                Err(_) => seen.push(
                    WorkerDied {
                        device: self.device.clone(),
                    }
                    .into(),
                ),
            }
        }
        (works, seen)
    }

    /// Stops them within `bound`. If it passes, those that still run go on and those that ended
    /// are started again: the set is given back as it was.
    pub(crate) fn stop(
        self,
        bound: Duration,
        interrupter: &Interrupter,
    ) -> std::result::Result<Rest, Result<Self>> {
        self.ask_to_stop();
        if self.wait(bound) {
            return Ok(self.join());
        }
        Err(self.revive(interrupter))
    }

    /// Takes the request to stop back; threads that ended already are started again.
    fn revive(mut self, interrupter: &Interrupter) -> Result<Self> {
        let mut works = Vec::new();
        for worker in std::mem::take(&mut self.workers) {
            if worker.control.handshake.take_back() {
                worker.control.wake();
                self.workers.push(worker);
            } else if let Ok(work) = worker.thread.join() {
                // It was counted as ended before the join returned.
                let mut count = lock(&self.ended.count);
                *count = count.saturating_sub(1);
                works.push(work);
            }
        }
        for work in works {
            self.spawn_one(work, interrupter)?;
        }
        Ok(self)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.ask_to_stop();
        for worker in self.workers.drain(..) {
            let _ = worker.thread.join();
        }
    }
}

/// The life of a worker thread; ends with the work that it gives back.
fn run(
    mut work: Box<dyn Work>,
    control: &Control,
    poller: &Poller,
    interrupter: &Interrupter,
) -> Box<dyn Work> {
    let mut events = [EpollEvent::default(); EVENTS];
    let mut broken = false;
    let mut stopped = false;
    let mut step = match ENTRY.get().map_or(Ok(()), |enter| enter()) {
        Ok(()) => work.start(),
        Err(seen) => Err(Fault::backend(0, seen)),
    };
    loop {
        let again = match step {
            Ok(progress) => progress == Progress::More,
            Err(fault) => {
                if !std::mem::replace(&mut broken, true) {
                    work.stop();
                    interrupter.fault(fault);
                }
                false
            }
        };
        step = Ok(Progress::Wait);
        if control.handshake.stopping() {
            if !std::mem::replace(&mut stopped, true) {
                work.stop();
            }
            if work.idle() && control.handshake.end() {
                return work;
            }
        } else if std::mem::take(&mut stopped) && !broken {
            step = work.start();
            continue;
        }
        let timeout = if again { 0 } else { -1 };
        let count = match poller.0.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                // Only a bug of ours gets here (a bad descriptor). Do not spin on it.
                interrupter.fault(Fault::backend(0, error.into()));
                std::thread::sleep(Duration::from_millis(100));
                0
            }
        };
        if again {
            step = work.ready(Ready::Again, poller);
        }
        for event in events.iter().take(count) {
            let token = event.data();
            if token == WAKE {
                let _ = control.wake.read();
            } else {
                step = join_steps(step, work.ready(Ready::Source(token), poller));
            }
        }
    }
}

/// The outcome of two steps: a fault counts most, then what is left to do.
fn join_steps(
    first: Result<Progress, Fault>,
    second: Result<Progress, Fault>,
) -> Result<Progress, Fault> {
    match (first, second) {
        (Err(fault), _) | (_, Err(fault)) => Err(fault),
        (Ok(Progress::Wait), Ok(Progress::Wait)) => Ok(Progress::Wait),
        _ => Ok(Progress::More),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
