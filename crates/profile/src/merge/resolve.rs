//! One object: who says what about which field, and the fields one after another.

use std::borrow::Cow;

use super::{
    Conflict, ConflictKind, Deciding, Effective, Rank, Resolved, Source, Statement, Why, scalar,
    sets,
};
use crate::object::Object;
use crate::profile::{Operand, Operator, Profile, Rule};
use crate::schema::{Field, Merge, Schema, Slot};
use crate::set::ProfileSet;
use crate::value::{Value, ValueKind};

/// A rule with the slot that it is about.
struct Said<'a> {
    slot: &'a Slot,
    rank: Rank,
    operator: Operator,
    source: Source<'a>,
    operand: &'a Operand,
}

impl ProfileSet {
    /// What holds for `object`.
    #[must_use]
    pub fn effective<'a>(&'a self, object: &'a Object) -> Effective<'a> {
        let profiles = self.matching(object);
        let schema = self.schema().as_ref();
        let mut said: Vec<Said<'a>> = Vec::new();
        for profile in &profiles {
            for rule in &profile.rules {
                let applies = schema
                    .field(rule.slot.field)
                    .is_some_and(|field| field.kind == object.kind());
                if applies {
                    said.push(Said {
                        slot: &rule.slot,
                        rank: match (rule.locked, rule.operator) {
                            (_, Operator::Default) => Rank::Default(rule.head.priority),
                            (true, _) => Rank::Locked,
                            (false, _) => Rank::Profile(rule.head.priority),
                        },
                        operator: rule.operator,
                        source: Source::Rule(rule),
                        operand: &rule.operand,
                    });
                }
            }
        }
        // Stable: those of one field and one rank stay in the order of the profiles' names, which is
        // the order that they are told in.
        said.sort_by(|a, b| a.slot.cmp(b.slot).then(b.rank.cmp(&a.rank)));
        Resolver {
            schema,
            object,
            said: &said,
            done: Vec::new(),
            conflicts: Vec::new(),
        }
        .run(profiles)
    }
}

struct Resolver<'a, 's> {
    schema: &'a Schema,
    object: &'a Object,
    said: &'s [Said<'a>],
    done: Vec<Resolved<'a>>,
    conflicts: Vec<Conflict<'a>>,
}

impl<'a> Resolver<'a, '_> {
    fn run(mut self, profiles: Vec<&'a Profile>) -> Effective<'a> {
        let mut slots: Vec<Slot> = Vec::new();
        for (index, field) in self.schema.fields().iter().enumerate() {
            if field.kind == self.object.kind() && self.schema.default_of(index).is_some() {
                slots.push(Slot {
                    field: index,
                    key: None,
                });
            }
        }
        let mut last: Option<&Slot> = None;
        for said in self.said {
            if last != Some(said.slot) {
                slots.push(said.slot.clone());
                last = Some(said.slot);
            }
        }
        slots.extend(self.object.own_values().iter().map(|own| own.slot.clone()));
        slots.sort();
        slots.dedup();
        let refers = self
            .said
            .iter()
            .any(|said| matches!(said.operand, Operand::Share { .. }));
        if refers {
            for slot in &slots {
                self.with_references(slot, &mut Vec::new());
            }
            self.done.sort_by(|a, b| a.slot.cmp(&b.slot));
        } else {
            self.done.reserve(slots.len());
            for slot in slots {
                self.resolve(slot);
            }
        }
        Effective {
            object: &self.object.id,
            profiles,
            values: self.done,
            conflicts: self.conflicts,
        }
    }

    fn said_of(&self, slot: &Slot) -> &[Said<'a>] {
        let from = self.said.partition_point(|said| said.slot < slot);
        let rest = self.said.get(from..).unwrap_or(&[]);
        let count = rest.partition_point(|said| said.slot == slot);
        rest.get(..count).unwrap_or(&[])
    }

    /// Resolves what the rules of `slot` refer to, then `slot`.
    fn with_references(&mut self, slot: &Slot, way: &mut Vec<(Slot, &'a Rule)>) {
        if self.done.iter().any(|done| done.slot == *slot) {
            return;
        }
        let referring: Vec<(&'a Slot, &'a Rule)> = self
            .said_of(slot)
            .iter()
            .filter_map(|said| match (said.operand, said.source) {
                (Operand::Share { of, .. }, Source::Rule(rule)) => Some((of, rule)),
                _ => None,
            })
            .collect();
        for (of, rule) in referring {
            way.push((slot.clone(), rule));
            if let Some(from) = way.iter().position(|(known, _)| known == of) {
                let rules = way.iter().skip(from).map(|(_, rule)| *rule).collect();
                self.cycle(of, rules);
            } else {
                self.with_references(of, way);
            }
            way.pop();
        }
        if !self.done.iter().any(|done| done.slot == *slot) {
            self.resolve(slot.clone());
        }
    }

    fn cycle(&mut self, slot: &Slot, rules: Vec<&'a Rule>) {
        self.conflicts.push(Conflict {
            object: &self.object.id,
            slot: slot.clone(),
            path: self.schema.path(slot),
            kind: ConflictKind::Cycle(rules),
            first_says: String::new(),
            second_says: String::new(),
        });
    }

    /// The value that an operand has on this object.
    fn evaluate(&self, field: &Field, operand: &'a Operand) -> Option<Cow<'a, Value>> {
        match operand {
            Operand::Value(value) => Some(Cow::Borrowed(value)),
            Operand::Share { of, percent } => {
                let whole = self
                    .done
                    .iter()
                    .find(|done| done.slot == *of)
                    .and_then(|done| done.value.as_deref());
                let (Some(Value::Int(whole)), ValueKind::Int { min, max, step, .. }) =
                    (whole, field.value)
                else {
                    return None;
                };
                let part = u128::from(*whole) * u128::from(*percent) / 100;
                let part = u64::try_from(part).unwrap_or(u64::MAX).clamp(min, max);
                let part = part - part % step.max(1);
                let part = if part < min {
                    part.saturating_add(step)
                } else {
                    part
                };
                Some(Cow::Owned(Value::Int(part)))
            }
        }
    }

    fn resolve(&mut self, slot: Slot) {
        let Some(field) = self.schema.field(slot.field) else {
            return;
        };
        let said = self.said_of(&slot);
        let mut statements: Vec<Statement<'a>> = Vec::with_capacity(said.len() + 2);
        for said in said {
            if let Some(value) = self.evaluate(field, said.operand) {
                statements.push(Statement {
                    rank: said.rank,
                    operator: said.operator,
                    source: said.source,
                    value,
                });
            }
        }
        let own = self.object.own_values().iter().find(|own| own.slot == slot);
        let own_at = statements.partition_point(|statement| statement.rank > Rank::Own);
        if slot.key.is_none()
            && let Some(value) = self.schema.default_of(slot.field)
        {
            statements.push(Statement {
                rank: Rank::Schema,
                operator: Operator::Default,
                source: Source::Schema,
                value: Cow::Borrowed(value),
            });
        }
        let schema = self.schema;
        let path = {
            let slot = slot.clone();
            move || schema.path(&slot)
        };
        let run = |statements: &[Statement<'a>]| {
            let mut one = Deciding {
                object: &self.object.id,
                field,
                path: &path,
                resolved: Resolved {
                    slot: slot.clone(),
                    value: None,
                    origin: Vec::new(),
                    held: Vec::new(),
                    overrode: Vec::new(),
                },
                conflicts: Vec::new(),
            };
            match field.merge {
                Merge::Replace if matches!(field.value, ValueKind::Int { .. }) => {
                    scalar::bounded(&mut one, statements);
                }
                Merge::Replace => scalar::replaced(&mut one, statements),
                Merge::Min => scalar::extreme(&mut one, statements, Why::SmallerCounts),
                Merge::Max => scalar::extreme(&mut one, statements, Why::LargerCounts),
                Merge::Union => sets::union(&mut one, statements),
                Merge::DenyWins => sets::deny_wins(&mut one, statements),
            }
            (one.resolved, one.conflicts)
        };
        // First without the object's own value: that must not hide a conflict.
        let (mut resolved, mut conflicts) = run(&statements);
        if let Some(own) = own
            && conflicts.is_empty()
        {
            statements.insert(
                own_at,
                Statement {
                    rank: Rank::Own,
                    operator: match field.merge {
                        Merge::Union | Merge::DenyWins => Operator::Add,
                        Merge::Replace | Merge::Min | Merge::Max => Operator::Set,
                    },
                    source: Source::Own,
                    value: Cow::Borrowed(&own.value),
                },
            );
            (resolved, conflicts) = run(&statements);
        }
        if !conflicts.is_empty() {
            // What is in conflict has no value; everybody who said something is named.
            resolved.value = None;
            resolved.origin.clear();
        }
        self.conflicts.append(&mut conflicts);
        self.done.push(resolved);
    }
}
