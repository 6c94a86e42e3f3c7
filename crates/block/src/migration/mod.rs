//! Moving a live disk to another image.

pub mod journal;

use std::fs::File;
use std::sync::Arc;

use strake_api::job::{JobId, MigrationLimits, MigrationStatus};
use strake_observe::Result;

use crate::{Image, LiveDisk};

/// What a migration asks of the machine and of the daemon. Called in the migration's own thread;
/// none of the calls may wait for the migration itself.
pub trait SwitchHooks: Send + Sync {
    /// Pauses the vCPUs. Called only with [`Suspend::Vm`](strake_api::job::Suspend::Vm). The disk's
    /// workers keep running: the requests inside are waited for afterwards.
    ///
    /// # Errors
    /// When the VM cannot be paused; the migration then fails and the disk stays on its source.
    fn suspend_vm(&self) -> Result<()>;

    /// Lets the vCPUs run again, after a `suspend_vm` that succeeded, however the switch ended.
    fn resume_vm(&self);

    /// All is at the destination; asks the daemon whether it commits. Returns at once; the answer
    /// comes by [`Migration::decide`] (which may be called from in here).
    fn await_commit(&self, job: &JobId);

    /// The job reached a final phase.
    fn ended(&self, status: &MigrationStatus);
}

/// A migration with method `dirty`.
#[derive(Debug)]
pub struct Migration {}

impl Migration {
    /// Starts moving `disk` to `destination` in a thread of its own.
    ///
    /// # Errors
    /// When the destination cannot take the disk, the disk is already being migrated, or the
    /// journal cannot be written. Nothing was changed then.
    pub fn start(
        _disk: Arc<LiveDisk>,
        _destination: Arc<dyn Image>,
        _journal: File,
        _job: JobId,
        _limits: MigrationLimits,
        _hooks: Arc<dyn SwitchHooks>,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {}))
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> &JobId {
        unreachable!()
    }

    /// How it is.
    #[must_use]
    pub fn status(&self) -> MigrationStatus {
        unreachable!()
    }

    /// Ends the job; the disk stays on its source. It has ended within 100 ms of a healthy device.
    ///
    /// # Errors
    /// When the daemon was already asked to commit: its decision counts.
    pub fn cancel(&self) -> Result<()> {
        Ok(())
    }

    /// The daemon's answer to [`SwitchHooks::await_commit`]. Without effect before the question
    /// and after the first answer.
    pub fn decide(&self, committed: bool) {
        let _ = committed;
    }

    /// Waits until the job has ended.
    pub fn join(&self) -> MigrationStatus {
        unreachable!()
    }
}
