//! From the profiles that are about an object, and its own values, to one value for each field.
//!
//! Whoever says something about a field makes a [`Statement`] with a [`Rank`]. The statements of a
//! field are taken from the highest rank down, those of equal rank together:
//!
//! ```text
//! locked rules          one rank, whatever their priority: two locks that disagree are a conflict
//! the object's value
//! rules of profiles     by priority
//! `default` rules       by priority
//! the schema's default
//! ```
//!
//! The first value that is said stands; a bound that was said before it moves it, a bound that comes
//! after it and does not fit it yields. Statements of one rank that cannot hold together are a
//! conflict. Whether there is one does not depend on the object's own value: an operator who takes
//! that value away must not find a conflict behind it.

mod resolve;
mod scalar;
mod sets;

use std::borrow::Cow;

use strake_observe::Observation;

use crate::observations::{Contradiction, CyclicReference, LockAgainstLock};
use crate::profile::{Operator, Profile, Rule};
use crate::schema::{Field, Slot};
use crate::value::Value;

/// Who says something about a field.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// The schema, with its default.
    Schema,
    /// A rule of a profile.
    Rule(&'a Rule),
    /// The object itself.
    Own,
}

impl PartialEq for Source<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Schema, Self::Schema) | (Self::Own, Self::Own) => true,
            (Self::Rule(a), Self::Rule(b)) => std::ptr::eq(*a, *b) || a == b,
            _ => false,
        }
    }
}

impl Eq for Source<'_> {}

/// Why a statement did not decide the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// A rule of higher priority says another value.
    HigherPriority,
    /// Somebody of higher rank says the same value.
    SaidAlready,
    /// It is a default, and somebody sets a value.
    OnlyDefault,
    /// The object has a value of its own.
    OwnValue,
    /// A lock holds against it.
    Locked,
    /// A bound of higher rank moved the value.
    Bounded,
    /// It is a bound that the value, which has a higher rank, does not keep.
    ValueOutranks,
    /// It is a bound that contradicts a bound of higher rank.
    BoundOutranks,
    /// A rule of higher rank forbids the value.
    Forbidden,
    /// A rule of higher rank says otherwise about some of its words.
    WordsOutranked,
    /// The smallest value counts.
    SmallerCounts,
    /// The largest value counts.
    LargerCounts,
    /// It takes part in a conflict.
    Conflict,
}

impl Why {
    /// For people, as the end of a sentence that begins with the rule.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::HigherPriority => "yields to a higher priority",
            Self::SaidAlready => "says the same as a higher rank",
            Self::OnlyDefault => "is only a default",
            Self::OwnValue => "yields to the object's own value",
            Self::Locked => "yields to a lock",
            Self::Bounded => "is moved by a bound of higher rank",
            Self::ValueOutranks => "does not fit the value, which has a higher rank",
            Self::BoundOutranks => "contradicts a bound of higher rank",
            Self::Forbidden => "is forbidden by a rule of higher rank",
            Self::WordsOutranked => "yields to a higher rank in some of its words",
            Self::SmallerCounts => "is larger, and the smallest counts",
            Self::LargerCounts => "is smaller, and the largest counts",
            Self::Conflict => "is part of a conflict",
        }
    }
}

/// A statement that did not decide the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Yielded<'a> {
    /// Who made it.
    pub source: Source<'a>,
    /// What it said.
    pub value: Cow<'a, Value>,
    /// What it yielded to.
    pub to: Source<'a>,
    /// Why.
    pub why: Why,
}

/// A field's value, and how it came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved<'a> {
    /// Which field.
    pub slot: Slot,
    /// The value; absent if nobody says one.
    pub value: Option<Cow<'a, Value>>,
    /// Who decided it. More than one if they agree, or if each gave a part of it.
    pub origin: Vec<Source<'a>>,
    /// Bounds and prohibitions that hold and that the value keeps.
    pub held: Vec<Source<'a>>,
    /// What yielded, from the highest rank down.
    pub overrode: Vec<Yielded<'a>>,
}

/// What a conflict is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConflictKind<'a> {
    /// Rules of equal priority.
    EqualPriority(&'a Rule, &'a Rule),
    /// Locked rules, of whatever priority.
    Locks(&'a Rule, &'a Rule),
    /// Fields that refer to each other.
    Cycle(Vec<&'a Rule>),
}

/// Rules that cannot hold together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict<'a> {
    /// The object's name for people.
    pub object: &'a str,
    /// The field.
    pub slot: Slot,
    /// Its path.
    pub path: String,
    /// Who against whom.
    pub kind: ConflictKind<'a>,
    first_says: String,
    second_says: String,
}

impl Conflict<'_> {
    /// It as an observation.
    #[must_use]
    pub fn observation(&self) -> Observation {
        match &self.kind {
            ConflictKind::EqualPriority(first, second) => Contradiction {
                object: self.object.to_owned(),
                path: self.path.clone(),
                first: first.to_string(),
                first_says: self.first_says.clone(),
                second: second.to_string(),
                second_says: self.second_says.clone(),
                priority: first.head.priority,
            }
            .into(),
            ConflictKind::Locks(first, second) => LockAgainstLock {
                object: self.object.to_owned(),
                path: self.path.clone(),
                first: first.to_string(),
                first_says: self.first_says.clone(),
                second: second.to_string(),
                second_says: self.second_says.clone(),
            }
            .into(),
            ConflictKind::Cycle(rules) => CyclicReference {
                object: self.object.to_owned(),
                way: rules
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
            }
            .into(),
        }
    }
}

/// What holds for one object.
#[derive(Debug, Clone)]
pub struct Effective<'a> {
    /// The object's name for people.
    pub object: &'a str,
    /// The profiles that are about it, by priority and name.
    pub profiles: Vec<&'a Profile>,
    /// Every field that anybody says something about, in the schema's order.
    pub values: Vec<Resolved<'a>>,
    /// What cannot hold together. The fields concerned have no value.
    pub conflicts: Vec<Conflict<'a>>,
}

impl<'a> Effective<'a> {
    /// The value of a field.
    #[must_use]
    pub fn get(&self, slot: &Slot) -> Option<&Value> {
        self.resolved(slot)?.value.as_deref()
    }

    /// A field with its history.
    #[must_use]
    pub fn resolved(&self, slot: &Slot) -> Option<&Resolved<'a>> {
        self.values
            .binary_search_by(|known| known.slot.cmp(slot))
            .ok()
            .and_then(|at| self.values.get(at))
    }
}

/// How much a statement counts. The order of the variants is the order of the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Schema,
    Default(i32),
    Profile(i32),
    Own,
    Locked,
}

/// Somebody says something about a field.
#[derive(Debug, Clone)]
struct Statement<'a> {
    rank: Rank,
    operator: Operator,
    source: Source<'a>,
    value: Cow<'a, Value>,
}

impl<'a> Statement<'a> {
    fn yields(&self, to: Source<'a>, why: Why) -> Yielded<'a> {
        Yielded {
            source: self.source,
            value: self.value.clone(),
            to,
            why,
        }
    }

    fn int(&self) -> Option<u64> {
        match *self.value {
            Value::Int(n) => Some(n),
            _ => None,
        }
    }
}

/// Who a field's value is decided by, as far as that has come.
struct Deciding<'a, 'f> {
    object: &'a str,
    field: &'f Field,
    path: &'f dyn Fn() -> String,
    resolved: Resolved<'a>,
    conflicts: Vec<Conflict<'a>>,
}

impl<'a> Deciding<'a, '_> {
    /// Two statements of one rank cannot hold together.
    fn conflict(&mut self, first: &Statement<'a>, second: &Statement<'a>) {
        let (Source::Rule(a), Source::Rule(b)) = (first.source, second.source) else {
            return; // An object and a schema say one thing each.
        };
        let key = |rule: &Rule| (rule.head.name.clone(), rule.line);
        let ((first, a), (second, b)) = if key(a) <= key(b) {
            ((first, a), (second, b))
        } else {
            ((second, b), (first, a))
        };
        let says = |statement: &Statement<'a>| {
            let value = self.field.value.show(&statement.value);
            format!("{} {value}", statement.operator.name())
        };
        self.conflicts.push(Conflict {
            object: self.object,
            slot: self.resolved.slot.clone(),
            path: (self.path)(),
            first_says: says(first),
            second_says: says(second),
            kind: match first.rank {
                Rank::Locked => ConflictKind::Locks(a, b),
                _ => ConflictKind::EqualPriority(a, b),
            },
        });
    }
}

/// The statements by rank, the highest first.
fn by_rank<'s, 'a>(
    statements: &'s [Statement<'a>],
) -> impl Iterator<Item = (Rank, &'s [Statement<'a>])> {
    statements
        .chunk_by(|a, b| a.rank == b.rank)
        .filter_map(|group| Some((group.first()?.rank, group)))
}

/// Why something yields to `to`, which was said before it.
fn outranked(to: Rank) -> Why {
    match to {
        Rank::Locked => Why::Locked,
        Rank::Own => Why::OwnValue,
        Rank::Profile(_) | Rank::Default(_) | Rank::Schema => Why::HigherPriority,
    }
}
