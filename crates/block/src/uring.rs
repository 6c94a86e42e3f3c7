//! One io_uring: the only place that talks to the kernel's ring.
//!
//! Safe outside: a ring owns everything that the kernel may touch (the vectors, and the bounce
//! memory that they point into) from [`Ring::start`] until the completion hands it back, and
//! dropping a ring waits for what is in flight. Guest memory is the exception; whoever made a
//! [`Buffer`] promised that it stays.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};
use strake_observe::{Because, OsContext, Result};

use crate::raw::Aligned;
use crate::{Buffer, Event, NoUring, RingBroken};

/// The most requests that one ring has at the kernel. Beyond this a deeper queue only adds
/// latency, and the kernel's own bound on entries is 32768.
pub(crate) const MAX_DEPTH: u32 = 1024;

/// The most vectors in one transfer (the kernel's UIO_MAXIOV).
pub(crate) const MAX_VECTORS: usize = 1024;

/// How long whoever waits for the last completions stands back from a kernel that can start
/// nothing just now.
const SHORT_OF_MEMORY: Duration = Duration::from_millis(1);

/// Whether the kernel only cannot do it now: it is out of memory for requests, or completions are
/// to be reaped first. The ring is as good as before.
fn passes(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

/// One operation for the kernel, with the memory that it needs: `bounce` is what `buffers` point
/// into, if they are not the guest's.
#[derive(Debug)]
pub(crate) enum Step {
    Read {
        offset: u64,
        buffers: Vec<Buffer>,
        bounce: Option<Aligned>,
    },
    Write {
        offset: u64,
        buffers: Vec<Buffer>,
        #[cfg_attr(
            not(test),
            expect(dead_code, reason = "held for the kernel, which reads it")
        )]
        bounce: Option<Aligned>,
    },
    Sync,
    Allocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
}

/// What the kernel made of a step.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) token: usize,
    pub(crate) step: Step,
    /// Bytes, or a negative error number.
    pub(crate) result: i32,
}

pub(crate) struct Ring {
    ring: IoUring,
    fd: Arc<OwnedFd>,
    event: Arc<Event>,
    path: String,
    depth: usize,
    /// By the caller's token.
    flying: Vec<Option<Step>>,
    count: usize,
    /// In the submission queue, not yet at the kernel.
    unsent: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("path", &self.path)
            .field("depth", &self.depth)
            .field("flying", &self.count)
            .finish_non_exhaustive()
    }
}

impl Ring {
    pub(crate) fn new(
        fd: Arc<OwnedFd>,
        path: &str,
        depth: u32,
        event: &Arc<Event>,
    ) -> Result<Self> {
        let depth = depth.clamp(1, MAX_DEPTH);
        let ring = IoUring::builder()
            // Completions are reaped after a wake-up through the event anyway: no need for the
            // kernel to interrupt the worker. Kernels before 5.19 do not know it.
            .setup_coop_taskrun()
            .build(depth)
            .or_else(|_| IoUring::new(depth));
        let ring = ring
            .map_err(|error| NoUring {
                reason: error.to_string(),
            })
            .and_then(|ring| {
                ring.submitter()
                    .register_eventfd(event.as_fd().as_raw_fd())
                    .map_err(|error| NoUring {
                        reason: format!("registering its event: {error}"),
                    })
                    .map(|()| ring)
            })?;
        Ok(Self {
            ring,
            fd,
            event: Arc::clone(event),
            path: path.to_owned(),
            depth: usize::try_from(depth).unwrap_or(1),
            flying: Vec::new(),
            count: 0,
            unsent: 0,
        })
    }

    /// Whether one more step may be started.
    pub(crate) fn has_room(&self) -> bool {
        self.count < self.depth
    }

    /// Puts a step into the submission queue. The token must not be in flight, and there must be
    /// room; otherwise the step is given back.
    pub(crate) fn start(&mut self, token: usize, step: Step) -> std::result::Result<(), Step> {
        if !self.has_room() {
            return Err(step);
        }
        if self.flying.len() <= token {
            self.flying.resize_with(token + 1, || None);
        }
        let Some(place) = self.flying.get_mut(token).filter(|place| place.is_none()) else {
            return Err(step);
        };
        let fd = types::Fd(self.fd.as_raw_fd());
        let step = place.insert(step);
        let vectors = |buffers: &Vec<Buffer>| {
            let count = u32::try_from(buffers.len().min(MAX_VECTORS)).unwrap_or(0);
            (buffers.as_ptr().cast::<libc::iovec>(), count)
        };
        let entry = match step {
            Step::Read {
                offset, buffers, ..
            } => {
                let (at, count) = vectors(buffers);
                opcode::Readv::new(fd, at, count).offset(*offset).build()
            }
            Step::Write {
                offset, buffers, ..
            } => {
                let (at, count) = vectors(buffers);
                opcode::Writev::new(fd, at, count).offset(*offset).build()
            }
            Step::Sync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Step::Allocate { mode, offset, len } => opcode::Fallocate::new(fd, *len)
                .offset(*offset)
                .mode(*mode)
                .build(),
        };
        let entry = entry.user_data(token as u64);
        // SAFETY: what the entry points to, the vectors and the bounce memory, is owned by
        // `self.flying` and neither moved nor dropped before its completion was seen (`Vec`
        // contents do not move when the `Step` that holds them is moved). `Buffer` is a transparent
        // `iovec` whose maker promised that its memory stays until then.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // The submission queue has `depth` entries at least and holds at most the steps in
            // flight, so this does not happen; were it to, nothing has started.
            return match place.take() {
                Some(step) => Err(step),
                None => Ok(()),
            };
        }
        self.count += 1;
        self.unsent += 1;
        Ok(())
    }

    /// Gives the kernel what was started since the last call: one system call.
    pub(crate) fn enter(&mut self) -> Result<()> {
        while self.unsent > 0 {
            match self.ring.submit() {
                Ok(sent) => {
                    self.unsent = self.unsent.saturating_sub(sent);
                    if sent == 0 {
                        self.event.signal();
                        return Ok(());
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) if passes(&error) => {
                    // Try again at the next push, and make sure that there is one.
                    self.event.signal();
                    return Ok(());
                }
                Err(error) => {
                    return Err(error)
                        .os("io_uring_enter", &self.path)
                        .because_of(|| RingBroken {
                            path: self.path.clone(),
                        });
                }
            }
        }
        Ok(())
    }

    /// Takes one completion.
    pub(crate) fn next_ended(&mut self) -> Option<Ended> {
        loop {
            let entry = self.ring.completion().next()?;
            let token = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            if let Some(step) = self.flying.get_mut(token).and_then(Option::take) {
                self.count -= 1;
                return Some(Ended {
                    token,
                    step,
                    result: entry.result(),
                });
            }
        }
    }

    /// Waits for a completion; none if nothing is in flight.
    pub(crate) fn wait_ended(&mut self) -> Option<Ended> {
        while self.count > 0 {
            if let Some(ended) = self.next_ended() {
                return Some(ended);
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) if passes(&error) => {
                    // There is nothing to wait in: what is in flight ends all the same.
                    std::thread::sleep(SHORT_OF_MEMORY);
                }
                Err(_) => {
                    // The ring is beyond use: rather lose the memory than let it be reused.
                    #[allow(clippy::mem_forget)]
                    std::mem::forget(std::mem::take(&mut self.flying));
                    self.count = 0;
                }
            }
        }
        None
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may write into our memory and the guest's until the last completion.
        while self.wait_ended().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_without_memory_for_the_moment_is_not_a_broken_one() {
        let passes = |errno| passes(&std::io::Error::from_raw_os_error(errno));
        assert!(passes(libc::EAGAIN) && passes(libc::EBUSY));
        assert!(
            ![libc::EBADF, libc::EINVAL, libc::ENXIO, libc::EFAULT]
                .map(passes)
                .contains(&true)
        );
    }
}
