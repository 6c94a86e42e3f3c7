//! The table as a page of the documentation and as a JSON Schema.

use std::fmt::Write as _;

use serde_json::{Map, Value as Json, json};
use strake_profile::{Field, Steer, ValueKind};

use super::{FIELDS, KINDS};

/// The page `docs/src/fields.md`.
#[must_use]
pub fn page() -> String {
    let mut page = String::from(
        "# Fields\n\n\
         Every field that can be written about an object, from the one table that the daemon itself \
         goes by (`crates/api/src/schema/table.rs`; this page is generated from it).\n\n\
         * **merge** is how the values of several profiles become one, see [profiles](profiles.md).\n\
         * **change** is what a new value takes while the VM runs: `live` is in force at once; \
         `restart` with the next fast restart, which the guest does not notice; `reboot` with the \
         guest's next power cycle; `fixed` never changes.\n\
         * **who** may say it: profiles and the object, or the object alone.\n",
    );
    for kind in KINDS {
        let _ = write!(page, "\n## {}\n\n{}\n\n", kind.name, kind.doc);
        page.push_str("| field | holds | default | merge | change | who | |\n");
        page.push_str("| --- | --- | --- | --- | --- | --- | --- |\n");
        for field in FIELDS.iter().filter(|field| field.kind == kind.name) {
            let _ = writeln!(
                page,
                "| `{}` | {} | {} | {} | {} | {} | {} |",
                field.path,
                holds(field),
                default(field),
                field.merge.name(),
                match field.steer {
                    Steer::Fixed => "fixed",
                    Steer::Profiles | Steer::Own => field.change.name(),
                },
                match field.steer {
                    Steer::Profiles => "profiles, object",
                    Steer::Own | Steer::Fixed => "object",
                },
                field.doc
            );
        }
    }
    page
}

/// What a field may hold, for people.
#[must_use]
pub fn holds(field: &Field) -> String {
    match field.value {
        ValueKind::Int { min, max, step, .. } => {
            let show = |n: u64| field.value.show(&strake_profile::Value::Int(n));
            let step = match step {
                1 => String::new(),
                step => format!(", in steps of {}", show(step)),
            };
            format!("{} to {}{step}", show(min), show(max))
        }
        ValueKind::Text {
            longest,
            choices: [],
        } => {
            format!("text, at most {longest} bytes")
        }
        ValueKind::Text { choices, .. } => choices
            .iter()
            .map(|choice| format!("`{choice}`"))
            .collect::<Vec<_>>()
            .join(" or "),
        ValueKind::Bool => "`true` or `false`".to_owned(),
        ValueKind::Set { longest } => format!("words of at most {longest} bytes"),
        ValueKind::Map { longest } => format!("texts by key, at most {longest} bytes each"),
    }
}

fn default(field: &Field) -> String {
    match field.default {
        None if field.absent_is_unlimited => "unlimited".to_owned(),
        None => "–".to_owned(),
        Some(strake_profile::Constant::Int(n)) => field.value.show(&strake_profile::Value::Int(n)),
        Some(strake_profile::Constant::Text(text)) => format!("`{text}`"),
        Some(strake_profile::Constant::Bool(yes)) => format!("`{yes}`"),
    }
}

/// The JSON Schema of a VM's spec, with merge kind, change class and who may say a field as
/// `x-merge`, `x-change` and `x-who`.
#[must_use]
pub fn json_schema() -> Json {
    let mut sections: Map<String, Json> = Map::new();
    let mut top = Map::new();
    for field in FIELDS {
        let mut property = property(field);
        if let Some(object) = property.as_object_mut() {
            object.insert("description".to_owned(), json!(field.doc));
            object.insert("x-merge".to_owned(), json!(field.merge));
            object.insert("x-change".to_owned(), json!(field.change));
            object.insert("x-who".to_owned(), json!(field.steer));
        }
        match field.path.split_once('.') {
            None => {
                top.insert(field.path.to_owned(), property);
            }
            Some((section, name)) => {
                let section = sections
                    .entry(section)
                    .or_insert_with(|| json!({}))
                    .as_object_mut();
                if let Some(section) = section {
                    section.insert(name.to_owned(), property);
                }
            }
        }
    }
    for (section, properties) in sections {
        let required = match section.as_str() {
            "disk" => json!(["name", "image"]),
            "nic" => json!(["name"]),
            _ => json!(["from"]),
        };
        let object = json!({
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": false,
        });
        let value = if section == "boot" {
            object
        } else {
            json!({ "type": "array", "items": object })
        };
        top.insert(section, value);
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Strake VM spec",
        "type": "object",
        "properties": top,
        "required": ["boot"],
        "additionalProperties": false,
    })
}

fn property(field: &Field) -> Json {
    match field.value {
        ValueKind::Int {
            unit,
            min,
            max,
            step,
            ..
        } => {
            let mut number = json!({ "type": "integer", "minimum": min, "maximum": max });
            if step > 1
                && let Some(object) = number.as_object_mut()
            {
                object.insert("multipleOf".to_owned(), json!(step));
            }
            match unit {
                strake_profile::Unit::Bytes | strake_profile::Unit::BytesPerSecond => json!({
                    "oneOf": [number, { "type": "string", "pattern": "^[0-9]+ ?([KMGTkmgt](i?[Bb])?)?$" }],
                }),
                strake_profile::Unit::Count | strake_profile::Unit::PerSecond => number,
            }
        }
        ValueKind::Text {
            longest,
            choices: [],
        } => {
            json!({ "type": "string", "maxLength": longest })
        }
        ValueKind::Text { choices, .. } => json!({ "enum": choices }),
        ValueKind::Bool => json!({ "type": "boolean" }),
        ValueKind::Set { longest } => json!({
            "type": "array", "uniqueItems": true,
            "items": { "type": "string", "maxLength": longest },
        }),
        ValueKind::Map { longest } => json!({
            "type": "object",
            "additionalProperties": { "type": "string", "maxLength": longest },
        }),
    }
}
