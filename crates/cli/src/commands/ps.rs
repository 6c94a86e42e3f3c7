//! `strake ps`

use strake_api::rest::{Vm, VmState};
use strake_observe::Result;

use crate::context::Context;
use crate::exit::Exit;
use crate::output::{Align, Table};
use crate::units;

/// List the VMs and what they do
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake ps
  strake ps --json | jq -r '.[] | select(.state == \"running\") | .name'")]
pub struct Args {}

pub(super) async fn run(_: Args, context: &Context) -> Result<Exit> {
    let vms = context.client.vms().await?;
    context.output.answer(&vms, |vms| table(vms))?;
    Ok(Exit::Done)
}

fn table(vms: &[Vm]) -> String {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("STATE", Align::Left),
        ("CPUS", Align::Right),
        ("MEMORY", Align::Right),
        ("PID", Align::Right),
        ("UPTIME", Align::Right),
        ("DISKS", Align::Left),
    ]);
    for vm in vms {
        let disks: Vec<&str> = vm.disks.iter().map(|disk| disk.name.as_str()).collect();
        table.row([
            vm.name.clone(),
            state(vm.state).to_owned(),
            vm.spec.cpus.to_string(),
            units::bytes(vm.spec.memory.0),
            vm.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            vm.uptime_ms.map_or_else(|| "-".to_owned(), units::millis),
            disks.join(","),
        ]);
    }
    table.render()
}

/// A state in one word.
pub(super) fn state(state: VmState) -> &'static str {
    match state {
        VmState::Stopped => "stopped",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopping => "stopping",
        VmState::Failed => "failed",
    }
}
