//! Disks move while their guests use them.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::check;
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::load::{Connection, Stamps, fill, verify_image};
use crate::process::wait_until;
use crate::runner::Test;
use crate::vm::{DISK, Shape, Vm};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "migrates-under-load",
        run: under_load,
    },
    Test {
        name: "migrates-with-the-vm-suspended",
        run: suspended,
    },
    Test {
        name: "client-interrupted",
        run: client_interrupted,
    },
    Test {
        name: "migration-cancelled",
        run: cancelled,
    },
];

fn under_load(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(
        &mut host,
        Shape {
            cpus: 2,
            disk: "128M",
            ..Shape::default()
        },
    )?;
    let connection = Connection::open(vm.guest())?;
    let stamps = Stamps::start(vm.guest(), "")?;
    for (to, method) in [("b", "dirty"), ("a", "mirror"), ("b", "auto")] {
        let before = vm.image(&host)?;
        let job = vm.migrate_away(&host, to, method)?;
        let used = job.pointer("/status/method/method").and_then(Value::as_str);
        check!(
            used == Some(method) || method == "auto" && used.is_some(),
            "asked for {method}, the job used {used:?}"
        );
        let pause = job.pointer("/status/pause_ms").and_then(Value::as_f64);
        check!(pause.is_some(), "the job does not say its pause: {job}");
        let image = vm.image(&host)?;
        check!(
            image.starts_with(host.store(to)),
            "the disk is on {}",
            image.display()
        );
        check!(before != image, "the disk did not move");
        stamps.go_on()?;
    }
    stamps.end()?;
    connection.close()?;
    vm.shut_down(&host)?;
    verify_image(&vm.image(&host)?)?;
    // The binding outlives the VM's stop: it starts from where its disk is.
    vm.start(&mut host)?;
    vm.wait_for_guest(&host)?;
    vm.force_off(&host)
}

fn suspended(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(
        &mut host,
        Shape {
            cpus: 2,
            ..Shape::default()
        },
    )?;
    let stamps = Stamps::start(vm.guest(), "--rate 200")?;
    let client = vm.migrate_in_background(&host, "b", &["--suspend", "vm", "--remove-source"])?;
    let source = vm.image(&host)?;
    client.wait(Duration::from_secs(180))?.good()?;
    check!(
        vm.state(&host)? == "running",
        "after the migration the VM is {}",
        vm.state(&host)?
    );
    wait_until("the source is removed", Duration::from_secs(20), || {
        Ok(!source.exists())
    })?;
    stamps.go_on()?;
    stamps.end()?;
    vm.shut_down(&host)?;
    verify_image(&vm.image(&host)?).map(drop)
}

/// The job of the only migration under way.
fn running_job(host: &Host) -> Outcome<String> {
    let jobs = host.json(&["jobs", "ls"])?;
    jobs.as_array()
        .into_iter()
        .flatten()
        .rev()
        .find_map(|job| job.pointer("/status/job")?.as_str())
        .map(str::to_owned)
        .ok_or_else(|| Failure::new(format!("no job in {jobs}")))
}

/// Ctrl-C ends the client and nothing else.
fn client_interrupted(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(&mut host, Shape::default())?;
    fill(vm.guest(), 32)?;
    let stamps = Stamps::start(vm.guest(), "--rate 20")?;
    let client = vm.migrate_in_background(&host, "b", &["--rate", "4M"])?;
    wait_until(
        "the migration is under way",
        Duration::from_secs(20),
        || Ok(running_job(&host).is_ok()),
    )?;
    let job = running_job(&host)?;
    client.signal(Signal::INT);
    let said = client.wait(Duration::from_secs(20))?.ended_with(130)?;
    check!(
        said.contains(&job),
        "the client does not say which job goes on:\n{said}"
    );
    host.strake(&["jobs", "wait", &job])?.good()?;
    check!(
        vm.image(&host)?.starts_with(host.store("b")),
        "the job did not go on without its client"
    );
    stamps.end()?;
    vm.shut_down(&host)?;
    verify_image(&vm.image(&host)?).map(drop)
}

/// A cancelled job leaves the disk where it was and nothing behind.
fn cancelled(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(&mut host, Shape::default())?;
    fill(vm.guest(), 32)?;
    let stamps = Stamps::start(vm.guest(), "--rate 50")?;
    let source = vm.image(&host)?;
    let client = vm.migrate_in_background(&host, "b", &["--rate", "2M"])?;
    wait_until(
        "the migration is under way",
        Duration::from_secs(20),
        || Ok(running_job(&host).is_ok()),
    )?;
    let job = running_job(&host)?;
    host.strake(&["jobs", "cancel", &job])?.good()?;
    client.wait(Duration::from_secs(60))?.ended_with(1)?;
    check!(
        vm.image(&host)? == source,
        "a cancelled migration moved {DISK}"
    );
    wait_until(
        "nothing is left at the destination",
        Duration::from_secs(20),
        || Ok(std::fs::read_dir(host.store("b"))?.next().is_none()),
    )?;
    stamps.go_on()?;
    vm.migrate(&host, "b")?;
    stamps.end()?;
    vm.shut_down(&host)?;
    verify_image(&vm.image(&host)?).map(drop)
}
