//! Profiles as TOML text; every problem has its line and column.
//!
//! ```toml
//! name = "slow-store"
//! priority = 100
//! description = "Disks on spinning stores leave room for others"
//! locks = ["disk.iops"]            # not even the disk itself may say otherwise
//!
//! [match]
//! kind = "disk"                    # the first kind of the schema if absent
//! name = ["root", "data-*"]
//! labels.stage = ["test", "dev"]   # one of; also { not-in = […] }, true (there), false (not there)
//! datastore.tier = "slow"
//!
//! [max]
//! disk.iops = 500
//!
//! [default]
//! disk.read-bytes = "100M/s"
//! ```
//!
//! The sections are the operators, the keys in them the fields. A field whose name is the beginning
//! of another's (`memory`, `memory.resident`) is written in quotes: `"memory.resident" = "1G"`.

mod matching;
mod rules;

use std::ops::Range;
use std::sync::Arc;

use strake_observe::{Observation, Result};
use toml::de::{DeTable, DeValue};

use crate::observations::{BadName, ProfileProblems, ProfileSyntax, TooMany, UnknownKey};
use crate::profile::{Head, Operator, Profile, Rule, check_name};
use crate::schema::Schema;

/// The longest text of a profile, in bytes.
pub const MAX_PROFILE_TEXT: usize = 256 << 10;

/// The most rules of a profile.
pub const MAX_RULES: usize = 512;

/// The most problems of one file that are told at once.
const MAX_PROBLEMS: usize = 20;

/// How deep sections nest.
const MAX_DEPTH: usize = 8;

/// The longest description.
const MAX_DESCRIPTION: usize = 1024;

impl Profile {
    /// Reads a profile; `file` is its name for what is found wrong with it.
    ///
    /// # Errors
    /// What is wrong, or [`ProfileProblems`] caused by several of them.
    pub fn from_toml(schema: &Schema, text: &str, file: &str) -> Result<Self> {
        let lines = Lines::of(text);
        if text.len() > MAX_PROFILE_TEXT {
            return Err(ProfileSyntax {
                file: file.to_owned(),
                line: 1,
                column: 1,
                reason: format!(
                    "{} bytes are no profile; the longest has {MAX_PROFILE_TEXT}",
                    text.len()
                ),
            }
            .into());
        }
        let document = DeTable::parse(text).map_err(|error| {
            let at = lines.at(error.span().unwrap_or(0..0).start);
            ProfileSyntax {
                file: file.to_owned(),
                line: at.0,
                column: at.1,
                reason: error
                    .message()
                    .split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" "),
            }
        })?;
        let mut reader = Reader {
            schema,
            file,
            lines,
            problems: Vec::new(),
        };
        let profile = reader.profile(document.get_ref());
        match (profile, reader.end()) {
            (_, Some(problem)) => Err(problem),
            (Some(profile), None) => Ok(profile),
            (None, None) => Err(UnknownKey {
                file: file.to_owned(),
                line: 1,
                column: 1,
                key: "name".to_owned(),
                reason: "the profile has none".to_owned(),
                advice: "add name = \"…\"".to_owned(),
            }
            .into()),
        }
    }
}

/// Where the lines of a text begin.
struct Lines<'t> {
    text: &'t str,
    starts: Vec<usize>,
}

impl<'t> Lines<'t> {
    fn of(text: &'t str) -> Self {
        let after = text.match_indices('\n').map(|(at, _)| at + 1);
        Self {
            text,
            starts: std::iter::once(0).chain(after).collect(),
        }
    }

    /// Line and column, both from 1, the column in characters.
    fn at(&self, offset: usize) -> (usize, usize) {
        let line = self.starts.partition_point(|start| *start <= offset).max(1);
        let start = self.starts.get(line - 1).copied().unwrap_or(0);
        let column = self
            .text
            .get(start..)
            .unwrap_or("")
            .char_indices()
            .take_while(|(at, _)| start + at < offset)
            .count();
        (line, column + 1)
    }
}

/// A place in the text.
#[derive(Debug, Clone, Copy)]
struct At {
    offset: usize,
    line: usize,
    column: usize,
}

struct Reader<'t> {
    schema: &'t Schema,
    file: &'t str,
    lines: Lines<'t>,
    problems: Vec<(usize, Observation)>,
}

/// A rule with the place of its key.
struct Placed {
    rule: Rule,
    at: At,
}

impl Reader<'_> {
    fn at(&self, span: &Range<usize>) -> At {
        let (line, column) = self.lines.at(span.start);
        At {
            offset: span.start,
            line,
            column,
        }
    }

    fn problem(&mut self, at: At, problem: impl Into<Observation>) {
        self.problems.push((at.offset, problem.into()));
    }

    fn end(mut self) -> Option<Observation> {
        self.problems.sort_by_key(|(offset, _)| *offset);
        let count = self.problems.len();
        let mut seen = self.problems.into_iter().map(|(_, seen)| seen);
        if count <= 1 {
            return seen.next();
        }
        let all = ProfileProblems {
            file: self.file.to_owned(),
            count,
        };
        Some(Observation::from(all).because_all(seen.take(MAX_PROBLEMS)))
    }

    fn bad_key(&mut self, at: At, key: &str, reason: impl Into<String>, advice: impl Into<String>) {
        let problem = UnknownKey {
            file: self.file.to_owned(),
            line: at.line,
            column: at.column,
            key: key.escape_debug().to_string(),
            reason: reason.into(),
            advice: advice.into(),
        };
        self.problem(at, problem);
    }

    fn profile(&mut self, top: &DeTable<'_>) -> Option<Profile> {
        const TOP: [&str; 5] = ["name", "priority", "description", "match", "locks"];
        for (key, _) in top {
            let name: &str = key.get_ref();
            let section = Operator::ALL.iter().any(|operator| operator.name() == name);
            if !section && !TOP.contains(&name) {
                let at = self.at(&key.span());
                let known = TOP.iter().copied().chain(Operator::ALL.map(Operator::name));
                let advice = match closest(name, known.clone()) {
                    Some(meant) => format!("did you mean '{meant}'?"),
                    None => format!(
                        "remove it; a profile has {}",
                        known.collect::<Vec<_>>().join(", ")
                    ),
                };
                self.bad_key(at, name, "a profile has no such key or rule", advice);
            }
        }
        let name = self.name(top);
        let priority = self.priority(top);
        let description = self.description(top);
        let selector = self.selector(top);
        let head = Arc::new(Head {
            name: name?,
            priority: priority?,
            file: self.file.to_owned(),
        });
        let mut placed = Vec::new();
        for (key, value) in top {
            let found = Operator::ALL
                .into_iter()
                .find(|operator| operator.name() == &**key.get_ref());
            let Some(operator) = found else { continue };
            match value.get_ref() {
                DeValue::Table(section) => {
                    self.section(&head, operator, section, "", 0, &mut placed);
                }
                _ => {
                    let at = self.at(&key.span());
                    let example = format!("write [{}] and the fields below it", operator.name());
                    self.bad_key(at, operator.name(), "it is not a section", example);
                }
            }
        }
        placed.sort_by_key(|placed| placed.at.offset);
        if let Some(selector) = &selector {
            for rule in &placed {
                self.reachable(selector, rule);
            }
        }
        self.locks(top, &mut placed);
        self.consistent(&placed);
        if placed.len() > MAX_RULES {
            let at = At {
                offset: 0,
                line: 1,
                column: 1,
            };
            let problem = TooMany {
                what: format!("rules in {}", self.file),
                count: placed.len(),
                most: MAX_RULES,
            };
            self.problem(at, problem);
        }
        let rules = placed.into_iter().map(|placed| placed.rule).collect();
        Some(Profile {
            head,
            description: description.unwrap_or_default(),
            selector: selector?,
            rules,
        })
    }

    fn name(&mut self, top: &DeTable<'_>) -> Option<String> {
        let (_, value) = top.get_key_value("name")?;
        let at = self.at(&value.span());
        let (name, reason) = match value.get_ref() {
            DeValue::String(name) => (name.to_string(), check_name(name).err()),
            _ => (String::new(), Some("it is not a text".to_owned())),
        };
        let Some(reason) = reason else {
            return Some(name);
        };
        let problem = BadName {
            file: self.file.to_owned(),
            line: at.line,
            column: at.column,
            name: name
                .chars()
                .take(80)
                .collect::<String>()
                .escape_debug()
                .to_string(),
            reason,
        };
        self.problem(at, problem);
        None
    }

    fn priority(&mut self, top: &DeTable<'_>) -> Option<i32> {
        let Some((key, value)) = top.get_key_value("priority") else {
            let at = self.at(&(0..0));
            let advice = "add priority = 100; the higher wins";
            self.bad_key(at, "priority", "the profile has none", advice);
            return None;
        };
        let number = match value.get_ref() {
            DeValue::Integer(n) if n.radix() == 10 => n.as_str().replace('_', "").parse().ok(),
            _ => None,
        };
        if number.is_none() {
            let at = self.at(&key.span());
            let advice = "write a number from -2147483648 to 2147483647, for example 100";
            self.bad_key(
                at,
                "priority",
                "it is not a whole number of 32 bits",
                advice,
            );
        }
        number
    }

    fn description(&mut self, top: &DeTable<'_>) -> Option<String> {
        let (key, value) = top.get_key_value("description")?;
        match value.get_ref() {
            DeValue::String(text)
                if text.len() <= MAX_DESCRIPTION
                    && !text.chars().any(|c| c.is_control() && c != '\n') =>
            {
                Some(text.to_string())
            }
            _ => {
                let at = self.at(&key.span());
                let advice = format!("write a text of at most {MAX_DESCRIPTION} bytes");
                self.bad_key(at, "description", "it is no plain text", advice);
                None
            }
        }
    }
}

/// The known word that `word` is most likely a misspelling of.
fn closest<'k>(word: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    if word.len() > 64 {
        return None;
    }
    known
        .map(|candidate| (distance(word, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len() / 3)
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
