//! Observations: what each component saw when a task failed.
//!
//! An error message that crosses three processes usually arrives as one string, and the line
//! that would have explained it stays behind in some journal. Strake's errors are
//! [`Observation`]s instead: a stable identifier from a [catalog], typed data, a remedy, and the
//! observations that caused it. An observation is plain data, so it travels with the failure: in a
//! `Result` within a thread, over a channel between threads, and as JSON over every carrier
//! between processes. What the command line shows at the end is the whole tree.
//!
//! * [`catalog!`] declares the observations of a crate.
//! * [`Observation`] is one of them as it happened: data, time, emitter, causes.
//! * [`Task`] is a scope: what its callees saw either becomes the cause of its own failure or is
//!   cleared by its success.
//! * [`recorder()`] keeps the last ones of this process, open and cleared, for a later look.
//! * [`Ring`] keeps the last open ones in a file, for whoever finds the process killed.
//!
//! [catalog]: Kind

mod catalog;
mod observation;
mod os;
mod recorder;
mod render;
mod ring;
mod task;

pub use catalog::{Entry, Kind};
pub use observation::{Because, Emitter, Observation, Record, Result, set_process_name};
pub use os::{CATALOG as OS_CATALOG, OsCallFailed, OsContext, errno_name};
pub use recorder::{FlightRecorder, RECORDER_CAPACITY, Recorded, State, Watcher, recorder};
pub use render::{Style, render};
pub use ring::{Ring, left_behind};
pub use task::Task;

#[doc(hidden)]
pub mod private {
    pub use serde;
}

#[cfg(test)]
mod tests;
