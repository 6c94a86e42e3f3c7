//! `strake show`

use strake_api::control::ExitReason;
use strake_api::rest::Vm;
use strake_api::spec::BootSpec;
use strake_observe::{Result, Style, render};

use super::ps::state;
use crate::context::Context;
use crate::exit::Exit;
use crate::output::{Align, Table, printable};
use crate::units::{bytes, bytes_or_dash, millis};

/// Show everything about a VM
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake show web1
  strake show web1 --json | jq -r '.disks[].image'")]
pub struct Args {
    /// The VM
    pub name: String,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let vm = context.client.vm(&args.name).await?;
    context.output.answer(&vm, text)?;
    Ok(Exit::Done)
}

fn text(vm: &Vm) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        out.push_str(&format!("{name:<10}{}\n", printable(value)));
    };
    line("name", &vm.name);
    line("state", state(vm.state));
    if let Some(pid) = vm.pid {
        line("pid", &pid.to_string());
    }
    if let Some(uptime) = vm.uptime_ms {
        line("uptime", &millis(uptime));
    }
    line("cpus", &vm.spec.cpus.to_string());
    line("memory", &bytes(vm.spec.memory.0));
    match &vm.spec.boot {
        BootSpec::Kernel {
            kernel,
            initrd,
            cmdline,
        } => {
            line("kernel", kernel);
            if let Some(initrd) = initrd {
                line("initrd", initrd);
            }
            line("cmdline", cmdline);
        }
        BootSpec::Disk { disk, cmdline } => {
            let disk = disk.as_deref().unwrap_or("the first one");
            line("boot", &format!("from disk {disk}"));
            if !cmdline.is_empty() {
                line("append", cmdline);
            }
        }
    }
    for (name, value) in &vm.spec.labels {
        line("label", &format!("{name}={value}"));
    }
    for pending in &vm.pending {
        let field = format!("{} {}", pending.object, pending.path);
        let when = pending.when.text();
        line("pending", &format!("{field} {} ({when})", pending.shown));
    }
    match &vm.last_exit {
        None => {}
        Some(ExitReason::GuestPowerOff) => line("last exit", "the guest powered off"),
        Some(ExitReason::GuestReset) => line("last exit", "the guest reset"),
        Some(ExitReason::Stopped) => line("last exit", "stopped"),
        Some(ExitReason::Failed(_)) => line("last exit", "failed, see below"),
    }
    if !vm.disks.is_empty() {
        out.push('\n');
        out.push_str(&disks(vm));
    }
    if !vm.nics.is_empty() {
        let mut table = Table::new(&[
            ("NIC", Align::Left),
            ("TAP", Align::Left),
            ("MAC", Align::Left),
            ("SLOT", Align::Right),
        ]);
        for nic in &vm.nics {
            table.row([
                nic.name.clone(),
                nic.tap.clone(),
                nic.mac.clone(),
                nic.slot.to_string(),
            ]);
        }
        out.push('\n');
        out.push_str(&table.render());
    }
    if let Some(ExitReason::Failed(failure)) = &vm.last_exit {
        out.push('\n');
        out.push_str(&render(failure, Style::Plain));
    }
    out
}

fn disks(vm: &Vm) -> String {
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("ALLOCATED", Align::Right),
        ("SLOT", Align::Right),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("ERRORS", Align::Right),
        ("STORE", Align::Left),
        ("IMAGE", Align::Left),
    ]);
    for disk in &vm.disks {
        let counters = disk.counters;
        table.row([
            disk.name.clone(),
            bytes(disk.size_bytes),
            bytes_or_dash(disk.allocated_bytes),
            disk.slot.to_string(),
            bytes_or_dash(counters.map(|c| c.read_bytes)),
            bytes_or_dash(counters.map(|c| c.write_bytes)),
            counters.map_or_else(|| "-".to_owned(), |c| c.errors.to_string()),
            disk.datastore.clone().unwrap_or_else(|| "-".to_owned()),
            disk.image.clone(),
        ]);
    }
    table.render()
}
