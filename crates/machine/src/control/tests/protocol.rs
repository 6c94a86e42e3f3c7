//! What the server answers without a machine.

use std::time::{Duration, Instant};

use strake_api::control::{Body, Event, PROTOCOL_VERSION, Reply, Request, RunState};
use strake_api::job::JobId;
use strake_observe::{Kind, Observation};

use super::harness::{Monitor, PATIENCE};
use crate::MAILBOX_CAPACITY;
use crate::observations::{
    BadConfig, BuildFailed, DescriptorMissing, HelloMissing, ObservationsDropped, WrongState,
    WrongVersion,
};

fn failed(reply: Reply) -> Observation {
    match reply {
        Reply::Failed(seen) => seen,
        other => panic!("{other:?}"),
    }
}

fn note(text: &str) -> Observation {
    WrongState {
        asked: text.to_owned(),
        state: "a test".to_owned(),
    }
    .into()
}

#[test]
fn hello_comes_first_and_in_the_right_version() {
    let monitor = Monitor::start();
    let mut daemon = monitor.connect();
    let seen = failed(daemon.ask(Request::Status));
    assert_eq!(seen.id(), HelloMissing::ID);
    let seen = failed(daemon.ask(Request::Hello { version: 999 }));
    assert_eq!(seen.id(), WrongVersion::ID);
    assert!(matches!(
        daemon.ask(Request::Hello {
            version: PROTOCOL_VERSION
        }),
        Reply::Hello { vm: None, .. }
    ));
    let Reply::Status(status) = daemon.ask(Request::Status) else {
        panic!("no status");
    };
    assert_eq!(status.state, RunState::Unconfigured);
}

#[test]
fn without_a_machine_its_requests_are_refused() {
    let monitor = Monitor::start();
    let mut daemon = monitor.daemon();
    let job = JobId("j1".to_owned());
    for request in [
        Request::Start,
        Request::Pause,
        Request::Resume,
        Request::PowerButton,
        Request::JobStatus { job: job.clone() },
        Request::CancelJob { job },
    ] {
        assert_eq!(failed(daemon.ask(request)).id(), WrongState::ID);
    }
    daemon.done(Request::Stop);
    monitor.join();
}

#[test]
fn a_machine_that_cannot_be_leaves_nothing_behind() {
    if !super::harness::have_kvm() {
        return;
    }
    let monitor = Monitor::start();
    let mut daemon = monitor.daemon();
    let (config, fds) = monitor.machine(b"this is no kernel", 1);

    let mut wrong = config.clone();
    wrong.cpus = 17;
    let reply = daemon.ask_with(Request::Configure(Box::new(wrong)), &fds);
    assert_eq!(failed(reply).id(), BadConfig::ID);

    let reply = daemon.ask_with(Request::Configure(Box::new(config.clone())), &fds[..2]);
    let seen = failed(reply);
    assert_eq!(seen.id(), BuildFailed::ID);
    assert!(seen.find(DescriptorMissing::ID).is_some());

    let reply = daemon.ask_with(Request::Configure(Box::new(config)), &fds);
    assert_eq!(failed(reply).id(), BuildFailed::ID);

    let Reply::Status(status) = daemon.ask(Request::Status) else {
        panic!("no status");
    };
    assert_eq!(status.state, RunState::Unconfigured);
}

#[test]
fn a_new_connection_replaces_the_old_one() {
    let monitor = Monitor::start();
    let old = monitor.daemon();
    let mut new = monitor.daemon();
    assert!(old.receive().is_none(), "the old one was not closed");
    assert!(matches!(new.ask(Request::Status), Reply::Status(_)));
}

/// What a migration looks at before its pause.
#[test]
fn only_a_daemon_that_has_said_hello_and_is_there_hears() {
    let monitor = Monitor::start();
    assert!(!monitor.mailbox.is_heard());
    let until = |heard| {
        let end = Instant::now() + PATIENCE;
        while monitor.mailbox.is_heard() != heard {
            assert!(Instant::now() < end, "never so: {heard}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let mut daemon = monitor.connect();
    failed(daemon.ask(Request::Hello { version: 999 }));
    assert!(!monitor.mailbox.is_heard());
    let daemon = monitor.daemon();
    until(true);
    drop(daemon);
    until(false);
    let _replaced = monitor.daemon();
    until(true);
    let _silent = monitor.connect();
    until(false);
}

#[test]
fn observations_wait_for_a_daemon() {
    let monitor = Monitor::start();
    monitor.mailbox.observe(note("first"));
    let mut daemon = monitor.connect();
    // Not before the hello.
    std::thread::sleep(Duration::from_millis(50));
    assert!(matches!(
        daemon.ask(Request::Hello {
            version: PROTOCOL_VERSION
        }),
        Reply::Hello { .. }
    ));
    let event = daemon.event(|event| matches!(event, Event::Observed(_)));
    assert_eq!(event, Event::Observed(observed(&event)));
    assert!(observed(&event).text().contains("first"));
    drop(daemon);
    monitor.mailbox.observe(note("second"));
    let mut daemon = monitor.daemon();
    let event = daemon.event(|event| matches!(event, Event::Observed(_)));
    assert!(observed(&event).text().contains("second"));
}

/// What was on its way to a daemon that went is its own; all else the next one hears, each once.
#[test]
fn events_that_a_slow_daemon_did_not_take_are_told_to_the_next() {
    let monitor = Monitor::start();
    let first = monitor.daemon();
    let long = "x".repeat(2000);
    for number in 0..1000 {
        monitor.mailbox.observe(note(&format!("{number} {long}")));
    }
    std::thread::sleep(Duration::from_millis(200));
    let mut second = monitor.daemon();
    let mut heard = Vec::new();
    while let Some(packet) = first.receive() {
        let Body::Event(event) = packet.body else {
            panic!("{packet:?}");
        };
        heard.push(event);
    }
    assert!((10..990).contains(&heard.len()), "{}", heard.len());
    while heard.len() < 1000 {
        heard.push(second.event(|_| true));
    }
    for (number, event) in heard.iter().enumerate() {
        let seen = observed(event);
        let asked = seen.datum("asked").unwrap().as_str().unwrap();
        assert!(
            asked.starts_with(&format!("{number} ")),
            "{number}: {asked:.9}"
        );
    }
}

#[test]
fn too_many_observations_are_counted() {
    let monitor = Monitor::start();
    for number in 0..MAILBOX_CAPACITY + 10 {
        monitor.mailbox.observe(note(&number.to_string()));
    }
    let mut daemon = monitor.daemon();
    let first = daemon.event(|_| true);
    assert_eq!(observed(&first).id(), ObservationsDropped::ID);
    assert_eq!(observed(&first).datum("count").unwrap(), 10);
    for _ in 0..MAILBOX_CAPACITY {
        daemon.event(|event| matches!(event, Event::Observed(_)));
    }
}

fn observed(event: &Event) -> Observation {
    match event {
        Event::Observed(seen) => seen.clone(),
        other => panic!("{other:?}"),
    }
}
