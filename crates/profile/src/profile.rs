//! Profiles and their rules.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::schema::Slot;
use crate::select::Selector;
use crate::value::Value;

/// The most characters of a name.
const MAX_NAME: usize = 63;

/// What a rule does with its field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operator {
    /// The value, unless something of higher rank says another.
    Set,
    /// The value if nobody sets one.
    Default,
    /// At least this.
    Min,
    /// At most this.
    Max,
    /// These words too.
    Add,
    /// Not these words.
    Remove,
    /// Never these values.
    Forbid,
}

impl Operator {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Set,
        Self::Default,
        Self::Min,
        Self::Max,
        Self::Add,
        Self::Remove,
        Self::Forbid,
    ];

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Set => "set",
            Self::Default => "default",
            Self::Min => "min",
            Self::Max => "max",
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Forbid => "forbid",
        }
    }
}

/// What a profile is known by, shared by its rules.
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    /// Its name.
    pub name: String,
    /// The higher wins.
    pub priority: i32,
    /// The file that it was read from.
    pub file: String,
}

/// What stands on the right of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operand {
    /// A value.
    Value(Value),
    /// A part of another field's value.
    Share {
        /// The other field, of the same object.
        of: Slot,
        /// How much of it.
        percent: u32,
    },
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The profile that it is in.
    pub head: Arc<Head>,
    /// The line of its file.
    pub line: usize,
    /// What it is about.
    pub slot: Slot,
    /// What it does.
    pub operator: Operator,
    /// With what.
    pub operand: Operand,
    /// Whether it holds against the object's own value.
    pub locked: bool,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Head { name, file, .. } = self.head.as_ref();
        write!(f, "profile '{name}' ({file}:{})", self.line)
    }
}

/// A profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Name, priority and file.
    pub head: Arc<Head>,
    /// What it is for, in its author's words.
    pub description: String,
    /// Which objects it is about.
    pub selector: Selector,
    /// What it says about them, in the file's order.
    pub rules: Vec<Rule>,
}

impl Profile {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.head.name
    }
}

/// Checks a profile's name.
///
/// # Errors
/// The reason, as the end of a sentence that begins with the name.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("a name cannot be empty".to_owned());
    }
    if name.len() > MAX_NAME {
        return Err(format!("a name has at most {MAX_NAME} characters"));
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err("a name begins with a letter or a digit".to_owned());
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match name.chars().find(|c| !allowed(*c)) {
        Some(other) => Err(format!(
            "a name consists of letters, digits, '-', '_' and '.', not '{}'",
            other.escape_default()
        )),
        None => Ok(()),
    }
}
