//! The thread of a console: everything that may wait for a disk or a terminal happens in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use strake_observe::{State as Seen, recorder};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{Arrival, CHUNK, Held, LEFT_LIMIT, LOG_LIMIT, RETRY_MS, Shared, WAKE};
use crate::observations::ConsoleOutputLost;
use crate::serial::ConsoleInput;

pub(super) struct Stream {
    socket: UnixStream,
    /// Input that the guest had no room for. The stream is not read meanwhile.
    pending: Vec<u8>,
    /// Since when the terminal is known to have left while its input waits.
    left: Option<Instant>,
    /// How much of the next output is older than the stream.
    skip: usize,
}

/// What the hub's thread owns.
pub(super) struct Hub {
    pub(super) shared: Arc<Shared>,
    pub(super) poller: Epoll,
    pub(super) log: File,
    pub(super) written: u64,
    pub(super) streams: BTreeMap<u64, Stream>,
    pub(super) next: u64,
    pub(super) reported: bool,
}

impl Hub {
    pub(super) fn run(mut self) {
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
