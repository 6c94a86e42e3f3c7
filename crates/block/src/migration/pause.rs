//! The pause of a switch-over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::Suspend;
use strake_observe::Result;

use super::{Control, SwitchHooks};
use crate::LiveDisk;

/// The scope in which the guest waits. However it is left, the gate opens and the VM goes on.
pub(crate) struct Pause {
    disk: Arc<LiveDisk>,
    hooks: Arc<dyn SwitchHooks>,
    control: Arc<Control>,
    suspend: Suspend,
    pub(crate) began: Instant,
}

impl Pause {
    pub(crate) fn new(
        disk: &Arc<LiveDisk>,
        hooks: &Arc<dyn SwitchHooks>,
        control: &Arc<Control>,
        suspend: Suspend,
    ) -> Result<Self> {
        let began = Instant::now();
        if suspend == Suspend::Vm {
            hooks.suspend_vm()?;
        }
        Ok(Self {
            disk: Arc::clone(disk),
            hooks: Arc::clone(hooks),
            control: Arc::clone(control),
            suspend,
            began,
        })
    }

    /// False if the requests inside did not end in time.
    pub(crate) fn close_gate(&self, limit: Duration) -> bool {
        self.disk.suspend(limit)
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        self.disk.resume();
        if self.suspend == Suspend::Vm {
            self.hooks.resume_vm();
        }
        let took = self.began.elapsed();
        self.control
            .update(|status| status.pause_ms = Some(took.as_secs_f64() * 1000.0));
    }
}
