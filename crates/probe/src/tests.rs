use std::cell::RefCell;

use super::*;

/// A KVM whose guests take what `nanos_per_turn` says, and fail where `broken` says.
fn judged(nanos_per_turn: u64, broken: &'static str) -> Report {
    judge(KVM_API_VERSION, Vec::new(), move |code, count| {
        let family = guest::FAMILIES.iter().find(|family| family.code == code);
        match family {
            Some(family) if family.name == broken => Err(GuestEnded {
                how: "a triple fault".to_owned(),
            }
            .into()),
            None if broken == "loop" => Err(GuestHangs { waited_ms: 1 }.into()),
            _ => Ok(Duration::from_nanos(count * nanos_per_turn)),
        }
    })
}

#[test]
fn a_fast_ring_zero_is_stock() {
    let report = judged(4, "");
    assert_eq!(report.verdict, Verdict::Stock);
    assert!(report.runs_stock_kernels());
    assert_eq!(report.instructions_per_second, Some(2_000_000_000));
    assert!(report.problem.is_none());
    assert!(report.families.iter().all(|f| f.failure.is_none()));
}

#[test]
fn an_interpreter_is_slow() {
    let report = judged(8_000, "");
    assert_eq!(report.verdict, Verdict::SlowRingZero);
    assert_eq!(report.instructions_per_second, Some(1_000_000));
    assert!(report.problem.unwrap().is::<RingZeroSlow>());
}

#[test]
fn a_missing_family_is_named_with_its_cause() {
    let report = judged(4, "swapgs");
    assert_eq!(report.verdict, Verdict::MissingInstructions);
    let problem = report.problem.unwrap();
    assert!(problem.text().contains("swapgs"));
    assert!(problem.find("probe.guest-ended").is_some());
}

#[test]
fn a_broken_loop_is_not_a_speed() {
    let report = judged(4, "loop");
    assert_eq!(report.verdict, Verdict::MissingInstructions);
    assert_eq!(report.instructions_per_second, None);
    assert!(report.problem.unwrap().find("probe.guest-hangs").is_some());
}

#[test]
fn the_measurement_grows_only_while_it_is_too_short() {
    let counts = RefCell::new(Vec::new());
    let rate = measure(&|_, count| {
        counts.borrow_mut().push(count);
        Ok(Duration::from_micros(count / 10))
    });
    assert_eq!(*counts.borrow(), [2_000, 40_000, 800_000]);
    assert_eq!(rate.unwrap(), 80_000_000);
}

#[test]
fn no_device_is_missing_with_a_remedy() {
    let report = probe_at(Path::new("/nonexistent/kvm"));
    assert_eq!(report.verdict, Verdict::Missing);
    let problem = report.problem.unwrap();
    assert!(problem.is::<NoKvm>());
    assert!(problem.remedy().contains("modprobe"));
    assert_eq!(
        problem
            .find("os.call-failed")
            .unwrap()
            .datum("name")
            .unwrap(),
        "ENOENT"
    );
}

#[test]
fn a_device_that_is_not_kvm_is_missing() {
    let report = probe_at(Path::new("/dev/null"));
    assert_eq!(report.verdict, Verdict::Missing);
    assert!(report.problem.unwrap().is::<WrongApiVersion>());
}

#[test]
fn programs_fit_and_end_in_hlt() {
    for code in guest::FAMILIES.iter().map(|f| f.code).chain([guest::LOOP]) {
        assert!(code.len() < usize::try_from(guest::HANDLER - guest::CODE).unwrap());
        assert_eq!(code.last(), Some(&0xf4));
        let image = guest::image(code);
        assert_eq!(image.len(), guest::MEMORY);
        let at = usize::try_from(guest::CODE).unwrap();
        assert_eq!(&image[at..at + code.len()], code);
    }
}

#[test]
fn a_report_survives_json() {
    let report = judged(8_000, "");
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
}

/// Runs the real thing where there is a KVM. The verdict is the host's own; what must hold
/// anywhere is that the report is consistent and the probe comes back.
#[test]
fn the_real_probe_comes_back() {
    let report = probe();
    eprintln!("{report:#?}");
    assert_eq!(report.verdict == Verdict::Stock, report.problem.is_none());
    match report.verdict {
        Verdict::Missing => assert!(report.families.is_empty()),
        Verdict::Stock => assert!(report.instructions_per_second.unwrap() >= ENOUGH),
        Verdict::SlowRingZero => assert!(report.instructions_per_second.unwrap() < ENOUGH),
        Verdict::MissingInstructions => {}
    }
}
