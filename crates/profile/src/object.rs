//! Objects: what profiles are applied to.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::schema::{Schema, Slot};
use crate::value::Value;

/// What an object, or the whole that it is a part of, is known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its kind.
    pub kind: String,
    /// Its name among those of its kind.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// A value that an object has of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnValue {
    /// Of which field.
    pub slot: Slot,
    /// The value.
    pub value: Value,
}

/// An object: who it is, what it is near to, and what it says itself.
#[derive(Debug, Clone)]
pub struct Object {
    /// What people know it by, for example `web1/root`.
    pub id: String,
    identity: Identity,
    wholes: Vec<Arc<Identity>>,
    contexts: Vec<(String, Arc<BTreeMap<String, String>>)>,
    own: Vec<OwnValue>,
}

impl Object {
    /// An object that says nothing yet.
    #[must_use]
    pub fn new(id: impl Into<String>, identity: Identity) -> Self {
        Self {
            id: id.into(),
            identity,
            wholes: Vec::new(),
            contexts: Vec::new(),
            own: Vec::new(),
        }
    }

    /// Makes it a part of `whole`.
    #[must_use]
    pub fn part_of(mut self, whole: Arc<Identity>) -> Self {
        self.wholes.push(whole);
        self
    }

    /// Gives it a context: labels of something near, for example of its host.
    #[must_use]
    pub fn near(
        mut self,
        context: impl Into<String>,
        labels: Arc<BTreeMap<String, String>>,
    ) -> Self {
        self.contexts.push((context.into(), labels));
        self
    }

    /// Gives it a value of its own. A path that the schema does not know, or a value that the field
    /// cannot hold, is left out: whoever keeps objects has checked them.
    #[must_use]
    pub fn own(mut self, schema: &Schema, path: &str, value: Value) -> Self {
        if let Some(slot) = schema.slot(path)
            && schema
                .field(slot.field)
                .is_some_and(|field| field.kind == self.identity.kind)
        {
            self.own.retain(|own| own.slot != slot);
            self.own.push(OwnValue { slot, value });
        }
        self
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.identity.kind
    }

    /// Who it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// It, and what it is a part of.
    pub fn identities(&self) -> impl Iterator<Item = &Identity> {
        std::iter::once(&self.identity).chain(self.wholes.iter().map(Arc::as_ref))
    }

    /// The labels of one of its contexts.
    #[must_use]
    pub fn context(&self, name: &str) -> Option<&BTreeMap<String, String>> {
        self.contexts
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, labels)| labels.as_ref())
    }

    /// What it says itself.
    #[must_use]
    pub fn own_values(&self) -> &[OwnValue] {
        &self.own
    }
}
