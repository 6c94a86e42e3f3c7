//! The `match` section.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{At, Reader};
use crate::observations::BadMatch;
use crate::select::{Requirement, Selector, Test};

/// The most requirements, names and values of one selector.
const MAX_TERMS: usize = 256;
/// The longest of them.
const MAX_TERM: usize = 253;

impl Reader<'_> {
    /// What a profile without the section selects: everything of the first kind.
    pub(super) fn selector(&mut self, top: &DeTable<'_>) -> Option<Selector> {
        let mut selector = Selector {
            kind: self.schema.kinds().first()?.name,
            names: Vec::new(),
            labels: Vec::new(),
            contexts: Vec::new(),
        };
        let Some((key, value)) = top.get_key_value("match") else {
            return Some(selector);
        };
        let DeValue::Table(table) = value.get_ref() else {
            let at = self.at(&key.span());
            self.bad_match(at, "match", "it is not a section", "write [match]");
            return None;
        };
        if let Some((_, kind)) = table.get_key_value("kind") {
            selector.kind = self.kind(kind)?;
        }
        let contexts = self.contexts_below(selector.kind);
        for (key, value) in table {
            let at = self.at(&key.span());
            match &**key.get_ref() {
                "kind" => {}
                "name" => match texts(value.get_ref()) {
                    Some(names) if names.iter().all(|name| plain(name)) => selector.names = names,
                    _ => self.bad_match(
                        at,
                        "match.name",
                        "it is neither a name nor a list of names",
                        "write name = \"web*\" or name = [\"web*\", \"db1\"]",
                    ),
                },
                "labels" => selector.labels = self.requirements("match.labels", at, value),
                context if contexts.contains(&context) => {
                    let at_path = format!("match.{context}");
                    let wants = self.requirements(&at_path, at, value);
                    selector.contexts.push((context.to_owned(), wants));
                }
                other => {
                    let known = ["kind", "name", "labels"].into_iter();
                    let known = known.chain(contexts.iter().copied()).collect::<Vec<_>>();
                    let key = format!("match.{}", other.escape_debug());
                    let advice = format!("what can be matched is {}", known.join(", "));
                    self.bad_match(at, &key, "there is no such key", &advice);
                }
            }
        }
        let lists = selector.contexts.iter().map(|(_, wants)| wants);
        let terms: usize = lists
            .chain([&selector.labels])
            .flatten()
            .map(|wants| match &wants.test {
                Test::In(values) | Test::NotIn(values) => values.len().max(1),
                Test::Exists | Test::Absent => 1,
            })
            .sum();
        if terms + selector.names.len() > MAX_TERMS {
            let at = self.at(&key.span());
            let advice = format!("name at most {MAX_TERMS} names and values");
            self.bad_match(at, "match", "it is too long", &advice);
        }
        selector.contexts.sort_by(|a, b| a.0.cmp(&b.0));
        Some(selector)
    }

    fn kind(&mut self, value: &Spanned<DeValue<'_>>) -> Option<&'static str> {
        let named = match value.get_ref() {
            DeValue::String(name) => self.schema.kind(name),
            _ => None,
        };
        if named.is_none() {
            let at = self.at(&value.span());
            let kinds: Vec<_> = self.schema.kinds().iter().map(|kind| kind.name).collect();
            let advice = format!("write one of {}", kinds.join(", "));
            self.bad_match(at, "match.kind", "there is no such kind of object", &advice);
        }
        named.map(|kind| kind.name)
    }

    /// What objects of this kind and their parts can be near to.
    fn contexts_below(&self, kind: &str) -> Vec<&'static str> {
        let parts = self.schema.kinds().iter();
        let mut contexts: Vec<_> = parts
            .filter(|part| self.schema.is_part_of(part.name, kind))
            .flat_map(|part| part.contexts.iter().copied())
            .collect();
        contexts.sort_unstable();
        contexts.dedup();
        contexts
    }

    fn requirements(
        &mut self,
        path: &str,
        at: At,
        value: &Spanned<DeValue<'_>>,
    ) -> Vec<Requirement> {
        let DeValue::Table(table) = value.get_ref() else {
            let advice = format!("write {path}.LABEL = \"VALUE\"");
            self.bad_match(at, path, "it is not a table of labels", &advice);
            return Vec::new();
        };
        let mut found = Vec::new();
        for (key, value) in table {
            let label: &str = key.get_ref();
            match test(value.get_ref()) {
                Some(test) if plain(label) => found.push(Requirement {
                    key: label.to_owned(),
                    test,
                }),
                _ => {
                    let at = self.at(&key.span());
                    let path = format!("{path}.{}", label.escape_debug());
                    let advice = "write \"VALUE\", [\"A\", \"B\"], { not-in = […] }, true (the label \
                                  is there) or false (it is not); quote a label that has a dot";
                    self.bad_match(at, &path, "it is no requirement", advice);
                }
            }
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found
    }

    fn bad_match(&mut self, at: At, key: &str, reason: &str, advice: &str) {
        let problem = BadMatch {
            file: self.file.to_owned(),
            line: at.line,
            column: at.column,
            key: key.to_owned(),
            reason: reason.to_owned(),
            advice: advice.to_owned(),
        };
        self.problem(at, problem);
    }
}

fn plain(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_TERM && !text.chars().any(char::is_control)
}

/// A text, or a list of some.
fn texts(value: &DeValue<'_>) -> Option<Vec<String>> {
    let mut texts = match value {
        DeValue::String(one) => vec![one.to_string()],
        DeValue::Array(list) => list
            .iter()
            .map(|entry| entry.get_ref().as_str().map(str::to_owned))
            .collect::<Option<Vec<_>>>()?,
        _ => return None,
    };
    texts.sort();
    texts.dedup();
    (!texts.is_empty()).then_some(texts)
}

fn test(value: &DeValue<'_>) -> Option<Test> {
    match value {
        DeValue::Boolean(true) => Some(Test::Exists),
        DeValue::Boolean(false) => Some(Test::Absent),
        DeValue::Table(table) => {
            let mut entries = table.iter();
            let (key, value) = entries.next()?;
            let values = texts(value.get_ref())?;
            match (&**key.get_ref(), entries.next()) {
                ("in", None) => Some(Test::In(values)),
                ("not-in", None) => Some(Test::NotIn(values)),
                _ => None,
            }
        }
        other => texts(other).map(Test::In),
    }
}
