//! A task: the scope in which failures below are either causes or cleared.

use crate::{Observation, State, recorder};

/// A scope of work. What its callees observed arrives here; the task then either fails with an
/// observation of its own, caused by those, or succeeds, and they are cleared.
///
/// ```
/// use strake_observe::{OsContext, Task};
///
/// let mut task = Task::begin("read the configuration");
/// let text = match std::fs::read_to_string("/nonexistent").os("open", "/nonexistent") {
///     Ok(text) => text,
///     Err(seen) => {
///         task.saw(seen); // not fatal: there is a default
///         String::new()
///     }
/// };
/// task.succeed();
/// # assert!(text.is_empty());
/// ```
#[derive(Debug)]
#[must_use = "a task must end in `succeed` or `fail`"]
pub struct Task {
    name: String,
    received: Vec<Observation>,
    ended: bool,
}

impl Task {
    /// Begins a task; the name reads as what is being done.
    pub fn begin(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            received: Vec::new(),
            ended: false,
        }
    }

    /// Takes in what a callee observed, when the task goes on in spite of it.
    pub fn saw(&mut self, observation: impl Into<Observation>) {
        self.received.push(observation.into());
    }

    /// Takes the value of a callee's result, or takes in its observation.
    pub fn attempt<T, E: Into<Observation>>(&mut self, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(seen) => {
                self.saw(seen);
                None
            }
        }
    }

    /// What has been taken in so far.
    #[must_use]
    pub fn received(&self) -> &[Observation] {
        &self.received
    }

    /// The task did what it was for: what it saw on the way is cleared.
    pub fn succeed(mut self) {
        self.ended = true;
        for seen in self.received.drain(..) {
            recorder().record(
                seen,
                State::Cleared {
                    by: self.name.clone(),
                },
            );
        }
    }

    /// The task failed: its own observation, caused by all that it took in.
    #[must_use]
    pub fn fail(mut self, own: impl Into<Observation>) -> Observation {
        self.ended = true;
        let own = own.into().because_all(self.received.drain(..));
        recorder().record(own.clone(), State::Open);
        own
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // Left by an early return or a panic: nothing claims success, so what it saw stays open.
        for seen in self.received.drain(..) {
            recorder().record(seen, State::Open);
        }
        debug_assert!(
            std::thread::panicking(),
            "task '{}' ended neither in `succeed` nor in `fail`",
            self.name
        );
    }
}
