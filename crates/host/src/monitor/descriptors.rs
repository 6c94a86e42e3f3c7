//! The descriptors of a packet to a monitor, in its order.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use strake_api::control::{FdIndex, MAX_FDS};
use strake_observe::Result;

use crate::observations::TooManyFiles;

/// Descriptors that go with one packet.
#[derive(Debug, Default)]
pub(crate) struct Descriptors(Vec<OwnedFd>);

impl Descriptors {
    /// Adds one; the packet names it by what this returns.
    ///
    /// # Errors
    /// [`TooManyFiles`].
    pub(crate) fn add(&mut self, fd: impl Into<OwnedFd>) -> Result<FdIndex> {
        let index = u8::try_from(self.0.len())
            .ok()
            .filter(|n| usize::from(*n) < MAX_FDS);
        let index = index.ok_or(TooManyFiles { most: MAX_FDS })?;
        self.0.push(fd.into());
        Ok(FdIndex(index))
    }

    pub(crate) fn all(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }
}
