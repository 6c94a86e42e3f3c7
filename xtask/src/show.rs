//! `cargo xtask demo` and `cargo xtask bench`: building what they need and starting it.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use strake_observe::Result;

use crate::observations::DemoFailed;
use crate::whole::{self, Debian};
use crate::{build, setup, tool, workspace};

/// Half of it is enough on two cores; a busy machine shall still see its end.
const DEMO_LIMIT: Duration = Duration::from_secs(400);

/// Runs the demo with that method of migration.
///
/// # Errors
/// If something cannot be had, or the demo does not end well.
pub fn demo(method: &str) -> Result<()> {
    setup::all()?;
    eprintln!("building Strake and its guest; the first time takes a few minutes");
    let program = ["strake-demo", "--method", method].map(str::to_owned);
    let mut command = whole::command(&program, Debian::Absent, DEMO_LIMIT)?;
    if std::io::stdout().is_terminal()
        && let Ok(size) = rustix::termios::tcgetwinsize(std::io::stdout())
    {
        let columns = size.ws_col.max(40).to_string();
        command
            .env
            .push(("STRAKE_DEMO_COLUMNS".to_owned(), columns));
    }
    let started = Instant::now();
    let status = whole::run(&command)?;
    eprintln!("({:.0} s after the build)", started.elapsed().as_secs_f64());
    if status == 0 {
        return Ok(());
    }
    Err(DemoFailed {
        status: format!("exit status {status}"),
    }
    .into())
}

/// Builds the benches and runs one by its arguments.
///
/// # Errors
/// If the build or the bench fails.
pub fn bench(arguments: &[String]) -> Result<()> {
    if arguments.first().is_some_and(|name| name == "profiles") {
        return bench_profiles(arguments);
    }
    setup::all()?;
    // The restart is measured with real monitors, in a program of its own.
    let (packages, program, arguments) = match arguments.split_first() {
        Some((first, rest)) if first == "restart" => (
            &["strake-bench-restart", "strake-vmm"][..],
            "strake-bench-restart",
            rest,
        ),
        _ => (&["strake-bench"][..], "strake-bench", arguments),
    };
    let mut cargo = build::cargo();
    cargo.args(["build", "--quiet", "--release"]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    tool::run_visibly(&mut cargo)?;
    let program = workspace::target_dir().join("release").join(program);
    let mut bench = std::process::Command::new(program);
    tool::run_visibly(bench.args(arguments))
}

/// The bench of profiles is built with its peer, in a workspace of its own.
fn bench_profiles(arguments: &[String]) -> Result<()> {
    let mut cargo = build::cargo();
    let manifest = workspace::root().join("bench/profiles/Cargo.toml");
    cargo.args(["build", "--quiet", "--release", "--manifest-path"]);
    cargo.arg(manifest);
    cargo.arg("--target-dir").arg(workspace::target_dir());
    tool::run_visibly(&mut cargo)?;
    let program = workspace::target_dir().join("release/strake-bench-profiles");
    let mut bench = std::process::Command::new(program);
    tool::run_visibly(bench.args(arguments))
}
