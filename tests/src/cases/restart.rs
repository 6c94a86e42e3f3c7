//! Monitors are replaced under guests that work.

use std::time::Duration;

use serde_json::Value;

use crate::check;
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::load::{Connection, Stamps, number, verify_image};
use crate::runner::Test;
use crate::vm::{Shape, Vm};

pub(super) const TESTS: &[Test] = &[Test {
    name: "upgrades-all-vms",
    run: upgrade,
}];

/// Moves a guest again and again.
pub(super) const REPEATED: &[Test] = &[Test {
    name: "restarts-fast-under-load",
    run: under_load,
}];

const QUICK: Duration = Duration::from_secs(60);

/// How often a guest is moved.
const MOVES: u32 = 20;

/// What a kernel says when its time or its devices were not as they should be. Of slowness it may
/// well speak: that is the lab's.
const TROUBLE: &str = "clocksource: timekeeping|unstable|I/O error|lockup|Oops|BUG";

/// Restarts it fast: how long the guest stood still, in microseconds.
fn restart(host: &mut Host, vm: &Vm) -> Outcome<u64> {
    let said = host.json(&["restart", &vm.name, "--fast"])?;
    let number = |path: &str| said.pointer(path).and_then(Value::as_u64);
    let (Some(pause), Some(before), Some(after)) =
        (number("/pause_us"), number("/old_pid"), number("/vm/pid"))
    else {
        return Err(Failure::new(format!("no pause or no process in {said}")));
    };
    check!(before != after, "the monitor is still process {before}");
    let state = said.pointer("/vm/state").and_then(Value::as_str);
    check!(state == Some("running"), "the VM is {state:?}");
    host.knows_monitor(u32::try_from(after).unwrap_or(0));
    Ok(pause)
}

/// The guest's clock, in seconds since the epoch, and how far the host's is ahead of it.
fn behind(vm: &Vm) -> Outcome<i64> {
    let said = vm.guest().sh("date +%s", QUICK)?;
    let guest: i64 = said
        .trim()
        .parse()
        .map_err(|_| Failure::new(format!("no time: {said:?}")))?;
    let host = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    Ok(i64::try_from(host).unwrap_or(0) - guest)
}

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
    let guest = vm.guest();
    let connection = Connection::open(guest)?;
    let stamps = Stamps::start(guest, "--rate 100")?;
    // Somebody who reads the same memory again and again and knows what must be in it.
    guest.sh(
        "dd if=/dev/urandom of=/tmp/blob bs=1M count=8 2>/dev/null; sha256sum /tmp/blob >/tmp/sum",
        QUICK,
    )?;
    guest.start(
        "sh -c 'while sha256sum -c /tmp/sum; do :; done'",
        "/tmp/sums.log",
    )?;
    let said_before = guest.sh("dmesg | wc -l", QUICK)?;
    let ahead = behind(&vm)?;
    let mut pauses = Vec::new();
    for round in 0..MOVES {
        pauses.push(restart(&mut host, &vm)?);
        if round % 6 == 5 {
            stamps.go_on()?;
        }
    }
    // A later daemon finds the monitor that has the guest, and moves it on.
    host.kill_daemon();
    host.start_daemon(&[])?;
    pauses.push(restart(&mut host, &vm)?);
    stamps.go_on()?;
    let wrong = guest.sh("grep -c FAILED /tmp/sums.log; true", QUICK)?;
    check!(wrong.trim() == "0", "a checksum in the guest was wrong");
    let new = format!("dmesg | tail -n +$(({} + 1))", said_before.trim());
    let trouble = guest.sh(&format!("{new} | grep -E '{TROUBLE}'; true"), QUICK)?;
    check!(
        trouble.trim().is_empty(),
        "the guest's kernel noticed:\n{trouble}"
    );
    let drift = behind(&vm)? - ahead;
    check!(
        drift.abs() <= 3,
        "the guest's clock moved by {drift} s against the host's"
    );
    stamps.end()?;
    let echoed = connection.close()?;
    pauses.sort_unstable();
    let middle = pauses.get(pauses.len() / 2).copied().unwrap_or(0);
    let last = pauses.last().copied().unwrap_or(0);
    println!(
        "{} fast restarts: pause median {middle} us, longest {last} us; worst round trip {} ms",
        pauses.len(),
        number(&echoed, "worst_ms=").unwrap_or(0)
    );
    vm.shut_down(&host)?;
    verify_image(&vm.image(&host)?).map(drop)
}

fn upgrade(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(&mut host, Shape::default())?;
    let connection = Connection::open(vm.guest())?;
    let before = vm.pid(&host)?;
    let planned = host.strake(&["upgrade", "--dry-run"])?.good()?;
    check!(planned.contains(&vm.name), "not planned: {planned}");
    check!(vm.pid(&host)? == before, "a dry run did something");
    host.strake(&["upgrade", "--parallel", "2"])?.good()?;
    let after = vm.pid(&host)?;
    check!(before != after, "the monitor is still process {before}");
    host.knows_monitor(after);
    // And without --fast the guest itself starts anew.
    connection.close()?;
    host.strake(&["restart", &vm.name, "--timeout", "60"])?
        .good()?;
    host.knows_monitor(vm.pid(&host)?);
    vm.force_off(&host)
}
