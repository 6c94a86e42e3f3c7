//! userfaultfd, as far as the pager needs it: thin bindings over a mapping of a memfd.
//!
//! The descriptor belongs to the address space of the process that made it, so no other process can
//! make it for the monitor. What can be handed over is an open `/dev/userfaultfd`, from which an
//! unprivileged process makes one that sees the kernel's own accesses too ([`UffdAccess`]).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use strake_observe::{OsContext, Result};

use crate::observations::UffdLacks;

/// How a userfaultfd is come by.
#[derive(Debug)]
pub enum UffdAccess {
    /// From an open `/dev/userfaultfd`.
    Device(OwnedFd),
    /// By the system call, which wants a privilege.
    Call,
}

const API: u64 = 0xAA;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
const FEATURE_WP_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// What the pager cannot do without.
const NEEDED: [(u64, &str); 4] = [
    (FEATURE_MISSING_SHMEM, "missing pages of a memfd"),
    (FEATURE_MINOR_SHMEM, "minor faults of a memfd"),
    (FEATURE_WP_SHMEM, "write protection of a memfd"),
    (FEATURE_WP_ASYNC, "asynchronous write protection"),
];

const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const MODE_MINOR: u64 = 4;

const EVENT_PAGEFAULT: u8 = 0x12;

/// Messages that one read takes.
const BATCH: usize = 32;

/// Whether a page is mapped write-protected, so that the first write to it is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    /// The first write is noted by the kernel.
    Clean,
    /// Writes are not noted: it counts as written.
    Written,
}

/// A range of this process's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// Its first address, page-aligned.
    pub(crate) start: u64,
    /// Bytes, whole pages.
    pub(crate) len: u64,
}

/// A userfaultfd that watches mappings of a memfd for missing pages, minor faults and writes.
#[derive(Debug)]
pub(crate) struct Uffd(OwnedFd);

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
    mode: u64,
    result: i64,
}

#[repr(C)]
struct ProtectArg {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    result: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    ptid: u64,
}

impl Uffd {
    /// Makes one with everything that the pager needs.
    ///
    /// # Errors
    /// [`UffdLacks`] if the kernel cannot do it, and what it answers if it refuses.
    pub(crate) fn new(access: UffdAccess) -> Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let raw = match &access {
            // SAFETY: makes a descriptor and touches no memory.
            UffdAccess::Device(device) => unsafe {
                i64::from(libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags))
            },
            // SAFETY: as above.
            UffdAccess::Call => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) },
        };
        let raw = i32::try_from(raw).unwrap_or(-1);
        if raw < 0 {
            return Err(io::Error::last_os_error()).os("userfaultfd", "this process");
        }
        // SAFETY: the kernel has just made it for us.
        let uffd = Self(unsafe { OwnedFd::from_raw_fd(raw) });
        uffd.agree()?;
        Ok(uffd)
    }

    fn agree(&self) -> Result<()> {
        let needed = NEEDED.iter().fold(0, |all, (bit, _)| all | bit);
        let mut arg = ApiArg {
            api: API,
            features: needed | FEATURE_WP_UNPOPULATED | FEATURE_EXACT_ADDRESS,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_API, &mut arg).map_err(|_| UffdLacks {
            what: NEEDED.map(|(_, name)| name).join(", "),
        })?;
        Ok(())
    }

    /// Watches `span`, a shared mapping of a memfd.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn register(&self, span: Span) -> Result<()> {
        let mut arg = RangeArg {
            start: span.start,
            len: span.len,
            mode: MODE_MISSING | MODE_WP | MODE_MINOR,
            result: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut arg)
            .os("UFFDIO_REGISTER", show(span))
    }

    /// The addresses that were faulted at, as far as known now, page-aligned, appended to `out`.
    /// Says whether there may be more.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn faults(&self, out: &mut Vec<u64>) -> Result<bool> {
        let mut messages = [Message::default(); BATCH];
        loop {
            // SAFETY: the buffer is as long as said and lives over the call.
            let done = unsafe {
                libc::read(
                    self.0.as_raw_fd(),
                    messages.as_mut_ptr().cast(),
                    size_of_val(&messages),
                )
            };
            let Ok(done) = usize::try_from(done) else {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(false),
                    io::ErrorKind::Interrupted => continue,
                    _ => return Err(error).os("read", "userfaultfd"),
                }
            };
            let count = done / size_of::<Message>();
            out.extend(
                messages
                    .iter()
                    .take(count)
                    .filter(|message| message.event == EVENT_PAGEFAULT)
                    .map(|message| message.address & !0xfff),
            );
            return Ok(count == BATCH);
        }
    }

    /// Maps pages that the memfd holds, and wakes whoever waits for them. Pages that are mapped
    /// already are passed over.
    ///
    /// # Errors
    /// What the kernel answers: the memfd does not hold one of them, no memory.
    pub(crate) fn map_cached(&self, span: Span, protection: Protection) -> io::Result<()> {
        let mode = match protection {
            Protection::Clean => 2,
            Protection::Written => 0,
        };
        self.each(UFFDIO_CONTINUE, span, mode)
    }

    /// Puts zero pages into the memfd, maps them and wakes whoever waits for them.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn map_zero(&self, span: Span) -> io::Result<()> {
        self.each(UFFDIO_ZEROPAGE, span, 0)
    }

    /// Runs a call that takes a range and stops at pages that are mapped already.
    fn each(&self, call: libc::c_ulong, span: Span, mode: u64) -> io::Result<()> {
        let end = span.start + span.len;
        let mut start = span.start;
        while start < end {
            let mut arg = RangeArg {
                start,
                len: end - start,
                mode,
                result: 0,
            };
            let outcome = self.ioctl(call, &mut arg);
            let done = u64::try_from(arg.result).unwrap_or(0);
            start += done;
            match outcome {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    if done == 0 {
                        self.wake(Span {
                            start,
                            len: 4096.min(end - start),
                        })?;
                        start += 4096;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Puts `content` as a new page into the memfd at `address`, maps it and wakes.
    ///
    /// # Errors
    /// What the kernel answers; `EEXIST` if there is a page already.
    pub(crate) fn copy(
        &self,
        address: u64,
        content: &[u8; 4096],
        how: Protection,
    ) -> io::Result<()> {
        let mut arg = CopyArg {
            dst: address,
            src: content.as_ptr() as u64,
            len: 4096,
            mode: match how {
                Protection::Clean => 2,
                Protection::Written => 0,
            },
            result: 0,
        };
        self.ioctl(UFFDIO_COPY, &mut arg)
    }

    /// Write-protects what is mapped: from now on the first write to each page is noted.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn arm(&self, span: Span) -> io::Result<()> {
        let mut arg = ProtectArg {
            start: span.start,
            len: span.len,
            mode: 1,
        };
        self.ioctl(UFFDIO_WRITEPROTECT, &mut arg)
    }

    /// Wakes whoever waits for a page there; it faults again if the page is not mapped.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn wake(&self, span: Span) -> io::Result<()> {
        let mut arg = [span.start, span.len];
        self.ioctl(UFFDIO_WAKE, &mut arg)
    }

    fn ioctl<T>(&self, call: libc::c_ulong, arg: &mut T) -> io::Result<()> {
        // SAFETY: `call` takes a `T` (each caller passes the argument of its call), which is
        // borrowed exclusively. The calls change which pages of the watched mapping are mapped;
        // their content comes from the memfd or from what the argument points to, which outlives
        // the call. No Rust reference points into guest memory.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), call, std::ptr::from_mut(arg)) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

pub(crate) fn show(span: Span) -> String {
    format!("{} bytes at {:#x}", span.len, span.start)
}
