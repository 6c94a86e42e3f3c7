//! The descriptors that came with a message.

use std::os::fd::OwnedFd;

use strake_api::control::FdIndex;
use strake_observe::Result;

use crate::observations::DescriptorMissing;

/// Descriptors by their place in a packet. Each is taken at most once; those that nobody takes are
/// closed.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// The descriptors of one packet, in order.
    #[must_use]
    pub fn new(fds: impl IntoIterator<Item = OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// How many came.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The descriptor at `index`, for `purpose`.
    ///
    /// # Errors
    /// [`DescriptorMissing`].
    pub fn take(&mut self, index: FdIndex, purpose: &str) -> Result<OwnedFd> {
        let count = self.count();
        self.0
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or_else(|| {
                DescriptorMissing {
                    purpose: purpose.to_owned(),
                    index: index.0,
                    count,
                }
                .into()
            })
    }
}
