//! Why a test failed.

use std::fmt;

use strake_observe::Observation;

/// A reason in words.
#[derive(Clone)]
pub struct Failure(String);

/// What tests return.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A reason in words.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self(format!("not the JSON expected: {error}"))
    }
}

impl From<Observation> for Failure {
    fn from(seen: Observation) -> Self {
        Self(seen.to_string())
    }
}

/// Names what was being done when it failed.
pub trait While<T> {
    /// `doing` reads after "while".
    ///
    /// # Errors
    /// The same failure with the words in front.
    fn doing(self, doing: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: Into<Failure>> While<T> for Result<T, E> {
    fn doing(self, doing: impl fmt::Display) -> Outcome<T> {
        self.map_err(|error| Failure(format!("{doing}: {}", error.into())))
    }
}

/// Fails with the words given unless the condition holds.
#[macro_export]
macro_rules! check {
    ($holds:expr, $($words:tt)+) => {
        if !$holds {
            return Err($crate::failure::Failure::new(format!($($words)+)));
        }
    };
}
