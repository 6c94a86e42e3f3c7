//! What the machine's threads have to say to the daemon.
//!
//! vCPU threads, workers and migrations post; the control thread takes. Posting never blocks and
//! never fails: the mailbox is bounded, and when nobody fetches what is in it (the daemon may be
//! away for long) the oldest observations go first and are counted.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use strake_api::control::{Event, ExitReason};
use strake_observe::{Observation, OsContext, Result, State, recorder};

use crate::control::Connection;
use crate::observations::ObservationsDropped;

/// How many events are kept for a daemon that is away.
pub const MAILBOX_CAPACITY: usize = 1024;

/// Carries events and the end of the guest to the control thread.
#[derive(Debug)]
pub struct Mailbox {
    inner: Mutex<Inner>,
    wake: OwnedFd,
    /// For a last word while the process ends.
    connection: Mutex<Option<Arc<Connection>>>,
    /// Whether the daemon at the other end has said hello.
    heard: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    events: VecDeque<Event>,
    dropped: u64,
    exit: Option<ExitReason>,
    /// Up to which entry the process's recorder was looked at, if it is followed.
    recorded: Option<u64>,
}

impl Mailbox {
    /// An empty one.
    ///
    /// # Errors
    /// If the system has no descriptor left.
    pub fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            inner: Mutex::default(),
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
                .os("eventfd", "the mailbox")?,
            connection: Mutex::default(),
            heard: AtomicBool::new(false),
        }))
    }

    /// Posts an event.
    pub fn post(&self, event: Event) {
        let mut inner = self.lock();
        if matches!(event, Event::State(_)) {
            // Only the newest state is of interest to whoever comes back.
            inner
                .events
                .retain(|earlier| !matches!(earlier, Event::State(_)));
        }
        if inner.events.len() >= MAILBOX_CAPACITY {
            let oldest = inner
                .events
                .iter()
                .position(|event| matches!(event, Event::Observed(_)))
                .unwrap_or(0);
            inner.events.remove(oldest);
            inner.dropped += 1;
        }
        inner.events.push_back(event);
        drop(inner);
        self.wake();
    }

    /// From now on open entries of this process's recorder are posted, too.
    pub fn follow_recorder(self: &Arc<Self>) {
        self.lock().recorded.get_or_insert(0);
        let mailbox = Arc::downgrade(self);
        recorder().watch(Box::new(move || {
            if let Some(mailbox) = mailbox.upgrade() {
                mailbox.wake();
            }
        }));
    }

    /// Posts what was recorded since the last call, but for what is part of `told`, which somebody
    /// is told already.
    pub(crate) fn take_recorded(&self, told: Option<&Observation>) {
        let mut inner = self.lock();
        let Some(after) = inner.recorded else {
            return;
        };
        let entries = recorder().since(after);
        if let Some(last) = entries.last() {
            inner.recorded = Some(last.seq);
        }
        drop(inner);
        for entry in entries {
            let known = told.is_some_and(|told| contains(told, &entry.observation));
            if entry.state == State::Open && !known {
                self.post(Event::Observed(entry.observation));
            }
        }
    }

    /// Posts something that no request waits for.
    pub fn observe(&self, seen: Observation) {
        recorder().keep(&seen);
        self.post(Event::Observed(seen));
    }

    /// The guest has ended, or cannot go on. The first reason counts.
    pub fn exit(&self, reason: ExitReason) {
        self.lock().exit.get_or_insert(reason);
        self.wake();
    }

    /// Why the guest has ended, if it has and nobody took it yet.
    #[must_use]
    pub fn take_exit(&self) -> Option<ExitReason> {
        self.lock().exit.take()
    }

    /// Takes the oldest event.
    #[must_use]
    pub fn take(&self) -> Option<Event> {
        let mut inner = self.lock();
        if inner.dropped > 0 {
            let count = std::mem::take(&mut inner.dropped);
            return Some(Event::Observed(ObservationsDropped { count }.into()));
        }
        inner.events.pop_front()
    }

    /// Whether there is nothing to take.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let inner = self.lock();
        inner.events.is_empty() && inner.dropped == 0
    }

    /// Puts back what could not be delivered.
    pub fn put_back(&self, event: Event) {
        self.lock().events.push_front(event);
    }

    /// Forgets what a new connection is told anew.
    pub fn forget_pending_commits(&self) {
        self.lock()
            .events
            .retain(|event| !matches!(event, Event::JobAwaitsCommit { .. }));
    }

    /// Readable while there may be something to take.
    #[must_use]
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Resets [`Mailbox::readable`]; before taking.
    pub fn acknowledge(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Where a last word goes. Who is there has still to say hello.
    pub(crate) fn set_connection(&self, connection: Option<Arc<Connection>>) {
        self.heard.store(false, Ordering::Release);
        *self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = connection;
    }

    /// The daemon that is there has said hello: it is told all that is posted.
    pub(crate) fn set_heard(&self) {
        self.heard.store(true, Ordering::Release);
    }

    /// Whether there is a daemon, of a version that is understood, which hears what is posted now.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        self.heard.load(Ordering::Acquire)
    }

    /// Says something at once, from whatever thread, because the process is about to end. It is
    /// lost if no daemon is there.
    pub fn last_word(&self, seen: Observation) {
        if let Ok(connection) = self.connection.try_lock()
            && let Some(connection) = connection.as_ref()
        {
            let _ = connection.send_event(&Event::Observed(seen));
        }
    }

    fn wake(&self) {
        // It fails only if the counter is full, and then the control thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn contains(tree: &Observation, part: &Observation) -> bool {
    tree == part || tree.causes().iter().any(|cause| contains(cause, part))
}
