//! Specs as TOML text: every problem is named with its line, its column and its key.
//!
//! The text is read in three steps, and only if one finds nothing does the next begin: the syntax;
//! the keys (which exist, which are missing), against one table for each kind of section; the
//! types, by serde. After that come the rules of [`super::check`].

use std::fmt;
use std::ops::Range;

use strake_observe::{Observation, Result};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::VmSpec;
use super::check::problems;
use crate::{SpecProblems, SpecRefused, SpecUnwritable};

/// The longest spec, in bytes: far above any real one, and small enough to read at once.
pub const MAX_SPEC_TEXT: usize = 1 << 20;

/// The most problems of one file that are told at once.
const MAX_PROBLEMS: usize = 20;

/// One step to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Into a table.
    Key(String),
    /// Into a list.
    Index(usize),
}

/// The way to a key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Place(Vec<Step>);

impl Place {
    pub(super) fn key(&self, key: &str) -> Self {
        self.step(Step::Key(key.to_owned()))
    }

    pub(super) fn step(&self, step: Step) -> Self {
        let mut steps = self.0.clone();
        steps.push(step);
        Self(steps)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("the spec");
        }
        for (index, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(key) if index == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// What is wrong, and where.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) at: Place,
    pub(super) reason: String,
    pub(super) remedy: String,
}

/// The keys of one kind of section.
struct Section {
    known: &'static [&'static str],
    required: &'static [&'static str],
}

const TOP: Section = Section {
    known: &["labels", "cpus", "memory", "console", "boot", "disk", "nic"],
    required: &["boot"],
};
const BOOT_KERNEL: Section = Section {
    known: &["from", "kernel", "initrd", "cmdline"],
    required: &["kernel"],
};
const BOOT_DISK: Section = Section {
    known: &["from", "disk", "cmdline"],
    required: &[],
};
const DISK: Section = Section {
    known: &[
        "name",
        "image",
        "format",
        "size",
        "read-only",
        "queues",
        "iops",
        "bandwidth",
    ],
    required: &["name", "image"],
};
const NIC: Section = Section {
    known: &["name", "tap", "bridge", "mac"],
    required: &["name"],
};

impl VmSpec {
    /// Reads and checks a spec; `file` is its name for the problems found.
    ///
    /// # Errors
    /// [`SpecRefused`], or [`SpecProblems`] caused by several of them.
    pub fn from_toml(text: &str, file: &str) -> Result<Self> {
        if text.len() > MAX_SPEC_TEXT {
            return Err(refuse(
                text,
                file,
                0..0,
                &Problem {
                    at: Place::default(),
                    reason: format!("{} bytes are no spec", text.len()),
                    remedy: format!("give a TOML file of at most {MAX_SPEC_TEXT} bytes"),
                },
            ));
        }
        let document = match DeTable::parse(text) {
            Ok(document) => document,
            Err(error) => {
                let span = error.span().unwrap_or(0..0);
                return Err(refuse(
                    text,
                    file,
                    span,
                    &Problem {
                        at: Place::default(),
                        reason: one_line(error.message()),
                        remedy: "mend the TOML at this place".to_owned(),
                    },
                ));
            }
        };
        let table = document.get_ref();
        refuse_all(text, file, table, keys(table))?;
        let spec: Self = match toml::from_str(text) {
            Ok(spec) => spec,
            Err(error) => {
                let span = error.span().unwrap_or(0..0);
                let at = place_of(table, &span);
                return Err(refuse(
                    text,
                    file,
                    span,
                    &Problem {
                        remedy: format!("give {at} a value of the kind that the reason names"),
                        at,
                        reason: one_line(error.message()),
                    },
                ));
            }
        };
        let mut wrong = noughts(table);
        wrong.extend(problems(&spec));
        refuse_all(text, file, table, wrong)?;
        Ok(spec)
    }

    /// The spec as TOML, as [`VmSpec::from_toml`] reads it.
    ///
    /// # Errors
    /// [`SpecUnwritable`]; no spec is known that causes it.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| {
            SpecUnwritable {
                reason: error.to_string(),
            }
            .into()
        })
    }
}

fn refuse_all(text: &str, file: &str, table: &DeTable<'_>, problems: Vec<Problem>) -> Result<()> {
    let count = problems.len();
    let mut placed: Vec<_> = problems
        .iter()
        .map(|problem| (span_of(table, &problem.at), problem))
        .collect();
    placed.sort_by_key(|(span, _)| span.start);
    let mut seen = placed
        .into_iter()
        .take(MAX_PROBLEMS)
        .map(|(span, problem)| refuse(text, file, span, problem));
    match (seen.next(), count) {
        (None, _) => Ok(()),
        (Some(only), 1) => Err(only),
        (Some(first), _) => Err(Observation::from(SpecProblems {
            file: file.to_owned(),
            count,
        })
        .because(first)
        .because_all(seen)),
    }
}

fn refuse(text: &str, file: &str, span: Range<usize>, problem: &Problem) -> Observation {
    let (line, column) = line_and_column(text, span.start);
    SpecRefused {
        file: file.to_owned(),
        line,
        column,
        key: problem.at.to_string(),
        reason: problem.reason.clone(),
        advice: problem.remedy.clone(),
    }
    .into()
}

/// Both from 1, the column in characters.
fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text
        .char_indices()
        .take_while(|(at, _)| *at < offset)
        .map(|(_, c)| c);
    before.fold((1, 1), |(line, column), c| match c {
        '\n' => (line + 1, 1),
        _ => (line, column + 1),
    })
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Unknown and missing keys of the whole document.
fn keys(top: &DeTable<'_>) -> Vec<Problem> {
    let mut found = Vec::new();
    let root = Place::default();
    section(&mut found, &root, top, &TOP);
    for (key, section_of) in [("disk", &DISK), ("nic", &NIC)] {
        if let Some(DeValue::Array(list)) = value(top, key) {
            for (index, entry) in list.iter().enumerate() {
                if let DeValue::Table(table) = entry.get_ref() {
                    let at = root.key(key).step(Step::Index(index));
                    section(&mut found, &at, table, section_of);
                }
            }
        }
    }
    if let Some(DeValue::Table(table)) = value(top, "boot") {
        boot_section(&mut found, &root.key("boot"), table);
    }
    found
}

/// Every key, as the path of its field.
#[cfg(test)]
pub(crate) fn known_keys() -> Vec<&'static str> {
    let below = |prefix: &str, section: &Section| -> Vec<&'static str> {
        let keys = section.known.iter();
        keys.map(|key| &*format!("{prefix}.{key}").leak()).collect()
    };
    let mut keys: Vec<_> = TOP.known.to_vec();
    keys.retain(|key| !["boot", "disk", "nic"].contains(key));
    for (prefix, section) in [
        ("boot", &BOOT_KERNEL),
        ("boot", &BOOT_DISK),
        ("disk", &DISK),
        ("nic", &NIC),
    ] {
        keys.extend(below(prefix, section));
    }
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// Numbers that must not be nought: left out, they are what profiles and defaults make them.
fn noughts(top: &DeTable<'_>) -> Vec<Problem> {
    let nought = |key: &str| match value(top, key) {
        Some(DeValue::Integer(n)) => n.as_str().bytes().all(|digit| digit == b'0'),
        Some(DeValue::String(text)) => text.parse() == Ok(super::Bytes(0)),
        _ => false,
    };
    let (mut found, root) = (Vec::new(), Place::default());
    if nought("cpus") {
        found.push(Problem {
            at: root.key("cpus"),
            reason: "0 vCPUs are not possible".to_owned(),
            remedy: format!("give it 1 to {}", super::MAX_CPUS),
        });
    }
    if nought("memory") {
        found.push(Problem {
            at: root.key("memory"),
            reason: "a VM needs at least 64M".to_owned(),
            remedy: "write memory = \"64M\" or more".to_owned(),
        });
    }
    found
}

fn boot_section(found: &mut Vec<Problem>, at: &Place, table: &DeTable<'_>) {
    match value(table, "from") {
        Some(DeValue::String(from)) if from == "kernel" => {
            section(found, at, table, &BOOT_KERNEL);
        }
        Some(DeValue::String(from)) if from == "disk" => section(found, at, table, &BOOT_DISK),
        other => found.push(Problem {
            at: if other.is_some() {
                at.key("from")
            } else {
                at.clone()
            },
            reason: match other {
                Some(DeValue::String(from)) => format!("one cannot boot from '{from}'"),
                Some(_) => "it is not a text".to_owned(),
                None => "the key 'from' is missing".to_owned(),
            },
            remedy: "write from = \"kernel\" or from = \"disk\"".to_owned(),
        }),
    }
}

fn section(found: &mut Vec<Problem>, at: &Place, table: &DeTable<'_>, section: &Section) {
    for key in table.keys() {
        let key: &str = key.get_ref();
        if !section.known.contains(&key) {
            found.push(Problem {
                at: at.key(key),
                reason: "there is no such key here".to_owned(),
                remedy: match closest(key, section.known) {
                    Some(meant) => format!("did you mean '{meant}'?"),
                    None => format!("remove it; the keys here are {}", section.known.join(", ")),
                },
            });
        }
    }
    for key in section.required {
        if value(table, key).is_none() {
            found.push(Problem {
                at: at.clone(),
                reason: format!("the key '{key}' is missing"),
                remedy: format!("add {key} = …"),
            });
        }
    }
}

fn value<'a, 'i>(table: &'a DeTable<'i>, key: &str) -> Option<&'a DeValue<'i>> {
    table.get(key).map(Spanned::get_ref)
}

/// The known key that `key` is most likely a misspelling of.
fn closest(key: &str, known: &[&'static str]) -> Option<&'static str> {
    if key.len() > 32 {
        return None;
    }
    known
        .iter()
        .map(|candidate| (distance(key, candidate), *candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len() / 2)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's, one row at a time.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(b.chars()) {
            let replaced = diagonal + usize::from(x != y);
            diagonal = *cell;
            left = replaced.min(left + 1).min(*cell + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

/// Where the document has `place`, or the nearest section around it.
fn span_of(table: &DeTable<'_>, place: &Place) -> Range<usize> {
    let mut span = 0..0;
    let mut table = Some(table);
    let mut value: Option<&DeValue<'_>> = None;
    for step in &place.0 {
        let next = match step {
            Step::Key(key) => {
                let Some((found, next)) = table.and_then(|table| table.get_key_value(key.as_str()))
                else {
                    break;
                };
                span = found.span();
                next
            }
            Step::Index(index) => {
                let next = value
                    .and_then(DeValue::as_array)
                    .and_then(|list| list.get(*index));
                let Some(next) = next else {
                    break;
                };
                span = next.span();
                next
            }
        };
        value = Some(next.get_ref());
        table = next.get_ref().as_table();
    }
    span
}

/// The innermost key whose value covers `span`.
fn place_of(table: &DeTable<'_>, span: &Range<usize>) -> Place {
    let covers = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    let mut place = Place::default();
    let mut table = Some(table);
    while let Some(here) = table.take() {
        // A section's own span is only that of its header, so keys are tried one by one and the
        // search goes on in lists and tables even if their span does not cover the place.
        for (key, value) in here {
            if covers(value.span()) || covers(key.span()) {
                place = place.key(key.get_ref());
                table = value.get_ref().as_table();
                break;
            }
            let (at, inner) = match value.get_ref() {
                DeValue::Table(inner) => (place.key(key.get_ref()), Some(inner)),
                DeValue::Array(list) => {
                    let hit = list.iter().enumerate().find_map(|(index, entry)| {
                        let inner = entry.get_ref().as_table()?;
                        holds(inner, span).then_some((index, inner))
                    });
                    match hit {
                        Some((index, inner)) => (
                            place.key(key.get_ref()).step(Step::Index(index)),
                            Some(inner),
                        ),
                        None => continue,
                    }
                }
                _ => continue,
            };
            if inner.is_some_and(|inner| holds(inner, span)) {
                place = at;
                table = inner;
                break;
            }
        }
    }
    place
}

fn holds(table: &DeTable<'_>, span: &Range<usize>) -> bool {
    table.iter().any(|(key, value)| {
        let outer = key.span().start.min(value.span().start)..value.span().end;
        (outer.start <= span.start && span.end <= outer.end)
            || value
                .get_ref()
                .as_table()
                .is_some_and(|inner| holds(inner, span))
    })
}
