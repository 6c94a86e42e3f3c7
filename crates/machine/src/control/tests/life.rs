//! Guests from their start to their end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use strake_api::control::{
    DiskConfig, Event, ExitReason, FdIndex, ImageConfig, KeepConfig, Reply, Request, RunState,
};
use strake_api::job::{Ceiling, JobId, LimitsChange, MigrationLimits, Phase, Progress, Suspend};

use strake_observe::Kind;

use super::guests::{chatter, elf, jump_into_nothing, power_off, reset, say, spin, triple_fault};
use super::harness::{Daemon, Monitor, PATIENCE, have_kvm};

fn configured(kernel: &[u8], cpus: u8) -> Option<(Monitor, Daemon)> {
    if !have_kvm() {
        return None;
    }
    let monitor = Monitor::start();
    let mut daemon = monitor.daemon();
    let (config, fds) = monitor.machine(kernel, cpus);
    let reply = daemon.ask_with(Request::Configure(Box::new(config)), &fds);
    assert!(matches!(reply, Reply::Done), "{reply:?}");
    Some((monitor, daemon))
}

/// Why it ended; a daemon that did not ask for the end says that it knows.
fn exited(daemon: &mut Daemon) -> ExitReason {
    let reason = heard_end(daemon);
    if reason != ExitReason::Stopped {
        daemon.done(Request::Dismiss);
    }
    reason
}

fn heard_end(daemon: &mut Daemon) -> ExitReason {
    match daemon.event(|event| matches!(event, Event::State(RunState::Exited(_)))) {
        Event::State(RunState::Exited(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

fn state(daemon: &mut Daemon) -> RunState {
    match daemon.ask(Request::Status) {
        Reply::Status(status) => status.state,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_speaks_and_powers_off() {
    let kernel = elf(&[say("hello from a guest\n"), power_off()]);
    let Some((monitor, mut daemon)) = configured(&kernel, 1) else {
        return;
    };
    assert_eq!(state(&mut daemon), RunState::Built);
    daemon.done(Request::Start);
    assert_eq!(exited(&mut daemon), ExitReason::GuestPowerOff);
    monitor.wait_for_console("hello from a guest\n");
    assert_eq!(monitor.join(), ExitReason::GuestPowerOff);
}

#[test]
fn resets_are_told_whatever_their_way() {
    for way in [reset(), triple_fault()] {
        let Some((monitor, mut daemon)) = configured(&elf(&[way]), 2) else {
            return;
        };
        daemon.done(Request::Start);
        assert_eq!(exited(&mut daemon), ExitReason::GuestReset);
        assert_eq!(monitor.join(), ExitReason::GuestReset);
    }
}

#[test]
fn a_guest_that_cannot_go_on_fails_with_its_registers() {
    let Some((monitor, mut daemon)) = configured(&elf(&[jump_into_nothing()]), 2) else {
        return;
    };
    daemon.done(Request::Start);
    let ExitReason::Failed(seen) = exited(&mut daemon) else {
        panic!("it went on");
    };
    assert_eq!(seen.id(), strake_kvm::observations::RunFailed::ID);
    let registers = seen.datum("registers").unwrap();
    assert_eq!(registers["rip"], "0xd0000000", "{registers}");
    monitor.join();
}

#[test]
fn a_pause_stops_the_guest_and_a_resume_lets_it_go_on() {
    let Some((monitor, mut daemon)) = configured(&elf(&[chatter()]), 1) else {
        return;
    };
    daemon.done(Request::Start);
    monitor.wait_for_console(".....");
    for _ in 0..20 {
        daemon.done(Request::Pause);
        assert_eq!(state(&mut daemon), RunState::Paused);
        daemon.done(Request::Pause);
        // What was said before the pause may still be on its way to the log.
        std::thread::sleep(Duration::from_millis(20));
        let before = monitor.console().len();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(monitor.console().len(), before);
        daemon.done(Request::Resume);
        assert_eq!(state(&mut daemon), RunState::Running);
        let end = Instant::now() + PATIENCE;
        while monitor.console().len() == before {
            assert!(Instant::now() < end, "it does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    daemon.done(Request::Stop);
    assert_eq!(exited(&mut daemon), ExitReason::Stopped);
    monitor.join();
}

#[test]
fn a_guest_that_never_exits_is_stopped() {
    let Some((monitor, mut daemon)) = configured(&elf(&[spin()]), 4) else {
        return;
    };
    daemon.done(Request::Start);
    daemon.done(Request::Pause);
    daemon.done(Request::Resume);
    daemon.done(Request::Stop);
    assert_eq!(exited(&mut daemon), ExitReason::Stopped);
    monitor.join();
}

#[test]
fn a_guest_that_was_never_started_is_stopped() {
    let Some((monitor, mut daemon)) = configured(&elf(&[spin()]), 2) else {
        return;
    };
    daemon.done(Request::Stop);
    assert_eq!(exited(&mut daemon), ExitReason::Stopped);
    monitor.join();
}

#[test]
fn the_end_of_a_guest_waits_for_a_daemon() {
    let kernel = elf(&[say("bye\n"), power_off()]);
    let Some((monitor, mut daemon)) = configured(&kernel, 1) else {
        return;
    };
    daemon.done(Request::Start);
    drop(daemon);
    monitor.wait_for_console("bye");
    std::thread::sleep(Duration::from_millis(100));
    let mut daemon = monitor.daemon();
    assert_eq!(exited(&mut daemon), ExitReason::GuestPowerOff);
    monitor.join();
}

/// A daemon that dies over the news has not taken note of it.
#[test]
fn the_end_of_a_guest_is_told_until_a_daemon_has_taken_note() {
    let kernel = elf(&[say("bye\n"), reset()]);
    let Some((monitor, mut daemon)) = configured(&kernel, 1) else {
        return;
    };
    assert!(matches!(daemon.ask(Request::Dismiss), Reply::Failed(_)));
    daemon.done(Request::Start);
    for _ in 0..3 {
        assert_eq!(heard_end(&mut daemon), ExitReason::GuestReset);
        drop(daemon);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!monitor.has_ended());
        daemon = monitor.daemon();
    }
    assert_eq!(state(&mut daemon), RunState::Exited(ExitReason::GuestReset));
    assert_eq!(exited(&mut daemon), ExitReason::GuestReset);
    assert_eq!(monitor.join(), ExitReason::GuestReset);
}

#[test]
fn a_signal_ends_a_monitor_that_nobody_dismisses() {
    let kernel = elf(&[say("bye\n"), power_off()]);
    for heard in [false, true] {
        let Some((mut monitor, mut daemon)) = configured(&kernel, 1) else {
            return;
        };
        daemon.done(Request::Start);
        if heard {
            heard_end(&mut daemon);
        }
        drop(daemon);
        monitor.wait_for_console("bye");
        std::thread::sleep(Duration::from_millis(100));
        assert!(!monitor.has_ended());
        monitor.terminate();
        assert_eq!(monitor.join(), ExitReason::GuestPowerOff);
    }
}

#[test]
fn a_signal_ends_a_guest_that_runs_without_daemon() {
    let Some((mut monitor, mut daemon)) = configured(&elf(&[chatter()]), 1) else {
        return;
    };
    daemon.done(Request::Start);
    drop(daemon);
    monitor.terminate();
    assert_eq!(monitor.join(), ExitReason::Stopped);
}

#[test]
fn a_console_reads_and_writes_and_a_slow_one_holds_up_nobody() {
    let Some((monitor, mut daemon)) = configured(&elf(&[chatter()]), 1) else {
        return;
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_slow, never_read) = UnixStream::pair().unwrap();
    for stream in [theirs, never_read] {
        let reply = daemon.ask_with(
            Request::AttachConsole { stream: FdIndex(0) },
            &[stream.into()],
        );
        assert!(matches!(reply, Reply::Done), "{reply:?}");
    }
    daemon.done(Request::Start);
    let mut seen = [0; 16];
    let mut ours = ours;
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"................");
    ours.write_all(b"typed").unwrap();
    // The one that does not read has long lost output: the guest goes on.
    let end = Instant::now() + PATIENCE;
    while monitor.console().len() < 100_000 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
        let mut drain = [0; 65536];
        let _ = ours.read(&mut drain);
    }
    daemon.done(Request::Stop);
    exited(&mut daemon);
    monitor.join();
}

/// A disk of 4 MiB with something in it, and an empty destination.
fn with_disk(cpus: u8) -> Option<(Monitor, Daemon)> {
    if !have_kvm() {
        return None;
    }
    let monitor = Monitor::start();
    let mut daemon = monitor.daemon();
    let (mut config, mut fds) = monitor.machine(&elf(&[chatter()]), cpus);
    let image = monitor.file("source.raw", &vec![0x5a; 4 << 20]);
    config.disks.push(DiskConfig {
        name: "root".to_owned(),
        slot: 1,
        image: ImageConfig::Raw {
            file: FdIndex(4),
            path: "source.raw".to_owned(),
        },
        read_only: false,
        serial: "test-root".to_owned(),
        queues: 1,
        limits: strake_api::control::DiskLimits::default(),
    });
    fds.push(read_write(&image).into());
    let reply = daemon.ask_with(Request::Configure(Box::new(config)), &fds);
    assert!(matches!(reply, Reply::Done), "{reply:?}");
    daemon.done(Request::Start);
    Some((monitor, daemon))
}

fn read_write(path: &std::path::Path) -> std::fs::File {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

/// Asks for the migration `j1` to a new destination called `name`.
fn migrate(monitor: &Monitor, daemon: &mut Daemon, name: &str, suspend: Suspend) -> Reply {
    let destination = monitor.file(&format!("{name}.raw"), b"");
    let destination = read_write(&destination);
    destination.set_len(4 << 20).unwrap();
    let journal = read_write(&monitor.file(&format!("{name}.journal"), b""));
    daemon.ask_with(
        Request::MigrateDisk {
            job: JobId("j1".to_owned()),
            disk: "root".to_owned(),
            destination: ImageConfig::Raw {
                file: FdIndex(0),
                path: format!("{name}.raw"),
            },
            keep: None,
            journal: FdIndex(1),
            limits: MigrationLimits {
                suspend,
                ..Default::default()
            },
        },
        &[destination.into(), journal.into()],
    )
}

#[test]
fn a_job_is_paused_resumed_and_limited_and_interrupted_by_the_end_of_its_vm() {
    let Some((monitor, mut daemon)) = with_disk(1) else {
        return;
    };
    let job = JobId("j1".to_owned());
    let file = |name: &str, size: u64| {
        let file = read_write(&monitor.file(name, b""));
        file.set_len(size).unwrap();
        file
    };
    let kept = file("kept", 0);
    let ask = |keep: KeepConfig, daemon: &mut Daemon| {
        let fds = [
            file("to.raw", 4 << 20).into(),
            file("to.journal", 0).into(),
            kept.try_clone().unwrap().into(),
        ];
        let request = Request::MigrateDisk {
            job: job.clone(),
            disk: "root".to_owned(),
            destination: ImageConfig::Raw {
                file: FdIndex(0),
                path: "to.raw".to_owned(),
            },
            journal: FdIndex(1),
            limits: MigrationLimits {
                bytes_per_second: Some(1),
                ..MigrationLimits::default()
            },
            keep: Some(keep),
        };
        daemon.ask_with(request, &fds)
    };
    // Only before the guest runs.
    let reply = ask(KeepConfig::Again(FdIndex(2)), &mut daemon);
    let Reply::Failed(seen) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!(seen.id(), "machine.wrong-state");
    let reply = ask(KeepConfig::New(FdIndex(2)), &mut daemon);
    assert!(matches!(reply, Reply::Done), "{reply:?}");
    let end = Instant::now() + PATIENCE;
    while kept.metadata().unwrap().len() == 0 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(kept.metadata().unwrap().len() > 0);
    let progress = |request: Request, daemon: &mut Daemon| {
        daemon.done(request);
        match daemon.ask(Request::JobStatus { job: job.clone() }) {
            Reply::Job(status) => status.progress,
            other => panic!("{other:?}"),
        }
    };
    let paused = progress(Request::PauseJob { job: job.clone() }, &mut daemon);
    assert_eq!(paused, Progress::Paused);
    let on = progress(Request::ResumeJob { job: job.clone() }, &mut daemon);
    assert_eq!(on, Progress::On);
    daemon.done(Request::SetJob {
        job: job.clone(),
        change: LimitsChange {
            bytes_per_second: Some(Ceiling::At(2)),
            ..LimitsChange::default()
        },
    });
    daemon.done(Request::Stop);
    assert_eq!(ended(&mut daemon).phase, Phase::Interrupted);
    exited(&mut daemon);
    monitor.join();
}

fn awaits(event: &Event) -> bool {
    matches!(event, Event::JobAwaitsCommit { .. })
}

fn ended(daemon: &mut Daemon) -> strake_api::job::MigrationStatus {
    match daemon.event(|event| matches!(event, Event::JobEnded(_))) {
        Event::JobEnded(status) => status,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_migration_waits_for_the_daemon_that_comes_back() {
    for suspend in [Suspend::Disk, Suspend::Vm] {
        let Some((monitor, mut daemon)) = with_disk(2) else {
            return;
        };
        let reply = migrate(&monitor, &mut daemon, "first", suspend);
        assert!(matches!(reply, Reply::Done), "{reply:?}");
        daemon.event(awaits);
        // Twice the daemon dies without an answer; the question is asked each time anew.
        for _ in 0..2 {
            drop(daemon);
            daemon = monitor.daemon();
            let Event::JobAwaitsCommit { job } = daemon.event(awaits) else {
                panic!("another event");
            };
            assert_eq!(job.0, "j1");
        }
        assert!(matches!(
            migrate(&monitor, &mut daemon, "second", suspend),
            Reply::Failed(_)
        ));
        daemon.done(Request::JobDecision {
            job: JobId("j1".to_owned()),
            committed: true,
        });
        let status = ended(&mut daemon);
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
        // The guest goes on.
        let before = monitor.console().len();
        let end = Instant::now() + PATIENCE;
        while monitor.console().len() == before {
            assert!(Instant::now() < end, "it does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
        daemon.done(Request::Stop);
        exited(&mut daemon);
        let copied = std::fs::read(monitor.directory.path().join("first.raw")).unwrap();
        assert!(copied == vec![0x5a; 4 << 20], "the copy differs");
        monitor.join();
    }
}

#[test]
fn a_migration_that_is_not_committed_stays_on_its_source() {
    let Some((monitor, mut daemon)) = with_disk(1) else {
        return;
    };
    migrate(&monitor, &mut daemon, "first", Suspend::Vm);
    daemon.event(awaits);
    daemon.done(Request::JobDecision {
        job: JobId("j1".to_owned()),
        committed: false,
    });
    assert_ne!(ended(&mut daemon).phase, Phase::Completed);
    let Reply::Job(status) = daemon.ask(Request::JobStatus {
        job: JobId("j1".to_owned()),
    }) else {
        panic!("no status");
    };
    assert!(status.phase.is_final());
    daemon.done(Request::Stop);
    exited(&mut daemon);
    monitor.join();
}
