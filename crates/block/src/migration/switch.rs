//! The switch-over: the one part of a migration in which the guest waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::Phase;
use strake_observe::Observation;

use super::control::Ask;
use super::copier::{Room, Stop};
use super::job::{End, How, Job};
use super::journal::Durable;
use super::pause::Pause;
use super::plan::{DirtyPass, MirrorPass, Plan};
use crate::live::Mirror;
use crate::{CommitRefused, PauseTooLong};

/// How often the switch is tried when the devices turn out too slow for the allowed pause.
const SWITCH_ATTEMPTS: u32 = 5;

/// How often a job that could switch over looks whether there is a daemon again.
pub(super) const LOOK_FOR_DAEMON: Duration = Duration::from_millis(100);

/// Why a switch did not happen, though it may the next time.
pub(super) struct TooLate {
    took: Duration,
    /// What else is known of it.
    why: Option<Observation>,
}

pub(super) enum Switch {
    Done,
    TooLate(TooLate),
    /// The job was paused.
    Paused,
    /// Nobody is there to be asked. The guest does not wait for one.
    NoDaemon,
}

/// How often the switch was tried.
#[derive(Debug, Default)]
pub(super) struct Attempts(u32);

impl Attempts {
    /// It was in vain.
    pub(super) fn missed(&mut self, job: &Job, late: &TooLate) -> Result<(), Observation> {
        self.0 += 1;
        if self.0 < SWITCH_ATTEMPTS {
            return Ok(());
        }
        Err(Observation::from(PauseTooLong {
            attempts: self.0,
            took_ms: u64::try_from(late.took.as_millis()).unwrap_or(u64::MAX),
            pause_ms: job.limits.pause_ms,
        })
        .because_all(late.why.clone()))
    }
}

impl Job {
    /// Closes the gate, copies what is left, asks the daemon and does what it decides.
    ///
    /// The guard may open the gate at any time before the daemon is asked. What is done here is
    /// right all the same, only in vain: it is noticed at the next look, by the question at last.
    /// While the disk is mirrored that is why the last blocks go by its zones as well.
    pub(super) fn switch(&mut self, mirror: Option<&Arc<Mirror>>) -> Result<Switch, End> {
        self.still_there()?;
        if !self.hooks.can_ask() {
            return Ok(Switch::NoDaemon);
        }
        let pause = match self.begin_pause() {
            Ok(pause) => pause,
            Err(late) => return Ok(Switch::TooLate(late)),
        };
        if !pause.drained() {
            return Ok(self.too_late(&pause));
        }
        let bitmap = Arc::clone(&self.bitmap);
        let size = self.disk.size();
        let mut dirty = DirtyPass::new(&bitmap, size, None, None);
        let mut mirrored = MirrorPass::new(&bitmap, size);
        let plan: &mut dyn Plan = match mirror {
            Some(_) => &mut mirrored,
            None => &mut dirty,
        };
        let how = How {
            deadline: Some(pause.deadline()),
            mirror,
            ..How::usual(bitmap.marked_bytes(), Room::Alone)
        };
        match self.pass(plan, how) {
            Ok(()) => {}
            Err(Stop::Late | Stop::Unmirrored) => return Ok(self.too_late(&pause)),
            Err(stop) => return Err(stop.into()),
        }
        // With the gate closed and drained every change is marked, and every mark was copied.
        let left = bitmap.marked();
        if !pause.lasts() || left != 0 {
            debug_assert!(!pause.lasts(), "marked while the gate was closed");
            return Ok(self.too_late(&pause));
        }
        self.copier.flush()?;
        self.still_there()?;
        if !self.hooks.can_ask() {
            // It went meanwhile. The pause ends with its scope, and this was one more pass.
            return Ok(Switch::NoDaemon);
        }
        // Before the question, after which nothing may fail. Need not be durable: the record
        // before it already says that the inventory knows.
        self.journal.reach(Phase::AwaitingCommit, Durable::Later)?;
        match self.control.ask(self.stage) {
            Ask::Asked => {}
            Ask::Cancelled => return Err(End::Cancelled),
            Ask::Paused => return Ok(Switch::Paused),
            Ask::TooLate => return Ok(self.too_late(&pause)),
        }
        self.control
            .update(|status| status.phase = Phase::AwaitingCommit);
        self.hooks.await_stage(&self.control.job, self.stage);
        let committed = self.control.decision();
        // Whichever it is, the disk is on one image from now on.
        self.disk.end_mirror();
        if committed {
            if let Some(keeper) = &mut self.keeper {
                keeper.leave();
            }
            self.disk.replace(Arc::clone(&self.destination));
            self.disk.end_tracking();
            if let Some(overlay) = &self.overlay {
                overlay.merged();
            }
            drop(pause);
            Ok(Switch::Done)
        } else {
            drop(pause);
            Err(Observation::from(CommitRefused {
                job: self.control.job.to_string(),
            })
            .into())
        }
    }

    /// vCPUs that did not stand in time may do so the next time.
    pub(super) fn begin_pause(&self) -> Result<Pause, TooLate> {
        let began = Instant::now();
        Pause::begin(&self.opener, self.allowed()).map_err(|seen| TooLate {
            took: began.elapsed(),
            why: Some(seen),
        })
    }

    pub(super) fn too_late(&self, pause: &Pause) -> Switch {
        pause.end();
        if self.control.is_paused() {
            return Switch::Paused;
        }
        let took = self.control.status().pause_ms.unwrap_or(0.0) / 1000.0;
        Switch::TooLate(TooLate {
            took: Duration::try_from_secs_f64(took).unwrap_or(Duration::MAX),
            why: None,
        })
    }
}
