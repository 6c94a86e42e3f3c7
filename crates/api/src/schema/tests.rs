use std::path::Path;

use strake_profile::{Constant, Steer, ValueKind};

use super::*;
use crate::spec::VmSpec;

fn spec(boot: &str) -> VmSpec {
    let text = format!(
        "cpus = 2\nmemory = \"1G\"\n[boot]\n{boot}\n[[disk]]\nname = \"root\"\n\
         image = \"fast:root.raw\"\n[[nic]]\nname = \"net0\"\n"
    );
    VmSpec::from_toml(&text, "test.toml").unwrap()
}

const KERNEL: &str = "from = \"kernel\"\nkernel = \"/boot/vmlinuz\"";
const FROM_DISK: &str = "from = \"disk\"";

/// A value that is not the default.
fn sample(field: &Field) -> Value {
    match field.value {
        ValueKind::Int { min, step, .. } => Value::Int(min + 2 * step),
        ValueKind::Text { choices, .. } => {
            let other = choices.iter().find(|choice| {
                !matches!(field.default, Some(Constant::Text(default)) if default == **choice)
            });
            Value::Text(other.map_or("/root", |choice| choice).to_owned())
        }
        ValueKind::Bool => Value::Bool(true),
        ValueKind::Set { .. } => Value::Set(["a".to_owned()].into()),
        ValueKind::Map { .. } => Value::Text("a value".to_owned()),
    }
}

#[test]
fn every_field_of_the_table_can_be_written_and_read_back_or_says_that_it_is_fixed() {
    for field in FIELDS {
        let mut seen = 0;
        for boot in [KERNEL, FROM_DISK] {
            let mut spec = spec(boot);
            let part = match field.kind {
                VM => Part::Vm,
                DISK => Part::Disk("root".to_owned()),
                _ => Part::Nic("net0".to_owned()),
            };
            let path = match field.value {
                ValueKind::Map { .. } => format!("{}.key", field.path),
                _ => field.path.to_owned(),
            };
            let value = sample(field);
            field.value.check(&value).unwrap();
            match spec.put(&part, &path, Some(value.clone())) {
                Ok(()) => {
                    assert_ne!(field.steer, Steer::Fixed);
                    assert_eq!(spec.value(&part, &path), Some(value.clone()), "{path}");
                    assert!(spec.values(&part).contains(&(path.clone(), value)));
                    if spec.put(&part, &path, None).is_ok() {
                        assert_eq!(spec.value(&part, &path), None, "{path}");
                    }
                    seen += 1;
                }
                Err(reason) if field.steer == Steer::Fixed => {
                    assert!(reason.contains("fixed"), "{path}: {reason}");
                    seen += 1;
                }
                Err(reason) => assert!(reason.contains("boot.from"), "{path}: {reason}"),
            }
        }
        assert!(seen > 0, "{} cannot be written", field.path);
    }
}

#[test]
fn the_table_knows_every_key_of_a_spec() {
    let mut keys: Vec<&str> = crate::spec::known_keys();
    keys.sort_unstable();
    let mut fields: Vec<&str> = FIELDS.iter().map(|field| field.path).collect();
    fields.sort_unstable();
    assert_eq!(keys, fields);
}

#[test]
fn targets_name_the_device() {
    let spec = spec(KERNEL);
    let disk = Part::Disk("root".to_owned());
    let parsed = parse_target(&spec, "disk.root.iops").unwrap();
    assert_eq!(parsed, (disk.clone(), "disk.iops".to_owned()));
    assert_eq!(disk.target("disk.iops"), "disk.root.iops");
    assert_eq!(disk.id("web1"), "web1/root");
    assert_eq!(parse_target(&spec, "cpus").unwrap().0, Part::Vm);
    assert_eq!(parse_target(&spec, "labels.a.b").unwrap().1, "labels.a.b");
    assert!(
        parse_target(&spec, "disk.iops")
            .unwrap_err()
            .contains("disk.NAME.iops")
    );
    assert!(parse_target(&spec, "disk.other.iops").is_err());
    assert!(parse_target(&spec, "colour").is_err());
}

#[test]
fn the_page_of_the_documentation_is_the_table() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/src/fields.md");
    if std::env::var_os("STRAKE_WRITE_DOCS").is_some() {
        std::fs::write(&file, page()).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap();
    assert!(
        written == page(),
        "docs/src/fields.md is not what the table says; run the test with STRAKE_WRITE_DOCS=1"
    );
}

#[test]
fn the_json_schema_has_every_field() {
    let schema = json_schema();
    for field in FIELDS {
        let pointer = match field.path.split_once('.') {
            None => format!("/properties/{}", field.path),
            Some(("boot", name)) => format!("/properties/boot/properties/{name}"),
            Some((list, name)) => format!("/properties/{list}/items/properties/{name}"),
        };
        let found = schema
            .pointer(&pointer)
            .unwrap_or_else(|| panic!("{pointer}"));
        assert_eq!(found["x-change"], field.change.name());
    }
}
