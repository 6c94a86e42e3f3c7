//! A set of profiles, indexed so that an object meets only those that may be about it.
//!
//! Each profile stands in one place of the index: under the exact names that it selects, else under
//! the values of the label that it asks for, else among the rest of its kind. An object looks under
//! its name, under each of its labels and at the rest; what it finds is then compared in full.

use std::collections::HashMap;
use std::sync::Arc;

use strake_observe::Result;

use crate::glob;
use crate::object::Object;
use crate::observations::{DuplicateName, TooMany};
use crate::profile::Profile;
use crate::schema::Schema;
use crate::select::{Selector, Test};

/// The most profiles of a set.
pub const MAX_PROFILES: usize = 20_000;

/// Profiles that are in force together.
#[derive(Debug, Clone)]
pub struct ProfileSet {
    schema: Arc<Schema>,
    /// By priority, then by name: the order says nothing, but it is always the same.
    profiles: Vec<Arc<Profile>>,
    index: HashMap<&'static str, KindIndex>,
}

#[derive(Debug, Clone, Default)]
struct KindIndex {
    by_name: HashMap<String, Vec<u32>>,
    by_label: HashMap<String, HashMap<String, Vec<u32>>>,
    rest: Vec<u32>,
}

impl ProfileSet {
    /// A set of these, in whatever order they come.
    ///
    /// # Errors
    /// [`DuplicateName`] or [`TooMany`].
    pub fn new(
        schema: Arc<Schema>,
        profiles: impl IntoIterator<Item = Arc<Profile>>,
    ) -> Result<Self> {
        let mut profiles: Vec<_> = profiles.into_iter().collect();
        if profiles.len() > MAX_PROFILES {
            return Err(TooMany {
                what: "profiles".to_owned(),
                count: profiles.len(),
                most: MAX_PROFILES,
            }
            .into());
        }
        let order = |profile: &Arc<Profile>| (profile.head.priority, profile.head.name.clone());
        profiles.sort_by_cached_key(order);
        let mut files: HashMap<&str, &str> = HashMap::new();
        for profile in &profiles {
            if let Some(other) = files.insert(&profile.head.name, &profile.head.file) {
                let (first, second) = if other <= profile.head.file.as_str() {
                    (other, profile.head.file.as_str())
                } else {
                    (profile.head.file.as_str(), other)
                };
                return Err(DuplicateName {
                    name: profile.head.name.clone(),
                    first: first.to_owned(),
                    second: second.to_owned(),
                }
                .into());
            }
        }
        let mut index: HashMap<&'static str, KindIndex> = HashMap::new();
        for (place, profile) in (0_u32..).zip(&profiles) {
            index
                .entry(profile.selector.kind)
                .or_default()
                .add(place, &profile.selector);
        }
        Ok(Self {
            schema,
            profiles,
            index,
        })
    }

    /// An empty set.
    #[must_use]
    pub fn empty(schema: Arc<Schema>) -> Self {
        Self {
            schema,
            profiles: Vec::new(),
            index: HashMap::new(),
        }
    }

    /// The set with `changed` put in, each in place of the one of its name, and `removed` taken out.
    ///
    /// # Errors
    /// [`DuplicateName`] if two of `changed` have one name, [`TooMany`].
    pub fn with(&self, changed: &[Arc<Profile>], removed: &[&str]) -> Result<Self> {
        let stays = |name: &str| {
            !removed.contains(&name) && !changed.iter().any(|profile| profile.head.name == name)
        };
        let kept = self
            .profiles
            .iter()
            .filter(|profile| stays(&profile.head.name));
        Self::new(
            Arc::clone(&self.schema),
            kept.chain(changed).map(Arc::clone),
        )
    }

    /// The schema that they were read with.
    #[must_use]
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    /// All profiles, by priority and name.
    #[must_use]
    pub fn profiles(&self) -> &[Arc<Profile>] {
        &self.profiles
    }

    /// The profile of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<Profile>> {
        self.profiles
            .iter()
            .find(|profile| profile.head.name == name)
    }

    /// The profiles that are about `object`, by priority and name.
    #[must_use]
    pub fn matching(&self, object: &Object) -> Vec<&Profile> {
        let mut places = Vec::new();
        for identity in object.identities() {
            let Some(index) = self.index.get(identity.kind.as_str()) else {
                continue;
            };
            places.extend_from_slice(&index.rest);
            if let Some(named) = index.by_name.get(&identity.name) {
                places.extend_from_slice(named);
            }
            if !index.by_label.is_empty() {
                for (key, value) in &identity.labels {
                    if let Some(found) = index.by_label.get(key).and_then(|by| by.get(value)) {
                        places.extend_from_slice(found);
                    }
                }
            }
        }
        places.sort_unstable();
        places.dedup();
        places
            .into_iter()
            .filter_map(|place| self.profiles.get(usize::try_from(place).ok()?))
            .map(Arc::as_ref)
            .filter(|profile| profile.selector.selects(object))
            .collect()
    }
}

impl KindIndex {
    fn add(&mut self, place: u32, selector: &Selector) {
        let exact =
            !selector.names.is_empty() && !selector.names.iter().any(|name| glob::is_pattern(name));
        if exact {
            for name in &selector.names {
                self.by_name.entry(name.clone()).or_default().push(place);
            }
            return;
        }
        let narrowest = selector
            .labels
            .iter()
            .filter_map(|wants| match &wants.test {
                Test::In(values) => Some((values.len(), &wants.key, values)),
                Test::NotIn(_) | Test::Exists | Test::Absent => None,
            })
            .min();
        match narrowest {
            Some((_, key, values)) => {
                let by_value = self.by_label.entry(key.clone()).or_default();
                for value in values {
                    by_value.entry(value.clone()).or_default().push(place);
                }
            }
            None => self.rest.push(place),
        }
    }
}
