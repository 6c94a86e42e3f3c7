//! A wake-up that can be polled: an eventfd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use strake_observe::{OsContext, Result};

/// A level-triggered wake-up: readable from [`Event::signal`] until [`Event::clear`].
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// A new one, not signalled.
    ///
    /// # Errors
    /// When the process may open no more descriptors.
    pub fn new() -> Result<Self> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .os("eventfd", "a disk queue's wake-up")
            .map(Self)
    }

    /// Makes it readable.
    pub fn signal(&self) {
        // The only failure is a counter at its maximum (EAGAIN): it is readable then as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable until the next signal.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // Not signalled (EAGAIN) is as good.
        let _ = rustix::io::read(&self.0, &mut count);
    }

    /// Waits until it is signalled or `limit` has passed; says whether it is.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
