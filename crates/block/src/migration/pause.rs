//! The pause of a switch-over, and the guard that bounds it.
//!
//! Inside the pause the job's thread waits for devices: for the last blocks, for a flush, for
//! whatever else touches the destination's file system. A device may hang for minutes. So a second
//! thread, the [`Guard`], watches the clock: [`GRACE`] after the time that was allowed, or when the
//! job is cancelled, it opens the gate and lets the VM run, whatever the job's thread is stuck in.
//!
//! That is safe until the daemon is asked, because until then the source is authoritative and
//! every change is marked: once the gate is open the rest of the copy is a pass like all others.
//! What was on its way still ends before the job goes on, outside of the pause, so each block is
//! either known to be at the destination or the job fails. When the job's thread comes back and
//! wants to ask, [`Control::ask`] refuses. Once it has asked, the guard keeps its hands off.
//!
//! While the disk is being mirrored the guest's writes wait for the destination outside of the pause
//! as well. The guard bounds that too: it ends the mirroring of a destination that hangs.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strake_api::job::{Phase, Suspend};
use strake_observe::{OsContext, Result, State, recorder};

use super::SwitchHooks;
use super::control::{Control, Due, Overdue};
use crate::{LiveDisk, SwitchStalled};

/// How much longer than allowed a pause lasts before the guard ends it: the job's own thread,
/// which starts nothing more at the deadline, gets so long for what is on its way.
const GRACE: Duration = Duration::from_millis(20);

/// The least time that vCPUs get to stand and requests inside the gate to end, however short the
/// allowed pause.
const LEAST_DRAIN: Duration = Duration::from_millis(50);

/// How long a request of the guest may wait for the destination of a mirroring before it goes on
/// without: a device that takes longer is not slow but hangs.
const STALLED: Duration = Duration::from_secs(1);

/// How the gate is opened, by whomever.
#[derive(Clone)]
pub(crate) struct Opener {
    disk: Arc<LiveDisk>,
    hooks: Arc<dyn SwitchHooks>,
    control: Arc<Control>,
    suspend: Suspend,
}

impl Opener {
    pub(crate) fn new(
        disk: &Arc<LiveDisk>,
        hooks: &Arc<dyn SwitchHooks>,
        control: &Arc<Control>,
        suspend: Suspend,
    ) -> Self {
        Self {
            disk: Arc::clone(disk),
            hooks: Arc::clone(hooks),
            control: Arc::clone(control),
            suspend,
        }
    }

    /// Only between `begin_opening` and `gate_opened`.
    fn open(&self, began: Instant) {
        // What waits for the guest's requests must not look closed or undecided when they go on.
        // A job that has committed is on its way to `Completed`.
        if !self.control.is_committed() {
            self.control.update(|status| status.phase = Phase::Copying);
        }
        self.disk.resume();
        if self.suspend == Suspend::Vm {
            self.hooks.resume_vm();
        }
        let took = began.elapsed();
        self.control
            .update(|status| status.pause_ms = Some(took.as_secs_f64() * 1000.0));
        self.control.gate_opened();
    }
}

/// The scope in which the guest waits. However it is left, the gate opens and the VM goes on; it
/// may be opened before.
pub(crate) struct Pause {
    opener: Opener,
    began: Instant,
    allowed: Duration,
}

impl Pause {
    /// Suspends what is to be suspended and closes the gate.
    pub(crate) fn begin(opener: &Opener, allowed: Duration) -> Result<Self> {
        let began = Instant::now();
        if opener.suspend == Suspend::Vm {
            opener.hooks.suspend_vm(allowed.max(LEAST_DRAIN))?;
        }
        let control = &opener.control;
        control.update(|status| status.phase = Phase::Suspended);
        opener.disk.close();
        control.gate_closed(began, began + allowed.max(LEAST_DRAIN) + GRACE);
        Ok(Self {
            opener: opener.clone(),
            began,
            allowed,
        })
    }

    /// When it has lasted as long as is allowed.
    pub(crate) fn deadline(&self) -> Instant {
        self.began + self.allowed
    }

    /// False if the requests inside did not end in time.
    pub(crate) fn drained(&self) -> bool {
        let limit = self.allowed.max(LEAST_DRAIN);
        self.opener
            .disk
            .drained(limit.saturating_sub(self.began.elapsed()))
    }

    /// Whether it still lasts.
    pub(crate) fn lasts(&self) -> bool {
        self.opener.control.is_gate_closed()
    }

    /// Ends it, if nobody has.
    pub(crate) fn end(&self) {
        if self.opener.control.begin_opening() {
            self.opener.open(self.began);
        }
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        self.end();
    }
}

/// The thread that bounds the pauses of a job. Dropping it waits for its end.
#[derive(Debug)]
pub(crate) struct Guard {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    pub(crate) fn start(opener: Opener) -> Result<Self> {
        let control = Arc::clone(&opener.control);
        let thread = std::thread::Builder::new()
            .name(format!("pause-{}", opener.disk.name()))
            .spawn(move || guard(&opener))
            .os("clone", "the guard of a migration's pause")?;
        Ok(Self {
            control,
            thread: Some(thread),
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.control.unguard();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn guard(opener: &Opener) {
    let mut told = false;
    while let Some(due) = opener.control.due() {
        let Due::Open(why, began) = due else {
            opener.disk.end_stalled_mirror(STALLED);
            continue;
        };
        opener.open(began);
        // Once per job: five attempts on a slow device say the same five times.
        if why == Overdue::TooLong && !told {
            told = true;
            let seen = SwitchStalled {
                job: opener.control.job.to_string(),
                disk: opener.disk.name().to_owned(),
                after_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            };
            recorder().record(seen.into(), State::Open);
        }
    }
}
