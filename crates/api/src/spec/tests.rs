//! Specs that are read, specs that are refused, and where.

use proptest::prelude::*;
use strake_observe::Observation;

use super::*;

const FULL: &str = r#"
cpus = 2
memory = "1G"

[labels]
team = "web"

[boot]
from = "kernel"
kernel = "/boot/vmlinuz"
initrd = "/boot/initrd.img"
cmdline = "root=/dev/vda1 console=ttyS0"

[[disk]]
name = "root"
image = "fast:web1-root.raw"
size = "10G"
read-only = false
queues = 4

[[disk]]
name = "data"
image = "/images/data.raw"

[[nic]]
name = "net0"
tap = "tap-web1"
bridge = "br0"
mac = "52:54:00:12:34:56"
"#;

fn refused(text: &str) -> Observation {
    VmSpec::from_toml(text, "web1.toml").unwrap_err()
}

/// `FULL` with one line replaced.
fn with(line: &str, instead: &str) -> String {
    assert!(FULL.contains(line), "{line}");
    FULL.replacen(line, instead, 1)
}

#[test]
fn a_full_spec_survives_toml_and_json() {
    let spec = VmSpec::from_toml(FULL, "web1.toml").unwrap();
    assert_eq!(spec.memory, Bytes(1 << 30));
    assert_eq!(spec.disks[0].size, Some(Bytes(10 << 30)));
    let text = spec.to_toml().unwrap();
    assert!(text.contains("memory = \"1G\""), "{text}");
    assert_eq!(VmSpec::from_toml(&text, "again").unwrap(), spec);
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
    spec.validate().unwrap();
}

/// What the documents show is what a reader will paste.
#[test]
fn the_specs_of_the_documents_are_good_ones() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut seen = 0;
    for file in ["README.md", "docs/src/cli.md"] {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        for block in text.split("```toml\n").skip(1) {
            let spec = block.split("```").next().unwrap();
            VmSpec::from_toml(spec, file).unwrap();
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn the_console_is_serial_unless_said_otherwise() {
    let console = |text: &str| VmSpec::from_toml(text, "web1.toml").unwrap().console;
    assert_eq!(console(FULL), None);
    let said = |kind: &str| with("cpus = 2", &format!("cpus = 2\nconsole = \"{kind}\""));
    assert_eq!(console(&said("serial")), Some(ConsoleKind::Serial));
    assert_eq!(console(&said("virtio")), Some(ConsoleKind::Virtio));
    let spec = VmSpec::from_toml(&said("virtio"), "web1.toml").unwrap();
    let again = VmSpec::from_toml(&spec.to_toml().unwrap(), "again").unwrap();
    assert_eq!(again.console, Some(ConsoleKind::Virtio));
}

#[test]
fn boot_from_the_disk_needs_no_kernel() {
    let text = "cpus = 1\nmemory = 67108864\nboot = { from = \"disk\" }\n\
                disk = [{ name = \"a\", image = \"/a\" }]";
    let spec = VmSpec::from_toml(text, "x").unwrap();
    assert_eq!(spec.memory, Bytes(MIN_MEMORY));
    let seen = refused("cpus = 1\nmemory = \"64M\"\n[boot]\nfrom = \"disk\"\n");
    assert_eq!(seen.datum("key").unwrap(), "boot.from");
    assert_eq!(seen.datum("line").unwrap(), 4);
}

#[test]
fn each_problem_has_its_place() {
    // (line of FULL, instead, key, line number, column, part of the reason or the remedy)
    let cases: &[(&str, &str, &str, u32, u32, &str)] = &[
        ("cpus = 2", "cpus = 0", "cpus", 2, 1, "0 vCPUs"),
        ("cpus = 2", "cpus = 17", "cpus", 2, 1, "1 to 16"),
        ("cpus = 2", "cpus = 300", "cpus", 2, 8, "300"),
        ("cpus = 2", "cpus = \"two\"", "cpus", 2, 8, "string"),
        ("memory = \"1G\"", "memory = 0", "memory", 3, 1, "64M"),
        (
            "cpus = 2",
            "cpus = 2\nconsole = \"vga\"",
            "console",
            3,
            11,
            "`serial` or `virtio`",
        ),
        (
            "cpus = 2",
            "cpus = 2\nconsole = 1",
            "console",
            3,
            11,
            "string",
        ),
        (
            "cpus = 2",
            "cpus = 2\nmemroy = 5",
            "memroy",
            3,
            1,
            "did you mean 'memory'",
        ),
        (
            "memory = \"1G\"",
            "memory = \"1X\"",
            "memory",
            3,
            10,
            "not a size",
        ),
        (
            "memory = \"1G\"",
            "memory = -4",
            "memory",
            3,
            10,
            "negative",
        ),
        ("memory = \"1G\"", "memory = \"63M\"", "memory", 3, 1, "64M"),
        (
            "memory = \"1G\"",
            "memory = \"65M\"",
            "memory",
            3,
            1,
            "huge pages",
        ),
        ("memory = \"1G\"", "memory = \"1T\"", "memory", 3, 1, "255G"),
        (
            "memory = \"1G\"",
            "memory = ",
            "the spec",
            3,
            10,
            "mend the TOML",
        ),
        (
            "from = \"kernel\"",
            "from = \"floppy\"",
            "boot.from",
            9,
            1,
            "floppy",
        ),
        ("from = \"kernel\"", "", "boot", 8, 2, "'from' is missing"),
        (
            "from = \"kernel\"",
            "from = \"disk\"",
            "boot.kernel",
            10,
            1,
            "no such key",
        ),
        (
            "kernel = \"/boot/vmlinuz\"",
            "kernel = \"vmlinuz\"",
            "boot.kernel",
            10,
            1,
            "absolute",
        ),
        (
            "name = \"root\"",
            "name = \"ro ot\"",
            "disk[0].name",
            15,
            1,
            "not ' '",
        ),
        (
            "name = \"root\"",
            "name = \"data\"",
            "disk[1].name",
            22,
            1,
            "another 'data'",
        ),
        (
            "name = \"root\"",
            "name = \"a-name-that-is-too-long\"",
            "disk[0].name",
            15,
            1,
            "20",
        ),
        (
            "fast:web1-root.raw",
            "fast:../x",
            "disk[0].image",
            16,
            1,
            "'/'",
        ),
        (
            "fast:web1-root.raw",
            "fast:..",
            "disk[0].image",
            16,
            1,
            "'.'",
        ),
        (
            "fast:web1-root.raw",
            "fast:",
            "disk[0].image",
            16,
            1,
            "missing",
        ),
        (
            "fast:web1-root.raw",
            "web1.raw",
            "disk[0].image",
            16,
            1,
            "neither",
        ),
        (
            "fast:web1-root.raw",
            "/a/../b",
            "disk[0].image",
            16,
            1,
            "'..'",
        ),
        (
            "size = \"10G\"",
            "size = 1000",
            "disk[0].size",
            17,
            1,
            "sectors",
        ),
        (
            "size = \"10G\"",
            "size = \"65T\"",
            "disk[0].size",
            17,
            1,
            "64T",
        ),
        (
            "read-only = false",
            "read-only = 3",
            "disk[0].read-only",
            18,
            13,
            "boolean",
        ),
        (
            "read-only = false",
            "readonly = true",
            "disk[0].readonly",
            18,
            1,
            "read-only",
        ),
        (
            "queues = 4",
            "queues = 0",
            "disk[0].queues",
            19,
            1,
            "1 to 16",
        ),
        (
            "queues = 4",
            "queues = 17",
            "disk[0].queues",
            19,
            1,
            "1 to 16",
        ),
        (
            "tap = \"tap-web1\"",
            "tap = \"a-tap-name-too-long\"",
            "nic[0].tap",
            27,
            1,
            "15",
        ),
        (
            "name = \"net0\"",
            "name = \"root\"",
            "nic[0].name",
            26,
            1,
            "another 'root'",
        ),
        (
            "52:54:00:12:34:56",
            "52:54:00:12:34",
            "nic[0].mac",
            29,
            1,
            "not a MAC",
        ),
        (
            "52:54:00:12:34:56",
            "53:54:00:12:34:56",
            "nic[0].mac",
            29,
            1,
            "group",
        ),
        (
            "team = \"web\"",
            "team = \"a\\u0007b\"",
            "labels.team",
            6,
            1,
            "one line",
        ),
    ];
    for (line, instead, key, number, column, part) in cases {
        let tree = refused(&with(line, instead));
        let seen = tree.find("api.spec-refused").unwrap();
        let place = (
            seen.datum("key").unwrap().as_str().unwrap(),
            seen.datum("line").unwrap().as_u64().unwrap(),
            seen.datum("column").unwrap().as_u64().unwrap(),
        );
        let expected = (*key, u64::from(*number), u64::from(*column));
        assert_eq!(place, expected, "{instead}: {seen}");
        let all = format!("{} | {}", seen.text(), seen.remedy());
        assert!(all.starts_with("web1.toml:"), "{all}");
        assert!(all.contains(part), "{instead}: {all}");
    }
}

#[test]
fn several_problems_are_told_together() {
    let seen = refused(&with("cpus = 2", "cpus = 0").replace("queues = 4", "queues = 99"));
    assert_eq!(seen.id(), "api.spec-problems");
    assert_eq!(seen.causes().len(), 2);
    let mut spec = VmSpec::from_toml(FULL, "x").unwrap();
    spec.cpus = 99;
    assert_eq!(spec.validate().unwrap_err().id(), "api.spec-invalid");
    spec.disks[1].image = spec.disks[0].image.clone();
    assert_eq!(spec.validate().unwrap_err().causes().len(), 2);
}

#[test]
fn the_key_tables_are_those_of_the_types() {
    // Every known key is in FULL, so a key that serde does not know would be refused there; and
    // what serde writes for FULL has no key that the tables lack, or the round trip would fail.
    for key in [
        "labels",
        "cpus",
        "memory",
        "initrd",
        "cmdline",
        "size",
        "read-only",
        "queues",
    ] {
        assert!(FULL.contains(key), "{key}");
    }
    let limited = with("queues = 4", "iops = 500\nbandwidth = \"100M\"");
    let disk = &VmSpec::from_toml(&limited, "web1.toml").unwrap().disks[0];
    assert_eq!(
        (disk.iops, disk.bandwidth),
        (Some(500), Some(Bytes(100 << 20)))
    );
    for (bad, key) in [
        ("iops = 1", "disk[0].iops"),
        ("bandwidth = 5", "disk[0].bandwidth"),
    ] {
        let seen = refused(&with("queues = 4", bad));
        assert_eq!(seen.datum("key").unwrap(), key);
    }
}

#[test]
fn sizes_are_read_and_written_for_people() {
    for (text, bytes, written) in [
        ("0", 0, "0"),
        ("1", 1, "1"),
        ("1k", 1 << 10, "1K"),
        ("1536M", 1536 << 20, "1536M"),
        ("2 GiB", 2 << 30, "2G"),
        ("2gb", 2 << 30, "2G"),
        ("1T", 1 << 40, "1T"),
        ("1025", 1025, "1025"),
    ] {
        assert_eq!(text.parse::<Bytes>(), Ok(Bytes(bytes)), "{text}");
        assert_eq!(Bytes(bytes).to_string(), written);
    }
    for text in [
        "",
        "G",
        "1.5G",
        "-1",
        "1GG",
        "1P",
        "99999999999999999999",
        "99999999T",
        "1 0",
    ] {
        assert!(text.parse::<Bytes>().is_err(), "{text}");
    }
    assert_eq!(serde_json::to_string(&Bytes(1 << 30)).unwrap(), "\"1G\"");
    assert_eq!(serde_json::from_str::<Bytes>("4096").unwrap(), Bytes(4096));
}

#[test]
fn names_follow_one_rule() {
    for good in ["web1", "0", "a.b-c_d", &"x".repeat(63)] {
        check_name(good, MAX_NAME).unwrap();
    }
    for bad in [
        "",
        ".",
        "..",
        "-a",
        "a/b",
        "a b",
        "ä",
        "a\0",
        &"x".repeat(64),
    ] {
        assert!(check_name(bad, MAX_NAME).is_err(), "{bad}");
    }
}

fn specs() -> impl Strategy<Value = String> {
    // Mutations of a real spec reach deeper than arbitrary text.
    (
        prop::collection::vec((0..FULL.len(), ".{0,6}"), 0..4),
        prop::collection::vec(0..FULL.len(), 0..2),
    )
        .prop_map(|(inserts, cuts)| {
            let mut text = FULL.to_owned();
            for (at, what) in inserts {
                let at = at.min(text.len());
                if text.is_char_boundary(at) {
                    text.insert_str(at, &what);
                }
            }
            for at in cuts {
                if text.is_char_boundary(at.min(text.len())) {
                    text.truncate(at.min(text.len()));
                }
            }
            text
        })
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC*") {
        let _ = VmSpec::from_toml(&text, "x");
        let _ = text.parse::<Bytes>();
        let _ = ImageRef::parse(&text);
        let _ = parse_mac(&text);
    }

    #[test]
    fn damaged_specs_are_refused_or_sound(text in specs()) {
        match VmSpec::from_toml(&text, "x") {
            Ok(spec) => {
                spec.validate().unwrap();
                let again = VmSpec::from_toml(&spec.to_toml().unwrap(), "again").unwrap();
                prop_assert_eq!(again, spec);
            }
            Err(seen) => {
                let leaf = seen.find("api.spec-refused").unwrap();
                let lines = text.matches('\n').count() as u64 + 1;
                prop_assert!(leaf.datum("line").unwrap().as_u64().unwrap() <= lines);
            }
        }
    }

    #[test]
    fn bytes_round_trip(bytes: u64) {
        prop_assert_eq!(Bytes(bytes).to_string().parse::<Bytes>(), Ok(Bytes(bytes)));
    }
}
