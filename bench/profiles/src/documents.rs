//! What is measured on: a schema of 40 fields, profiles, objects; and the same for Nickel.
//!
//! Each profile says something about all 40 fields and selects by one label; eight profiles share a
//! label, so that eight meet on every object whatever the number of profiles. Priorities are all
//! different. Each object has two values of its own.

use std::fmt::Write as _;
use std::sync::Arc;

use strake_profile::{
    ChangeClass, Field, Identity, Merge, Object, ObjectKind, Profile, ProfileSet, Schema, Steer,
    Unit, Value, ValueKind,
};

/// How many fields there are.
pub(crate) const FIELDS: usize = 40;

/// How many profiles are about one object.
pub(crate) const MATCHING: usize = 8;

static KINDS: &[ObjectKind] = &[ObjectKind {
    name: "vm",
    part_of: None,
    contexts: &[],
    doc: "",
}];

/// Thirty numbers and ten texts.
pub(crate) fn schema() -> Arc<Schema> {
    let fields = (0..FIELDS).map(|index| Field {
        kind: "vm",
        path: Box::leak(format!("field{index}").into_boxed_str()),
        value: if is_number(index) {
            ValueKind::Int {
                unit: Unit::Count,
                min: 0,
                max: 1 << 40,
                step: 1,
            }
        } else {
            ValueKind::Text {
                longest: 64,
                choices: &[],
            }
        },
        default: None,
        absent_is_unlimited: false,
        merge: Merge::Replace,
        change: ChangeClass::Live,
        steer: Steer::Profiles,
        doc: "",
    });
    Arc::new(Schema::new(KINDS, Vec::leak(fields.collect())))
}

fn is_number(field: usize) -> bool {
    field % 4 != 3
}

/// Which rules the profiles have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rules {
    /// Values, and bounds of numbers.
    Mixed,
    /// Values only: what Nickel's merge has too.
    Values,
}

fn operator(rules: Rules, profile: usize, field: usize) -> &'static str {
    match (rules, is_number(field), (profile + field) % 4) {
        (Rules::Mixed, true, 1) => "min",
        (Rules::Mixed, true, 2) => "max",
        _ => "set",
    }
}

/// The value that a profile has for a field. Upper bounds lie above lower ones.
fn number(operator: &str, profile: usize, field: usize) -> usize {
    match operator {
        "min" => 10 + field,
        "max" => 100_000 + field,
        _ => 1000 + profile * 41 % 977 + field,
    }
}

pub(crate) fn label(index: usize, profiles: usize) -> String {
    format!("g{}", index % (profiles / MATCHING).max(1))
}

/// A profile as an operator writes it.
fn text(index: usize, profiles: usize, rules: Rules) -> String {
    let mut text = format!("name = \"p{index}\"\npriority = {index}\n");
    let _ = writeln!(text, "[match]\nlabels.group = \"{}\"", label(index, profiles));
    for section in ["set", "min", "max"] {
        let _ = writeln!(text, "[{section}]");
        for field in (0..FIELDS).filter(|field| operator(rules, index, *field) == section) {
            let _ = if is_number(field) {
                writeln!(text, "field{field} = {}", number(section, index, field))
            } else {
                writeln!(text, "field{field} = \"text of p{index}\"")
            };
        }
    }
    text
}

/// The texts of a set.
pub(crate) fn texts(profiles: usize, rules: Rules) -> Vec<String> {
    (0..profiles).map(|index| text(index, profiles, rules)).collect()
}

/// A set as the daemon has it.
pub(crate) fn set(schema: &Arc<Schema>, texts: &[String]) -> Result<ProfileSet, String> {
    let profiles = texts
        .iter()
        .map(|text| Profile::from_toml(schema, text, "bench.toml").map(Arc::new))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|seen| seen.to_string())?;
    ProfileSet::new(Arc::clone(schema), profiles).map_err(|seen| seen.to_string())
}

/// An object that eight profiles are about.
pub(crate) fn object(schema: &Schema, index: usize, profiles: usize) -> Object {
    let labels = [
        ("group".to_owned(), label(index, profiles)),
        ("stage".to_owned(), "prod".to_owned()),
        ("team".to_owned(), format!("team{}", index % 17)),
    ];
    let identity = Identity {
        kind: "vm".to_owned(),
        name: format!("vm{index}"),
        labels: labels.into(),
    };
    Object::new(format!("vm{index}"), identity)
        .own(schema, "field0", Value::Int(7))
        .own(schema, "field3", Value::Text("its own".to_owned()))
}

/// The profiles of one object, and its own values, as a Nickel program.
pub(crate) fn nickel(index: usize, profiles: usize) -> String {
    let mut records: Vec<String> = (0..profiles)
        .filter(|profile| label(*profile, profiles) == label(index, profiles))
        .map(|profile| {
            let mut record = String::from("{");
            for field in 0..FIELDS {
                let _ = if is_number(field) {
                    write!(
                        record,
                        " field{field} | priority {profile} = {},",
                        number("set", profile, field)
                    )
                } else {
                    write!(record, " field{field} | priority {profile} = \"text of p{profile}\",")
                };
            }
            record + " }"
        })
        .collect();
    records.push("{ field0 | force = 7, field3 | force = \"its own\" }".to_owned());
    records.join("\n& ")
}
