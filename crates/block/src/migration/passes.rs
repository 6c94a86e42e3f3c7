//! Method `dirty`: passes over what was written since the last one, until the rest fits the pause.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::job::{Method, MethodReason};
use strake_observe::Observation;

use super::choice::Judge;
use super::copier::{Room, Stop};
use super::job::{End, How, Job};
use super::pace::rate;
use super::plan::{DirtyPass, FirstPass, Fresh};
use super::switch::{Attempts, LOOK_FOR_DAEMON, Switch};
use crate::{DirtyBitmap, NotConverging};

/// A pause that is not worth another pass: below it what remains is the latency of the last few
/// requests.
const GOOD_PAUSE: Duration = Duration::from_millis(4);

/// A pass has shrunk what is left if it is below this share of what it was, in percent.
const SHRUNK_PERCENT: u64 = 90;

/// If a pass leaves more than this share of what it was, in percent, the guest has to give way: the
/// passes would get shorter so slowly that all of them together are a burden for long. With method
/// `auto` this is where mirroring begins.
const PRESS_PERCENT: u64 = 60;

/// Passes in a row that may fail to shrink what is left while it is too much for the pause.
const STALLED_PASSES: u32 = 5;

/// How the passes ended.
pub(super) enum Passes {
    /// The disk is on the destination.
    Switched,
    /// They cannot keep up with the guest.
    TooSlow(MethodReason),
}

impl Job {
    /// Copies what is allocated. With method `auto` it says why to go on by mirroring, if there is
    /// a reason; the rest of the plan is left then.
    pub(super) fn first_pass(
        &mut self,
        plan: &mut FirstPass,
        fresh: Fresh,
    ) -> Result<Option<MethodReason>, End> {
        let planned = self.planned()?;
        let mut judge = Judge::new(Instant::now(), planned);
        let mut why = None;
        let how = How {
            fresh,
            judge: (self.limits.method == Method::Auto).then_some((&mut judge, &mut why)),
            ..How::usual(planned, Room::BesideGuest)
        };
        match self.pass(plan, how) {
            Ok(()) => Ok(None),
            Err(Stop::Enough) => Ok(why),
            Err(stop) => Err(stop.into()),
        }
    }

    /// Makes passes until the rest fits the pause, and switches over.
    pub(super) fn later_passes(&mut self) -> Result<Passes, End> {
        let mut before = u64::MAX;
        let mut stalled = 0;
        let mut room = Room::BesideGuest;
        let mut attempts = Attempts::default();
        let mut pauses = self.control.pauses();
        loop {
            self.go_on()?;
            if pauses != self.control.pauses() {
                // What is dirty after a rest says nothing about how the passes do.
                pauses = self.control.pauses();
                (before, stalled) = (u64::MAX, 0);
            }
            let mut dirty = self.bitmap.marked_bytes();
            let mut within = self.expected_pause(dirty) <= self.allowed();
            if within {
                self.get_ready()?;
                self.flush_destination()?;
                // The guest went on writing meanwhile.
                dirty = self.bitmap.marked_bytes();
                within = self.expected_pause(dirty) <= self.allowed();
            }
            let shrunk = dirty < before.saturating_mul(SHRUNK_PERCENT) / 100;
            let last = self.counted_passes() >= self.limits.max_passes;
            let good = self.expected_pause(dirty) <= GOOD_PAUSE + self.flush;
            // Longer than a good pause only if the guest gave way and that did not help.
            if within && (good || last || (!shrunk && room == Room::Pressing)) {
                match self.switch(None)? {
                    Switch::Done => return Ok(Passes::Switched),
                    Switch::TooLate(late) => {
                        attempts.missed(self, &late)?;
                        before = u64::MAX;
                    }
                    Switch::Paused => continue,
                    Switch::NoDaemon => {
                        self.await_daemon()?;
                        // What is left now says nothing about how the passes did.
                        (before, stalled) = (u64::MAX, 0);
                        continue;
                    }
                }
            } else {
                if dirty >= before.saturating_mul(PRESS_PERCENT) / 100 {
                    // The guest writes nearly as fast as we copy beside it, or faster.
                    if self.limits.method == Method::Auto {
                        let after = dirty;
                        return Ok(Passes::TooSlow(MethodReason::NotShrinking {
                            before,
                            after,
                        }));
                    }
                    room = Room::Pressing;
                }
                if within || shrunk {
                    stalled = 0;
                    before = dirty;
                } else {
                    stalled += 1;
                }
            }
            if !within && (stalled >= STALLED_PASSES || last) {
                return Err(self.not_converging(dirty).into());
            }
            self.dirty_pass(room)?;
        }
    }

    /// Waits until a daemon can be asked, while the guest goes on, and keeps what is left small.
    ///
    /// That may take hours, so the copier stays beside the guest, copies only when a good pause
    /// would not do, and tells of its newest pass only. None of these passes is a sign that the
    /// guest writes too fast, so the limit counts anew afterwards.
    fn await_daemon(&mut self) -> Result<(), End> {
        let mut told = false;
        while !self.hooks.can_ask() {
            self.control.rest(LOOK_FOR_DAEMON);
            self.go_on()?;
            let expected = self.expected_pause(self.bitmap.marked_bytes());
            if expected <= GOOD_PAUSE + self.flush {
                continue;
            }
            if std::mem::replace(&mut told, true) {
                self.control.update(|status| {
                    status.passes.pop();
                });
            }
            self.dirty_pass(Room::BesideGuest)?;
        }
        self.uncounted = self.passes();
        Ok(())
    }

    /// Copies what was marked since, but for the blocks that the guest rewrites all the time:
    /// they are left for the last pass as long as they are few.
    fn dirty_pass(&mut self, room: Room) -> Result<(), End> {
        let bitmap = Arc::clone(&self.bitmap);
        let size = self.disk.size();
        let hot = DirtyBitmap::new(size)?;
        let mut at = 0;
        while let Some(block) = bitmap.next_marked(at) {
            if self.recent.is_marked(block) {
                hot.mark(block * crate::BLOCK_BYTES, 1);
            }
            at = block + 1;
        }
        let hot_bytes = hot.marked_bytes();
        // Few enough that the pause stays a good one.
        let few = self.expected_pause(hot_bytes) <= GOOD_PAUSE + self.flush;
        let leave = few.then_some(&hot);
        let left = if few { hot_bytes } else { 0 };
        let planned = bitmap.marked_bytes().saturating_sub(left);
        let copied = DirtyBitmap::new(size)?;
        let mut plan = DirtyPass::new(&bitmap, size, leave, Some(&copied));
        self.pass(&mut plan, How::usual(planned, room))?;
        if few {
            // What was left stays hot.
            let mut at = 0;
            while let Some(block) = hot.next_marked(at) {
                copied.mark(block * crate::BLOCK_BYTES, 1);
                at = block + 1;
            }
        }
        self.recent = copied;
        Ok(())
    }

    pub(super) fn not_converging(&self, dirty: u64) -> Observation {
        let status = self.control.status();
        let write_rate = status.passes.last().map_or(0, |pass| {
            rate(
                pass.dirty_after_bytes,
                Duration::from_millis(pass.elapsed_ms.max(1)),
            )
        });
        NotConverging {
            passes: self.passes(),
            write_rate,
            copy_rate: self.pace.throughput(),
            dirty,
            expected_pause_ms: u64::try_from(self.expected_pause(dirty).as_millis())
                .unwrap_or(u64::MAX),
            pause_ms: self.limits.pause_ms,
        }
        .into()
    }
}
