//! What was answered to monitors that asked for a commit.
//!
//! A monitor may ask again: on a new connection, or because its question was still on its way when
//! the answer came. Whatever was answered first is answered for ever, since the monitor may act on
//! the first answer and the inventory on the last. A commit is remembered by the inventory itself.
//! A refusal is too, unless the inventory cannot be written; then it is remembered here, and made
//! lasting by removing the destination, without which no later daemon commits.
//!
//! Each job has a lock of its own, held while it is decided about, so that of its commit and of its
//! clearing up exactly one happens. A decision looks at the destination, whose store may hang: no
//! other job's guest may stand still for that. The lock comes after
//! [`Cell::jobs`](super::live::Cell::jobs) and before the inventory's own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

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

/// The verdict on one job, once there is one.
pub(super) type Verdicted = Mutex<Option<Verdict>>;

/// The verdicts on jobs that have not ended.
#[derive(Debug, Default)]
pub(super) struct Verdicts(Mutex<BTreeMap<JobId, Arc<Verdicted>>>);

impl Verdicts {
    /// The verdict on a job that exists.
    pub(super) fn on(&self, job: &JobId) -> Arc<Verdicted> {
        Arc::clone(guard(&self.0).entry(job.clone()).or_default())
    }

    /// The verdict on a job that may not exist: a monitor can name any.
    pub(super) fn known(&self, job: &JobId) -> Option<Arc<Verdicted>> {
        guard(&self.0).get(job).cloned()
    }

    /// The inventory has recorded the end: it answers from now on.
    pub(super) fn forget(&self, job: &JobId) {
        guard(&self.0).remove(job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_decided_independently_and_remembered() {
        let verdicts = Verdicts::default();
        let (a, b) = (JobId("job-1".into()), JobId("job-2".into()));
        let of_a = verdicts.on(&a);
        let mut deciding = guard(&of_a);
        // Neither the verdict on another job nor a look at what is known waits for it.
        *guard(&verdicts.on(&b)) = Some(Verdict::Committed);
        assert_eq!(
            *guard(&verdicts.known(&b).unwrap()),
            Some(Verdict::Committed)
        );
        assert!(verdicts.on(&a).try_lock().is_err());
        *deciding = Some(Verdict::Refused);
        drop(deciding);
        assert_eq!(*guard(&verdicts.on(&a)), Some(Verdict::Refused));
        verdicts.forget(&a);
        assert!(verdicts.known(&a).is_none());
    }
}
