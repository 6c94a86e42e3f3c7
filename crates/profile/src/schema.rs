//! The schema: which kinds of objects there are, and which fields they have.

use std::collections::HashMap;

use serde::Serialize;

use crate::value::{Value, ValueKind};

/// How the values of several profiles become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Merge {
    /// The highest rank wins.
    Replace,
    /// The smallest counts, whoever says it.
    Min,
    /// The largest counts, whoever says it.
    Max,
    /// Sets are joined; of those who name the same word, the highest rank says whether it is in.
    Union,
    /// Sets are joined; a word that anybody forbids is out.
    DenyWins,
}

impl Merge {
    /// As it is written in documentation and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Replace => "replace",
            Self::Min => "min",
            Self::Max => "max",
            Self::Union => "union",
            Self::DenyWins => "deny-wins",
        }
    }
}

/// What it takes to bring a changed value into force on an object that is in use. Ordered: the
/// greater disturbs more.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeClass {
    /// Now, and nobody notices.
    Live,
    /// By a fast restart: the process is replaced, the guest does not notice.
    Restart,
    /// At the guest's next power cycle.
    Reboot,
}

impl ChangeClass {
    /// As it is written in documentation and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Restart => "restart",
            Self::Reboot => "reboot",
        }
    }
}

/// Who may say something about a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Steer {
    /// Profiles and the object.
    Profiles,
    /// The object alone: it is part of what the object *is*.
    Own,
    /// The object alone, and only when it is made: it does not change any more.
    Fixed,
}

/// A value in a table of fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Constant {
    /// A whole number.
    Int(u64),
    /// Text.
    Text(&'static str),
    /// Yes or no.
    Bool(bool),
}

impl From<Constant> for Value {
    fn from(constant: Constant) -> Self {
        match constant {
            Constant::Int(n) => Self::Int(n),
            Constant::Text(text) => Self::Text(text.to_owned()),
            Constant::Bool(yes) => Self::Bool(yes),
        }
    }
}

/// A field of a kind of object: one line of the table from which everything else comes.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// The kind of object that has it.
    pub kind: &'static str,
    /// Its path, `section.name`, unique among all kinds.
    pub path: &'static str,
    /// What it holds.
    pub value: ValueKind,
    /// What it is if nobody says anything.
    pub default: Option<Constant>,
    /// Whether a field without a value means "without limit", so that an upper bound applies to it.
    pub absent_is_unlimited: bool,
    /// How several values become one.
    pub merge: Merge,
    /// What a change takes.
    pub change: ChangeClass,
    /// Who may say something about it.
    pub steer: Steer,
    /// One or two sentences for people.
    pub doc: &'static str,
}

/// A kind of object.
#[derive(Debug, Clone, Copy)]
pub struct ObjectKind {
    /// Its name, as profiles say it.
    pub name: &'static str,
    /// The kind that its objects are parts of. What selects the whole selects its parts.
    pub part_of: Option<&'static str>,
    /// What else its objects can be selected by: names of label sets, for example those of the host.
    pub contexts: &'static [&'static str],
    /// One sentence for people.
    pub doc: &'static str,
}

/// A field of one object: for a map, one key of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The field's place in the schema.
    pub field: usize,
    /// The key, if the field is a map.
    pub key: Option<Box<str>>,
}

/// All kinds and fields.
#[derive(Debug)]
pub struct Schema {
    kinds: &'static [ObjectKind],
    fields: &'static [Field],
    by_path: HashMap<&'static str, usize>,
    defaults: Vec<Option<Value>>,
}

impl Schema {
    /// A schema of these tables.
    #[must_use]
    pub fn new(kinds: &'static [ObjectKind], fields: &'static [Field]) -> Self {
        Self {
            kinds,
            fields,
            by_path: fields
                .iter()
                .enumerate()
                .map(|(index, field)| (field.path, index))
                .collect(),
            defaults: fields
                .iter()
                .map(|field| field.default.map(Value::from))
                .collect(),
        }
    }

    /// Every kind of object.
    #[must_use]
    pub fn kinds(&self) -> &'static [ObjectKind] {
        self.kinds
    }

    /// Every field, in the table's order.
    #[must_use]
    pub fn fields(&self) -> &'static [Field] {
        self.fields
    }

    /// The kind of this name.
    #[must_use]
    pub fn kind(&self, name: &str) -> Option<&'static ObjectKind> {
        self.kinds.iter().find(|kind| kind.name == name)
    }

    /// A field by its place.
    #[must_use]
    pub fn field(&self, index: usize) -> Option<&'static Field> {
        self.fields.get(index)
    }

    pub(crate) fn default_of(&self, index: usize) -> Option<&Value> {
        self.defaults.get(index).and_then(Option::as_ref)
    }

    /// The field that a path names; for a map with its key.
    #[must_use]
    pub fn slot(&self, path: &str) -> Option<Slot> {
        if let Some(&field) = self.by_path.get(path) {
            let is_map = matches!(self.field(field)?.value, ValueKind::Map { .. });
            return (!is_map).then_some(Slot { field, key: None });
        }
        path.match_indices('.').find_map(|(dot, _)| {
            let (head, key) = (path.get(..dot)?, path.get(dot + 1..)?);
            let &field = self.by_path.get(head)?;
            let is_map = matches!(self.field(field)?.value, ValueKind::Map { .. });
            (is_map && !key.is_empty()).then(|| Slot {
                field,
                key: Some(key.into()),
            })
        })
    }

    /// The path of a slot.
    #[must_use]
    pub fn path(&self, slot: &Slot) -> String {
        let path = self.field(slot.field).map_or("", |field| field.path);
        match &slot.key {
            None => path.to_owned(),
            Some(key) => format!("{path}.{key}"),
        }
    }

    /// Whether objects of `part` are parts of objects of `whole`, or the same kind.
    #[must_use]
    pub fn is_part_of(&self, part: &str, whole: &str) -> bool {
        let mut kind = self.kind(part);
        // A chain of kinds is never longer than their number.
        for _ in 0..=self.kinds.len() {
            match kind {
                Some(found) if found.name == whole => return true,
                Some(found) => kind = found.part_of.and_then(|name| self.kind(name)),
                None => return false,
            }
        }
        false
    }
}
