//! How long a guest stands still in a fast restart, on this machine's own KVM.
//!
//! The whole way that a user takes: the daemon (as a library in this process) with its inventory,
//! and real monitors in their jails. The guest is some bytes of machine code that does nothing but
//! look at the clock ([`guest`]): it sees its pauses itself. Two figures for each pause:
//!
//! * `pause`: from the order to stop its vCPUs in the one monitor to the order to run them in the
//!   other, as the monitors measure it;
//! * `gap`: the longest time between two looks of the guest at its clock around the restart. Whatever
//!   else keeps the guest from running counts too, so on a loaded machine it is an upper bound.
//!
//! What has no disk and no network is measured here; a stock guest with both is in the lab.

mod guest;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use serde_json::json;
use strake_api::rest::CreateVm;
use strake_host::{Host, HostConfig, Images};
use strake_observe::{Observation, OsContext, Result, Style, render};

use guest::Heartbeat;
use report::{Report, Row};

/// Measures the pause of fast restarts.
#[derive(Debug, Parser)]
#[command(name = "strake-bench-restart")]
struct Arguments {
    /// Fewer restarts: some minutes.
    #[arg(long)]
    quick: bool,
    /// Restarts of each VM, instead of the usual number.
    #[arg(long)]
    rounds: Option<usize>,
    /// Only VMs of this many vCPUs.
    #[arg(long)]
    cpus: Option<u8>,
    /// Only VMs of this much memory, in MiB.
    #[arg(long)]
    memory_mib: Option<u64>,
}

/// Memory of the VMs in MiB, and how it is called.
const MEMORY: &[(u64, &str)] = &[(512, "0.5g"), (4096, "4g"), (16384, "16g")];

/// vCPUs of the VMs, and the targets for the pause in milliseconds: median and 99th percentile.
const CPUS: &[(u8, f64, f64)] = &[(1, 1.0, 3.0), (4, 2.0, 5.0)];

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(seen) => {
            eprint!("{}", render(&seen, Style::Plain));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let directory = tempfile::tempdir().os("mkdir", "a temporary directory")?;
    let kernel = directory.path().join("heartbeat");
    std::fs::write(&kernel, guest::kernel()).os("write", kernel.display())?;
    let host = Host::open(HostConfig {
        state_dir: made(directory.path().join("state"))?,
        run_dir: made(directory.path().join("run"))?,
        vmm: monitor()?,
        kvm: PathBuf::from("/dev/kvm"),
    })?;
    let usual = if arguments.quick { 60 } else { 300 };
    let rounds = arguments.rounds.unwrap_or(usual).max(1);
    let mut rows = Vec::new();
    for (cpus, p50, p99) in CPUS {
        for (mib, size) in MEMORY {
            let left_out = arguments.cpus.is_some_and(|only| only != *cpus)
                || arguments.memory_mib.is_some_and(|only| only != *mib);
            if left_out {
                continue;
            }
            let measured = measure(&host, *cpus, *mib, &kernel, rounds);
            if let Err(seen) = &measured {
                eprint!("{}", render(seen, Style::Plain));
            }
            let name = format!("{size}_{cpus}cpu");
            rows.extend(Row::pair(
                "pause",
                &name,
                measured.as_ref().map(|m| &*m.pauses),
                Some((*p50, *p99)),
            ));
            rows.extend(Row::pair(
                "gap",
                &name,
                measured.as_ref().map(|m| &*m.gaps),
                None,
            ));
        }
    }
    Report {
        bench: "restart",
        quick: arguments.quick,
        rows,
    }
    .print();
    Ok(())
}

/// In milliseconds.
#[derive(Debug, Default)]
struct Measured {
    pauses: Vec<f64>,
    gaps: Vec<f64>,
}

fn measure(
    host: &Arc<Host>,
    cpus: u8,
    mib: u64,
    kernel: &std::path::Path,
    rounds: usize,
) -> Result<Measured> {
    let name = format!("b{cpus}-{mib}");
    let spec = json!({ "name": name, "spec": {
        "cpus": cpus,
        "memory": format!("{mib}M"),
        "boot": { "from": "kernel", "kernel": kernel, "cmdline": "" },
    }});
    let create: CreateVm = serde_json::from_value(spec)
        .map_err(|error| Observation::from(std::io::Error::other(error)))?;
    host.create(&create)?;
    let mut vm = host.start(&name)?;
    let mut measured = Measured::default();
    let heartbeat = vm.pid.map(Heartbeat::find).transpose();
    let heartbeat = heartbeat.unwrap_or_else(|seen| {
        eprint!("{}", render(&seen, Style::Plain));
        None
    });
    // The first ones also load the program into the page cache.
    for round in 0..rounds + 3 {
        let before = heartbeat.as_ref().map(Heartbeat::forget).transpose()?;
        let moved = host.restart_fast(&name, None)?;
        vm = moved.vm;
        let gap = heartbeat.as_ref().map(Heartbeat::longest_gap).transpose()?;
        if round < 3 {
            continue;
        }
        measured.pauses.extend(moved.pause_us.map(milliseconds));
        if let (Some(()), Some(gap)) = (before, gap) {
            measured.gaps.push(gap);
        }
    }
    drop(vm);
    let stop = strake_api::rest::StopVm {
        force: true,
        timeout_s: None,
    };
    host.stop(&name, &stop)?;
    host.remove(&name, Images::Keep)?;
    Ok(measured)
}

fn milliseconds(us: u64) -> f64 {
    std::time::Duration::from_micros(us).as_secs_f64() * 1e3
}

fn made(directory: PathBuf) -> Result<PathBuf> {
    std::fs::create_dir_all(&directory).os("mkdir", directory.display())?;
    Ok(directory)
}

/// The monitor that was built beside this program.
fn monitor() -> Result<PathBuf> {
    let own = std::env::current_exe().os("readlink", "/proc/self/exe")?;
    Ok(own.with_file_name("strake-vmm"))
}
