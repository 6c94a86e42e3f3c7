//! Profiles, values and labels through the daemon: what they change, what is refused, and what is
//! true after the daemon was killed in the middle of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod common;

use common::{World, monitor_log, soon};
use serde_json::{Value, json};
use strake_api::rest::Vm;
use strake_api::spec::Bytes;
use strake_api::steer::{EffectiveObject, ProfileSummary, ProfileText, SteerPlan, When};
use strake_profile::ExplainedSource;

const NOTHING: Value = Value::Null;

/// The body that applies profiles: each in a file of its own.
fn body(profiles: &[&str], plan: bool) -> Value {
    let files: Vec<Value> = profiles
        .iter()
        .enumerate()
        .map(|(index, text)| json!({ "file": format!("file{index}.toml"), "text": text }))
        .collect();
    json!({ "profiles": files, "plan": plan })
}

fn apply(world: &World, profiles: &[&str]) -> SteerPlan {
    world.ok("POST", "/v1/profiles", &body(profiles, false))
}

fn set(world: &World, values: &Value) -> SteerPlan {
    world.ok("POST", "/v1/vms/web1/set", &json!({ "values": values }))
}

fn names(world: &World) -> Vec<String> {
    let all: Vec<ProfileSummary> = world.ok("GET", "/v1/profiles", &NOTHING);
    all.into_iter().map(|profile| profile.name).collect()
}

/// A VM that leaves to profiles what it can.
fn create_open(world: &World) -> Vm {
    let mut body = world.vm_body("web1", "");
    let spec = body["spec"].as_object_mut().unwrap();
    spec.remove("cpus");
    spec.remove("memory");
    spec.insert("labels".to_owned(), json!({ "team": "web" }));
    world.ok("POST", "/v1/vms", &body)
}

fn told(plan: &SteerPlan) -> Vec<(String, String, String, When)> {
    let changes = plan.changes.iter();
    let of = |text: &str| text.to_owned();
    changes
        .map(|change| {
            (
                of(&change.object),
                of(&change.path),
                of(&change.shown),
                change.when,
            )
        })
        .collect()
}

const WEB: &str = "name = \"web\"\npriority = 10\n[match]\nlabels.team = \"web\"\n\
                   [set]\ncpus = 3\nmemory = \"128M\"\n[max]\ndisk.iops = 500\n";

#[test]
fn what_a_vm_does_not_say_its_profiles_do() {
    let world = World::new();
    let vm = create_open(&world);
    assert_eq!((vm.spec.cpus, vm.spec.memory), (1, Bytes(512 << 20)));
    assert_eq!((vm.own.cpus, vm.own.memory), (0, Bytes(0)));
    let plan: SteerPlan = world.ok("POST", "/v1/profiles", &body(&[WEB], true));
    assert!(!plan.applied && names(&world).is_empty());
    let next = When::NextStart;
    let of = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned(), next);
    let expected = [
        of("web1", "cpus", "1 → 3"),
        of("web1", "memory", "512M → 128M"),
        of("web1/root", "disk.iops", "– → 500/s"),
    ];
    assert_eq!(told(&plan), expected);
    let done = apply(&world, &[WEB]);
    assert!(done.applied);
    assert_eq!(told(&done), expected);
    assert_eq!(world.vm("web1").spec.cpus, 3);
    let all: Vec<EffectiveObject> = world.ok("GET", "/v1/vms/web1/effective", &NOTHING);
    let cpus = all[0]
        .values
        .iter()
        .find(|value| value.path == "cpus")
        .unwrap();
    assert_eq!(cpus.shown, "3");
    let [
        ExplainedSource::Profile {
            profile,
            line,
            file,
            ..
        },
    ] = &cpus.origin[..]
    else {
        panic!("{cpus:?}");
    };
    assert_eq!(
        (profile.as_str(), *line, file.as_str()),
        ("web", 6, "file0.toml")
    );
    assert_eq!(cpus.overrode.len(), 1);
    world.start("web1");
    let log = monitor_log(&world);
    assert!(
        log.contains("has 3 cpus") && log.contains("begins with Some(500)"),
        "{log}"
    );
    // The VM's own value beats the profile, until it is locked.
    set(&world, &json!({ "cpus": "2" }));
    assert_eq!(world.vm("web1").pending.len(), 1);
    let locked = WEB.replace("priority = 10", "priority = 10\nlocks = [\"cpus\"]");
    apply(&world, &[&locked]);
    assert!(world.vm("web1").pending.is_empty());
}

#[test]
fn live_values_reach_a_running_machine_and_the_others_wait() {
    let world = World::new();
    create_open(&world);
    world.start("web1");
    let plan = apply(&world, &[WEB]);
    let whens: Vec<When> = plan.changes.iter().map(|change| change.when).collect();
    assert_eq!(whens, [When::Reboot, When::Reboot, When::Now]);
    assert!(monitor_log(&world).contains("limits of root: Some(500) None"));
    let vm = world.vm("web1");
    assert_eq!((vm.spec.cpus, vm.spec.disks[0].iops), (1, Some(500)));
    let pending: Vec<_> = vm
        .pending
        .iter()
        .map(|change| change.path.as_str())
        .collect();
    assert_eq!(pending, ["cpus", "memory"]);
    let plan = set(
        &world,
        &json!({ "disk.root.bandwidth": "1M/s", "disk.root.iops": "100" }),
    );
    assert!(plan.changes.iter().all(|change| change.when == When::Now));
    assert!(monitor_log(&world).contains("limits of root: Some(100) Some(1048576)"));
    // A label decides which profiles there are.
    let body = json!({ "object": "web1", "labels": { "team": null } });
    let plan: SteerPlan = world.ok("POST", "/v1/labels", &body);
    assert_eq!(plan.changes[0].path, "labels.team");
    assert!(world.vm("web1").pending.is_empty());
    let body = json!({ "object": "web1", "labels": { "team": "web" } });
    let _: SteerPlan = world.ok("POST", "/v1/labels", &body);
    world.stop_by_force("web1");
    let vm = world.start("web1");
    assert_eq!((vm.spec.cpus, vm.pending.len()), (3, 0));
}

#[test]
fn a_conflict_is_refused_and_what_was_in_force_stays() {
    let world = World::new();
    create_open(&world);
    apply(&world, &[WEB]);
    let other = "name = \"other\"\npriority = 10\n[match]\nname = \"web*\"\n[set]\ncpus = 4\n";
    let plan: SteerPlan = world.ok("POST", "/v1/profiles", &body(&[other], true));
    assert_eq!(plan.conflicts.len(), 1);
    world.start("web1");
    let (status, seen) = world.refused("POST", "/v1/profiles", &body(&[other], false));
    assert_eq!(status, 409);
    assert!(seen.find("host.steering-refused").is_some());
    let why = seen
        .find("profile.contradiction")
        .unwrap()
        .text()
        .to_owned();
    assert!(
        why.contains("'web' (file0.toml:6)") && why.contains("'other'"),
        "{why}"
    );
    assert_eq!(names(&world), ["web"]);
    assert_eq!(world.vm("web1").spec.cpus, 3);
    // The same by the other ways: a label, a new VM.
    let other = "name = \"other\"\npriority = 10\n[match]\nlabels.team = true\nlabels.x = \"y\"\n\
                 [set]\ncpus = 4\n";
    let plan = apply(&world, &[other]);
    assert!(plan.warnings[0].id() == "profile.matches-nothing");
    let body = json!({ "object": "web1", "labels": { "x": "y" } });
    let (status, seen) = world.refused("POST", "/v1/labels", &body);
    assert!(status == 409 && seen.find("profile.contradiction").is_some());
    assert!(!world.vm("web1").own.labels.contains_key("x"));
    let mut body = world.vm_body("web2", "");
    body["spec"]["labels"] = json!({ "team": "web", "x": "y" });
    let (status, seen) = world.refused("POST", "/v1/vms", &body);
    assert!(status == 409 && seen.find("host.effective-conflict").is_some());
    assert!(!world.files("slow").contains(&"web2-root.raw".to_owned()));
}

#[test]
fn bad_requests_change_nothing() {
    let world = World::new();
    create_open(&world);
    for (text, id) in [
        (
            "name = \"a\"\npriority = 1\n[set]\ncpus = \"2G\"",
            "profile.bad-value",
        ),
        (
            "name = \"a\"\npriority = 1\n[set]\ncolour = 2",
            "profile.unknown-field",
        ),
        ("name = \"a\\u001b\"\npriority = 1", "profile.bad-name"),
        (
            "name = \"a\"\npriority = 1\n[set]\ndisk.image = \"x:y\"",
            "profile.field-not-steered",
        ),
    ] {
        let (status, seen) = world.refused("POST", "/v1/profiles", &body(&[text], false));
        assert_eq!(status, 422, "{seen}");
        assert!(seen.find(id).is_some(), "{seen}");
    }
    let twice = body(&[WEB, WEB], false);
    let (_, seen) = world.refused("POST", "/v1/profiles", &twice);
    assert!(seen.find("profile.duplicate-name").is_some());
    assert!(names(&world).is_empty());
    for values in [
        json!({ "cpus": "99" }),
        json!({ "cpu": "1" }),
        json!({ "disk.iops": "100" }),
        json!({ "disk.root.image": "fast:x.raw" }),
        json!({ "boot.disk": "root" }),
        json!({ "cpus": "2", "memory": "1" }),
    ] {
        let body = json!({ "values": values });
        let (status, seen) = world.refused("POST", "/v1/vms/web1/set", &body);
        assert_eq!(status, 422, "{values}");
        assert!(seen.find("host.value-refused").is_some(), "{seen}");
    }
    assert_eq!(world.vm("web1").revision, 1);
    let (status, _) = world.refused("GET", "/v1/profiles/none", &NOTHING);
    assert_eq!(status, 404);
    let labels = json!({ "object": "datastore/none", "labels": { "a": "b" } });
    assert_eq!(world.refused("POST", "/v1/labels", &labels).0, 404);
}

#[test]
fn datastores_and_the_host_have_labels_that_profiles_look_at() {
    let world = World::new();
    create_open(&world);
    let slow = "name = \"slow\"\npriority = 5\n[match]\nkind = \"disk\"\ndatastore.tier = \"slow\"\n\
                host.rack = \"7\"\n[set]\ndisk.bandwidth = \"10M/s\"\n";
    apply(&world, &[slow]);
    let label = |object: &str, key: &str, value: &str| -> SteerPlan {
        let body = json!({ "object": object, "labels": { key: value } });
        world.ok("POST", "/v1/labels", &body)
    };
    assert!(label("host", "rack", "7").changes.is_empty());
    let plan = label("datastore/slow", "tier", "slow");
    assert_eq!(plan.changes[0].shown, "– → 10M/s");
    assert_eq!(
        world.vm("web1").spec.disks[0].bandwidth,
        Some(Bytes(10 << 20))
    );
    let text: ProfileText = world.ok("GET", "/v1/profiles/slow", &NOTHING);
    assert_eq!(
        (text.matches, text.text.as_str()),
        (vec!["web1/root".to_owned()], slow)
    );
}

#[test]
fn a_disk_that_moves_comes_among_the_labels_of_its_new_store() {
    let world = World::new();
    create_open(&world);
    let slow = "name = \"slow\"\npriority = 5\n[match]\nkind = \"disk\"\n\
                datastore.name = \"slow\"\n[max]\ndisk.iops = 100\n";
    apply(&world, &[slow]);
    world.start("web1");
    assert!(monitor_log(&world).contains("begins with Some(100)"));
    let job = world.migrate("fast");
    world.wait_for_job(&job);
    let lifted = || {
        monitor_log(&world)
            .contains("limits of root: None None")
            .then_some(())
    };
    assert!(soon(lifted).is_some(), "{}", world.log());
}

#[test]
fn a_fast_restart_brings_what_needs_one_and_nothing_else() {
    let world = World::new();
    create_open(&world);
    world.start("web1");
    let text = "name = \"c\"\npriority = 1\n[set]\nconsole = \"virtio\"\ncpus = 2\n";
    let plan = apply(&world, &[text]);
    let whens: Vec<When> = plan.changes.iter().map(|change| change.when).collect();
    assert_eq!(whens, [When::Reboot, When::FastRestart]);
    let _: Value = world.ok("POST", "/v1/vms/web1/restart", &json!({ "fast": true }));
    let vm = world.vm("web1");
    assert_eq!(
        vm.spec.console,
        Some(strake_api::control::ConsoleKind::Virtio)
    );
    assert_eq!((vm.spec.cpus, vm.pending.len()), (1, 1));
}

#[test]
fn a_profile_that_running_vms_need_goes_by_force_only() {
    let world = World::new();
    create_open(&world);
    apply(&world, &[WEB]);
    world.start("web1");
    let (status, seen) = world.refused("DELETE", "/v1/profiles/web", &NOTHING);
    assert!(status == 409 && seen.id() == "host.profile-in-use");
    assert!(seen.text().contains("web1 (cpus 3 → 1)"), "{seen}");
    let plan: SteerPlan = world.ok("DELETE", "/v1/profiles/web?plan=true", &NOTHING);
    assert_eq!(
        (plan.applied, plan.changes.len(), names(&world).len()),
        (false, 3, 1)
    );
    let plan: SteerPlan = world.ok("DELETE", "/v1/profiles/web?force=true", &NOTHING);
    assert!(plan.applied && names(&world).is_empty());
    assert!(monitor_log(&world).contains("limits of root: None None"));
}

#[test]
fn a_change_during_which_the_daemon_dies_is_undone_or_finished() {
    let second = "name = \"second\"\npriority = 20\n[set]\ndisk.bandwidth = \"1M/s\"\n";
    for (at, finished) in [
        ("within-steering", false),
        ("before-steering-commit", false),
        ("after-steering-commit", true),
    ] {
        let mut world = World::new();
        create_open(&world);
        world.start("web1");
        world.kill_daemon();
        world.start_daemon_that_dies(Some(at));
        world.dying("POST", "/v1/profiles", &body(&[WEB, second], false));
        world.start_daemon();
        let expected: &[&str] = if finished { &["web", "second"] } else { &[] };
        assert_eq!(names(&world), expected, "{at}");
        let reached = || monitor_log(&world).contains("limits of root: Some(500) Some(1048576)");
        if finished {
            assert!(
                soon(|| reached().then_some(())).is_some(),
                "{}",
                world.log()
            );
            assert_eq!(world.vm("web1").spec.disks[0].iops, Some(500));
        } else {
            assert!(!reached());
        }
        // Nothing is in the way of the next one.
        assert!(apply(&world, &[WEB, second]).applied);
    }
}
