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

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strake_observe::{Because, OsContext, Result, State as Seen, recorder};
use strake_state::observations::Damaged;
use strake_state::{Blob, Records};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::lifecycle::{Component, Phase, PhaseCell};
use crate::observations::{ConsoleOutputLost, DeviceUnusable, QuiesceTimeout};
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

struct Stream {
    socket: UnixStream,
    /// Input that the guest had no room for. The stream is not read meanwhile.
    pending: Vec<u8>,
    /// Since when the terminal is known to have left while its input waits.
    left: Option<Instant>,
    /// How much of the next output is older than the stream.
    skip: usize,
}

/// What the hub's thread owns.
struct Hub {
    shared: Arc<Shared>,
    poller: Epoll,
    log: File,
    written: u64,
    streams: BTreeMap<u64, Stream>,
    next: u64,
    reported: bool,
}

impl Hub {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let waiting = self
                .streams
                .values()
                .any(|stream| !stream.pending.is_empty());
            let timeout = if waiting { RETRY_MS } else { -1 };
            let count = self.poller.wait(timeout, &mut events).unwrap_or(0);
            let _ = self.shared.wake.read();
            let (output, arrived, input, closing) = self.look();
            for arrival in arrived {
                self.welcome(arrival);
            }
            self.put(&output);
            if closing {
                return;
            }
            if self.stand() {
                continue;
            }
            let mut ready: Vec<u64> = events
                .iter()
                .take(count)
                .map(EpollEvent::data)
                .filter(|token| *token != WAKE)
                .collect();
            ready.extend(
                self.streams
                    .iter()
                    .filter(|(_, stream)| !stream.pending.is_empty())
                    .map(|(token, _)| *token),
            );
            ready.sort_unstable();
            ready.dedup();
            for event in events.iter().take(count) {
                self.note_end(event);
            }
            for token in ready {
                self.take_input(token, input.as_deref());
            }
        }
    }

    /// What there is to do, taken out of the shared state.
    #[allow(clippy::type_complexity)]
    fn look(&mut self) -> (Vec<u8>, Vec<Arrival>, Option<Arc<dyn ConsoleInput>>, bool) {
        let mut state = self.shared.lock();
        let lost = std::mem::take(&mut state.lost);
        let taken = (
            std::mem::take(&mut state.backlog),
            std::mem::take(&mut state.arrived),
            state.input.clone(),
            state.closing,
        );
        drop(state);
        if lost > 0 {
            self.report(lost, None);
        }
        taken
    }

    /// Stands still for as long as that is wanted; says whether it did. What came meanwhile is
    /// looked for afterwards.
    fn stand(&self) -> bool {
        let mut state = self.shared.lock();
        // What came since the last look is written first.
        if !state.still || !state.backlog.is_empty() || !state.arrived.is_empty() {
            let again = state.still;
            drop(state);
            if again {
                self.shared.wake();
            }
            return again;
        }
        let held = self
            .streams
            .values()
            .map(|stream| Held(stream.socket.try_clone().ok(), stream.pending.clone()));
        state.standing = Some(held.collect());
        self.shared.moved.notify_all();
        while state.still && !state.closing {
            state = self
                .shared
                .moved
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.standing = None;
        drop(state);
        self.shared.wake();
        true
    }

    fn welcome(&mut self, arrival: Arrival) {
        let Arrival {
            socket,
            older: skip,
            pending,
        } = arrival;
        let token = self.next;
        self.next += 1;
        let events = if pending.is_empty() {
            EventSet::IN
        } else {
            EventSet::ONE_SHOT
        };
        let added = self.poller.ctl(
            ControlOperation::Add,
            socket.as_raw_fd(),
            EpollEvent::new(events, token),
        );
        if added.is_ok() {
            let stream = Stream {
                socket,
                pending,
                left: None,
                skip,
            };
            self.streams.insert(token, stream);
        } else {
            self.shared.lock().streams -= 1;
        }
    }

    fn dismiss(&mut self, token: u64) {
        if let Some(stream) = self.streams.remove(&token) {
            let _ = self.poller.ctl(
                ControlOperation::Delete,
                stream.socket.as_raw_fd(),
                EpollEvent::default(),
            );
            self.shared.lock().streams -= 1;
        }
    }

    fn put(&mut self, output: &[u8]) {
        if output.is_empty() {
            return;
        }
        if self.written.saturating_add(output.len() as u64) > LOG_LIMIT
            && self.log.set_len(0).is_ok()
        {
            let _ = self.log.seek(SeekFrom::Start(0));
            self.written = 0;
            let _ = self
                .log
                .write_all(b"[the log reached its limit and starts anew]\n");
        }
        match self.log.write_all(output) {
            Ok(()) => self.written += output.len() as u64,
            Err(error) => self.report(output.len() as u64, Some(&error)),
        }
        let gone: Vec<u64> = self
            .streams
            .iter_mut()
            .filter_map(|(token, stream)| {
                // A terminal that does not read loses what does not fit into its socket.
                let skip = std::mem::take(&mut stream.skip);
                let output = output.get(skip..).filter(|output| !output.is_empty())?;
                match stream.socket.write(output) {
                    Ok(_) => None,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => None,
                    Err(error) if error.kind() == ErrorKind::Interrupted => None,
                    Err(_) => Some(*token),
                }
            })
            .collect();
        for token in gone {
            self.dismiss(token);
        }
    }

    /// Notes that a terminal has left while its input waits. Of the others reading tells.
    fn note_end(&mut self, event: &EpollEvent) {
        let gone = EventSet::HANG_UP | EventSet::ERROR;
        if event.event_set().intersects(gone)
            && let Some(stream) = self.streams.get_mut(&event.data())
            && !stream.pending.is_empty()
        {
            stream.left.get_or_insert_with(Instant::now);
        }
    }

    /// Reads from a stream, or offers again what it read before.
    fn take_input(&mut self, token: u64, input: Option<&dyn ConsoleInput>) {
        let Some(stream) = self.streams.get_mut(&token) else {
            return;
        };
        let waited = !stream.pending.is_empty();
        if !waited {
            let mut chunk = [0; CHUNK];
            match stream.socket.read(&mut chunk) {
                Ok(count) if count > 0 => {
                    stream.pending = chunk.get(..count).unwrap_or_default().to_vec();
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
                {
                    return;
                }
                _ => return self.dismiss(token),
            }
        }
        // Without a console that takes input it is dropped.
        let taken = input.map_or(stream.pending.len(), |input| input.offer(&stream.pending));
        stream.pending.drain(..taken.min(stream.pending.len()));
        let waits = !stream.pending.is_empty();
        if waits && stream.left.is_some_and(|left| left.elapsed() >= LEFT_LIMIT) {
            return self.dismiss(token);
        }
        if waits != waited {
            stream.left = None;
            // The end of a stream is reported whether one asks for it or not, and for as long as
            // it lasts. While its input waits, once is enough.
            let events = if waits {
                EventSet::ONE_SHOT
            } else {
                EventSet::IN
            };
            let _ = self.poller.ctl(
                ControlOperation::Modify,
                stream.socket.as_raw_fd(),
                EpollEvent::new(events, token),
            );
        }
    }

    /// Reports the first loss; a guest that floods its console does so for ever.
    fn report(&mut self, bytes: u64, cause: Option<&std::io::Error>) {
        if std::mem::replace(&mut self.reported, true) {
            return;
        }
        let seen = strake_observe::Observation::from(ConsoleOutputLost {
            device: self.shared.name.clone(),
            bytes,
        });
        let seen = match cause {
            Some(error) => {
                seen.because(strake_observe::OsCallFailed::new("write", "the log", error))
            }
            None => seen,
        };
        recorder().record(seen, Seen::Open);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sink(Mutex<(Vec<u8>, usize)>);

    impl ConsoleInput for Sink {
        fn offer(&self, bytes: &[u8]) -> usize {
            let mut sink = self.0.lock().unwrap();
            let taken = bytes.len().min(sink.1);
            sink.0.extend(&bytes[..taken]);
            taken
        }
    }

    fn eventually(what: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(5);
        while !what() {
            assert!(Instant::now() < until, "it did not happen");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn logged(file: &File) -> String {
        let mut file = file.try_clone().unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    fn log() -> (tempfile::NamedTempFile, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let append = File::options().append(true).open(file.path()).unwrap();
        (file, append)
    }

    #[test]
    fn output_goes_to_the_log_and_to_whoever_is_attached() {
        let (file, append) = log();
        let hub = ConsoleHub::new("console", append).unwrap();
        hub.write(b"early ");
        let (ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs.into()).unwrap();
        eventually(|| logged(file.as_file()) == "early ");
        hub.write(b"late");
        let mut got = [0; 4];
        (&ours).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"late");
        hub.close();
        assert_eq!(logged(file.as_file()), "early late");
    }

    #[test]
    fn a_terminal_that_does_not_read_does_not_hold_the_log() {
        let (file, append) = log();
        let hub = ConsoleHub::new("console", append).unwrap();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs.into()).unwrap();
        for _ in 0..100 {
            hub.write(&[b'x'; 16 * 1024]);
            std::thread::sleep(Duration::from_millis(1));
        }
        hub.write(b"end");
        hub.close();
        assert!(logged(file.as_file()).ends_with("end"));
    }

    #[test]
    fn input_that_finds_no_room_waits_and_arrives_whole() {
        let (_file, append) = log();
        let hub = ConsoleHub::new("console", append).unwrap();
        let sink = Arc::new(Sink(Mutex::new((Vec::new(), 3))));
        hub.connect_input(sink.clone());
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs.into()).unwrap();
        let sent: Vec<u8> = (0..200).collect();
        ours.write_all(&sent).unwrap();
        eventually(|| sink.0.lock().unwrap().0 == sent);
    }

    /// How long a thread of this process has been computing.
    fn worked(thread: &str) -> Duration {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let read = |task: &std::path::Path, file: &str| std::fs::read_to_string(task.join(file));
        let task = tasks
            .map(|task| task.unwrap().path())
            .find(|task| read(task, "comm").is_ok_and(|name| name.trim() == thread))
            .unwrap();
        // User and system time, in ticks of 10 ms.
        let stat = read(&task, "stat").unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
        let ticks = fields.skip(11).take(2).map(|n| n.parse::<u64>().unwrap());
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }

    #[test]
    fn a_terminal_that_leaves_with_unread_input_costs_nothing_and_is_dismissed() {
        let (_file, append) = log();
        let hub = ConsoleHub::new("hub-left", append).unwrap();
        let sink = Arc::new(Sink(Mutex::new((Vec::new(), 0))));
        hub.connect_input(sink);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs.into()).unwrap();
        ours.write_all(b"nobody reads this").unwrap();
        std::thread::sleep(Duration::from_millis(100));
        drop(ours);
        let before = worked("hub-left");
        std::thread::sleep(Duration::from_millis(1000));
        let spent = worked("hub-left") - before;
        assert!(spent < Duration::from_millis(200), "{spent:?} of a second");
        eventually(|| hub.shared.lock().streams == 0);
    }

    #[test]
    fn input_of_a_terminal_that_has_left_still_arrives() {
        let (_file, append) = log();
        let hub = ConsoleHub::new("console", append).unwrap();
        let sink = Arc::new(Sink(Mutex::new((Vec::new(), 0))));
        hub.connect_input(sink.clone());
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs.into()).unwrap();
        let sent = vec![b'x'; 2 * CHUNK];
        ours.write_all(&sent).unwrap();
        drop(ours);
        std::thread::sleep(Duration::from_millis(100));
        sink.0.lock().unwrap().1 = CHUNK;
        eventually(|| sink.0.lock().unwrap().0 == sent);
        eventually(|| hub.shared.lock().streams == 0);
    }

    #[test]
    fn terminals_come_and_go() {
        let (_file, append) = log();
        let hub = ConsoleHub::new("console", append).unwrap();
        for _ in 0..3 {
            let pairs: Vec<_> = (0..STREAM_LIMIT)
                .map(|_| {
                    let (ours, theirs) = UnixStream::pair().unwrap();
                    hub.attach(theirs.into()).unwrap();
                    ours
                })
                .collect();
            let (_, one_more) = UnixStream::pair().unwrap();
            assert!(hub.attach(one_more.into()).is_err());
            drop(pairs);
            eventually(|| hub.shared.lock().streams == 0);
        }
    }
}
