//! The kinds of threads of a monitor, and how each is confined.
//!
//! The jail is the monitor binary's; this crate only tells it where a thread begins. A thread
//! inherits the confinement of the one that starts it and adds its own.

use std::sync::OnceLock;
use std::thread::JoinHandle;

use strake_devices::virtio::set_worker_entry;
use strake_observe::{Because, OsContext, Result};

use crate::observations::ThreadFailed;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Runs a vCPU and, for its accesses, the devices' registers.
    Vcpu,
    /// Serves virtqueues of a device. Started by a vCPU's thread.
    Worker,
    /// The process's main thread: the control server.
    Control,
}

/// Confines the calling thread.
pub type Confinement = Box<dyn Fn(ThreadKind) -> Result<()> + Send + Sync>;

static CONFINEMENT: OnceLock<Confinement> = OnceLock::new();

/// Confines every thread that begins from now on. Only the first call counts.
pub fn set_confinement(confinement: Confinement) {
    let _ = CONFINEMENT.set(confinement);
    set_worker_entry(|| enter(ThreadKind::Worker));
}

/// Confines the calling thread.
///
/// # Errors
/// What the confinement says; the thread must not go on then.
pub(crate) fn enter(kind: ThreadKind) -> Result<()> {
    CONFINEMENT.get().map_or(Ok(()), |confine| confine(kind))
}

/// Starts a named thread.
///
/// # Errors
/// [`ThreadFailed`].
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .os("clone", name)
        .because_of(|| ThreadFailed {
            thread: name.to_owned(),
        })
}
