//! An io_uring for transfers between the swap file and guest memory.
//!
//! A transfer names pages, not addresses: the ring holds the [`Window`] that they are in, and
//! dropping it waits for what is under way.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};
use strake_observe::{OsContext, Result};

use crate::window::Window;

/// Transfers at the kernel at once. Beyond it a queue only adds latency.
const DEPTH: u32 = 128;

/// How long a kernel without memory for the moment is left alone.
const PATIENCE: Duration = Duration::from_millis(1);

pub(crate) struct Ring {
    ring: IoUring,
    window: Arc<Window>,
    file: Arc<OwnedFd>,
    flying: u32,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("flying", &self.flying)
            .finish_non_exhaustive()
    }
}

/// Pages and where they are in the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) page: usize,
    pub(crate) count: u32,
    pub(crate) offset: u64,
}

impl Ring {
    pub(crate) fn new(window: &Arc<Window>, file: &Arc<OwnedFd>) -> Result<Self> {
        Ok(Self {
            ring: IoUring::new(DEPTH).os("io_uring_setup", "the swap file")?,
            window: Arc::clone(window),
            file: Arc::clone(file),
            flying: 0,
        })
    }

    /// Signals `event` at each completion.
    pub(crate) fn notify(&self, event: &impl AsRawFd) -> Result<()> {
        self.ring
            .submitter()
            .register_eventfd(event.as_raw_fd())
            .os("io_uring_register", "the swap file")
    }

    pub(crate) fn has_room(&self) -> bool {
        self.flying < DEPTH
    }

    /// Begins to read into pages. Says whether it could.
    pub(crate) fn read(&mut self, token: u64, piece: Piece) -> bool {
        self.start(token, piece, |fd, at, len, offset| {
            opcode::Read::new(fd, at, len).offset(offset).build()
        })
    }

    /// Begins to write pages. Says whether it could.
    pub(crate) fn write(&mut self, token: u64, piece: Piece) -> bool {
        self.start(token, piece, |fd, at, len, offset| {
            opcode::Write::new(fd, at, len).offset(offset).build()
        })
    }

    fn start(
        &mut self,
        token: u64,
        piece: Piece,
        build: impl Fn(types::Fd, *mut u8, u32, u64) -> io_uring::squeue::Entry,
    ) -> bool {
        let Some(at) = self.window.address(piece.page, piece.count as usize) else {
            return false;
        };
        if !self.has_room() {
            return false;
        }
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = build(fd, at, piece.count * 4096, piece.offset).user_data(token);
        // SAFETY: the memory is within the window, which this ring holds until the last completion
        // was seen (see `drop`), and the descriptor likewise.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        self.flying += u32::from(pushed);
        pushed
    }

    /// Gives the kernel what was begun.
    pub(crate) fn submit(&mut self) -> Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if passes(&error) => std::thread::sleep(PATIENCE),
                Err(error) => return Err(error).os("io_uring_enter", "the swap file"),
            }
        }
        Ok(())
    }

    /// A transfer that has ended: its token, and bytes or a negative error number.
    pub(crate) fn next(&mut self) -> Option<(u64, i32)> {
        let entry = self.ring.completion().next()?;
        self.flying = self.flying.saturating_sub(1);
        Some((entry.user_data(), entry.result()))
    }

    /// Waits for a transfer to end; none if none is under way.
    pub(crate) fn wait(&mut self) -> Option<(u64, i32)> {
        while self.flying > 0 {
            if let Some(ended) = self.next() {
                return Some(ended);
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if passes(&error) => std::thread::sleep(PATIENCE),
                // Only a bug of ours gets here. The kernel still uses the memory: wait on.
                Err(_) => std::thread::sleep(PATIENCE),
            }
        }
        None
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.wait().is_some() {}
    }
}

fn passes(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}
