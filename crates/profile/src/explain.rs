//! The history of a value as plain data, for carriers and for people.

use serde::{Deserialize, Serialize};

use crate::merge::{Resolved, Source, Why, Yielded};
use crate::profile::Operator;
use crate::schema::{ChangeClass, Schema};
use crate::value::Value;

/// Who says something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum ExplainedSource {
    /// The field's default.
    Default,
    /// The object itself.
    Own,
    /// A rule of a profile.
    Profile {
        /// The profile.
        profile: String,
        /// Its priority.
        priority: i32,
        /// Its file.
        file: String,
        /// The rule's line.
        line: usize,
        /// The rule's operator.
        operator: String,
        /// Whether the rule is locked.
        locked: bool,
    },
}

/// What did not decide a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainedYield {
    /// Who said it.
    pub source: ExplainedSource,
    /// What.
    pub value: Value,
    /// What, for people.
    pub shown: String,
    /// What it yielded to.
    pub to: ExplainedSource,
    /// Why.
    pub why: Why,
}

/// A field's value with its history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// The field's path.
    pub path: String,
    /// Its value; null if it has none.
    pub value: Option<Value>,
    /// Its value for people.
    pub shown: String,
    /// What a change of it takes.
    pub class: ChangeClass,
    /// Who decided it.
    pub origin: Vec<ExplainedSource>,
    /// Bounds and prohibitions that it keeps.
    pub held: Vec<ExplainedSource>,
    /// What yielded.
    pub overrode: Vec<ExplainedYield>,
}

impl ExplainedSource {
    fn of(source: Source<'_>) -> Self {
        match source {
            Source::Schema => Self::Default,
            Source::Own => Self::Own,
            Source::Rule(rule) => Self::Profile {
                profile: rule.head.name.clone(),
                priority: rule.head.priority,
                file: rule.head.file.clone(),
                line: rule.line,
                operator: rule.operator.name().to_owned(),
                locked: rule.locked,
            },
        }
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Default => "default".to_owned(),
            Self::Own => "own value".to_owned(),
            Self::Profile {
                profile,
                priority,
                file,
                line,
                operator,
                locked,
            } => {
                let verb = match operator.as_str() {
                    "set" => String::new(),
                    other => format!("{other} of "),
                };
                let locked = if *locked { ", locked" } else { "" };
                format!("{verb}profile '{profile}' (priority {priority}{locked}, {file}:{line})")
            }
        }
    }
}

impl Explained {
    /// A resolved value as plain data.
    #[must_use]
    pub fn of(schema: &Schema, resolved: &Resolved<'_>) -> Option<Self> {
        let field = schema.field(resolved.slot.field)?;
        let sources = |sources: &[Source<'_>]| {
            sources
                .iter()
                .map(|source| ExplainedSource::of(*source))
                .collect()
        };
        let yielded = |yielded: &Yielded<'_>| {
            let operator = match yielded.source {
                Source::Rule(rule) if rule.operator != Operator::Set => {
                    format!("{} ", rule.operator.name())
                }
                _ => String::new(),
            };
            ExplainedYield {
                source: ExplainedSource::of(yielded.source),
                value: yielded.value.as_ref().clone(),
                shown: format!("{operator}{}", field.value.show(&yielded.value)),
                to: ExplainedSource::of(yielded.to),
                why: yielded.why,
            }
        };
        Some(Self {
            path: schema.path(&resolved.slot),
            value: resolved.value.as_deref().cloned(),
            shown: resolved
                .value
                .as_deref()
                .map_or_else(|| "–".to_owned(), |value| field.value.show(value)),
            class: field.change,
            origin: sources(&resolved.origin),
            held: sources(&resolved.held),
            overrode: resolved.overrode.iter().map(yielded).collect(),
        })
    }
}
