//! What another set of profiles would change.

use serde::{Deserialize, Serialize};
use strake_observe::Observation;

use crate::merge::{Conflict, Effective};
use crate::object::Object;
use crate::observations::MatchesNothing;
use crate::schema::ChangeClass;
use crate::set::ProfileSet;
use crate::value::Value;

/// A value of one object that would change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The object.
    pub object: String,
    /// The object's kind.
    pub kind: String,
    /// The field.
    pub path: String,
    /// What it is now.
    pub from: Option<Value>,
    /// What it would be.
    pub to: Option<Value>,
    /// Both for people, `A → B`.
    pub shown: String,
    /// What the change takes on an object in use.
    pub class: ChangeClass,
}

/// What another set of profiles would change.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Values, by object and path.
    pub changes: Vec<Change>,
    /// Conflicts that are not there now.
    pub conflicts: Vec<(String, Observation)>,
    /// Conflicts of now that would be gone.
    pub settled: Vec<(String, Observation)>,
    /// What is odd, but no obstacle.
    pub warnings: Vec<Observation>,
}

/// What it would change to go from `before` to `after`. Profiles that are in both say nothing new, so
/// only objects that one of the others is about are looked at.
#[must_use]
pub fn plan(before: &ProfileSet, after: &ProfileSet, objects: &[Object]) -> Plan {
    let mut plan = Plan::default();
    let differs = |one: &ProfileSet, other: &ProfileSet| -> Vec<_> {
        let known: std::collections::HashMap<&str, &std::sync::Arc<crate::Profile>> = other
            .profiles()
            .iter()
            .map(|profile| (profile.name(), profile))
            .collect();
        one.profiles()
            .iter()
            .filter(|profile| known.get(profile.name()).is_none_or(|same| same != profile))
            .cloned()
            .collect()
    };
    let gone = differs(before, after);
    let new = differs(after, before);
    let mut used = vec![false; new.len()];
    for object in objects {
        let mut concerned = gone.iter().any(|profile| profile.selector.selects(object));
        for (profile, used) in new.iter().zip(&mut used) {
            if profile.selector.selects(object) {
                concerned = true;
                *used = true;
            }
        }
        if concerned {
            compare(
                &mut plan,
                before,
                object,
                &before.effective(object),
                &after.effective(object),
            );
        }
    }
    for (profile, used) in new.iter().zip(used) {
        if !used {
            plan.warnings.push(
                MatchesNothing {
                    profile: profile.head.name.clone(),
                    file: profile.head.file.clone(),
                }
                .into(),
            );
        }
    }
    plan
}

fn compare(
    plan: &mut Plan,
    set: &ProfileSet,
    object: &Object,
    before: &Effective<'_>,
    after: &Effective<'_>,
) {
    let schema = set.schema();
    let mut slots: Vec<_> = before.values.iter().chain(&after.values).collect();
    slots.sort_by(|a, b| a.slot.cmp(&b.slot));
    slots.dedup_by(|a, b| a.slot == b.slot);
    for slot in slots.into_iter().map(|resolved| &resolved.slot) {
        let (from, to) = (before.get(slot), after.get(slot));
        let Some(field) = schema.field(slot.field) else {
            continue;
        };
        let in_conflict =
            |effective: &Effective<'_>| effective.conflicts.iter().any(|seen| seen.slot == *slot);
        if from == to || in_conflict(before) || in_conflict(after) {
            continue;
        }
        let shown = |value: Option<&Value>| {
            value.map_or_else(|| "–".to_owned(), |value| field.value.show(value))
        };
        plan.changes.push(Change {
            object: object.id.clone(),
            kind: object.kind().to_owned(),
            path: schema.path(slot),
            from: from.cloned(),
            to: to.cloned(),
            shown: format!("{} → {}", shown(from), shown(to)),
            class: field.change,
        });
    }
    let only = |one: &[Conflict<'_>], other: &[Conflict<'_>]| -> Vec<(String, Observation)> {
        one.iter()
            .filter(|seen| !other.contains(seen))
            .map(|seen| (object.id.clone(), seen.observation()))
            .collect()
    };
    plan.conflicts
        .extend(only(&after.conflicts, &before.conflicts));
    plan.settled
        .extend(only(&before.conflicts, &after.conflicts));
}
