//! The guest ends, resets, or is asked to.

use std::time::Duration;

use crate::check;
use crate::failure::Outcome;
use crate::guest::Guest;
use crate::host::Host;
use crate::process::{sh, wait_until};
use crate::runner::Test;
use crate::vm::{BOOT, Shape, Vm};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "power-button",
        run: power_button,
    },
    Test {
        name: "guest-resets",
        run: guest_resets,
    },
];

const QUICK: Duration = Duration::from_secs(60);

/// The button reaches the guest, and what the guest wrote last is in the image.
fn power_button(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::boot(&mut host, Shape::default())?;
    vm.guest().sh("echo last words >/dev/vda", QUICK)?;
    vm.shut_down(&host)?;
    let console = host.console(&vm.name);
    check!(
        console.contains("guest: power button"),
        "the guest saw no power button:\n{console}"
    );
    let exit = vm
        .show(&host)?
        .get("last_exit")
        .cloned()
        .unwrap_or_default();
    check!(exit == "guest-power-off", "the last exit is {exit}");
    let image = std::fs::read(vm.image(&host)?)?;
    check!(
        image.starts_with(b"last words"),
        "the guest's last write is not in the image"
    );
    // It starts again.
    vm.start(&mut host)?;
    vm.wait_for_guest(&host)?;
    vm.force_off(&host)
}

/// A reset starts the guest anew with its disk as it was, and a power-off by the guest ends it.
fn guest_resets(name: &str) -> Outcome {
    let mut host = Host::start(name)?;
    let vm = Vm::new(
        "vm",
        1,
        Shape {
            cpus: 2,
            ..Shape::default()
        },
    );
    let _tap = OwnTap::make(&vm.tap())?;
    vm.create(&host)?;
    vm.start(&mut host)?;
    vm.wait_for_guest(&host)?;
    let guest = vm.guest();
    guest.sh("echo before >/dev/vda; sync", QUICK)?;
    reset(guest)?;
    booted_anew(guest)?;
    host.knows_monitor(vm.pid(&host)?);
    let disk = guest.sh("head -c 6 /dev/vda", QUICK)?;
    check!(disk == "before", "after the reset the disk holds {disk:?}");
    let _ = guest.ask("(sleep 1; poweroff -f) >/dev/null 2>&1 &", QUICK);
    wait_until("the VM is stopped", QUICK, || {
        Ok(vm.state(&host)? == "stopped")
    })
    .map_err(|failure| vm.with_logs(&host, &failure))?;
    let exit = vm
        .show(&host)?
        .get("last_exit")
        .cloned()
        .unwrap_or_default();
    check!(exit == "guest-power-off", "the last exit is {exit}");
    Ok(())
}

/// Lets the guest reset itself in a moment.
pub(super) fn reset(guest: Guest) -> Outcome {
    guest.sh("touch /tmp/mark", QUICK)?;
    // The answer may or may not come back before the machine is gone.
    let _ = guest.ask("(sleep 1; reboot -f) >/dev/null 2>&1 &", QUICK);
    Ok(())
}

/// Waits until a guest answers that has started after [`reset`].
pub(super) fn booted_anew(guest: Guest) -> Outcome {
    wait_until("the guest has booted anew", BOOT, || {
        Ok(guest
            .ask("test ! -e /tmp/mark", Duration::from_secs(5))
            .is_ok_and(|(gone, _)| gone == 0))
    })
}

/// A persistent tap device, which outlives each monitor as an operator's own does. Gone when
/// dropped.
#[derive(Debug)]
pub(super) struct OwnTap(String);

impl OwnTap {
    pub(super) fn make(name: &str) -> Outcome<Self> {
        sh(&["busybox", "tunctl", "-t", name])?;
        Ok(Self(name.to_owned()))
    }
}

impl Drop for OwnTap {
    fn drop(&mut self) {
        let _ = sh(&["busybox", "tunctl", "-d", &self.0]);
    }
}
