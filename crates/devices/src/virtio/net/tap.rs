//! The host's side of an interface.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use strake_observe::{Because, OsContext, Result};

use super::HEADER;
use crate::observations::TapFailed;

const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// What a guest can receive, in the numbers of the kernel's `TUN_F_*`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads(pub u32);

impl Offloads {
    /// Packets without their checksum.
    pub const CHECKSUM: Self = Self(0x01);
    /// Unsegmented TCP over IPv4.
    pub const TSO4: Self = Self(0x02);
    /// Unsegmented TCP over IPv6.
    pub const TSO6: Self = Self(0x04);
    /// Unsegmented TCP with ECN.
    pub const TSO_ECN: Self = Self(0x08);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Something that takes and gives packets with a 12-byte virtio-net header, one per read or write,
/// without blocking.
pub trait NetBackend: Send + Sync + fmt::Debug {
    /// What packets are read from and written to.
    fn packets(&self) -> BorrowedFd<'_>;

    /// What the guest's driver can receive.
    ///
    /// # Errors
    /// The host refuses.
    fn set_offloads(&self, offloads: Offloads) -> Result<()>;
}

/// A tap device of the host.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// A tap that was opened with `IFF_NO_PI` and `IFF_VNET_HDR`.
    ///
    /// # Errors
    /// [`TapFailed`] if it is none.
    pub fn new(device: &str, tap: OwnedFd) -> Result<Self> {
        let failed = || TapFailed {
            device: device.to_owned(),
            doing: "setting it up".to_owned(),
        };
        rustix::io::ioctl_fionbio(&tap, true)
            .os("FIONBIO", device)
            .because_of(failed)?;
        let tap = Self(tap);
        let size = libc::c_int::try_from(HEADER).unwrap_or(0);
        // SAFETY: the request reads one int from the address, which is that of a live int.
        let done = unsafe { libc::ioctl(tap.0.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        check(done)
            .os("TUNSETVNETHDRSZ", device)
            .because_of(failed)?;
        Ok(tap)
    }
}

impl NetBackend for Tap {
    fn packets(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn set_offloads(&self, offloads: Offloads) -> Result<()> {
        // SAFETY: the request takes its argument by value.
        let done = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(offloads.0),
            )
        };
        check(done).os("TUNSETOFFLOAD", format!("offloads {:#x}", offloads.0))
    }
}

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
