//! Tests of the crate's promises: nothing of a tree is lost on the way, and clearing is by success
//! alone.

use proptest::prelude::*;

use crate as strake_observe;
use crate::{Because, Observation, OsContext, State, Style, Task, recorder, render};

crate::catalog! {
    /// For these tests.
    pub(crate) static CATALOG;

    /// A job failed.
    JobFailed("test.job-failed") {
        /// Its name.
        job: String,
    }
    text "job '{job}' failed";
    remedy "start job '{job}' again";

    /// Something without data.
    Plain("test.plain") {}
    text "nothing to say";
    remedy "nothing to do";
}

fn io_failure() -> Observation {
    Err::<(), _>(std::io::Error::from_raw_os_error(28))
        .os("pwrite", "/fast/web1.raw at offset 4096")
        .unwrap_err()
}

#[test]
fn a_system_call_names_call_object_and_number() {
    let seen = io_failure();
    assert_eq!(seen.id(), "os.call-failed");
    assert_eq!(
        seen.text(),
        "pwrite on /fast/web1.raw at offset 4096: No space left on device (ENOSPC)"
    );
    assert_eq!(seen.datum("errno").unwrap(), 28);
    assert!(seen.remedy().contains("free space"));
}

#[test]
fn a_cause_survives_a_thread_and_a_process_boundary() {
    let from_thread = std::thread::Builder::new()
        .name("blk0".into())
        .spawn(|| Err::<(), _>(io_failure()).because_of(|| JobFailed { job: "j1".into() }))
        .unwrap()
        .join()
        .unwrap()
        .unwrap_err();
    let wire = serde_json::to_string(&from_thread).unwrap();
    let arrived: Observation = serde_json::from_str(&wire).unwrap();
    assert_eq!(arrived, from_thread);
    let leaf = arrived.find("os.call-failed").unwrap();
    assert_eq!(leaf.record().emitter.thread, "blk0");
    assert_eq!(leaf.datum("name").unwrap(), "ENOSPC");
}

#[test]
fn success_clears_and_failure_links() {
    let marker = format!("marker {:?}", std::thread::current().id());
    let mut task = Task::begin(marker.clone());
    task.saw(io_failure());
    task.succeed();
    assert!(
        recorder()
            .since(0)
            .iter()
            .any(|entry| entry.state == State::Cleared { by: marker.clone() })
    );

    let mut task = Task::begin("second");
    assert!(task.attempt(Err::<(), _>(io_failure())).is_none());
    let failed = task.fail(JobFailed {
        job: marker.clone(),
    });
    assert_eq!(failed.causes().len(), 1);
    assert!(recorder().since(0).iter().any(|entry| {
        entry.state == State::Open
            && entry
                .observation
                .datum("job")
                .is_some_and(|job| *job == marker)
    }));
}

#[test]
#[should_panic(expected = "ended neither")]
#[cfg(debug_assertions)]
fn a_forgotten_task_is_noticed_in_debug_builds() {
    drop(Task::begin("forgotten"));
}

#[test]
fn rendering_shows_every_level_and_no_escape_sequence() {
    let tree = Observation::from(JobFailed {
        job: "evil\x1b[2J".into(),
    })
    .because(Observation::from(Plain {}).because(io_failure()))
    .because(Plain {});
    let text = render(&tree, Style::Plain);
    assert!(text.contains("├─ nothing to say [test.plain]"), "{text}");
    assert!(text.contains("│  └─ pwrite on"), "{text}");
    assert!(text.contains("remedy: free space"), "{text}");
    assert!(!text.contains('\x1b'), "{text}");
}

#[test]
fn the_recorder_is_bounded() {
    let recorder = crate::FlightRecorder::new();
    for _ in 0..crate::RECORDER_CAPACITY + 5 {
        recorder.record(Plain {}.into(), State::Open);
    }
    let kept = recorder.since(0);
    assert_eq!(kept.len(), crate::RECORDER_CAPACITY);
    assert_eq!(kept[0].seq, 6);
}

#[test]
fn the_catalog_lists_what_was_declared() {
    assert_eq!(CATALOG.len(), 2);
    assert_eq!(CATALOG[0].id, "test.job-failed");
    assert!(CATALOG.iter().all(|entry| !entry.remedy.is_empty()));
}

fn trees() -> impl Strategy<Value = Observation> {
    let leaf = ".*".prop_map(|job| Observation::from(JobFailed { job }));
    leaf.prop_recursive(4, 32, 4, |inner| {
        (".*", prop::collection::vec(inner, 0..4))
            .prop_map(|(job, causes)| Observation::from(JobFailed { job }).because_all(causes))
    })
}

proptest! {
    #[test]
    fn any_tree_survives_serialisation(tree in trees()) {
        let wire = serde_json::to_string(&tree).unwrap();
        let arrived: Observation = serde_json::from_str(&wire).unwrap();
        prop_assert_eq!(&arrived, &tree);
        prop_assert!(!render(&arrived, Style::Plain).contains('\x1b'));
    }
}

#[test]
fn a_watcher_hears_of_each_record() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    let recorder = crate::FlightRecorder::new();
    let heard = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&heard);
    recorder.watch(Box::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    let seen: Observation =
        crate::OsCallFailed::new("open", "x", &std::io::Error::other("no")).into();
    recorder.record(seen.clone(), crate::State::Open);
    recorder.record(seen, crate::State::Open);
    assert_eq!(heard.load(Ordering::Relaxed), 2);
}

#[test]
fn the_deepest_remedies_are_drawn_and_the_one_above_a_system_call() {
    let job = |job: &str| JobFailed { job: job.into() };
    let seen = Err::<(), _>(io_failure())
        .because_of(|| job("inner"))
        .because_of(|| job("middle"))
        .because_of(|| job("outer"))
        .unwrap_err();
    let text = render(&seen, Style::Plain);
    assert!(text.contains("remedy: start job 'outer' again"), "{text}");
    assert!(!text.contains("remedy: start job 'middle' again"), "{text}");
    assert!(text.contains("remedy: start job 'inner' again"), "{text}");
    assert!(text.contains("remedy: free space"), "{text}");
}

#[test]
fn a_tree_is_cut_below_so_many_levels() {
    let deep = (0..10).fold(io_failure(), |seen, _| {
        Observation::from(Plain {}).because(seen)
    });
    assert!(deep.clone().cut_below(10).find("os.call-failed").is_some());
    let cut = deep.clone().cut_below(3);
    assert!(cut.find("os.call-failed").is_none());
    assert_eq!(cut.causes()[0].causes()[0].causes().len(), 1);
    assert!(deep.cut_below(0).causes().is_empty());
}
