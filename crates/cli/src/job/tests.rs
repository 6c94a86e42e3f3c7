use strake_api::job::{MigrationStatus, PassReport};

use super::*;

fn at(elapsed_ms: u64, read_bytes: u64) -> Job {
    Job {
        vm: "web1".into(),
        source: "/a".into(),
        destination: "/b".into(),
        format: strake_api::image::ImageFormat::Raw,
        source_format: strake_api::image::ImageFormat::Raw,
        kind: strake_api::job::JobKind::Migrate,
        snapshot: None,
        to: "b".into(),
        limits: strake_api::job::MigrationLimits::default(),
        status: MigrationStatus {
            phase: Phase::Copying,
            passes: vec![PassReport {
                read_bytes,
                ..PassReport::default()
            }],
            elapsed_ms,
            ..MigrationStatus::new(JobId("j1".into()), "root".into(), 1 << 30)
        },
    }
}

#[test]
fn the_speed_is_that_of_the_last_seconds() {
    let mut speed = Speed::default();
    assert_eq!(speed.next(&at(0, 0)), None);
    assert_eq!(speed.next(&at(1_000, 5_000)), Some(5_000));
    assert_eq!(speed.next(&at(2_000, 5_000)), Some(2_500));
    // The first second is out of the window now.
    assert_eq!(speed.next(&at(3_000, 5_000)), Some(0));
}

#[test]
fn a_job_that_tells_nonsense_has_no_speed() {
    let mut speed = Speed::default();
    assert_eq!(speed.next(&at(5_000, 1_000)), None);
    assert_eq!(speed.next(&at(4_000, 0)), None);
    assert_eq!(speed.next(&at(6_000, u64::MAX)), None);
}
