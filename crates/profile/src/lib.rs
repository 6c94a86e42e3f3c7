//! Priority profiles over typed documents.
//!
//! Whoever runs forty machines wants to say a thing once: "test machines may not have more than two
//! CPUs", "disks on the slow store do at most 500 requests a second". A [`Profile`] says such
//! things about every object that its `match` selects. Several profiles meet on one object, and
//! then the question is who wins, and how somebody finds out. The answers here are:
//!
//! * **One order.** What says something about a field is ranked: the schema's default, the `default`
//!   rules of profiles, the other rules of profiles, the object's own value, locked rules. Among
//!   profiles the higher priority wins. Nothing else orders anything: not the names, not the files,
//!   not the sequence in which they came.
//! * **The schema owns the merge.** How several values of one field become one ([`Merge`]) belongs to
//!   the field, not to the profile.
//! * **No conflict is settled silently.** Rules of equal priority that cannot both hold are a
//!   [`Conflict`] that names both with file and line. Of unequal priority, the lower one yields, and
//!   the effective profile says so.
//! * **Every value has a history.** A [`Resolved`] value carries who decided it, what that overrode
//!   and [why](Why). No rule that applied to the object is missing from the account.
//!
//! This crate knows nothing of virtual machines. A [`Schema`] tells it which kinds of objects there
//! are and which fields they have; [`Object`]s carry their labels and their own values.
//!
//! Everything is a pure function of its input: a [`ProfileSet`] is built once and then only read, by
//! as many threads as like to.

mod explain;
mod glob;
mod merge;
mod object;
mod observations;
mod parse;
mod plan;
mod profile;
mod schema;
mod select;
mod set;
#[cfg(test)]
mod tests;
mod value;

pub use explain::{Explained, ExplainedSource, ExplainedYield};
pub use merge::{Conflict, ConflictKind, Effective, Resolved, Source, Why, Yielded};
pub use object::{Identity, Object, OwnValue};
pub use observations::CATALOG;
pub use observations::{
    BadLock, BadMatch, BadName, BadOperator, BadValue, Contradiction, CyclicReference,
    DuplicateName, FieldNotSteered, LockAgainstLock, MatchesNothing, ProfileProblems,
    ProfileSyntax, TooMany, UnknownField, UnknownKey,
};
pub use parse::{MAX_PROFILE_TEXT, MAX_RULES};
pub use plan::{Change, Plan, plan};
pub use profile::{Head, Operand, Operator, Profile, Rule, check_name};
pub use schema::{ChangeClass, Constant, Field, Merge, ObjectKind, Schema, Slot, Steer};
pub use select::{Requirement, Selector, Test};
pub use set::{MAX_PROFILES, ProfileSet};
pub use value::{Unit, Value, ValueKind};
