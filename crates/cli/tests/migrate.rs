//! `strake disk migrate` and `strake jobs wait`: progress, the end, Ctrl-C, a daemon that goes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::{Answer, FakeDaemon, Terminal, job, not_found, ok, signal};
use rustix::process::Signal;
use serde_json::json;
use strake_api::job::Phase;

const MIGRATE: [&str; 6] = ["disk", "migrate", "web1", "root", "--to", "fast"];

/// A daemon whose job goes through `phases`, one at each question, and stays in the last.
fn going_through(phases: &'static [Phase]) -> FakeDaemon {
    let asked_for = AtomicUsize::new(0);
    FakeDaemon::new(move |asked| match asked.line().as_str() {
        "POST /v1/vms/web1/disks/root/migrate" => ok(job(Phase::Preparing)),
        "GET /v1/jobs/j1" => {
            let at = asked_for.fetch_add(1, Ordering::Relaxed);
            ok(job(phases[at.min(phases.len() - 1)]))
        }
        _ => not_found(),
    })
}

#[test]
fn a_migration_ends_with_its_passes_and_its_pause() {
    let daemon = going_through(&[Phase::Preparing, Phase::Copying, Phase::Completed]);
    let done = daemon.run(&MIGRATE).ok();
    assert_eq!(
        done.out,
        "\
PASS   PLANNED      READ   WRITTEN    TIME   DIRTY AFTER
   1  1.00 GiB  1.00 GiB   512 MiB  700 ms      5.00 MiB
   2  5.00 MiB  5.00 MiB  2.50 MiB  700 ms  in the pause
disk root of web1 is on fast: /fast/web1-root.raw; pause 38.2 ms, 1.50 s in all
"
    );
    // Quiet in a pipe.
    assert_eq!(done.err, "");
}

#[test]
fn the_limits_are_sent() {
    let daemon = going_through(&[Phase::Completed]);
    let mut args = MIGRATE.to_vec();
    args.extend([
        "--pause-ms",
        "50",
        "--rate",
        "100M",
        "--suspend",
        "vm",
        "--method",
        "mirror",
        "--remove-source",
    ]);
    args.extend(["--detach"]);
    let done = daemon.run(&args).ok();
    assert_eq!(done.out, "j1\n");
    assert_eq!(
        daemon.asked()[0].body,
        json!({
            "to": "fast",
            "limits": {
                "pause_ms": 50, "bytes_per_second": 104_857_600, "max_passes": 64, "suspend": "vm",
                "method": "mirror"
            },
            "remove_source": true
        })
    );
    assert_eq!(daemon.asked().len(), 1, "--detach must not watch");
}

#[test]
fn json_is_the_final_job() {
    let daemon = going_through(&[Phase::Copying, Phase::Completed]);
    let mut args = MIGRATE.to_vec();
    args.push("--json");
    let job = daemon.run(&args).ok().json();
    assert_eq!(job["status"]["phase"], "completed");
    assert_eq!(job["status"]["pause_ms"], 38.25);
}

#[test]
fn a_failed_migration_shows_why_and_where_the_disk_is() {
    let daemon = going_through(&[Phase::Copying, Phase::Failed]);
    let done = daemon.run(&MIGRATE);
    assert_eq!(done.code, Some(1));
    assert!(
        done.err.contains("it stays, whole, on /slow/web1-root.raw"),
        "{}",
        done.err
    );
    assert!(
        done.err
            .contains("pwrite on /fast/root.raw: no space (ENOSPC)"),
        "{}",
        done.err
    );
    assert!(
        done.err
            .contains("seen by strake-vmm web1 (pid 8), thread copier"),
        "{}",
        done.err
    );
}

#[test]
fn a_cancelled_migration_is_a_failure_of_the_one_who_waits() {
    let daemon = going_through(&[Phase::Cancelled]);
    let done = daemon.run(&["jobs", "wait", "j1"]);
    assert_eq!(done.code, Some(1));
    assert!(done.err.contains("cli.migration-cancelled"), "{}", done.err);
}

#[test]
fn a_terminal_sees_progress_and_no_trace_of_it_at_the_end() {
    let end = Arc::new(AtomicBool::new(false));
    let ended = end.clone();
    let daemon = FakeDaemon::new(move |asked| match asked.line().as_str() {
        "POST /v1/vms/web1/disks/root/migrate" => ok(job(Phase::Preparing)),
        "GET /v1/jobs/j1" if ended.load(Ordering::Relaxed) => ok(job(Phase::Completed)),
        "GET /v1/jobs/j1" => ok(job(Phase::Copying)),
        _ => not_found(),
    });
    let mut terminal = Terminal::run(&mut daemon.command(&MIGRATE));
    terminal.wait_for("pass 1, 256 MiB/1.00 GiB, ");
    end.store(true, Ordering::Relaxed);
    assert_eq!(terminal.end(), Some(0));
    terminal.wait_for("1.50 s in all");
}

#[test]
fn ctrl_c_leaves_the_job_alone_and_says_how_to_go_on() {
    let daemon = going_through(&[Phase::Copying]);
    let child = daemon.spawn(&MIGRATE);
    daemon.wait_for("GET /v1/jobs/j1", 2);
    signal(&child, Signal::INT);
    let done = common::done(child.wait_with_output().unwrap());
    assert_eq!(done.code, Some(130));
    assert!(done.err.contains("job j1 continues"), "{}", done.err);
    assert!(done.err.contains("strake jobs wait j1"), "{}", done.err);
    assert!(done.err.contains("strake jobs cancel j1"), "{}", done.err);
    assert!(!daemon.lines().iter().any(|line| line.contains("cancel")));
}

#[test]
fn a_daemon_that_restarts_is_waited_for() {
    let end = Arc::new(AtomicBool::new(false));
    let ended = end.clone();
    let mut daemon = FakeDaemon::new(move |asked| match asked.line().as_str() {
        "POST /v1/vms/web1/disks/root/migrate" => ok(job(Phase::Preparing)),
        "GET /v1/jobs/j1" if ended.load(Ordering::Relaxed) => ok(job(Phase::Completed)),
        "GET /v1/jobs/j1" => ok(job(Phase::Copying)),
        _ => not_found(),
    });
    let mut terminal = Terminal::run(&mut daemon.command(&MIGRATE));
    terminal.wait_for("pass 1");
    daemon.stop();
    terminal.wait_for("the daemon is away");
    end.store(true, Ordering::Relaxed);
    daemon.resume();
    assert_eq!(terminal.end(), Some(0));
    terminal.wait_for("the daemon is back");
    terminal.wait_for("disk root of web1 is on fast");
}

#[test]
fn a_daemon_that_stays_away_is_told_after_a_bounded_time() {
    let daemon = Arc::new(Mutex::new(going_through(&[Phase::Copying])));
    let mut args = MIGRATE.to_vec();
    args.extend(["--patience", "1"]);
    let child = daemon.lock().unwrap().spawn(&args);
    daemon.lock().unwrap().wait_for("GET /v1/jobs/j1", 1);
    daemon.lock().unwrap().stop();
    let done = common::done(child.wait_with_output().unwrap());
    assert_eq!(done.code, Some(3), "{done:?}");
    assert!(
        done.err.contains("job j1 goes on in the VM's monitor"),
        "{}",
        done.err
    );
    assert!(done.err.contains("strake jobs wait j1"), "{}", done.err);
    assert!(done.err.contains("cli.daemon-unreachable"), "{}", done.err);
}

#[test]
fn a_daemon_that_hangs_is_told_after_the_same_time() {
    let daemon = FakeDaemon::new(|asked| match asked.method.as_str() {
        "POST" => ok(job(Phase::Preparing)),
        _ => Answer::Hang,
    });
    let mut args = MIGRATE.to_vec();
    args.extend(["--patience", "1"]);
    let done = daemon.run(&args);
    assert_eq!(done.code, Some(3), "{done:?}");
    assert!(done.err.contains("cli.daemon-gone"), "{}", done.err);
}

#[test]
fn a_refused_migration_is_not_watched() {
    let daemon = FakeDaemon::new(|_| common::refusal(409));
    let done = daemon.run(&MIGRATE);
    assert_eq!(done.code, Some(1));
    assert_eq!(daemon.lines(), ["POST /v1/vms/web1/disks/root/migrate"]);
}

#[test]
fn ctrl_c_before_the_job_has_a_name_is_told_too() {
    let daemon = FakeDaemon::new(|_| Answer::Hang);
    let child = daemon.spawn(&MIGRATE);
    daemon.wait_for("POST /v1/vms/web1/disks/root/migrate", 1);
    signal(&child, Signal::INT);
    let done = common::done(child.wait_with_output().unwrap());
    assert_eq!(done.code, Some(130));
    assert!(done.err.contains("strake jobs ls"), "{}", done.err);
}
