//! `strake console` and `strake logs`: in pipes, on a terminal, and when streams end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Answer, FakeDaemon, Step, Terminal, not_found, observation, ok, refusal, signal, vm};
use rustix::process::Signal;
use strake_api::control::ExitReason;
use strake_api::rest::VmState;

/// A running VM with this console, which stays.
fn with_console(steps: &'static [Step]) -> FakeDaemon {
    FakeDaemon::new(move |asked| match asked.line().as_str() {
        "POST /v1/vms/web1/console" => Answer::Console(steps.to_vec()),
        "GET /v1/vms/web1" => ok(vm("web1", VmState::Running)),
        _ => not_found(),
    })
}

#[test]
fn a_pipe_goes_both_ways_and_ends_with_the_vm() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "POST /v1/vms/web1/console" => Answer::Console(vec![
            Step::Say(b"login: "),
            Step::Hear(b"root\n\x1dx"),
            Step::Say(b"welcome\n"),
        ]),
        "GET /v1/vms/web1" => ok(vm("web1", VmState::Stopped)),
        _ => not_found(),
    });
    let mut child = daemon.spawn(&["console", "web1"]);
    // Ctrl-] is a byte like any other in a pipe.
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"root\n\x1dx")
        .unwrap();
    let done = common::done(child.wait_with_output().unwrap()).ok();
    assert_eq!(done.out, "login: welcome\n");
    assert_eq!(daemon.heard(), b"root\n\x1dx");
    assert!(done.err.contains("web1 powered off"), "{}", done.err);
}

#[test]
fn the_escape_key_leaves_and_restores_the_terminal() {
    let daemon = with_console(&[Step::Say(b"login: "), Step::Stay]);
    let mut terminal = Terminal::run(&mut daemon.command(&["console", "web1"]));
    terminal.wait_for("login: ");
    assert!(!terminal.cooked());
    terminal.type_keys(b"ab\x1dcd");
    assert_eq!(terminal.end(), Some(0));
    assert!(terminal.cooked());
    terminal.wait_for("web1 keeps running");
}

#[test]
fn keys_reach_the_guest_untouched() {
    let daemon = with_console(&[
        Step::Say(b"$ "),
        Step::Hear(b"\x03\x1a\r"),
        Step::Say(b"got it"),
        Step::Stay,
    ]);
    let mut terminal = Terminal::run(&mut daemon.command(&["console", "web1"]));
    terminal.wait_for("$ ");
    // Ctrl-C and Ctrl-Z are the guest's.
    terminal.type_keys(b"\x03\x1a\r");
    terminal.wait_for("got it");
    terminal.type_keys(b"\x1d");
    assert_eq!(terminal.end(), Some(0));
    assert_eq!(daemon.heard(), b"\x03\x1a\r");
}

#[test]
fn every_signal_restores_the_terminal() {
    for kind in [Signal::TERM, Signal::HUP, Signal::QUIT, Signal::INT] {
        let daemon = with_console(&[Step::Say(b"login: "), Step::Stay]);
        let mut terminal = Terminal::run(&mut daemon.command(&["console", "web1"]));
        terminal.wait_for("login: ");
        assert!(!terminal.cooked());
        signal(&terminal.child, kind);
        assert_eq!(terminal.end(), Some(130), "{kind:?}");
        assert!(terminal.cooked(), "{kind:?}");
    }
}

#[test]
fn a_vm_that_ends_restores_the_terminal() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "POST /v1/vms/web1/console" => {
            Answer::Console(vec![Step::Say(b"login: "), Step::Hear(b"x")])
        }
        "GET /v1/vms/web1" => ok(vm("web1", VmState::Stopped)),
        _ => not_found(),
    });
    let mut terminal = Terminal::run(&mut daemon.command(&["console", "web1"]));
    terminal.wait_for("login: ");
    terminal.type_keys(b"x");
    assert_eq!(terminal.end(), Some(0));
    assert!(terminal.cooked());
    terminal.wait_for("powered off");
}

#[test]
fn a_failed_vm_shows_its_tree() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "POST /v1/vms/web1/console" => Answer::Console(vec![Step::Say(b"oops")]),
        "GET /v1/vms/web1" => {
            let mut failed = vm("web1", VmState::Failed);
            failed.last_exit = Some(ExitReason::Failed(observation()));
            ok(failed)
        }
        _ => not_found(),
    });
    let done = daemon.run(&["console", "web1"]);
    assert_eq!(done.code, Some(1));
    assert_eq!(done.out, "oops");
    assert!(done.err.contains("web1 ended by a failure"), "{}", done.err);
    assert!(done.err.contains("ENOSPC"), "{}", done.err);
}

#[test]
fn a_reset_or_a_restarted_daemon_is_attached_again() {
    let attached = AtomicUsize::new(0);
    let asked_for = AtomicUsize::new(0);
    let daemon = FakeDaemon::new(move |asked| match asked.line().as_str() {
        "POST /v1/vms/web1/console" => match attached.fetch_add(1, Ordering::Relaxed) {
            0 => Answer::Console(vec![Step::Say(b"first ")]),
            // The new monitor is not there yet.
            1 => refusal(409),
            _ => Answer::Console(vec![Step::Say(b"second")]),
        },
        "GET /v1/vms/web1" => match asked_for.fetch_add(1, Ordering::Relaxed) {
            0 => {
                let mut reset = vm("web1", VmState::Stopped);
                reset.last_exit = Some(ExitReason::GuestReset);
                ok(reset)
            }
            1 => ok(vm("web1", VmState::Running)),
            _ => ok(vm("web1", VmState::Stopped)),
        },
        _ => not_found(),
    });
    let done = daemon.run(&["console", "web1"]).ok();
    assert_eq!(done.out, "first second");
}

#[test]
fn a_refused_console_touches_no_terminal() {
    let daemon = FakeDaemon::new(|_| refusal(409));
    let mut terminal = Terminal::run(&mut daemon.command(&["console", "web1"]));
    assert_eq!(terminal.end(), Some(1));
    assert!(terminal.cooked());
    terminal.wait_for("host.refused");
}

#[test]
fn colours_follow_the_terminal_and_no_color() {
    let daemon = FakeDaemon::new(|_| refusal(409));
    let mut colourful = Terminal::run(&mut daemon.command(&["start", "web1"]));
    colourful.end();
    colourful.wait_for("\x1b[31merror:");
    let mut plain = Terminal::run(daemon.command(&["start", "web1"]).env("NO_COLOR", "1"));
    plain.end();
    plain.wait_for("remedy: free space");
    assert!(!plain.screen().contains('\x1b'), "{}", plain.screen());
}

#[test]
fn logs_print_all_or_the_last_lines() {
    let daemon = FakeDaemon::new(|asked| match asked.path.as_str() {
        "/v1/vms/web1/log" => Answer::Bytes(b"a\nb\nc\n".to_vec()),
        "/v1/vms/web1/log?tail=65536" => {
            // Longer than asked for: there may be more lines before.
            let mut log = vec![b'x'; 65_530];
            log.extend(b"\nb\nc\nd");
            Answer::Bytes(log)
        }
        "/v1/vms/web1/log?tail=524288" => Answer::Bytes(b"0\n1\n2\n3\n4\n".to_vec()),
        _ => not_found(),
    });
    assert_eq!(daemon.run(&["logs", "web1"]).ok().out, "a\nb\nc\n");
    assert_eq!(
        daemon.run(&["logs", "web1", "--tail", "2"]).ok().out,
        "c\nd"
    );
    assert_eq!(
        daemon.run(&["logs", "web1", "--tail", "5"]).ok().out,
        "0\n1\n2\n3\n4\n"
    );
    assert_eq!(daemon.run(&["logs", "web1", "--tail", "0"]).ok().out, "");
}

#[test]
fn following_goes_from_the_log_to_the_console_without_a_repetition() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "GET /v1/vms/web1" => ok(vm("web1", VmState::Running)),
        "POST /v1/vms/web1/console" => Answer::Console(vec![
            Step::Say(b"line 2\nline"),
            Step::Say(b" 3\n"),
            Step::Stay,
        ]),
        "GET /v1/vms/web1/log" => Answer::Bytes(b"line 1\nline 2\nli".to_vec()),
        _ => not_found(),
    });
    let mut terminal = Terminal::run(&mut daemon.command(&["logs", "web1", "--follow"]));
    terminal.wait_for("line 1\r\nline 2\r\nline 3\r\n");
    // Only the output is followed: the terminal is the user's own.
    assert!(terminal.cooked());
    signal(&terminal.child, Signal::INT);
    assert_eq!(terminal.end(), Some(130));
    assert_eq!(terminal.screen().matches("line 2").count(), 1);
}

#[test]
fn following_a_stopped_vm_ends() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "GET /v1/vms/web1" => ok(vm("web1", VmState::Stopped)),
        "GET /v1/vms/web1/log" => Answer::Bytes(b"bye\n".to_vec()),
        _ => not_found(),
    });
    assert_eq!(daemon.run(&["logs", "web1", "-f"]).ok().out, "bye\n");
}
