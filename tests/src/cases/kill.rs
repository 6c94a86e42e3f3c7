//! `kill -9` of the daemon and of the monitor, at chosen and at random instants of a migration:
//! just one image is the disk, nothing that the guest flushed is lost, and the next attempt works.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::Value;
use strake_host::CRASH_POINTS;

use super::power::{OwnTap, booted_anew, reset};
use crate::check;
use crate::failure::{Failure, Outcome, While};
use crate::host::Host;
use crate::load::{Stamps, verify_image};
use crate::process::{self, signal_pid, wait_until};
use crate::runner::Test;
use crate::vm::{Shape, Vm};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "daemon-killed-at-each-point-of-a-migration",
        run: daemon_at_points,
    },
    Test {
        name: "daemon-killed-at-each-point-of-a-start",
        run: daemon_at_start,
    },
    Test {
        name: "daemon-killed-while-a-guest-resets",
        run: daemon_at_reset,
    },
    Test {
        name: "daemon-killed-at-random-instants",
        run: daemon_at_random,
    },
    Test {
        name: "monitor-killed-during-a-migration",
        run: monitor_killed,
    },
];

/// The crash points that a start passes.
const OF_A_START: &[&str] = &[
    "before-spawn",
    "after-spawn",
    "after-configure",
    "after-start",
];

/// The crash points that the reset of a guest passes before it starts again.
const OF_A_RESET: &[&str] = &["after-exit-recorded", "before-restart"];

/// Crash points of fast restarts, snapshots, interrupted jobs and profiles, which the daemon's own
/// tests walk with a monitor that stands in (`crates/straked/tests`).
const ELSEWHERE: &[&str] = &[
    "before-successor",
    "after-successor-spawned",
    "after-successor-built",
    "after-handed-over",
    "before-handover-commit",
    "after-handover-commit",
    "after-take-over",
    "after-socket-renamed",
    "before-handover-end",
    "after-job-taken-up",
    "after-merge",
    "after-merge-committed",
    "after-snapshot-forgotten",
    "after-layer-removal",
    "within-steering",
    "before-steering-commit",
    "after-steering-commit",
];

/// The methods of migration take turns: whoever is killed, each has to come through.
fn method(round: usize) -> &'static str {
    if round.is_multiple_of(2) {
        "mirror"
    } else {
        "dirty"
    }
}

/// All others lie on the way of a migration.
fn of_a_migration(point: &str) -> bool {
    ![OF_A_START, OF_A_RESET, ELSEWHERE]
        .concat()
        .contains(&point)
}

/// The store that the disk is not on.
fn other_store(host: &Host, vm: &Vm) -> Outcome<&'static str> {
    Ok(if vm.image(host)?.starts_with(host.store("a")) {
        "b"
    } else {
        "a"
    })
}

fn jobs(host: &Host) -> Outcome<Vec<Value>> {
    Ok(host
        .json(&["jobs", "ls"])?
        .as_array()
        .cloned()
        .unwrap_or_default())
}

fn phase(job: &Value) -> &str {
    job.pointer("/status/phase")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The phases after which nothing more happens.
const FINAL: &[&str] = &["completed", "failed", "cancelled"];

/// Those, and the one of a job whose VM has ended before it.
const AT_REST: &[&str] = &["completed", "failed", "cancelled", "interrupted"];

/// Every job has come to an end, and the stores hold the disk's image and nothing else that looks
/// like one, unless a completed job left its source there.
fn settled(host: &Host, vm: &Vm) -> Outcome {
    settled_as(host, vm, FINAL)
}

/// Every job is in one of the phases, and the disk's image is there.
fn settled_as(host: &Host, vm: &Vm, phases: &[&str]) -> Outcome {
    let mut seen = Vec::new();
    wait_until("every job has ended", Duration::from_secs(90), || {
        seen = jobs(host)?;
        Ok(seen.iter().all(|job| phases.contains(&phase(job))))
    })
    .map_err(|failure| Failure::new(format!("{failure}; jobs: {seen:?}")))?;
    let image = vm.image(host)?;
    check!(
        image.exists(),
        "the binding names {}, which does not exist",
        image.display()
    );
    Ok(())
}

/// Removes what completed migrations left at their sources, so that the next one may go there.
fn forget_sources(host: &Host, vm: &Vm) -> Outcome {
    let image = vm.image(host)?;
    for store in ["a", "b"] {
        for entry in fs::read_dir(host.store(store))?.flatten() {
            if entry.path() != image {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

fn daemon_at_points(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(&mut host, Shape::default())?;
    let stamps = Stamps::start(vm.guest(), "--rate 20")?;
    let monitor = vm.pid(&host)?;
    let points = CRASH_POINTS.iter().filter(|point| of_a_migration(point));
    for (round, point) in points.enumerate() {
        daemon_at_point(&mut host, &vm, &stamps, point, method(round))
            .and_then(|()| {
                check!(vm.pid(&host)? == monitor, "the monitor was replaced");
                Ok(())
            })
            .doing(format!("killed {point}"))?;
    }
    let to = other_store(&host, &vm)?;
    vm.migrate(&host, to).doing("the last migration")?;
    stamps.end()?;
    vm.shut_down(&host)?;
    verify_image(&vm.image(&host)?).map(drop)
}

/// One migration with a daemon that dies at the point. That the next attempt works is shown by
/// the next point's, which has to come as far as that.
fn daemon_at_point(
    host: &mut Host,
    vm: &Vm,
    stamps: &Stamps,
    point: &str,
    method: &str,
) -> Outcome {
    host.kill_daemon();
    host.start_daemon(&[("STRAKE_CRASH_AT", point)])?;
    let to = other_store(host, vm)?;
    let known: BTreeSet<String> = jobs(host)?.iter().map(Value::to_string).collect();
    // Only a source that is to be removed, or a job that fails, passes the last points.
    let cancels = point.contains("destination-removal");
    let more: &[&str] = if cancels {
        &["--rate", "2M"]
    } else if point.contains("source-removal") {
        &["--remove-source"]
    } else {
        &[]
    };
    let more = [&["--method", method], more].concat();
    let client = vm.migrate_in_background(host, to, &more)?;
    if cancels {
        wait_until(
            "the migration is under way",
            Duration::from_secs(20),
            || {
                Ok(jobs(host)?
                    .iter()
                    .any(|job| !known.contains(&job.to_string())))
            },
        )?;
        let all = jobs(host)?;
        let job = all
            .iter()
            .find(|job| phase(job) == "copying" || phase(job) == "preparing")
            .and_then(|job| job.pointer("/status/job")?.as_str())
            .ok_or_else(|| Failure::new(format!("no job runs: {all:?}")))?;
        // The daemon may die of it before it answers.
        let _ = host.strake(&["jobs", "cancel", job])?;
    }
    host.daemon_ends(Duration::from_secs(90))?;
    stamps.lives_without_daemon()?;
    host.start_daemon(&[])?;
    // The client found the daemon again, or says that it did not; both are well.
    client.wait(Duration::from_secs(90))?;
    settled(host, vm)?;
    stamps.go_on()?;
    forget_sources(host, vm)
}

fn daemon_at_start(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::new("vm", 1, Shape::default());
    vm.create(&host)?;
    for point in OF_A_START {
        host.kill_daemon();
        host.start_daemon(&[("STRAKE_CRASH_AT", point)])?;
        let client = host.in_background(&["start", "vm"])?;
        host.daemon_ends(Duration::from_secs(60))
            .doing(format!("killed {point}"))?;
        let _ = client.wait(Duration::from_secs(60));
        host.start_daemon(&[])?;
        wait_until("the VM runs or is stopped", Duration::from_secs(30), || {
            Ok(["running", "stopped", "failed"].contains(&vm.state(&host)?.as_str()))
        })
        .doing(format!("killed {point}"))?;
        if vm.state(&host)? != "running" {
            vm.start(&mut host)
                .doing(format!("the next start after a kill {point}"))?;
        }
        host.knows_monitor(vm.pid(&host)?);
        vm.force_off(&host)?;
    }
    vm.start(&mut host)?;
    vm.wait_for_guest(&host)?;
    vm.force_off(&host)
}

/// A guest that wanted to start again does so under the next daemon, and one that wanted to end
/// has ended.
fn daemon_at_reset(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::new("vm", 1, Shape::default());
    let _tap = OwnTap::make(&vm.tap())?;
    vm.create(&host)?;
    vm.start(&mut host)?;
    vm.wait_for_guest(&host)?;
    for point in OF_A_RESET {
        host.kill_daemon();
        host.start_daemon(&[("STRAKE_CRASH_AT", point)])?;
        reset(vm.guest())?;
        host.daemon_ends(Duration::from_secs(60))
            .and_then(|()| host.start_daemon(&[]))
            .and_then(|()| booted_anew(vm.guest()))
            .doing(format!("killed {point}"))?;
        host.knows_monitor(vm.pid(&host)?);
    }
    host.kill_daemon();
    host.start_daemon(&[("STRAKE_CRASH_AT", "after-exit-recorded")])?;
    let _ = vm.guest().ask(
        "(sleep 1; poweroff -f) >/dev/null 2>&1 &",
        Duration::from_secs(20),
    );
    host.daemon_ends(Duration::from_secs(60))?;
    host.start_daemon(&[])?;
    wait_until("the VM is stopped", Duration::from_secs(60), || {
        Ok(vm.state(&host)? == "stopped")
    })
}

fn daemon_at_random(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(&mut host, Shape::default())?;
    let stamps = Stamps::start(vm.guest(), "--rate 20")?;
    for round in 0..4 {
        let to = other_store(&host, &vm)?;
        let how = ["--method", method(round), "--rate", "20M"];
        let client = vm.migrate_in_background(&host, to, &how)?;
        let instant = random_below(4000);
        thread::sleep(Duration::from_millis(instant));
        host.kill_daemon();
        stamps.lives_without_daemon()?;
        host.start_daemon(&[])?;
        client.wait(Duration::from_secs(120))?;
        settled(&host, &vm).doing(format!("round {round}, killed after {instant} ms"))?;
        stamps.go_on()?;
        forget_sources(&host, &vm)?;
    }
    stamps.end()?;
    vm.shut_down(&host)?;
    verify_image(&vm.image(&host)?).map(drop)
}

fn monitor_killed(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::new("vm", 1, Shape::default());
    vm.create(&host)?;
    for round in 0..2 {
        vm.start(&mut host)?;
        vm.wait_for_guest(&host)?;
        let _stamps = Stamps::start(vm.guest(), "--rate 40 --checkpoint 1")?;
        let to = other_store(&host, &vm)?;
        let monitor = vm.pid(&host)?;
        let how = ["--method", method(round), "--rate", "4M"];
        let client = vm.migrate_in_background(&host, to, &how)?;
        // Once in the middle for sure, and once at any instant.
        let instant = if round == 0 {
            wait_until("the copy is under way", Duration::from_secs(60), || {
                Ok(jobs(&host)?.iter().any(|job| phase(job) == "copying"))
            })?;
            0
        } else {
            random_below(4000)
        };
        thread::sleep(Duration::from_millis(instant));
        signal_pid(monitor, Signal::KILL);
        let said = client.wait(Duration::from_secs(60))?;
        wait_until(
            "the VM is known to have failed",
            Duration::from_secs(30),
            || Ok(["failed", "stopped"].contains(&vm.state(&host)?.as_str())),
        )?;
        check!(!process::exists(monitor), "the monitor survived");
        let killed = || format!("killed after {instant} ms, {said:?}");
        settled_as(&host, &vm, AT_REST).doing(killed())?;
        verify_image(&vm.image(&host)?).doing(killed())?;
        // An interrupted job goes on with the VM's next start.
        vm.start(&mut host)?;
        vm.wait_for_guest(&host)?;
        settled(&host, &vm).doing(killed())?;
        let image = vm.image(&host)?;
        check!(
            round != 0 || image.starts_with(host.store(to)),
            "the job did not go on: the disk is on {}",
            image.display()
        );
        vm.force_off(&host)?;
        verify_image(&image).doing(killed())?;
        forget_sources(&host, &vm)?;
    }
    vm.start(&mut host)?;
    vm.wait_for_guest(&host)?;
    let stamps = Stamps::start(vm.guest(), "")?;
    let to = other_store(&host, &vm)?;
    vm.migrate(&host, to)?;
    stamps.end()?;
    vm.shut_down(&host)?;
    verify_image(&vm.image(&host)?).map(drop)
}

/// Not reproducible, and meant so: each run tries other instants, and a failure names its own.
fn random_below(limit: u64) -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::from(now.subsec_micros()) % limit
}
