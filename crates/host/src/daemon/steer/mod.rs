//! Profiles, and what they make of the objects of this host.
//!
//! What is true at which instant:
//!
//! * The **own values** of a VM are its spec in the inventory; profiles and labels are in the
//!   inventory too. Every change of these is one transaction (`Inventory::steer`), checked before
//!   against every object: one that would bring about a conflict is refused, so that what is in the
//!   inventory always has an effective value for every field.
//! * The **effective spec** is computed from those whenever it is needed; it is stored nowhere.
//! * **In force** is what the running machine was given: it is noted before the monitor is started,
//!   and after each change that was made live.
//!
//! After a change has been committed, [`Host::bring_into_force`] compares both for every VM that runs
//! and makes the live part true. A daemon that ends in between leaves the difference behind, and the
//! next one does the same at its start: a change is undone (not committed) or finished, never half.
//!
//! `Host::steering` is held for the whole of a change, so that what was checked is what is
//! committed. It comes after `Host::placing` in the order of locks.

mod apply;
mod force;
mod load;
mod objects;
mod values;

use std::sync::{Arc, Mutex};

use strake_api::schema::schema;
use strake_profile::ProfileSet;

pub use apply::Intent;
pub(super) use force::limits;
pub(super) use objects::Place;

/// The profiles in force.
#[derive(Debug)]
pub(super) struct Profiles(Mutex<Arc<ProfileSet>>);

impl Default for Profiles {
    fn default() -> Self {
        let empty = ProfileSet::empty(Arc::clone(schema()));
        Self(Mutex::new(Arc::new(empty)))
    }
}
