//! The rules of a profile, and its locks.

use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{At, MAX_DEPTH, MAX_RULES, Placed, Reader, closest};
use crate::observations::{BadLock, BadOperator, BadValue, FieldNotSteered, UnknownField};
use crate::profile::{Head, Operand, Operator, Rule, check_name};
use crate::schema::{Field, Merge, Slot, Steer};
use crate::select::Selector;
use crate::value::{Value, ValueKind, parse_int};

impl Field {
    /// The operators that rules about it may have.
    #[must_use]
    pub fn operators(&self) -> &'static [Operator] {
        use Operator::{Add, Default, Forbid, Max, Min, Remove, Set};
        match (self.merge, self.value) {
            (Merge::Replace, ValueKind::Int { .. }) => &[Set, Default, Min, Max],
            (Merge::Replace, ValueKind::Text { .. } | ValueKind::Map { .. }) => {
                &[Set, Default, Forbid]
            }
            (Merge::Replace | Merge::Min | Merge::Max, _) => &[Set, Default],
            (Merge::Union, _) => &[Add, Remove, Default],
            (Merge::DenyWins, _) => &[Add, Forbid, Default],
        }
    }
}

impl Reader<'_> {
    /// The rules of one operator, or of a table within it.
    pub(super) fn section(
        &mut self,
        head: &Arc<Head>,
        operator: Operator,
        table: &DeTable<'_>,
        prefix: &str,
        depth: usize,
        placed: &mut Vec<Placed>,
    ) {
        for (key, value) in table {
            let path = match prefix {
                "" => key.get_ref().to_string(),
                _ => format!("{prefix}.{}", key.get_ref()),
            };
            let at = self.at(&key.span());
            match (self.schema.slot(&path), value.get_ref()) {
                (None, DeValue::Table(inner)) if depth < MAX_DEPTH => {
                    self.section(head, operator, inner, &path, depth + 1, placed);
                }
                (Some(slot), _) => {
                    if let Some(rule) = self.rule(head, operator, slot, &path, value, at) {
                        if placed.len() > MAX_RULES {
                            return; // One too many is told, the others are not kept.
                        }
                        placed.push(Placed { rule, at });
                    }
                }
                (None, _) => self.unknown_field(at, &path),
            }
        }
    }

    fn unknown_field(&mut self, at: At, path: &str) {
        let known = self.schema.fields().iter();
        let meant = closest(path, known.map(|field| field.path));
        let problem = UnknownField {
            file: self.file.to_owned(),
            line: at.line,
            column: at.column,
            path: path
                .chars()
                .take(200)
                .collect::<String>()
                .escape_debug()
                .to_string(),
            advice: match meant {
                Some(meant) => format!("did you mean '{meant}'?"),
                None => "`strake profile fields` lists the fields".to_owned(),
            },
        };
        self.problem(at, problem);
    }

    fn rule(
        &mut self,
        head: &Arc<Head>,
        operator: Operator,
        slot: Slot,
        path: &str,
        value: &Spanned<DeValue<'_>>,
        at: At,
    ) -> Option<Rule> {
        let field = self.schema.field(slot.field)?;
        if field.steer != Steer::Profiles {
            let reason = format!("it is part of what a {} is", field.kind);
            self.not_steered(at, path, reason);
            return None;
        }
        if !field.operators().contains(&operator) {
            let takes = field.operators().iter().map(|operator| operator.name());
            let problem = BadOperator {
                file: self.file.to_owned(),
                line: at.line,
                column: at.column,
                path: path.to_owned(),
                operator: operator.name().to_owned(),
                merge: field.merge.name().to_owned(),
                takes: takes.collect::<Vec<_>>().join(", "),
            };
            self.problem(at, problem);
            return None;
        }
        if let Some(key) = &slot.key
            && let Err(reason) = check_name(key)
        {
            let wants = "a key of letters, digits, '-', '_' and '.'";
            self.bad_value(
                at,
                path,
                format!("has a key that breaks the rule: {reason}"),
                wants,
            );
            return None;
        }
        match self.operand(field, operator, value.get_ref()) {
            Ok(operand) => Some(Rule {
                head: Arc::clone(head),
                line: at.line,
                slot,
                operator,
                operand,
                locked: false,
            }),
            Err(reason) => {
                let at = self.at(&value.span());
                self.bad_value(at, path, reason, field.value.noun());
                None
            }
        }
    }

    fn operand(
        &self,
        field: &Field,
        operator: Operator,
        value: &DeValue<'_>,
    ) -> std::result::Result<Operand, String> {
        let words =
            matches!(operator, Operator::Forbid) || matches!(field.value, ValueKind::Set { .. });
        let read = match (value, field.value) {
            (DeValue::Table(table), ValueKind::Int { .. }) => return self.share(field, table),
            (DeValue::Integer(n), ValueKind::Int { .. }) => Value::Int(
                u64::from_str_radix(&n.as_str().replace('_', ""), n.radix())
                    .map_err(|_| format!("cannot be {}", n.as_str()))?,
            ),
            (DeValue::String(text), ValueKind::Int { unit, .. }) => {
                Value::Int(parse_int(unit, text)?)
            }
            (DeValue::String(word), _) if words => {
                Value::Set([word.to_string()].into_iter().collect())
            }
            (DeValue::Array(list), _) if words => Value::Set(
                list.iter()
                    .map(|word| match word.get_ref() {
                        DeValue::String(word) => Ok(word.to_string()),
                        _ => Err("has something in its list that is not a text".to_owned()),
                    })
                    .collect::<std::result::Result<_, _>>()?,
            ),
            (DeValue::String(text), _) => Value::Text(text.to_string()),
            (DeValue::Boolean(yes), _) => Value::Bool(*yes),
            (DeValue::Integer(_), _) => Value::Int(0),
            _ => return Err(format!("is {}", field.value.noun())),
        };
        match (&read, field.value) {
            // What a text must never be: each of the words on its own.
            (Value::Set(words), ValueKind::Text { .. } | ValueKind::Map { .. }) => {
                if words.is_empty() {
                    return Err("forbids nothing".to_owned());
                }
                for word in words {
                    field.value.check(&Value::Text(word.clone()))?;
                }
            }
            _ => field.value.check(&read)?,
        }
        Ok(Operand::Value(read))
    }

    /// `{ field = "memory", percent = 50 }`
    fn share(&self, field: &Field, table: &DeTable<'_>) -> std::result::Result<Operand, String> {
        let shape = "is written as a value or as { field = \"…\", percent = 50 }";
        let mut of = None;
        let mut percent = 100;
        for (key, value) in table {
            match (&**key.get_ref(), value.get_ref()) {
                ("field", DeValue::String(path)) => of = Some(path.to_string()),
                ("percent", DeValue::Integer(n)) => {
                    percent = n
                        .as_str()
                        .parse()
                        .ok()
                        .filter(|percent| (1..=1000).contains(percent))
                        .ok_or("is a share of 1 to 1000 percent")?;
                }
                _ => return Err(shape.to_owned()),
            }
        }
        let path = of.ok_or(shape)?;
        let slot = self
            .schema
            .slot(&path)
            .ok_or_else(|| format!("refers to '{}', which does not exist", path.escape_debug()))?;
        let unit = |field: &Field| match field.value {
            ValueKind::Int { unit, .. } => Some(unit),
            _ => None,
        };
        let other = self.schema.field(slot.field).ok_or(shape)?;
        if other.kind != field.kind || unit(other) != unit(field) {
            return Err(format!(
                "cannot be a share of '{}', which is {} of a {}",
                other.path,
                other.value.noun(),
                other.kind
            ));
        }
        Ok(Operand::Share { of: slot, percent })
    }

    fn bad_value(&mut self, at: At, path: &str, reason: String, wants: &str) {
        let problem = BadValue {
            file: self.file.to_owned(),
            line: at.line,
            column: at.column,
            path: path.escape_debug().to_string(),
            reason,
            wants: wants.to_owned(),
        };
        self.problem(at, problem);
    }

    fn not_steered(&mut self, at: At, path: &str, reason: String) {
        let problem = FieldNotSteered {
            file: self.file.to_owned(),
            line: at.line,
            column: at.column,
            path: path.to_owned(),
            reason,
        };
        self.problem(at, problem);
    }

    /// Whether the rule can ever meet an object that the selector selects.
    pub(super) fn reachable(&mut self, selector: &Selector, placed: &Placed) {
        let Some(field) = self.schema.field(placed.rule.slot.field) else {
            return;
        };
        let path = self.schema.path(&placed.rule.slot);
        if !self.schema.is_part_of(field.kind, selector.kind) {
            let reason = format!(
                "it is a field of a {}, and the profile matches kind = \"{}\"",
                field.kind, selector.kind
            );
            self.not_steered(placed.at, &path, reason);
            return;
        }
        let contexts = self
            .schema
            .kind(field.kind)
            .map_or(&[][..], |kind| kind.contexts);
        let missing = selector
            .contexts
            .iter()
            .find(|(context, _)| !contexts.contains(&context.as_str()));
        if let Some((context, _)) = missing {
            let reason = format!("a {} has no {context} of its own to match", field.kind);
            self.not_steered(placed.at, &path, reason);
        }
    }

    pub(super) fn locks(&mut self, top: &DeTable<'_>, placed: &mut [Placed]) {
        let Some((key, value)) = top.get_key_value("locks") else {
            return;
        };
        let DeValue::Array(list) = value.get_ref() else {
            let at = self.at(&key.span());
            let advice = "write locks = [\"FIELD\", …]";
            self.bad_key(at, "locks", "it is not a list of fields", advice);
            return;
        };
        for entry in list {
            let at = self.at(&entry.span());
            let path = match entry.get_ref() {
                DeValue::String(path) => path.to_string(),
                _ => String::new(),
            };
            let slot = self.schema.slot(&path);
            let mut held = false;
            for placed in placed.iter_mut() {
                let same = slot.as_ref() == Some(&placed.rule.slot);
                if same && placed.rule.operator != Operator::Default {
                    placed.rule.locked = true;
                    held = true;
                }
            }
            if !held {
                let problem = BadLock {
                    file: self.file.to_owned(),
                    line: at.line,
                    column: at.column,
                    path: path
                        .chars()
                        .take(200)
                        .collect::<String>()
                        .escape_debug()
                        .to_string(),
                    reason: match slot {
                        None => "there is no such field".to_owned(),
                        Some(_) => "this profile has no rule about it but a default".to_owned(),
                    },
                };
                self.problem(at, problem);
            }
        }
    }

    /// A profile does not contradict itself.
    pub(super) fn consistent(&mut self, placed: &[Placed]) {
        let number = |placed: &Placed| match placed.rule.operand {
            Operand::Value(Value::Int(n)) => Some(n),
            _ => None,
        };
        for (index, a) in placed.iter().enumerate() {
            for b in placed.iter().skip(index + 1) {
                if a.rule.slot != b.rule.slot {
                    continue;
                }
                let (Some(x), Some(y)) = (number(a), number(b)) else {
                    continue;
                };
                let contradicts = match (a.rule.operator, b.rule.operator) {
                    (Operator::Min, Operator::Max | Operator::Set | Operator::Default)
                    | (Operator::Set | Operator::Default, Operator::Max) => x > y,
                    (Operator::Max | Operator::Set | Operator::Default, Operator::Min)
                    | (Operator::Max, Operator::Set | Operator::Default) => x < y,
                    _ => a.rule.operator == b.rule.operator,
                };
                if contradicts {
                    let path = self.schema.path(&b.rule.slot);
                    let reason = format!(
                        "contradicts what line {} of the same profile says",
                        a.rule.line
                    );
                    self.bad_value(b.at, &path, reason, "a value that fits the other rule");
                }
            }
        }
    }
}
