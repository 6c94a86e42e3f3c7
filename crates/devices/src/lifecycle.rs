//! The life of a component: prepared → running ⇄ quiesced.
//!
//! ```text
//!             start()             quiesce()
//!  Prepared ───────────▶ Running ───────────▶ Quiesced ⟲ save()
//!     │                     ▲                  ▲ │
//!     │                     └──────────────────┼─┘
//!     │                           resume()     │
//!     └────────────────────────────────────────┘
//!                        restore()
//! ```
//!
//! *Prepared*: built, holds its resources, no thread of its own works for the guest.
//! *Running*: serves the guest. *Quiesced*: all that the guest handed over before is finished or
//! still in the guest's rings, nothing is in flight, no thread touches guest memory; accesses
//! from vCPUs still get their answers, but nobody makes any, because vCPUs are paused first and
//! resumed last.
//!
//! *Saved and restored*: what the guest could see or would miss goes into a record of the component's
//! own, and a component of the same shape in another process becomes quiesced with it. The shape
//! (sizes, features, identities) is in the record only to be compared; backends are not in it at all.
//!
//! No method has a default: a component that forgets one does not compile.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use strake_observe::Result;
use strake_state::{Records, Saved};

use crate::observations::WrongPhase;

/// Where a component is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Built.
    Prepared,
    /// Serves the guest.
    Running,
    /// Stands still, with nothing in flight.
    Quiesced,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepared => "prepared",
            Self::Running => "running",
            Self::Quiesced => "quiesced",
        })
    }
}

/// A part of a machine with a life of its own.
pub trait Component: Send + Sync {
    /// Its name within the machine, for example `blk-root`.
    fn name(&self) -> &str;

    /// Where it is.
    fn phase(&self) -> Phase;

    /// Prepared → running.
    ///
    /// # Errors
    /// It is not prepared, or cannot start what it needs.
    fn start(&self) -> Result<()>;

    /// Running → quiesced, within a bound that the component names. Call it after the vCPUs are
    /// paused. On failure it still runs.
    ///
    /// # Errors
    /// What is in flight did not finish within the bound.
    fn quiesce(&self) -> Result<()>;

    /// Quiesced → running. Whatever the guest asked for meanwhile is looked at again, so that no
    /// notification is lost.
    ///
    /// # Errors
    /// It cannot start again what it needs.
    fn resume(&self) -> Result<()>;

    /// Adds what a successor in another process can prepare for while this one still runs: whatever
    /// takes long to restore and seldom changes. Nobody relies on it.
    ///
    /// # Errors
    /// It cannot be told.
    fn sketch(&self, records: &mut Records) -> Result<()>;

    /// Prepares for being restored from about what was sketched. It stays prepared.
    ///
    /// # Errors
    /// It will not be possible to restore it.
    fn prepare(&self, records: &mut Records) -> Result<()>;

    /// Adds its records, while it is quiesced. Changes nothing: it may be resumed afterwards.
    ///
    /// # Errors
    /// It is not quiesced, or cannot be saved.
    fn save(&self, records: &mut Records) -> Result<()>;

    /// Prepared → quiesced, as it was when it was saved. After a failure it is of no use any more.
    ///
    /// # Errors
    /// A record is missing or makes no sense, or was saved by a component of another shape.
    fn restore(&self, records: &mut Records) -> Result<()>;
}

/// The state of a device that is nothing but registers, for [`registers_only!`](crate::registers_only!).
pub trait Registers {
    /// What of it is saved.
    type Saved: Saved;

    /// Its registers now.
    fn registers(&self) -> Self::Saved;

    /// Sets them, and raises again what is pending.
    ///
    /// # Errors
    /// They make no sense.
    fn set_registers(&self, saved: Self::Saved) -> Result<()>;
}

/// The phase of a component, with its transitions checked.
///
/// One transition at a time, under a mutex; the phase itself is an atomic beside it, so that a
/// vCPU can look at it while a transition waits for something that the vCPU holds.
#[derive(Debug, Default)]
pub struct PhaseCell {
    transition: Mutex<()>,
    phase: AtomicU8,
}

impl PhaseCell {
    /// Where the component is.
    #[must_use]
    pub fn get(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Prepared,
            1 => Phase::Running,
            _ => Phase::Quiesced,
        }
    }

    /// Does `work` and goes from `from` to `to`, or stays if `work` fails.
    ///
    /// # Errors
    /// [`WrongPhase`] if the component is not in `from`; the failure of `work`.
    pub fn step(
        &self,
        component: &str,
        asked: &str,
        (from, to): (Phase, Phase),
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let _transition = self
            .transition
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let phase = self.get();
        if phase != from {
            return Err(WrongPhase {
                component: component.to_owned(),
                phase: phase.to_string(),
                asked: asked.to_owned(),
            }
            .into());
        }
        work()?;
        let number = match to {
            Phase::Prepared => 0,
            Phase::Running => 1,
            Phase::Quiesced => 2,
        };
        self.phase.store(number, Ordering::Release);
        Ok(())
    }
}

/// [`Component`] for a device that has nothing to start or to stop: [`Registers`] only, nothing in
/// flight. It says so instead of inheriting it.
#[macro_export]
macro_rules! registers_only {
    ($type:ty) => {
        impl $crate::lifecycle::Component for $type {
            fn name(&self) -> &str {
                &self.name
            }

            fn phase(&self) -> $crate::lifecycle::Phase {
                self.phase.get()
            }

            fn start(&self) -> strake_observe::Result<()> {
                use $crate::lifecycle::Phase::{Prepared, Running};
                self.phase
                    .step(&self.name, "start", (Prepared, Running), || Ok(()))
            }

            fn quiesce(&self) -> strake_observe::Result<()> {
                use $crate::lifecycle::Phase::{Quiesced, Running};
                self.phase
                    .step(&self.name, "quiesce", (Running, Quiesced), || Ok(()))
            }

            fn resume(&self) -> strake_observe::Result<()> {
                use $crate::lifecycle::Phase::{Quiesced, Running};
                self.phase
                    .step(&self.name, "resume", (Quiesced, Running), || Ok(()))
            }

            fn sketch(&self, _: &mut strake_state::Records) -> strake_observe::Result<()> {
                Ok(()) // Registers are restored in no time.
            }

            fn prepare(&self, _: &mut strake_state::Records) -> strake_observe::Result<()> {
                Ok(())
            }

            fn save(&self, records: &mut strake_state::Records) -> strake_observe::Result<()> {
                use $crate::lifecycle::Phase::Quiesced;
                self.phase
                    .step(&self.name, "be saved", (Quiesced, Quiesced), || {
                        let saved = $crate::lifecycle::Registers::registers(self);
                        records.put(&self.name, &saved)
                    })
            }

            fn restore(&self, records: &mut strake_state::Records) -> strake_observe::Result<()> {
                use $crate::lifecycle::Phase::{Prepared, Quiesced};
                self.phase
                    .step(&self.name, "be restored", (Prepared, Quiesced), || {
                        let saved = records.take(&self.name)?;
                        $crate::lifecycle::Registers::set_registers(self, saved)
                    })
            }
        }
    };
}
