//! The connection against a monitor in a thread, and real processes.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use strake_api::control::{Body, Event, Packet, Reply, Request, RunState};
use strake_observe::Observation;

use super::connection::{Connection, Incoming, QUICK};
use super::packet;
use super::process::Process;
use super::spawn;
use crate::observations::NoSuchVm;

/// Serves one connection: `answer` gives the packets that follow a request.
fn monitor(path: &Path, answer: impl Fn(Request) -> Option<Vec<Body>> + Send + 'static) {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 1).unwrap();
    std::thread::spawn(move || {
        let peer: OwnedFd = accept_with(&socket, SocketFlags::CLOEXEC).unwrap();
        let mut buffer = Vec::new();
        while let Ok(Some(received)) = packet::receive(&peer, &mut buffer) {
            let Body::Request(request) = received.packet.body else {
                panic!("the daemon sends requests only");
            };
            let Some(bodies) = answer(request) else {
                return;
            };
            for body in bodies {
                let id = match body {
                    Body::Event(_) => 0,
                    _ => received.packet.id,
                };
                packet::send(&peer, &Packet { id, body }, &[]).unwrap();
            }
        }
    });
}

fn hello(version: u32) -> Body {
    Body::Reply(Reply::Hello {
        version,
        monitor: "test".into(),
        vm: Some("web1".into()),
    })
}

fn leaf() -> Observation {
    NoSuchVm { vm: "x".into() }.into()
}

#[test]
fn replies_find_their_callers_and_events_their_channel() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    monitor(&path, |request| {
        Some(match request {
            Request::Hello { .. } => vec![hello(1)],
            Request::Pause => vec![
                Body::Event(Event::State(RunState::Paused)),
                Body::Reply(Reply::Done),
            ],
            Request::Resume => vec![Body::Reply(Reply::Failed(leaf()))],
            Request::Stop => return None,
            _ => vec![],
        })
    });
    let (connection, greeting, events) = Connection::open(&path).unwrap();
    assert_eq!(greeting.vm.as_deref(), Some("web1"));
    assert_eq!(greeting.pid, Some(std::process::id()));
    let call = |name, request, patience| connection.call(name, request, &[], patience);
    assert_eq!(call("pause", Request::Pause, QUICK).unwrap(), Reply::Done);
    assert!(matches!(
        events.next(),
        Incoming::Event(Event::State(RunState::Paused))
    ));
    let seen = call("resume", Request::Resume, QUICK).unwrap_err();
    assert_eq!(seen.id(), "host.monitor-refused");
    assert!(seen.find("host.no-such-vm").is_some());
    let seen = call("status", Request::Status, Duration::from_millis(50)).unwrap_err();
    assert_eq!(seen.id(), "host.monitor-silent");
    let seen = call("stop", Request::Stop, QUICK).unwrap_err();
    assert_eq!(seen.id(), "host.monitor-lost");
    assert!(matches!(events.next(), Incoming::Closed));
    let seen = call("status", Request::Status, QUICK).unwrap_err();
    assert_eq!(seen.id(), "host.monitor-lost");
}

#[test]
fn a_flood_of_events_holds_up_no_reply() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    monitor(&path, |request| {
        Some(match request {
            Request::Hello { .. } => vec![hello(1)],
            // More than anybody keeps, before the reply.
            Request::Status => {
                let seen = Body::Event(Event::Observed(leaf()));
                let mut bodies = vec![seen; 2000];
                bodies.push(Body::Event(Event::State(RunState::Paused)));
                bodies.push(Body::Reply(Reply::Done));
                bodies
            }
            _ => {
                let state = Body::Event(Event::State(RunState::Running));
                let mut bodies = vec![state; 2000];
                bodies.push(Body::Reply(Reply::Done));
                bodies
            }
        })
    });
    let (connection, _, events) = Connection::open(&path).unwrap();
    let reply = connection.call("status", Request::Status, &[], QUICK);
    assert_eq!(reply.unwrap(), Reply::Done);
    // Observations were dropped; what changes the state was not.
    let mut count = 0;
    loop {
        match events.next() {
            Incoming::Event(Event::Observed(_)) => count += 1,
            Incoming::Event(event) => {
                assert_eq!(event, Event::State(RunState::Paused));
                break;
            }
            Incoming::Closed => panic!("closed"),
        }
    }
    assert!((1..2000).contains(&count), "{count}");
    // A flood of events that count ends the connection, so that the state is asked for again.
    let seen = connection.call("pause", Request::Pause, &[], QUICK);
    assert_eq!(seen.unwrap_err().id(), "host.monitor-lost");
    while let Incoming::Event(_) = events.next() {}
}

#[test]
fn observations_of_a_monitor_are_of_bounded_depth() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    monitor(&path, |request| {
        Some(match request {
            Request::Hello { .. } => vec![hello(1)],
            _ => {
                let deep = (0..50).fold(leaf(), |seen, _| leaf().because(seen));
                vec![Body::Reply(Reply::Failed(deep))]
            }
        })
    });
    let (connection, _, _events) = Connection::open(&path).unwrap();
    let seen = connection
        .call("pause", Request::Pause, &[], QUICK)
        .unwrap_err();
    let mut depth = 0;
    let mut level = &seen;
    while let Some(cause) = level.causes().first() {
        level = cause;
        depth += 1;
    }
    assert_eq!(depth, 33);
}

#[test]
fn another_protocol_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    monitor(&path, |_| Some(vec![hello(7)]));
    let seen = Connection::open(&path).unwrap_err();
    assert_eq!(seen.id(), "host.monitor-mismatch");
    assert!(seen.text().contains("protocol 7"), "{seen}");
    assert!(Connection::open(&dir.path().join("none")).is_err());
}

#[test]
fn a_process_is_known_by_its_start_and_its_end_is_told() {
    let child = Command::new("sleep").arg("100").spawn().unwrap();
    let process = Process::hold(child.id(), Some(child)).unwrap();
    let (pid, started) = process.identity();
    assert!(!process.wait(Duration::from_millis(20)));
    assert!(Process::find(pid, started).unwrap().is_some());
    assert!(Process::find(pid, started + 1).unwrap().is_none());
    // Numbers that no process has.
    assert!(Process::find(0, started).unwrap().is_none());
    assert!(Process::find(u32::MAX, started).unwrap().is_none());
    process.kill();
    assert!(process.wait(Duration::from_secs(5)));
    assert_eq!(
        process.how_it_ended().unwrap().to_string(),
        "signal 9 (SIGKILL)"
    );
    assert!(Process::find(pid, started).unwrap().is_none());
    assert!(Process::hold(u32::MAX, None).is_err());
}

#[test]
fn a_spawned_monitor_has_its_socket_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, log) = (dir.path().join("s"), dir.path().join("log"));
    let program = dir.path().join("monitor");
    // Something that a careless program would leak.
    let leak = std::fs::File::open("/dev/null").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    std::fs::write(
        &program,
        "#!/bin/sh\nenv | grep -c SECRET\nls -l /proc/$$/fd\necho last >&2\n",
    )
    .unwrap();
    std::fs::set_permissions(
        &program,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let mut child = spawn::spawn(&program, "web1", &socket, &log).unwrap();
    child.wait().unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    let fds: Vec<&str> = text.lines().filter(|line| line.contains(" -> ")).collect();
    assert!(
        fds.iter().any(|line| line.contains(" 3 -> socket:")),
        "{text}"
    );
    // 0, 1, 2, 3 and the script itself, which the shell reads.
    assert!(fds.len() <= 5, "{text}");
    assert!(!fds.iter().any(|line| line.contains("SECRET")));
    assert!(spawn::last_words(&log).unwrap().ends_with("last"));
    assert!(!spawn::last_words(&log).unwrap().contains("straked starts"));
    let seen = spawn::spawn(Path::new("/no/such"), "x", &socket, &log).unwrap_err();
    assert_eq!(seen.id(), "host.monitor-not-spawned");
}

#[test]
fn the_last_word_of_one_who_left_without_listening_is_heard() {
    use rustix::net::socketpair;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let packet = |body| Packet { id: 0, body };
    packet::send(&ours, &packet(Body::Request(Request::Status)), &[]).unwrap();
    let word = packet(Body::Event(Event::State(RunState::Paused)));
    packet::send(&theirs, &word, &[]).unwrap();
    drop(theirs);
    let mut buffer = Vec::new();
    let heard = packet::receive(&ours, &mut buffer).unwrap().unwrap();
    assert_eq!(heard.packet, word);
    assert!(packet::receive(&ours, &mut buffer).unwrap().is_none());
}
