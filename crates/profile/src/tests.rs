//! Profiles against a reference that does the same in the plainest way, and each bad input.

mod bad;
mod merging;
mod model;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::*;

const NUMBER: ValueKind = ValueKind::Int {
    unit: Unit::Count,
    min: 0,
    max: 15,
    step: 1,
};

const USUAL: Field = Field {
    kind: "tree",
    path: "",
    value: NUMBER,
    default: None,
    absent_is_unlimited: false,
    merge: Merge::Replace,
    change: ChangeClass::Live,
    steer: Steer::Profiles,
    doc: "",
};

const SET: ValueKind = ValueKind::Set { longest: 8 };

static FIELDS: &[Field] = &[
    Field {
        path: "height",
        default: Some(Constant::Int(5)),
        ..USUAL
    },
    Field {
        path: "limit",
        absent_is_unlimited: true,
        ..USUAL
    },
    Field {
        path: "smallest",
        merge: Merge::Min,
        ..USUAL
    },
    Field {
        path: "largest",
        merge: Merge::Max,
        ..USUAL
    },
    Field {
        path: "colour",
        value: ValueKind::Text {
            longest: 8,
            choices: &["red", "green", "blue"],
        },
        default: Some(Constant::Text("green")),
        change: ChangeClass::Reboot,
        ..USUAL
    },
    Field {
        path: "birds",
        value: SET,
        merge: Merge::Union,
        ..USUAL
    },
    Field {
        path: "pests",
        value: SET,
        merge: Merge::DenyWins,
        ..USUAL
    },
    Field {
        path: "notes",
        value: ValueKind::Map { longest: 16 },
        ..USUAL
    },
    Field {
        path: "weight",
        value: ValueKind::Int {
            unit: Unit::Bytes,
            min: 4096,
            max: 1 << 40,
            step: 4096,
        },
        ..USUAL
    },
    Field {
        path: "weight.leaves",
        value: ValueKind::Int {
            unit: Unit::Bytes,
            min: 4096,
            max: 1 << 40,
            step: 4096,
        },
        ..USUAL
    },
    Field {
        path: "species",
        value: ValueKind::Text {
            longest: 8,
            choices: &[],
        },
        steer: Steer::Own,
        ..USUAL
    },
    Field {
        kind: "branch",
        path: "branch.length",
        ..USUAL
    },
    Field {
        kind: "garden",
        path: "garden.size",
        ..USUAL
    },
];

static KINDS: &[ObjectKind] = &[
    ObjectKind {
        name: "tree",
        part_of: None,
        contexts: &["garden"],
        doc: "",
    },
    ObjectKind {
        name: "branch",
        part_of: Some("tree"),
        contexts: &["garden", "soil"],
        doc: "",
    },
    ObjectKind {
        name: "garden",
        part_of: None,
        contexts: &[],
        doc: "",
    },
];

fn schema() -> Arc<Schema> {
    Arc::new(Schema::new(KINDS, FIELDS))
}

fn read(text: &str, file: &str) -> Arc<Profile> {
    Arc::new(Profile::from_toml(&schema(), text, file).unwrap_or_else(|seen| panic!("{seen}")))
}

/// A set of profiles, each in a file of its own name.
fn set(texts: &[&str]) -> ProfileSet {
    let profiles = texts.iter().enumerate().map(|(index, text)| {
        let text = format!("name = \"p{index}\"\n{text}");
        read(&text, &format!("p{index}.toml"))
    });
    ProfileSet::new(schema(), profiles).unwrap()
}

fn labels(labels: &[(&str, &str)]) -> BTreeMap<String, String> {
    labels
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn tree(name: &str, of: &[(&str, &str)]) -> Object {
    Object::new(
        name,
        Identity {
            kind: "tree".to_owned(),
            name: name.to_owned(),
            labels: labels(of),
        },
    )
}

fn value(effective: &Effective<'_>, path: &str) -> Option<Value> {
    effective.get(&schema().slot(path).unwrap()).cloned()
}
