//! Values, and the kinds of values that fields have.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A value of a field.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// Yes or no.
    Bool(bool),
    /// A whole number in the field's unit.
    Int(u64),
    /// Text.
    Text(String),
    /// A set of words.
    Set(BTreeSet<String>),
}

/// What an integer counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Things.
    Count,
    /// Bytes: read with the suffixes K, M, G and T, in powers of 1024.
    Bytes,
    /// Bytes per second: as bytes, `/s` may follow.
    BytesPerSecond,
    /// Operations per second: `/s` may follow.
    PerSecond,
}

/// What a field may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// A whole number.
    Int {
        /// What it counts.
        unit: Unit,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
        /// It is a multiple of this; 1 if any number will do.
        step: u64,
    },
    /// Text of one line.
    Text {
        /// The most bytes.
        longest: usize,
        /// The only values there are; any text if empty.
        choices: &'static [&'static str],
    },
    /// Yes or no.
    Bool,
    /// A set of words, each of at most this many bytes.
    Set {
        /// The most bytes of a word.
        longest: usize,
    },
    /// Texts by key: `FIELD.KEY`, each key a field of its own.
    Map {
        /// The most bytes of a value.
        longest: usize,
    },
}

/// The most words of a set.
const MAX_SET: usize = 256;

const SUFFIXES: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl ValueKind {
    /// Reads a value as people write it on a command line.
    ///
    /// # Errors
    /// The reason, as the end of a sentence that begins with the field.
    pub fn parse(&self, text: &str) -> Result<Value, String> {
        let value = match self {
            Self::Int { unit, .. } => Value::Int(parse_int(*unit, text)?),
            Self::Text { .. } | Self::Map { .. } => Value::Text(text.to_owned()),
            Self::Bool => match text {
                "true" | "yes" => Value::Bool(true),
                "false" | "no" => Value::Bool(false),
                _ => return Err(format!("is true or false, not '{}'", text.escape_debug())),
            },
            Self::Set { .. } => Value::Set(
                text.split(',')
                    .map(str::trim)
                    .filter(|word| !word.is_empty())
                    .map(str::to_owned)
                    .collect(),
            ),
        };
        self.check(&value)?;
        Ok(value)
    }

    /// Whether `value` may stand in such a field.
    ///
    /// # Errors
    /// The reason, as the end of a sentence that begins with the field.
    pub fn check(&self, value: &Value) -> Result<(), String> {
        match (self, value) {
            (
                Self::Int {
                    unit,
                    min,
                    max,
                    step,
                },
                Value::Int(n),
            ) => {
                if n < min || n > max {
                    return Err(format!(
                        "is {} to {}, not {}",
                        show_int(*unit, *min),
                        show_int(*unit, *max),
                        show_int(*unit, *n)
                    ));
                }
                if *step > 1 && !n.is_multiple_of(*step) {
                    let step = show_int(*unit, *step);
                    return Err(format!(
                        "is a multiple of {step}, not {}",
                        show_int(*unit, *n)
                    ));
                }
                Ok(())
            }
            (Self::Text { longest, choices }, Value::Text(text)) => {
                one_line(text, *longest)?;
                if choices.is_empty() || choices.contains(&text.as_str()) {
                    Ok(())
                } else {
                    Err(format!(
                        "is one of {}, not '{}'",
                        choices.join(", "),
                        text.escape_debug()
                    ))
                }
            }
            (Self::Map { longest }, Value::Text(text)) => one_line(text, *longest),
            (Self::Bool, Value::Bool(_)) => Ok(()),
            (Self::Set { longest }, Value::Set(words)) => {
                if words.len() > MAX_SET {
                    return Err(format!("has at most {MAX_SET} words"));
                }
                words.iter().try_for_each(|word| {
                    if word.is_empty() {
                        return Err("has no empty words".to_owned());
                    }
                    one_line(word, *longest)
                })
            }
            (_, other) => Err(format!("is {}, not {}", self.noun(), other.noun())),
        }
    }

    /// What it is called in a sentence.
    #[must_use]
    pub fn noun(&self) -> &'static str {
        match self {
            Self::Int {
                unit: Unit::Count, ..
            } => "a whole number",
            Self::Int {
                unit: Unit::Bytes, ..
            } => "a size such as \"512M\"",
            Self::Int {
                unit: Unit::BytesPerSecond,
                ..
            } => "a rate such as \"100M/s\"",
            Self::Int {
                unit: Unit::PerSecond,
                ..
            } => "a rate such as \"500/s\"",
            Self::Text { .. } | Self::Map { .. } => "a text",
            Self::Bool => "true or false",
            Self::Set { .. } => "a list of words",
        }
    }

    /// A value as people write it.
    #[must_use]
    pub fn show(&self, value: &Value) -> String {
        match (self, value) {
            (Self::Int { unit, .. }, Value::Int(n)) => show_int(*unit, *n),
            _ => value.to_string(),
        }
    }
}

impl Value {
    fn noun(&self) -> &'static str {
        match self {
            Self::Bool(_) => "true or false",
            Self::Int(_) => "a number",
            Self::Text(_) => "a text",
            Self::Set(_) => "a list",
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::Text(value) => f.write_str(value),
            Self::Set(words) => {
                f.write_str("[")?;
                for (index, word) in words.iter().enumerate() {
                    write!(f, "{}{word}", if index == 0 { "" } else { ", " })?;
                }
                f.write_str("]")
            }
        }
    }
}

fn one_line(text: &str, longest: usize) -> Result<(), String> {
    if text.len() > longest {
        return Err(format!("has at most {longest} bytes, not {}", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err("is one line without control characters".to_owned());
    }
    Ok(())
}

pub(crate) fn parse_int(unit: Unit, text: &str) -> Result<u64, String> {
    let shown = text.escape_debug();
    let wrong = || {
        let kind = ValueKind::Int {
            unit,
            min: 0,
            max: 0,
            step: 1,
        };
        format!("is {}, not '{shown}'", kind.noun())
    };
    let text = text.trim();
    let text = match unit {
        Unit::BytesPerSecond | Unit::PerSecond => text.strip_suffix("/s").unwrap_or(text).trim(),
        Unit::Count | Unit::Bytes => text,
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let suffix = suffix.trim_start();
    if suffix.is_empty() {
        return Ok(number);
    }
    if matches!(unit, Unit::Count | Unit::PerSecond) {
        return Err(wrong());
    }
    let mut letters = suffix.chars();
    let shift = letters.next().and_then(|letter| {
        SUFFIXES
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(&letter))
            .map(|(_, shift)| *shift)
    });
    match (shift, letters.as_str()) {
        (Some(shift), "" | "B" | "b" | "iB" | "ib") => number
            .checked_mul(1 << shift)
            .ok_or_else(|| format!("cannot hold '{shown}': it is more than can be counted")),
        _ => Err(wrong()),
    }
}

fn show_int(unit: Unit, n: u64) -> String {
    let size = || {
        SUFFIXES
            .iter()
            .find(|(_, shift)| n != 0 && n.trailing_zeros() >= *shift)
            .map_or_else(
                || n.to_string(),
                |(suffix, shift)| format!("{}{suffix}", n >> shift),
            )
    };
    match unit {
        Unit::Count => n.to_string(),
        Unit::Bytes => size(),
        Unit::BytesPerSecond => format!("{}/s", size()),
        Unit::PerSecond => format!("{n}/s"),
    }
}
