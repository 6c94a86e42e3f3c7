//! `straked`: the host daemon. Everything that it does is in `strake_host`; here is its command
//! line and its life.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use strake_host::server::{self, Socket};
use strake_host::{Host, HostConfig};
use strake_observe::{Observation, OsContext, Result, Style, render};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The host daemon: keeps the inventory, starts and watches monitors, serves the API.
///
/// It may be ended and started again at any time: VMs run on without it, and it finds them.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example: straked --state-dir /var/lib/strake --run-dir /run/strake"
)]
struct Arguments {
    /// Where the inventory and the console logs are kept
    #[arg(long, env = "STRAKE_STATE_DIR", default_value = "/var/lib/strake")]
    state_dir: PathBuf,

    /// Where sockets and the monitors' logs are kept
    #[arg(long, env = "STRAKE_RUN_DIR", default_value = "/run/strake")]
    run_dir: PathBuf,

    /// The API's socket [default: straked.sock in the run directory]
    #[arg(long, env = "STRAKE_SOCKET")]
    socket: Option<PathBuf>,

    /// The monitor's program [default: strake-vmm beside straked]
    #[arg(long, env = "STRAKE_VMM")]
    vmm: Option<PathBuf>,

    /// The virtualisation device
    #[arg(long, default_value = "/dev/kvm", hide = true)]
    kvm: PathBuf,

    /// What to log, for example `debug` or `info,strake_host=trace`
    #[arg(long, env = "STRAKE_LOG", default_value = "info")]
    log: String,
}

fn main() -> ExitCode {
    strake_observe::set_process_name("straked");
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&arguments.log))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(seen) => {
            eprint!("{}", render(&seen, Style::Plain));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let config = HostConfig {
        vmm: match arguments.vmm {
            Some(vmm) => vmm,
            None => beside_us("strake-vmm")?,
        },
        state_dir: absolute(&arguments.state_dir)?,
        run_dir: absolute(&arguments.run_dir)?,
        kvm: arguments.kvm,
    };
    let path = arguments
        .socket
        .unwrap_or_else(|| config.run_dir.join("straked.sock"));
    // The lock is taken before the socket of whoever holds it could be touched.
    let host = Host::open(config)?;
    let socket = Socket::bind(&path)?;
    let runtime = tokio::runtime::Runtime::new().os("clone", "the runtime's threads")?;
    let served = runtime.block_on(serve(host, socket));
    // Requests that wait for a guest do not hold up the end: the next daemon takes them up.
    runtime.shutdown_background();
    tracing::info!("straked ends; VMs run on");
    served
}

async fn serve(host: Arc<Host>, socket: Socket) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).os("sigaction", "SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).os("sigaction", "SIGINT")?;
    tracing::info!("straked serves");
    server::serve(host, socket, async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await
}

fn absolute(path: &std::path::Path) -> Result<PathBuf> {
    std::path::absolute(path).os("getcwd", path.display())
}

fn beside_us(program: &str) -> Result<PathBuf, Observation> {
    let us = std::env::current_exe().os("readlink", "/proc/self/exe")?;
    Ok(us.with_file_name(program))
}
