//! Method `snapshot`: the guest's writes go to an overlay while its image is copied.
//!
//! ```text
//!            the disk is                       the daemon's record names     how it goes on
//!   1        source                            source                        put on the overlay: gate closed,
//!                                                                            source flushed, daemon asked
//!   2 copy   overlay ─► source (immutable)     overlay                       copied in one pass; flushed
//!   3        overlay ─► source or copy         overlay                       the overlay's header names the copy
//!   4 merge  overlay ─► copy                   overlay                       consolidated, daemon asked
//!   5        copy                              copy                          the overlay is removed
//! ```
//!
//! Nothing that the guest writes is copied twice before step 4, and nothing has to converge before it:
//! the source does not change. Step 4 is a live consolidation, which converges whatever the guest
//! writes.
//!
//! # What is authoritative
//!
//! What the record names, and if that is the overlay, whatever its header names below it. That changes
//! by one write of one sector, in step 3, when the copy is the same as the source and durable. So each
//! instant has exactly one answer, and the VM starts from it. A job that ends between 1 and 5 leaves
//! a disk that is whole and larger than it has to be: the overlay over the source, with a destination
//! that nobody needs; or, after step 3, the overlay over the copy, with a source that nobody needs.
//! Whoever cleans up looks at the header before anything is removed. What remains to be done in
//! both cases is a consolidation.
//!
//! # When it turns back
//!
//! If the overlay gets so large that its limit would be passed before it is consolidated, or the copy
//! fails: what came into the overlay is consolidated into the source, and the record names that again.
//! The job has failed then, and the disk is where it was. Cancelled, the job ends at once where it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::{Method, MethodReason, OverlayStatus, OverlayStep, Phase, Stage};
use strake_observe::{Observation, Result};

use super::control::Ask;
use super::copier::{Copier, Room, Stop};
use super::job::{End, How, Job};
use super::journal::Durable;
use super::plan::{DirtyPass, FirstPass, Fresh};
use super::switch::{Attempts, LOOK_FOR_DAEMON, Switch};
use crate::{CommitRefused, Delta, DirtyBitmap, Image, NoOverlay, OverlayFull};

/// A flush that takes no longer has nothing of the bulk left, and how often that is tried for.
const SHORT_FLUSH: Duration = Duration::from_millis(3);
const FLUSHES: u32 = 3;

/// How often the size of the overlay is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Watches the size of an overlay while the image below it is copied.
pub(super) struct Cap {
    delta: Arc<dyn Delta>,
    limit: u64,
    /// Of the disk: an overlay does not get larger, but for its tables.
    size: u64,
    began: Instant,
    /// What it had when it was empty.
    empty: u64,
    looked: Option<Instant>,
}

impl Cap {
    fn new(delta: &Arc<dyn Delta>, limit: u64, size: u64) -> Self {
        Self {
            delta: Arc::clone(delta),
            limit,
            size,
            began: Instant::now(),
            empty: delta.bytes(),
            looked: None,
        }
    }

    /// Whether it is time to turn back: how large the overlay is now, and whether it would be larger than
    /// its limit when it is consolidated at `speed`. Rarely looks, and says nothing then.
    pub(super) fn look(&mut self, speed: u64) -> Option<(u64, bool)> {
        let now = Instant::now();
        if self.looked.is_some_and(|looked| now - looked < LOOK) {
            return None;
        }
        self.looked = Some(now);
        let bytes = self.delta.bytes();
        let grown = bytes.saturating_sub(self.empty);
        let end = grown_until_merged(grown, now - self.began, speed).min(self.size);
        Some((bytes, end > self.limit))
    }

    fn full(&self) -> Observation {
        OverlayFull {
            path: self.delta.path().to_owned(),
            bytes: self.delta.bytes(),
            limit: self.limit,
        }
        .into()
    }
}

/// How large an overlay that got `bytes` in that time is when so much is consolidated.
fn grown_until_merged(bytes: u64, time: Duration, speed: u64) -> u64 {
    if speed == 0 || time.is_zero() {
        return bytes;
    }
    let (bytes, nanos) = (u128::from(bytes), time.as_nanos());
    // `bytes / time` for as long as `bytes / speed`.
    let more = bytes
        .saturating_mul(bytes)
        .saturating_mul(1_000_000_000)
        .checked_div(nanos.saturating_mul(u128::from(speed)))
        .unwrap_or(0);
    u64::try_from(bytes.saturating_add(more)).unwrap_or(u64::MAX)
}

impl Job {
    /// The most that an overlay may get.
    fn delta_limit(&self) -> u64 {
        self.limits.delta_bytes.unwrap_or(self.disk.size())
    }

    /// Why the job should go on with an overlay, if there is one and it is expected to do: passes are
    /// too slow because of `why`, and that much is still to be copied.
    pub(super) fn overlay_fits(&self, why: &MethodReason, left: u64) -> Option<MethodReason> {
        self.delta.as_ref()?;
        let limit = self.delta_limit();
        let speed = self.pace.throughput();
        let write_rate = match why {
            MethodReason::WritesTooFast { write_rate, .. } => *write_rate,
            // The guest dirtied about as much as was copied meanwhile.
            _ => speed,
        };
        if speed == 0 {
            return None;
        }
        // While the image is copied, and then while what came of that is.
        let copying = Duration::from_secs_f64(left as f64 / speed as f64);
        let grown =
            u64::try_from(u128::from(write_rate).saturating_mul(copying.as_millis()) / 1000)
                .unwrap_or(u64::MAX)
                .min(self.disk.size());
        let expected = grown_until_merged(grown, copying, speed).min(self.disk.size());
        (expected <= limit).then_some(MethodReason::OverlayFits { expected, limit })
    }

    /// Copies what `first` has left and what is marked, with the guest on an overlay, and switches
    /// over.
    pub(super) fn by_snapshot(
        &mut self,
        first: &mut FirstPass,
        fresh: Fresh,
        why: MethodReason,
    ) -> Result<(), End> {
        let Some(delta) = self.delta.clone() else {
            let job = self.control.job.to_string();
            return Err(Observation::from(NoOverlay { job }).into());
        };
        self.uses(Method::Snapshot, why);
        let (source, destination) = (Arc::clone(&self.source), Arc::clone(&self.destination));
        // What is kept is about the source as the disk's image, which it is no longer.
        if let Some(mut keeper) = self.keeper.take() {
            keeper.close();
        }
        self.put_on_overlay(delta.as_ref())?;
        match self.copy_below(&delta, first, fresh) {
            Ok(()) => {}
            Err(End::Cancelled) => return Err(End::Cancelled),
            Err(End::Failed(why)) => {
                self.tell_step(OverlayStep::TurnBack);
                self.merge(&delta, source, Stage::Source)?;
                self.destination = destination;
                return Err(End::Failed(why));
            }
        }
        delta.rebase(&destination)?;
        // The source is not needed from here on.
        self.source = self.disk.image();
        drop(source);
        self.tell_step(OverlayStep::Consolidate);
        self.merge(&delta, destination, Stage::Destination)
    }

    /// Step 1.
    fn put_on_overlay(&mut self, delta: &dyn Delta) -> Result<(), End> {
        let chain = delta.over(&self.source)?;
        self.disk.prepare(&chain)?;
        self.journal.reach(Phase::Suspended, Durable::Now)?;
        let mut attempts = Attempts::default();
        loop {
            self.go_on()?;
            if !self.hooks.can_ask() {
                self.control.rest(LOOK_FOR_DAEMON);
                continue;
            }
            for _ in 0..FLUSHES {
                let began = Instant::now();
                self.source.flush()?;
                if began.elapsed() <= SHORT_FLUSH {
                    break;
                }
            }
            match self.take(&chain, delta)? {
                Switch::Done => return Ok(()),
                Switch::TooLate(late) => attempts.missed(self, &late)?,
                Switch::NoDaemon | Switch::Paused => {}
            }
        }
    }

    /// The moment in which the guest waits for it. The flush is for what the guest wrote and has not
    /// flushed: its next flush goes to the overlay.
    fn take(&mut self, chain: &Arc<dyn Image>, delta: &dyn Delta) -> Result<Switch, End> {
        let pause = match self.begin_pause() {
            Ok(pause) => pause,
            Err(late) => return Ok(Switch::TooLate(late)),
        };
        if !pause.drained() {
            return Ok(self.too_late(&pause));
        }
        self.source.flush()?;
        if !pause.lasts() {
            return Ok(self.too_late(&pause));
        }
        if !self.hooks.can_ask() {
            return Ok(Switch::NoDaemon);
        }
        match self.control.ask(Stage::Overlay) {
            Ask::Asked => {}
            Ask::Cancelled => return Err(End::Cancelled),
            Ask::Paused => return Ok(Switch::Paused),
            Ask::TooLate => return Ok(self.too_late(&pause)),
        }
        self.control
            .update(|status| status.phase = Phase::AwaitingCommit);
        self.hooks.await_stage(&self.control.job, Stage::Overlay);
        if !self.control.decision() {
            drop(pause);
            let job = self.control.job.to_string();
            return Err(Observation::from(CommitRefused { job }).into());
        }
        self.disk.replace(Arc::clone(chain));
        // What is marked by now is what the copy lacks, and stays so.
        self.disk.end_tracking();
        let limit = self.delta_limit();
        self.control.update(|status| {
            status.overlay = Some(Box::new(OverlayStatus {
                path: delta.path().to_owned(),
                bytes: delta.bytes(),
                limit,
                step: OverlayStep::Copy,
            }));
        });
        self.control.goes_on();
        drop(pause);
        Ok(Switch::Done)
    }

    /// Step 2.
    fn copy_below(
        &mut self,
        delta: &Arc<dyn Delta>,
        first: &mut FirstPass,
        fresh: Fresh,
    ) -> Result<(), End> {
        let mut cap = Cap::new(delta, self.delta_limit(), self.disk.size());
        let planned = self.planned()?;
        let how = How {
            fresh,
            cap: Some(&mut cap),
            ..How::usual(planned, Room::BesideGuest)
        };
        let mut copied = self.pass(first, how);
        let bitmap = Arc::clone(&self.bitmap);
        let dirty = bitmap.marked_bytes();
        if copied.is_ok() && dirty > 0 {
            let mut plan = DirtyPass::new(&bitmap, self.disk.size(), None, None);
            let how = How {
                cap: Some(&mut cap),
                ..How::usual(dirty, Room::BesideGuest)
            };
            copied = self.pass(&mut plan, how);
        }
        match copied {
            Ok(()) => {}
            Err(Stop::Enough) => return Err(cap.full().into()),
            Err(stop) => return Err(stop.into()),
        }
        self.flush_destination()?;
        self.look_around()
    }

    /// Steps 4 and 5, or the way back: puts what the overlay has into what it is over.
    fn merge(
        &mut self,
        delta: &Arc<dyn Delta>,
        into: Arc<dyn Image>,
        stage: Stage,
    ) -> Result<(), End> {
        // The overlay grows until this is done, and nothing bounds it but the end.
        self.control.hurry();
        let size = self.disk.size();
        self.source = self.disk.image();
        self.destination = into;
        self.overlay = Some(delta.overlay()?);
        self.bitmap = Arc::new(DirtyBitmap::new(size)?);
        self.recent = DirtyBitmap::new(size)?;
        self.copier = Copier::new(
            self.source.as_ref(),
            self.destination.as_ref(),
            Arc::clone(&self.control.event),
        )?;
        self.begin_again(stage);
        self.disk.begin_tracking(Arc::clone(&self.bitmap));
        self.live()?;
        self.source = self.disk.image();
        self.control.update(|status| status.overlay = None);
        Ok(())
    }

    fn tell_step(&self, step: OverlayStep) {
        self.control.update(|status| {
            if let Some(overlay) = &mut status.overlay {
                overlay.step = step;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_is_expected_to_grow_while_it_is_consolidated() {
        const MIB: u64 = 1 << 20;
        let second = Duration::from_secs(1);
        // As fast as it is consolidated: as much again.
        assert_eq!(grown_until_merged(100 * MIB, second, 100 * MIB), 200 * MIB);
        assert_eq!(grown_until_merged(100 * MIB, second, 1000 * MIB), 110 * MIB);
        assert_eq!(
            grown_until_merged(100 * MIB, 4 * second, 100 * MIB),
            125 * MIB
        );
        assert_eq!(grown_until_merged(0, second, 1), 0);
        assert_eq!(grown_until_merged(5, Duration::ZERO, 1), 5);
        assert_eq!(grown_until_merged(5, second, 0), 5);
        assert_eq!(grown_until_merged(u64::MAX, second, 1), u64::MAX);
    }
}
