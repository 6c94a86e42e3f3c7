//! Which objects a profile is about.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::glob;
use crate::object::{Identity, Object};

/// What a label must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Test {
    /// One of these.
    In(Vec<String>),
    /// None of these; an object without the label fits too.
    NotIn(Vec<String>),
    /// Anything, but there.
    Exists,
    /// Not there.
    Absent,
}

/// What one label must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// What it must be.
    pub test: Test,
}

impl Requirement {
    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match &self.test {
            Test::In(values) => value.is_some_and(|value| values.contains(value)),
            Test::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Test::Exists => value.is_some(),
            Test::Absent => value.is_none(),
        }
    }
}

/// Which objects a profile is about: all of it must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Selector {
    /// The kind of object that name and labels are about; its parts are selected with it.
    pub kind: &'static str,
    /// Names, with `*` and `?`; one must fit unless there are none.
    pub names: Vec<String>,
    /// What its labels must be.
    pub labels: Vec<Requirement>,
    /// What the labels of its contexts must be, by the context's name.
    pub contexts: Vec<(String, Vec<Requirement>)>,
}

impl Selector {
    /// Whether it selects `object`.
    #[must_use]
    pub fn selects(&self, object: &Object) -> bool {
        object
            .identities()
            .find(|identity| identity.kind == self.kind)
            .is_some_and(|identity| self.fits(identity))
            && self.contexts.iter().all(|(context, requirements)| {
                object
                    .context(context)
                    .is_some_and(|labels| requirements.iter().all(|wants| wants.holds(labels)))
            })
    }

    fn fits(&self, identity: &Identity) -> bool {
        let named = self.names.is_empty()
            || self
                .names
                .iter()
                .any(|pattern| glob::fits(pattern, &identity.name));
        named
            && self
                .labels
                .iter()
                .all(|wants| wants.holds(&identity.labels))
    }
}
