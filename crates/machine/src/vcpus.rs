//! The vCPUs' threads.
//!
//! ```text
//!                 let_run()                    leave()
//!   Parked  ◀────────────────▶  Running  ──────────────▶  gone
//!                  park()                     (from both)
//! ```
//!
//! One thread per vCPU, `vcpu0` and so on, born parked. What all of them shall do is one word,
//! [`Want`]. Whoever changes it kicks every vCPU; a vCPU's thread looks at it before each entry
//! into the guest (see `strake_kvm::Kicker` for why no change is missed) and, to park, waits on a
//! condition variable under the lock that also counts the parked ones.
//!
//! Who changes the word: the machine, for a pause (under its own lock, so that pauses do not
//! overlap), and a vCPU's thread whose guest powers off, resets or breaks: that one only ever sets
//! [`Want::Leave`] and never waits. `Leave` is final.
//!
//! A parked thread also does an [`Errand`]: it saves its vCPU or restores it, all of them at once and
//! each its own. An instruction that an exit interrupted is finished before its thread parks, because
//! what KVM keeps of it until then is in no state.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strake_api::control::ExitReason;
use strake_devices::bus::{MmioBus, PortBus};
use strake_kvm::{Exit, Failure, Kicker, SavedVcpu, Vcpu};
use strake_observe::{Observation, Result};

use crate::Mailbox;
use crate::observations::{PauseTimeout, WrongState};
use crate::threads::{self, ThreadKind};

/// How long a pause waits for the vCPUs. A vCPU is late when its thread is in a device or the host
/// does not schedule it.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);

/// What all vCPUs shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Want {
    Park,
    Run,
    Leave,
}

/// What parked threads do for somebody, each for its own vCPU.
#[derive(Debug)]
enum Errand {
    Save,
    Restore(Vec<SavedVcpu>),
}

/// Where the guest's accesses go.
#[derive(Debug, Clone)]
pub(crate) struct Buses {
    /// `in` and `out`.
    pub(crate) ports: Arc<PortBus>,
    /// Memory accesses outside of RAM.
    pub(crate) mmio: Arc<MmioBus>,
}

/// All vCPUs of a machine.
#[derive(Debug)]
pub(crate) struct Vcpus {
    crew: Arc<Crew>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Shared by the vCPUs' threads and whoever steers them.
#[derive(Debug)]
pub(crate) struct Crew {
    want: AtomicU8,
    kickers: Vec<Kicker>,
    state: Mutex<State>,
    /// A vCPU parks, or is gone.
    arrived: Condvar,
    /// [`Want`] has changed.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    parked: usize,
    gone: usize,
    /// The errand that is under way, and its number.
    errand: Option<Errand>,
    number: u64,
    /// What came of it so far.
    results: Vec<Result<Option<(u8, SavedVcpu)>>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU, parked.
    ///
    /// # Errors
    /// [`crate::observations::ThreadFailed`].
    pub(crate) fn start(
        vcpus: Vec<Vcpu>,
        crew: &Arc<Crew>,
        buses: &Buses,
        mailbox: &Arc<Mailbox>,
    ) -> Result<Self> {
        let this = Self {
            crew: Arc::clone(crew),
            threads: Mutex::default(),
        };
        for vcpu in vcpus {
            let member = Member {
                crew: Arc::clone(crew),
                buses: buses.clone(),
                mailbox: Arc::clone(mailbox),
            };
            let name = format!("vcpu{}", vcpu.index());
            let thread = threads::spawn(&name, move || member.run(vcpu))?;
            lock(&this.threads).push(thread);
        }
        Ok(this)
    }

    /// Those of an export: none.
    pub(crate) fn none() -> Self {
        Self {
            crew: Crew::new(&[]),
            threads: Mutex::default(),
        }
    }

    /// Lets all of them run.
    pub(crate) fn let_run(&self) {
        self.crew.change(Want::Run);
    }

    /// Makes all of them leave the guest and waits for it.
    ///
    /// # Errors
    /// [`PauseTimeout`]; then they run on.
    pub(crate) fn park(&self) -> Result<()> {
        self.park_within(PAUSE_LIMIT)
    }

    /// The same, but waits no longer than `limit`.
    ///
    /// # Errors
    /// As [`park`](Self::park).
    pub(crate) fn park_within(&self, limit: Duration) -> Result<()> {
        self.crew.change(Want::Park);
        let limit = limit.min(PAUSE_LIMIT);
        self.crew.wait_parked(limit).inspect_err(|_| self.let_run())
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.crew.kickers.len()
    }

    /// Makes all of them leave the guest and saves them, in the order of their numbers. They stay
    /// parked.
    ///
    /// # Errors
    /// They do not stop in time, one has left for good, or KVM does not tell its state. Whoever
    /// called decides whether they run on.
    pub(crate) fn park_and_save(&self) -> Result<Vec<SavedVcpu>> {
        self.crew.begin(Errand::Save);
        self.crew.change(Want::Park);
        let mut saved: Vec<_> = self.crew.finish()?.into_iter().flatten().collect();
        saved.sort_by_key(|(index, _)| *index);
        Ok(saved.into_iter().map(|(_, vcpu)| vcpu).collect())
    }

    /// Restores all of them, while they are parked.
    ///
    /// # Errors
    /// They are not as many as were saved, or KVM does not take a state.
    pub(crate) fn restore(&self, saved: Vec<SavedVcpu>) -> Result<()> {
        self.crew.begin(Errand::Restore(saved));
        self.crew.changed.notify_all();
        self.crew.finish().map(drop)
    }

    /// Ends all threads.
    pub(crate) fn leave(&self) {
        self.crew.leave();
        for thread in lock(&self.threads).drain(..) {
            // A panic has been reported by the process's hook.
            let _ = thread.join();
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Crew {
    pub(crate) fn new(vcpus: &[Vcpu]) -> Arc<Self> {
        Arc::new(Self {
            want: AtomicU8::new(Want::Park as u8),
            kickers: vcpus.iter().map(Vcpu::kicker).collect(),
            state: Mutex::default(),
            arrived: Condvar::new(),
            changed: Condvar::new(),
        })
    }

    /// No vCPU enters the guest again. From any thread, without waiting.
    pub(crate) fn leave(&self) {
        self.change(Want::Leave);
    }

    fn change(&self, want: Want) {
        {
            // Under the lock, so that a thread that is about to wait does not miss it.
            let _state = lock(&self.state);
            if self.want() == Want::Leave {
                return;
            }
            self.want.store(want as u8, Ordering::SeqCst);
        }
        self.changed.notify_all();
        if want != Want::Run {
            for kicker in &self.kickers {
                // It fails only if the thread does not exist, and then there is nobody to stop.
                let _ = kicker.kick();
            }
        }
    }

    fn want(&self) -> Want {
        match self.want.load(Ordering::SeqCst) {
            x if x == Want::Run as u8 => Want::Run,
            x if x == Want::Park as u8 => Want::Park,
            _ => Want::Leave,
        }
    }

    fn wait_parked(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let mut state = lock(&self.state);
        loop {
            let standing = state.parked + state.gone;
            if standing == self.kickers.len() {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(PauseTimeout {
                    running: self.kickers.len() - standing,
                    waited_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
                }
                .into());
            }
            state = self
                .arrived
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }

    fn begin(&self, errand: Errand) {
        let mut state = lock(&self.state);
        state.errand = Some(errand);
        state.number += 1;
        state.results.clear();
    }

    /// Waits until all have done the errand.
    fn finish(&self) -> Result<Vec<Option<(u8, SavedVcpu)>>> {
        let end = Instant::now() + PAUSE_LIMIT;
        let mut state = lock(&self.state);
        let outcome: Result<()> = loop {
            if state.gone > 0 {
                break Err(WrongState {
                    asked: "save or restore the guest".to_owned(),
                    state: "at its end".to_owned(),
                }
                .into());
            }
            if state.results.len() == self.kickers.len() {
                break Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Err(PauseTimeout {
                    running: self.kickers.len() - state.results.len(),
                    waited_ms: u64::try_from(PAUSE_LIMIT.as_millis()).unwrap_or(u64::MAX),
                }
                .into());
            }
            state = self
                .arrived
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        };
        state.errand = None;
        let results = std::mem::take(&mut state.results);
        drop(state);
        outcome?;
        results.into_iter().collect()
    }

    /// Does the errand that is under way, once.
    fn run_errand<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        vcpu: &mut Vcpu,
        done: &mut u64,
    ) -> MutexGuard<'a, State> {
        let number = state.number;
        if state.errand.is_none() || *done == number {
            return state;
        }
        *done = number;
        let mine = match &mut state.errand {
            Some(Errand::Restore(saved)) => {
                let place = saved.get_mut(usize::from(vcpu.index()));
                Some(place.map(|place| place.clone()))
            }
            _ => None,
        };
        drop(state);
        let result = match mine {
            None => vcpu.save().map(|saved| Some((vcpu.index(), saved))),
            Some(Some(saved)) => vcpu.restore(&saved).map(|()| None),
            Some(None) => Err(WrongState {
                asked: format!("restore vCPU {}", vcpu.index()),
                state: "not the one that was saved".to_owned(),
            }
            .into()),
        };
        let mut state = lock(&self.state);
        if state.number == number && state.errand.is_some() {
            state.results.push(result);
            self.arrived.notify_all();
        }
        state
    }

    /// Before each entry into the guest. Returns when the vCPU may run; false when it shall leave.
    fn turn(&self, vcpu: &mut Vcpu, done: &mut u64) -> bool {
        match self.want() {
            Want::Run => return true,
            Want::Leave => return false,
            Want::Park => {}
        }
        let mut state = lock(&self.state);
        state.parked += 1;
        self.arrived.notify_all();
        loop {
            state = self.run_errand(state, vcpu, done);
            if self.want() != Want::Park {
                break;
            }
            if state.errand.is_some() && state.number != *done {
                continue;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        drop(state);
        vcpu.note_pause();
        self.want() != Want::Leave
    }

    fn gone(&self) {
        lock(&self.state).gone += 1;
        self.arrived.notify_all();
    }
}

/// One vCPU's thread.
struct Member {
    crew: Arc<Crew>,
    buses: Buses,
    mailbox: Arc<Mailbox>,
}

/// What to do after an exit from the guest.
enum Next {
    Again,
    Kicked,
    Reset,
    Broken(Failure),
}

impl Member {
    fn run(self, mut vcpu: Vcpu) {
        vcpu.adopt();
        match threads::enter(ThreadKind::Vcpu) {
            Ok(()) => self.serve(&mut vcpu),
            Err(seen) => self.broken(seen),
        }
        // Kicks have no effect before the crew counts it as gone.
        drop(vcpu);
        self.crew.gone();
    }

    /// Guest → exit → device → guest, until the end.
    fn serve(&self, vcpu: &mut Vcpu) {
        // Whether an instruction is to be finished, which KVM does when it is entered again.
        let mut unfinished = false;
        let mut errands = 0;
        loop {
            match self.crew.want() {
                Want::Park if unfinished => vcpu.finish_exit(),
                Want::Run if unfinished => {}
                _ if self.crew.turn(vcpu, &mut errands) => {}
                _ => return,
            }
            let next = self.handle(vcpu.run());
            unfinished = matches!(next, Next::Again);
            match next {
                Next::Again => {}
                Next::Kicked => vcpu.acknowledge_kick(),
                Next::Reset => {
                    self.mailbox.exit(ExitReason::GuestReset);
                    self.crew.leave();
                }
                Next::Broken(failure) => self.broken(vcpu.run_failed(failure)),
            }
        }
    }

    fn handle(&self, exit: Exit<'_>) -> Next {
        match exit {
            Exit::PortIn(mut input) => {
                let port = u64::from(input.port);
                for data in input.accesses() {
                    self.buses.ports.read(port, data);
                }
            }
            Exit::PortOut(output) => {
                let port = u64::from(output.port);
                for data in output.accesses() {
                    self.buses.ports.write(port, data);
                }
            }
            Exit::MmioRead { address, data } => self.buses.mmio.read(address, data),
            Exit::MmioWrite { address, data } => self.buses.mmio.write(address, data),
            Exit::Interrupted => return Next::Kicked,
            Exit::TripleFault => return Next::Reset,
            Exit::Halted => {
                return Next::Broken(Failure {
                    reason: "it halted although KVM waits for its interrupts".to_owned(),
                    cause: None,
                });
            }
            Exit::Failed(failure) => return Next::Broken(failure),
        }
        Next::Again
    }

    fn broken(&self, seen: Observation) {
        self.mailbox.exit(ExitReason::Failed(seen));
        self.crew.leave();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
