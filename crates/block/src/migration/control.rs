//! What a migration's threads share with everyone else.
//!
//! Three parties meet here: the job's thread, its guard (see `pause.rs`), and whoever cancels or
//! decides. One lock orders them, so that of "the pause is over" and "the daemon is asked" exactly
//! one comes first, and of "cancelled" and "asked" too. The lock is a leaf: nothing is called while
//! it is held.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use strake_api::job::{JobId, LimitsChange, MigrationLimits, MigrationStatus, Progress, Stage};

use crate::Event;

/// How often the guard looks after a mirroring.
const LOOK: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub(crate) struct Control {
    /// Wakes the job's thread wherever it waits for I/O.
    pub(crate) event: Arc<Event>,
    pub(crate) job: JobId,
    state: Mutex<State>,
    changed: Condvar,
    status: Mutex<MigrationStatus>,
    limits: Mutex<MigrationLimits>,
    /// Grows with each change of the limits, so that the copier need not look at them all the time.
    changes: AtomicU32,
    began: Instant,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    /// It is to be taken up again later.
    interrupted: bool,
    /// Nothing is to be copied and no gate to be closed.
    paused: bool,
    /// How often that was asked for.
    pauses: u32,
    /// It cannot be paused any more.
    hurries: bool,
    /// The daemon was asked; from now on only its answer counts.
    asked: bool,
    /// What it was asked.
    stage: Stage,
    decision: Option<bool>,
    gate: Gate,
    /// The guard is to look after the mirroring as well.
    mirroring: bool,
    /// The job needs no guard any more.
    unguarded: bool,
    ended: bool,
}

/// The gate as far as this job closed it.
#[derive(Debug, Clone, Copy, Default)]
enum Gate {
    #[default]
    Open,
    /// Closed; to be opened at this instant at the latest, unless the daemon was asked before.
    Closed { since: Instant, until: Instant },
    /// Somebody is opening it.
    Opening,
}

/// Whether the daemon may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    /// From now on only the daemon decides, and the gate stays closed until it has.
    Asked,
    Cancelled,
    /// The job was paused.
    Paused,
    /// The gate was opened: the destination may lack something again.
    TooLate,
}

/// What the guard is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Open the gate, as if by [`Control::begin_opening`]; it is closed since then.
    Open(Overdue, Instant),
    /// Look whether the guest waits for the destination.
    Look,
}

/// Why the guard opens a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overdue {
    /// The job was cancelled or paused.
    Asked,
    TooLong,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    pub(crate) fn new(event: Arc<Event>, status: MigrationStatus, limits: MigrationLimits) -> Self {
        Self {
            limits: Mutex::new(limits),
            changes: AtomicU32::new(0),
            event,
            job: status.job.clone(),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            status: Mutex::new(status),
            began: Instant::now(),
        }
    }

    pub(crate) fn status(&self) -> MigrationStatus {
        let mut status = lock(&self.status).clone();
        if !status.phase.is_final() {
            status.elapsed_ms = self.elapsed_ms();
            if self.is_paused() {
                status.progress = Progress::Paused;
            }
        }
        status
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut MigrationStatus)) {
        let mut status = lock(&self.status);
        change(&mut status);
        status.elapsed_ms = self.elapsed_ms();
    }

    /// False if the daemon was already asked.
    pub(crate) fn cancel(&self) -> bool {
        {
            let mut state = lock(&self.state);
            // With the disk on its overlay the job goes on, and can be cancelled there.
            let goes_on = state.stage == Stage::Overlay && state.decision == Some(true);
            if state.asked && !state.ended && !goes_on {
                return false;
            }
            state.cancelled = true;
            self.changed.notify_all();
        }
        self.event.signal();
        true
    }

    /// As if cancelled, but it may be taken up again; false if the daemon was already asked.
    pub(crate) fn interrupt(&self) -> bool {
        lock(&self.state).interrupted = true;
        self.cancel()
    }

    pub(crate) fn is_interrupted(&self) -> bool {
        lock(&self.state).interrupted
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        lock(&self.state).cancelled
    }

    /// Lets the job rest; false if the daemon was already asked.
    pub(crate) fn pause(&self) -> bool {
        {
            let mut state = lock(&self.state);
            if (state.asked || state.hurries) && !state.ended {
                return false;
            }
            if !state.paused {
                state.paused = true;
                state.pauses = state.pauses.wrapping_add(1);
            }
            self.changed.notify_all();
        }
        self.event.signal();
        true
    }

    /// From here on it does not rest: an overlay grows.
    pub(crate) fn hurry(&self) {
        lock(&self.state).hurries = true;
        self.resume();
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) {
        {
            lock(&self.state).paused = false;
            self.changed.notify_all();
        }
        self.event.signal();
    }

    pub(crate) fn is_paused(&self) -> bool {
        lock(&self.state).paused
    }

    /// How often it was paused.
    pub(crate) fn pauses(&self) -> u32 {
        lock(&self.state).pauses
    }

    /// Waits for as long as the job is paused and not cancelled.
    pub(crate) fn stay(&self) {
        let mut state = lock(&self.state);
        while state.paused && !state.cancelled {
            state = self.wait(state);
        }
    }

    /// The limits as they are now.
    pub(crate) fn limits(&self) -> MigrationLimits {
        lock(&self.limits).clone()
    }

    /// How often the limits were changed.
    pub(crate) fn changes(&self) -> u32 {
        self.changes.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, change: &LimitsChange) {
        change.apply(&mut lock(&self.limits));
        self.changes.fetch_add(1, Ordering::Release);
        self.event.signal();
    }

    /// Waits until the job is cancelled or paused, for `limit` at most.
    pub(crate) fn rest(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = lock(&self.state);
        while !state.cancelled && !state.paused {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.wait_at_most(state, left);
        }
    }

    /// Asks for the right to ask the daemon.
    pub(crate) fn ask(&self, stage: Stage) -> Ask {
        let mut state = lock(&self.state);
        if state.cancelled {
            return Ask::Cancelled;
        }
        if state.paused {
            return Ask::Paused;
        }
        if !matches!(state.gate, Gate::Closed { .. }) {
            return Ask::TooLate;
        }
        state.asked = true;
        state.stage = stage;
        Ask::Asked
    }

    /// What the daemon was asked and has not answered.
    pub(crate) fn question(&self) -> Option<Stage> {
        let state = lock(&self.state);
        (state.asked && state.decision.is_none() && !state.ended).then_some(state.stage)
    }

    /// An answer to another question than the one that is open is one that was given before.
    pub(crate) fn decide(&self, stage: Stage, committed: bool) {
        let mut state = lock(&self.state);
        if state.asked && state.stage == stage && state.decision.is_none() {
            state.decision = Some(committed);
            self.changed.notify_all();
        }
    }

    /// Waits for the daemon's answer.
    pub(crate) fn decision(&self) -> bool {
        let mut state = lock(&self.state);
        loop {
            if let Some(committed) = state.decision {
                return committed;
            }
            state = self.wait(state);
        }
    }

    /// The answer was acted upon; the job goes on, may be cancelled, and asks something else later.
    pub(crate) fn goes_on(&self) {
        let mut state = lock(&self.state);
        state.asked = false;
        state.decision = None;
    }

    pub(crate) fn is_committed(&self) -> bool {
        lock(&self.state).decision == Some(true)
    }

    /// The job's thread has closed the gate.
    pub(crate) fn gate_closed(&self, since: Instant, until: Instant) {
        lock(&self.state).gate = Gate::Closed { since, until };
        self.changed.notify_all();
    }

    pub(crate) fn is_gate_closed(&self) -> bool {
        matches!(lock(&self.state).gate, Gate::Closed { .. })
    }

    /// True if the caller is to open the gate, and to say [`gate_opened`](Self::gate_opened) then;
    /// false once it is open, and while it has to stay closed: between question and answer nobody
    /// opens it, be it that the job's thread panics.
    pub(crate) fn begin_opening(&self) -> bool {
        let mut state = lock(&self.state);
        loop {
            match state.gate {
                Gate::Open => return false,
                Gate::Closed { .. } if state.asked && state.decision.is_none() => return false,
                Gate::Closed { .. } => {
                    state.gate = Gate::Opening;
                    return true;
                }
                // Not before it is done: the next pause must not meet the end of this one.
                Gate::Opening => state = self.wait(state),
            }
        }
    }

    pub(crate) fn gate_opened(&self) {
        lock(&self.state).gate = Gate::Open;
        self.changed.notify_all();
    }

    /// The guard's wait: returns when it has something to do, none when the job needs it no more.
    pub(crate) fn due(&self) -> Option<Due> {
        let mut state = lock(&self.state);
        loop {
            if state.unguarded {
                return None;
            }
            let (since, until) = match state.gate {
                Gate::Closed { since, until } if !state.asked => (since, until),
                _ if state.mirroring => {
                    drop(self.wait_at_most(state, LOOK));
                    return Some(Due::Look);
                }
                _ => {
                    state = self.wait(state);
                    continue;
                }
            };
            let left = until.saturating_duration_since(Instant::now());
            let asked = state.cancelled || state.paused;
            if asked || left.is_zero() {
                state.gate = Gate::Opening;
                let why = if asked {
                    Overdue::Asked
                } else {
                    Overdue::TooLong
                };
                return Some(Due::Open(why, since));
            }
            state = self.wait_at_most(state, left);
        }
    }

    /// Whether the guard is to look after a mirroring.
    pub(crate) fn mirrors(&self, mirrors: bool) {
        lock(&self.state).mirroring = mirrors;
        self.changed.notify_all();
    }

    /// Lets the guard go.
    pub(crate) fn unguard(&self) {
        lock(&self.state).unguarded = true;
        self.changed.notify_all();
    }

    pub(crate) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    /// Waits for [`end`](Self::end).
    pub(crate) fn ended(&self) {
        let mut state = lock(&self.state);
        while !state.ended {
            state = self.wait(state);
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_at_most<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Duration,
    ) -> MutexGuard<'a, State> {
        match self.changed.wait_timeout(state, limit) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> Control {
        let status = MigrationStatus::new(JobId("job-1".into()), "root".into(), 512);
        let event = Arc::new(Event::new().unwrap());
        Control::new(event, status, MigrationLimits::default())
    }

    fn closed() -> Control {
        let control = control();
        let now = Instant::now();
        control.gate_closed(now, now + Duration::from_secs(60));
        control
    }

    #[test]
    fn between_question_and_answer_nobody_opens_the_gate() {
        let control = closed();
        assert!(control.question().is_none());
        control.decide(Stage::Destination, true);
        assert_eq!(control.ask(Stage::Destination), Ask::Asked);
        assert!(control.question().is_some());
        assert!(!control.cancel());
        assert!(!control.begin_opening());
        assert!(control.is_gate_closed() && control.question().is_some());
        control.decide(Stage::Destination, false);
        assert!(control.question().is_none());
        // The question may be put again, and answered again: the first answer counts.
        control.decide(Stage::Destination, true);
        assert!(!control.decision() && !control.is_committed());
        assert!(control.begin_opening());
        control.gate_opened();
        assert!(!control.begin_opening());
    }

    #[test]
    fn the_question_is_not_put_once_the_gate_was_opened_or_the_job_cancelled() {
        let control = control();
        assert_eq!(control.ask(Stage::Destination), Ask::TooLate);
        let control = closed();
        assert!(control.begin_opening());
        assert_eq!(control.ask(Stage::Destination), Ask::TooLate);
        control.gate_opened();
        assert_eq!(control.ask(Stage::Destination), Ask::TooLate);
        let control = closed();
        assert!(control.cancel());
        assert_eq!(control.ask(Stage::Destination), Ask::Cancelled);
        assert!(control.question().is_none());
    }

    #[test]
    fn an_answer_counts_for_its_own_question_only() {
        let control = closed();
        assert_eq!(control.ask(Stage::Overlay), Ask::Asked);
        assert_eq!(control.question(), Some(Stage::Overlay));
        control.decide(Stage::Destination, true);
        assert_eq!(control.question(), Some(Stage::Overlay));
        control.decide(Stage::Overlay, true);
        assert!(control.decision());
        control.goes_on();
        assert!(!control.is_committed() && control.begin_opening());
        control.gate_opened();
        let now = Instant::now();
        control.gate_closed(now, now + Duration::from_secs(60));
        assert_eq!(control.ask(Stage::Destination), Ask::Asked);
        // The daemon repeats its first answer.
        control.decide(Stage::Overlay, true);
        assert_eq!(control.question(), Some(Stage::Destination));
        control.decide(Stage::Destination, false);
        assert!(!control.decision());
    }

    #[test]
    fn a_pause_that_was_granted_keeps_the_question_from_being_put() {
        let control = closed();
        assert!(control.pause());
        assert_eq!(control.ask(Stage::Destination), Ask::Paused);
        // The guest does not wait for a job that rests.
        assert!(matches!(control.due(), Some(Due::Open(Overdue::Asked, _))));
        control.gate_opened();
        control.resume();
        let now = Instant::now();
        control.gate_closed(now, now + Duration::from_secs(60));
        assert_eq!(control.ask(Stage::Destination), Ask::Asked);
        assert!(!control.pause(), "the daemon decides by now");
    }
}
