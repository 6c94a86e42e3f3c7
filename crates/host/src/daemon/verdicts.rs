//! What was answered to monitors that asked for a commit.
//!
//! A monitor may ask again: on a new connection, or because its question was still on its way when
//! the answer came. Whatever was answered first is answered for ever, since the monitor may act on
//! the first answer and the inventory on the last. A commit is remembered by the inventory itself.
//! A refusal is too, unless the inventory cannot be written; then it is remembered here, and made
//! lasting by removing the destination, without which no later daemon commits.
//!
//! The lock is held while one decision is made, so that of a commit and of the clearing up of a job
//! that came to nothing exactly one happens. It comes after [`Cell::jobs`](super::live::Cell::jobs)
//! and before the inventory's own.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use strake_api::job::JobId;

use super::guard;

/// What is known of a job's commit beside what the inventory says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It has happened.
    Committed,
    /// It will never happen.
    Refused,
    /// A transaction failed in a way that leaves open whether it reached the disk. Nobody was told
    /// anything, and nothing may be removed.
    Unclear,
}

/// The verdicts on jobs that have not ended.
#[derive(Debug, Default)]
pub(super) struct Verdicts(Mutex<BTreeMap<JobId, Verdict>>);

impl Verdicts {
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<JobId, Verdict>> {
        guard(&self.0)
    }

    /// The inventory has recorded the end: it answers from now on.
    pub(super) fn forget(&self, job: &JobId) {
        self.lock().remove(job);
    }
}
