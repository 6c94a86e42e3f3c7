use std::path::Path;

use strake_observe::Kind;

use super::observations::{NoHugePages, OldCgroups};
use super::*;

fn report() -> Report {
    Report {
        fit: false,
        version: "1".into(),
        checks: vec![
            Check::ok("kvm", "API version 12"),
            Check::cannot(
                "huge pages",
                Need::Useful,
                Observation::from(NoHugePages {}).because(NoHugePages {}),
            ),
            Check::cannot("evil\x1b[2J", Need::Required, NoHugePages {}),
        ],
    }
}

#[test]
fn every_cannot_is_drawn_with_its_remedy() {
    let text = render(&report(), Style::Plain);
    assert!(text.starts_with("kvm        "), "{text}");
    assert!(text.contains("  ok       API version 12\n"), "{text}");
    assert!(text.contains("  limited  no 2 MiB pages"), "{text}");
    assert!(text.contains("because no 2 MiB pages"), "{text}");
    assert_eq!(text.matches("remedy: echo advise").count(), 2, "{text}");
    assert!(
        text.ends_with("do not run here: 1 missing, 1 limited\n"),
        "{text}"
    );
    assert!(!text.contains('\x1b'), "{text}");
}

#[test]
fn colours_are_for_terminals() {
    let text = render(&report(), Style::Terminal);
    assert!(text.contains("\x1b[31mMISSING\x1b[0m"), "{text}");
    assert!(!text.contains("\x1b[2J"), "{text}");
}

#[test]
fn a_report_survives_json() {
    let json = serde_json::to_string(&report()).unwrap();
    let back: Report = serde_json::from_str(&json).unwrap();
    assert_eq!(back.checks.len(), 3);
    assert_eq!(back.checks[1].result, Verdict::Limited);
}

#[test]
fn a_missing_kvm_is_required() {
    let checks = kvm::checks(Path::new("/nonexistent/kvm"));
    assert_eq!(checks.len(), 1);
    assert_eq!(checks[0].result, Verdict::Missing);
    assert!(
        checks[0]
            .problem
            .as_ref()
            .unwrap()
            .find("os.call-failed")
            .is_some()
    );
}

#[test]
fn a_slow_ring_zero_is_required_too() {
    let problem: Observation = strake_probe::RingZeroSlow {
        rate: 1_300_000,
        enough: strake_probe::ENOUGH,
    }
    .into();
    let mut probed = strake_probe::Report {
        verdict: strake_probe::Verdict::SlowRingZero,
        api_version: Some(12),
        capabilities: Vec::new(),
        instructions_per_second: Some(1_300_000),
        families: Vec::new(),
        problem: Some(problem),
    };
    let checks = kvm::from(&probed);
    assert_eq!(checks[0].result, Verdict::Ok);
    assert_eq!(checks[1].result, Verdict::Missing);
    probed.verdict = strake_probe::Verdict::Stock;
    probed.problem = None;
    assert_eq!(kvm::from(&probed)[1].result, Verdict::Ok);
}

#[test]
fn control_groups_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let none = host::cgroups(dir.path()).unwrap_err();
    assert_eq!(none.id(), "doctor.no-cgroups");
    std::fs::create_dir(dir.path().join("memory")).unwrap();
    let old = host::cgroups(dir.path()).unwrap_err();
    assert!(old.is::<OldCgroups>());
    std::fs::create_dir(dir.path().join("unified")).unwrap();
    let hybrid = host::cgroups(dir.path()).unwrap_err();
    assert!(hybrid.text().contains("hybrid"));
}

#[test]
fn huge_pages_of_either_kind_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let none = host::huge_pages(dir.path()).unwrap_err();
    assert_eq!(none.id(), NoHugePages::ID);
    let transparent = dir.path().join("transparent_hugepage");
    std::fs::create_dir(&transparent).unwrap();
    let setting = transparent.join("shmem_enabled");
    std::fs::write(&setting, "always within_size advise [never] deny force\n").unwrap();
    assert!(host::huge_pages(dir.path()).is_err());
    std::fs::write(&setting, "always within_size [advise] never deny force\n").unwrap();
    assert!(host::huge_pages(dir.path()).unwrap().ends_with("advise"));
}

#[test]
fn available_memory_is_read() {
    let text = "MemTotal: 8 kB\nMemAvailable:   12 kB\n";
    assert_eq!(limits::available(text), Some(12 * 1024));
    assert_eq!(limits::available("MemAvailable: x kB"), None);
    assert_eq!(limits::available(""), None);
}

#[test]
fn a_state_directory_may_not_exist_yet() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(storage::existing(&dir.path().join("a/b")), dir.path());
    let checks = storage::checks(&dir.path().join("a/b"));
    assert_eq!(checks.len(), 3);
}

#[test]
fn every_observation_of_this_crate_has_a_remedy() {
    let entries = CATALOG.iter().chain(crate::observations::CATALOG);
    for entry in entries {
        assert!(!entry.remedy.is_empty(), "{}", entry.id);
        assert!(entry.id.starts_with("cli.") || entry.id.starts_with("doctor."));
    }
}
