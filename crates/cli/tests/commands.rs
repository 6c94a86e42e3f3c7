//! Every command that is one request and one answer, against a scripted daemon.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use common::{Answer, FakeDaemon, Step, job, not_found, ok, refusal, store, strake, vm};
use serde_json::json;
use strake_api::job::Phase;
use strake_api::rest::VmState;
use strake_observe::{Recorded, State};

/// A daemon with one running and one stopped VM that grants everything.
fn granting() -> FakeDaemon {
    FakeDaemon::new(|asked| match asked.line().as_str() {
        "GET /v1/host" => ok(common::host()),
        "GET /v1/vms" => ok([vm("web1", VmState::Running), vm("db", VmState::Stopped)]),
        "POST /v1/vms" => {
            let name = asked.body["name"].as_str().unwrap();
            ok(vm(name, VmState::Stopped))
        }
        "GET /v1/vms/web1" => ok(vm("web1", VmState::Running)),
        "POST /v1/vms/web1/start" => ok(vm("web1", VmState::Running)),
        "POST /v1/vms/web1/stop" => ok(vm("web1", VmState::Stopped)),
        "POST /v1/vms/web1/restart" => ok(json!({
            "vm": vm("web1", VmState::Running),
            "pause_us": asked.body["fast"].as_bool().unwrap().then_some(1234),
            "old_pid": 4242,
            "old_version": "0.1.0",
            "new_version": "0.2.0",
        })),
        "DELETE /v1/vms/web1?disks=keep" | "DELETE /v1/vms/web1?disks=delete" => {
            Answer::Json(204, json!(null))
        }
        "GET /v1/datastores" => {
            let mut broken = store("far");
            broken.size_bytes = None;
            broken.free_bytes = None;
            broken.problem = Some(common::observation());
            ok([store("fast"), broken])
        }
        "POST /v1/datastores" => {
            let mut made = store(asked.body["name"].as_str().unwrap());
            made.path = asked.body["path"].as_str().unwrap().to_owned();
            ok(made)
        }
        "DELETE /v1/datastores/fast" => Answer::Json(204, json!(null)),
        "GET /v1/jobs" => ok([job(Phase::Copying), job(Phase::Failed)]),
        "GET /v1/jobs/j1" => ok(job(Phase::Failed)),
        "POST /v1/jobs/j1/cancel" | "POST /v1/jobs/j1/pause" | "POST /v1/jobs/j1/resume" => {
            ok(job(Phase::Copying))
        }
        "POST /v1/jobs/j1/set" => {
            let change: strake_api::job::LimitsChange =
                serde_json::from_value(asked.body.clone()).unwrap();
            let mut job = job(Phase::Copying);
            change.apply(&mut job.limits);
            ok(job)
        }
        "GET /v1/observations?since=7" => ok([
            Recorded {
                seq: 8,
                state: State::Open,
                observation: common::observation(),
            },
            Recorded {
                seq: 9,
                state: State::Cleared {
                    by: "try again".into(),
                },
                observation: common::observation(),
            },
        ]),
        _ => not_found(),
    })
}

#[test]
fn ps_lists_vms() {
    let daemon = granting();
    let done = daemon.run(&["ps"]).ok();
    assert_eq!(
        done.out,
        "\
NAME  STATE    CPUS    MEMORY   PID     UPTIME  DISKS
web1  running     2  1.00 GiB  4711  1 min 1 s  root
db    stopped     2  1.00 GiB     -          -  root
"
    );
    assert_eq!(done.err, "");
    let json = daemon.run(&["ps", "--json"]).ok().json();
    assert_eq!(json[0]["name"], "web1");
    assert_eq!(json[1]["state"], "stopped");
}

#[test]
fn show_tells_everything() {
    let daemon = granting();
    let done = daemon.run(&["show", "web1"]).ok();
    for text in [
        "state     running",
        "boot      from disk",
        "/slow/web1-root.raw",
        "4.00 GiB",
    ] {
        assert!(done.out.contains(text), "{text}: {}", done.out);
    }
    let json = daemon.run(&["--json", "show", "web1"]).ok().json();
    assert_eq!(json["disks"][0]["datastore"], "slow");
}

#[test]
fn create_sends_the_spec() {
    let daemon = granting();
    let file = daemon.dir().join("web1.toml");
    std::fs::write(&file, "cpus = 4\nmemory = \"2G\"\n[boot]\nfrom = \"disk\"\n[[disk]]\nname = \"root\"\nimage = \"fast:a.raw\"\n").unwrap();
    let done = daemon
        .run(&["create", "web1", "-f", file.to_str().unwrap()])
        .ok();
    assert_eq!(
        done.out,
        "web1 created; start it with `strake start web1`\n"
    );
    let asked = daemon.asked();
    assert_eq!(asked[0].body["name"], "web1");
    assert_eq!(asked[0].body["spec"]["cpus"], 4);
    assert_eq!(asked[0].body["spec"]["memory"], "2G");
    assert_eq!(asked[0].body["spec"]["disk"][0]["image"], "fast:a.raw");
}

#[test]
fn a_wrong_spec_is_refused_before_the_daemon_is_asked() {
    let daemon = granting();
    let file = daemon.dir().join("bad.toml");
    std::fs::write(
        &file,
        "cpus = 4\nmemroy = \"2G\"\n[boot]\nfrom = \"disk\"\n",
    )
    .unwrap();
    let done = daemon.run(&["create", "web1", "-f", file.to_str().unwrap()]);
    assert_eq!(done.code, Some(1));
    assert!(done.err.contains("bad.toml"), "{}", done.err);
    assert!(
        done.err.contains('2') && done.err.contains("memroy"),
        "{}",
        done.err
    );
    assert!(done.err.contains("remedy: "), "{}", done.err);
    assert!(daemon.asked().is_empty());
    let done = daemon.run(&["create", "web1", "-f", "/nonexistent.toml"]);
    assert_eq!(done.code, Some(1));
    assert!(done.err.contains("cli.spec-unreadable"), "{}", done.err);
    assert!(done.err.contains("ENOENT"), "{}", done.err);
}

#[test]
fn start_stop_and_rm() {
    let daemon = granting();
    assert_eq!(
        daemon.run(&["start", "web1"]).ok().out,
        "web1 runs (pid 4711)\n"
    );
    let stopped = daemon.run(&["stop", "web1", "--timeout", "9"]).ok();
    assert_eq!(stopped.out, "web1 stopped\n");
    daemon.run(&["stop", "web1", "--force"]).ok();
    assert_eq!(daemon.run(&["rm", "web1"]).ok().out, "web1 removed\n");
    let json = daemon.run(&["rm", "web1", "--delete-disks", "--json"]).ok();
    assert_eq!(json.json()["disks_deleted"], true);
    let asked = daemon.asked();
    assert_eq!(asked[1].body, json!({ "force": false, "timeout_s": 9 }));
    assert_eq!(asked[2].body, json!({ "force": true, "timeout_s": null }));
    assert_eq!(asked[3].line(), "DELETE /v1/vms/web1?disks=keep");
    assert_eq!(asked[4].line(), "DELETE /v1/vms/web1?disks=delete");
}

#[test]
fn restart_and_upgrade() {
    let daemon = granting();
    let moved = "web1 runs in a new monitor (pid 4242 -> 4711, 0.1.0 -> 0.2.0); its guest stood \
                 still for 1.23 ms\n";
    assert_eq!(daemon.run(&["restart", "web1", "--fast"]).ok().out, moved);
    let rebooted = daemon.run(&["restart", "web1", "--timeout", "9"]).ok();
    assert_eq!(rebooted.out, "web1 runs (pid 4711)\n");
    let wrong = daemon.run(&["restart", "web1", "--fast", "--force"]);
    assert_eq!(wrong.code, Some(2));
    let asked = daemon.asked();
    let body = |fast, timeout| json!({ "fast": fast, "force": false, "timeout_s": timeout });
    assert_eq!(asked[0].body, body(true, json!(null)));
    assert_eq!(asked[1].body, body(false, json!(9)));
    let planned = daemon.run(&["upgrade", "--dry-run"]).ok();
    assert_eq!(planned.out, "web1 would be restarted fast\n");
    let done = daemon.run(&["upgrade", "--parallel", "3"]).ok();
    assert_eq!(done.out, "1 VMs run in monitors of the installed version\n");
    let json = daemon.run(&["upgrade", "--json"]).ok().json();
    assert_eq!(json[0]["pause_us"], 1234);
}

#[test]
fn an_upgrade_stops_at_the_first_failure() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "GET /v1/vms" => ok(["a", "b", "c"].map(|name| vm(name, VmState::Running))),
        "POST /v1/vms/a/restart" => ok(json!({
            "vm": vm("a", VmState::Running), "pause_us": 1, "old_pid": 1,
            "old_version": null, "new_version": "1",
        })),
        _ => not_found(),
    });
    let failed = daemon.run(&["upgrade"]);
    assert_eq!(failed.code, Some(1));
    assert!(failed.err.contains("stopped at b"), "{}", failed.err);
    assert!(failed.err.contains("1 VMs run"), "{}", failed.err);
    assert!(failed.err.contains("1 were not begun"), "{}", failed.err);
    let asked: Vec<String> = daemon.asked().iter().map(|asked| asked.line()).collect();
    assert!(!asked.contains(&"POST /v1/vms/c/restart".to_owned()));
}

#[test]
fn datastores() {
    let daemon = granting();
    let done = daemon.run(&["datastore", "ls"]).ok();
    assert!(
        done.out
            .contains("fast  100 GiB  40.0 GiB      1  /fast  ok"),
        "{}",
        done.out
    );
    assert!(
        done.out.contains("the daemon refuses 'web1': pwrite"),
        "{}",
        done.out
    );
    let added = daemon
        .command(&["datastore", "add", "new", "some/dir"])
        .current_dir("/tmp")
        .output()
        .unwrap();
    assert!(added.status.success());
    assert_eq!(
        daemon.asked()[1].body,
        json!({ "name": "new", "path": "/tmp/some/dir" })
    );
    let done = daemon.run(&["datastore", "rm", "fast"]).ok();
    assert!(done.out.contains("its files stay"));
}

#[test]
fn jobs() {
    let daemon = granting();
    let done = daemon.run(&["jobs", "ls"]).ok();
    let line =
        "j1   web1  root  fast  pass 1, 256 MiB/1.00 GiB, 366 MiB/s, 768 MiB left, pause ~40 ms";
    assert!(done.out.contains(line), "{}", done.out);
    let done = daemon.run(&["jobs", "show", "j1"]).ok();
    assert!(done.out.contains("DIRTY AFTER"), "{}", done.out);
    assert!(done.out.contains("ENOSPC"), "{}", done.out);
    let done = daemon.run(&["jobs", "cancel", "j1"]).ok();
    assert!(
        done.out.contains("the disk stays on /slow/web1-root.raw"),
        "{}",
        done.out
    );
    let done = daemon.run(&["jobs", "pause", "j1"]).ok();
    assert_eq!(done.out, "job j1 rests\n");
    let done = daemon.run(&["jobs", "resume", "j1"]).ok();
    assert_eq!(done.out, "job j1 goes on\n");
    let set = [
        "jobs",
        "set",
        "j1",
        "--rate",
        "50M",
        "--latency-ms",
        "2.5",
        "--pause-ms",
        "9",
    ];
    let done = daemon.run(&set).ok();
    assert_eq!(
        done.out,
        "job j1: pause 9 ms, 50.0 MiB/s, guest latency 2.500 ms\n"
    );
    let done = daemon.run(&["jobs", "set", "j1"]);
    assert_eq!(done.code, Some(2), "{}", done.err);
    let done = daemon.run(&["jobs", "show", "no/such"]);
    assert_eq!(done.code, Some(1));
    assert_eq!(daemon.lines().last().unwrap(), "GET /v1/jobs/no%2Fsuch");
}

#[test]
fn observations_open_and_cleared() {
    let daemon = granting();
    let done = daemon.run(&["observations", "--since", "7"]).ok();
    assert!(
        done.out
            .starts_with("#8 2026-11-23 08:45:31Z\nerror: the daemon"),
        "{}",
        done.out
    );
    assert!(done.out.contains("remedy: free space"), "{}", done.out);
    assert!(
        done.out
            .contains("#9 2026-11-23 08:45:31Z cleared by 'try again': "),
        "{}",
        done.out
    );
}

#[test]
fn run_makes_a_spec_and_starts_it() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "GET /v1/vms" => ok([vm("disk", VmState::Stopped)]),
        "POST /v1/vms" | "POST /v1/vms/disk-2/start" => ok(vm("disk-2", VmState::Running)),
        _ => not_found(),
    });
    let image = daemon.dir().join("disk.raw");
    std::fs::write(&image, b"x").unwrap();
    let image = image.to_str().unwrap();
    let done = daemon
        .run(&[
            "run",
            image,
            "--cpus",
            "2",
            "--memory",
            "512M",
            "--kernel",
            "/boot/k",
            "--initrd",
            "/boot/i",
            "--append",
            "root=/dev/vda1",
            "--tap",
            "tap0",
            "--detach",
        ])
        .ok();
    assert_eq!(done.out, "disk-2 runs (pid 4711)\n");
    assert_eq!(
        daemon.asked()[1].body,
        json!({
            "name": "disk-2",
            "spec": {
                "cpus": 2,
                "memory": "512M",
                "boot": {
                    "from": "kernel", "kernel": "/boot/k", "initrd": "/boot/i",
                    "cmdline": "console=ttyS0 root=/dev/vda1"
                },
                "disk": [{ "name": "root", "image": image, "read-only": false }],
                "nic": [{ "name": "net0", "tap": "tap0" }]
            }
        })
    );
}

#[test]
fn run_leaves_nothing_behind_if_the_start_fails() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "GET /v1/vms" => ok(json!([])),
        "POST /v1/vms" => ok(vm("a", VmState::Stopped)),
        "POST /v1/vms/a/start" => refusal(409),
        "DELETE /v1/vms/a?disks=keep" => Answer::Json(204, json!(null)),
        _ => not_found(),
    });
    let done = daemon.run(&["run", "fast:a.raw", "--detach"]);
    assert_eq!(done.code, Some(1));
    assert!(done.err.contains("ENOSPC"), "{}", done.err);
    assert_eq!(
        daemon.lines().last().unwrap(),
        "DELETE /v1/vms/a?disks=keep"
    );
}

#[test]
fn run_shows_the_console_from_the_first_byte_to_power_off() {
    let daemon = FakeDaemon::new(|asked| match asked.line().as_str() {
        "GET /v1/vms" => ok(json!([])),
        "POST /v1/vms" => ok(vm("a", VmState::Stopped)),
        "POST /v1/vms/a/start" => ok(vm("a", VmState::Running)),
        // `wo` is in both: it was written between the attachment and the reading of the log.
        "POST /v1/vms/a/console" => Answer::Console(vec![Step::Say(b"world\n")]),
        "GET /v1/vms/a/log" => Answer::Bytes(b"hello wo".to_vec()),
        "GET /v1/vms/a" => ok(vm("a", VmState::Stopped)),
        _ => not_found(),
    });
    let done = daemon.run(&["run", "fast:a.raw"]).ok();
    assert_eq!(done.out, "hello world\n");
    assert!(done.err.contains("a powered off"), "{}", done.err);
}

#[test]
fn a_refusal_is_drawn_as_a_tree() {
    let daemon = FakeDaemon::new(|_| refusal(409));
    let done = daemon.run(&["start", "web1"]);
    assert_eq!(done.code, Some(1));
    assert_eq!(done.out, "");
    assert_eq!(
        done.err,
        "\
error: the daemon refuses 'web1' [host.refused]
  remedy: do it otherwise
  └─ pwrite on /fast/root.raw: no space (ENOSPC) [os.call-failed]
     seen by strake-vmm web1 (pid 8), thread copier
     remedy: free space on that file system
"
    );
}

#[test]
fn a_refusal_with_json_is_the_problem_document() {
    let daemon = FakeDaemon::new(|_| refusal(409));
    let done = daemon.run(&["start", "web1", "--json"]);
    assert_eq!(done.code, Some(1));
    assert_eq!(done.err, "");
    let problem = done.json();
    assert_eq!(problem["type"], "tag:strake,2026:host.refused");
    assert_eq!(problem["status"], 409);
    assert_eq!(problem["detail"], "do it otherwise");
    assert_eq!(problem["observation"]["causes"][0]["id"], "os.call-failed");
}

#[test]
fn answers_that_are_none_are_told_as_such() {
    let strange = FakeDaemon::new(|_| Answer::Json(500, json!("\u{1b}[2Jwhat?")));
    let done = strange.run(&["ps"]);
    assert_eq!(done.code, Some(1));
    assert!(
        done.err.contains("cli.answer-not-understood"),
        "{}",
        done.err
    );
    assert!(!done.err.contains('\x1b'), "{}", done.err);
    let newer = FakeDaemon::new(|_| ok(json!({ "vms": [] })));
    let done = newer.run(&["ps"]);
    assert_eq!(done.code, Some(1));
    assert!(done.err.contains("strake doctor"), "{}", done.err);
}

#[test]
fn no_daemon_is_exit_code_3() {
    for args in [
        &["ps"][..],
        &["start", "a"],
        &["console", "a"],
        &["logs", "a"],
        &["disk", "migrate", "a", "b", "--to", "c"],
        &["jobs", "ls"],
        &["datastore", "ls"],
        &["observations"],
    ] {
        let done = common::done(
            strake()
                .args(args)
                .args(["--socket", "/nonexistent/straked.sock"])
                .output()
                .unwrap(),
        );
        assert_eq!(done.code, Some(3), "{args:?}: {done:?}");
        assert!(
            done.err.contains("cli.daemon-unreachable"),
            "{args:?}: {done:?}"
        );
        assert!(
            done.err.contains("remedy: start it (`straked`)"),
            "{args:?}: {done:?}"
        );
    }
}

#[test]
fn a_daemon_that_dies_in_the_middle_is_exit_code_3() {
    let daemon = FakeDaemon::new(|_| Answer::Break);
    let done = daemon.run(&["start", "web1"]);
    assert_eq!(done.code, Some(3));
    assert!(done.err.contains("cli.connection-lost"), "{}", done.err);
}

#[test]
fn ctrl_c_says_that_the_daemon_may_go_on() {
    let daemon = FakeDaemon::new(|_| Answer::Hang);
    let child = daemon.spawn(&["stop", "web1"]);
    daemon.wait_for("POST /v1/vms/web1/stop", 1);
    common::signal(&child, rustix::process::Signal::INT);
    let done = common::done(child.wait_with_output().unwrap());
    assert_eq!(done.code, Some(130));
    assert!(done.err.contains("may already be doing"), "{}", done.err);
}

#[test]
fn a_closed_pipe_is_no_failure_to_talk_about() {
    let daemon = granting();
    let mut child = daemon.spawn(&["ps"]);
    drop(child.stdout.take());
    let done = common::done(child.wait_with_output().unwrap());
    assert_eq!(done.code, Some(141));
    assert_eq!(done.err, "");
}

#[test]
fn doctor_works_with_and_without_a_daemon() {
    let daemon = granting();
    let state = daemon.dir().join("state");
    let state = state.to_str().unwrap();
    // Whether this host is fit is its own; the report must be whole either way.
    let with = daemon.run(&["doctor", "--json", "--state-dir", state]);
    let report = with.json();
    assert_eq!(with.code, Some(i32::from(report["fit"] == false)));
    let find = |report: &serde_json::Value, name: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks
            .iter()
            .find(|check| check["name"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(find(&report, "daemon")["result"], "ok");
    assert_eq!(find(&report, "daemon")["data"]["daemon"]["pid"], 4242);
    assert!(find(&report, "kvm")["result"].is_string());
    let without = common::done(
        strake()
            .args(["doctor", "--json", "--socket", "/nonexistent.sock"])
            .output()
            .unwrap(),
    );
    let daemon = find(&without.json(), "daemon");
    assert_eq!(daemon["result"], "limited");
    assert_eq!(daemon["problem"]["id"], "cli.daemon-unreachable");
}
