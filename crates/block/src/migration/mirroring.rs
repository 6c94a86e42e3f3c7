//! Method `mirror`: one pass over what is marked, while the guest's changes of what is copied go to
//! both sides.
//!
//! The copier and the guest share the zones of `live/zones.rs`. When the pass is over, nothing is
//! left: what was dirty is copied and what was copied is kept the same. So the time does not depend on
//! how much the guest writes, and nothing of the bulk is left for the pause.
//!
//! Mirroring ends at once and harmlessly, whoever ends it: the job, a failure of the destination, or
//! the guard because the destination hangs. Blocks are marked again from then on. After a failure the
//! job fails; a destination that hung is waited for and the mirroring begun again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::{Method, MethodReason, MethodUsed};
use strake_observe::Result;

use super::control::Control;
use super::copier::{Room, Stop};
use super::job::{End, How, Job};
use super::plan::MirrorPass;
use super::switch::{Attempts, LOOK_FOR_DAEMON, Switch};
use crate::live::Mirror;
use crate::{LiveDisk, MirrorStalled};

/// How often in a row a destination may hang.
const STALLS: u32 = 5;

/// A mirroring that lasted so long has come on: a device that hangs after it begins a new row.
const LASTED: Duration = Duration::from_secs(10);

/// Passes for what the first one of a mirroring leaves: changes that were on their way when it
/// began. What is left after so many has time in the pause.
const SWEEPS: u32 = 4;

/// A flush that takes no longer has nothing of the bulk left.
const SHORT_FLUSH: Duration = Duration::from_millis(3);

/// How often the destination is flushed in a row, to get at a short one.
const FLUSHES: u32 = 3;

/// The scope in which the disk is mirrored. However it is left, the guest goes on with the source
/// alone, or with the destination if that is the disk now.
struct Scope<'a> {
    disk: &'a LiveDisk,
    control: &'a Control,
    mirror: &'a Mirror,
}

impl<'a> Scope<'a> {
    fn begin(disk: &'a LiveDisk, control: &'a Control, mirror: &'a Arc<Mirror>) -> Result<Self> {
        let scope = Self {
            disk,
            control,
            mirror,
        };
        disk.begin_mirror(mirror)?;
        control.mirrors(true);
        Ok(scope)
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.control.mirrors(false);
        self.disk.end_mirror();
        // Nothing of it reaches the destination later.
        self.mirror.settle();
    }
}

/// How a mirroring ended.
enum Mirrored {
    /// The disk is on the destination.
    Switched,
    /// By somebody else.
    Ended,
    /// The job was paused.
    Paused,
}

impl Job {
    /// Copies what is marked and switches over, by mirroring.
    pub(super) fn mirror(&mut self, why: MethodReason) -> Result<(), End> {
        self.uses(Method::Mirror, why);
        let (disk, control) = (Arc::clone(&self.disk), Arc::clone(&self.control));
        let mut attempts = Attempts::default();
        let mut arrived = 0u64;
        let mut stalls = 0;
        while stalls < STALLS {
            // Waits here, without a mirroring, for as long as the job is paused.
            self.go_on()?;
            let began = Instant::now();
            let mirror = Mirror::new(
                Arc::clone(&self.bitmap),
                Arc::clone(&self.destination),
                Arc::clone(&control.event),
            );
            let scope = Scope::begin(&disk, &control, &mirror)?;
            let end = self.mirrored(&mirror, &mut attempts);
            let lasted = began.elapsed();
            drop(scope);
            arrived = arrived.saturating_add(mirror.arrived());
            control.update(|status| {
                if let Some(method) = &mut status.method {
                    method.mirrored_bytes = arrived;
                }
            });
            match end? {
                Mirrored::Switched => return Ok(()),
                Mirrored::Paused => {}
                Mirrored::Ended => {
                    if let Some(seen) = mirror.failure() {
                        return Err(seen.into());
                    }
                    stalls = if lasted > LASTED { 1 } else { stalls + 1 };
                }
            }
        }
        Err(End::Failed(
            MirrorStalled {
                path: self.destination.path().to_owned(),
                times: STALLS,
            }
            .into(),
        ))
    }

    fn mirrored(&mut self, mirror: &Arc<Mirror>, attempts: &mut Attempts) -> Result<Mirrored, End> {
        let mut sweeps = 0;
        loop {
            if self.control.is_paused() {
                return Ok(Mirrored::Paused);
            }
            self.look_around()?;
            if !mirror.is_on() {
                return Ok(Mirrored::Ended);
            }
            let dirty = self.bitmap.marked_bytes();
            let much = self.expected_pause(dirty) > self.allowed();
            if dirty > 0 && (much || sweeps < SWEEPS) {
                if much && self.counted_passes() >= self.limits.max_passes {
                    return Err(self.not_converging(dirty).into());
                }
                sweeps += 1;
                self.sweep(mirror, dirty)?;
                continue;
            }
            self.get_ready()?;
            // First the bulk, then what came since, so that the one in the pause is short.
            for _ in 0..FLUSHES {
                self.flush_destination()?;
                if self.flush <= SHORT_FLUSH {
                    break;
                }
            }
            if !mirror.is_on() {
                continue;
            }
            match self.switch(Some(mirror))? {
                Switch::Done => return Ok(Mirrored::Switched),
                Switch::TooLate(late) => attempts.missed(self, &late)?,
                Switch::Paused => {}
                // The guest goes on meanwhile, on both sides: nothing is to be caught up later.
                Switch::NoDaemon => {
                    while mirror.is_on() && !self.hooks.can_ask() {
                        self.control.rest(LOOK_FOR_DAEMON);
                        if self.control.is_paused() {
                            break;
                        }
                        self.look_around()?;
                    }
                    self.uncounted = self.passes();
                }
            }
        }
    }

    /// One pass over what is marked.
    fn sweep(&mut self, mirror: &Arc<Mirror>, dirty: u64) -> Result<(), End> {
        let bitmap = Arc::clone(&self.bitmap);
        let mut plan = MirrorPass::new(&bitmap, self.disk.size());
        let how = How {
            mirror: Some(mirror),
            ..How::usual(dirty, Room::BesideGuest)
        };
        match self.pass(&mut plan, how) {
            // The next look at it says so.
            Ok(()) | Err(Stop::Unmirrored | Stop::Paused) => Ok(()),
            Err(stop) => Err(stop.into()),
        }
    }

    /// Says which method is in use from now on.
    pub(super) fn uses(&self, method: Method, why: MethodReason) {
        self.control.update(|status| {
            if status.overlay.is_some() {
                // How the overlay is consolidated is a part of the method.
                return;
            }
            status.method = Some(Box::new(MethodUsed {
                method,
                why,
                mirrored_bytes: 0,
            }));
        });
    }
}
