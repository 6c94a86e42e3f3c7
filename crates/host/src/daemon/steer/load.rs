//! The profiles of the inventory.

use std::sync::Arc;

use strake_api::schema::schema;
use strake_observe::Result;
use strake_profile::{Profile, ProfileSet};

use crate::daemon::{Host, guard, note};
use crate::observations::ProfileUnreadable;

impl Host {
    /// Reads the profiles of the inventory. One that this daemon does not understand, written by
    /// another version, is left where it is and is not in force; that is observed.
    pub(in crate::daemon) fn load_profiles(&self) -> Result<()> {
        let mut profiles = Vec::new();
        for record in self.inventory.profiles()? {
            match Profile::from_toml(schema(), &record.text, &record.file) {
                Ok(profile) => profiles.push(Arc::new(profile)),
                Err(seen) => note(
                    strake_observe::Observation::from(ProfileUnreadable {
                        profile: record.name,
                    })
                    .because(seen),
                ),
            }
        }
        let set = ProfileSet::new(Arc::clone(schema()), profiles)?;
        *guard(&self.profiles.0) = Arc::new(set);
        Ok(())
    }

    /// The profiles in force.
    pub(in crate::daemon) fn profiles_now(&self) -> Arc<ProfileSet> {
        Arc::clone(&guard(&self.profiles.0))
    }
}
