//! `cargo xtask test`: everything that tells whether Strake works.
//!
//! What must be built is built first, by one cargo at a time. Then two rows of parts run side by
//! side, because the lab keeps one processor busy and no more: the whole-system tests in one, unit
//! and property tests and then the fuzzers in the other.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use strake_observe::{OsContext, Result};

use crate::observations::ChecksFailed;
use crate::part::{Count, Ended, Part};
use crate::{build, guest, setup, tool, workspace};

/// What can be run alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Formatting and lints.
    Lint,
    /// Unit and property tests, and the data path at native speed.
    Unit,
    /// Each fuzz target for a while.
    Fuzz,
    /// The product's own programs with real guests.
    System,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Only these kinds; all if empty.
    pub only: Vec<Kind>,
    /// How long each fuzz target runs.
    pub fuzz: Duration,
}

impl Plan {
    fn has(&self, kind: Kind) -> bool {
        self.only.is_empty() || self.only.contains(&kind)
    }
}

/// Runs it, prints a table and the line `N passed, N failed`.
///
/// # Errors
/// If something failed or could not be run.
pub fn run(plan: &Plan) -> Result<()> {
    let started = Instant::now();
    setup::all()?;
    let mut ended = Vec::new();
    if plan.has(Kind::Lint) {
        ended.extend(row(lint())?);
    }
    build(plan)?;
    let beside = plan
        .has(Kind::System)
        .then(|| thread::spawn(|| row(vec![system()?])));
    let mut others = Vec::new();
    if plan.has(Kind::Unit) {
        others.push(unit()?);
    }
    if plan.has(Kind::Fuzz) {
        others.extend(fuzz(plan.fuzz)?);
    }
    let others = row(others);
    // Whatever happened to one row, the other is waited for.
    let beside = beside.map(thread::JoinHandle::join);
    ended.extend(others?);
    match beside {
        None => {}
        Some(Ok(parts)) => ended.extend(parts?),
        Some(Err(panic)) => std::panic::resume_unwind(panic),
    }
    report(&ended, started.elapsed())
}

fn row(parts: Vec<Part>) -> Result<Vec<Ended>> {
    parts.into_iter().map(Part::run).collect()
}

fn lint() -> Vec<Part> {
    let mut fmt = build::cargo();
    fmt.args(["fmt", "--all", "--check"]);
    let mut clippy = build::cargo();
    clippy.args(["clippy", "--quiet", "--workspace", "--all-targets"]);
    clippy.args(["--", "--deny", "warnings"]);
    vec![Part::new("format", fmt), Part::new("clippy", clippy)]
}

/// Builds what the parts run, so that they do not wait for each other's cargo.
fn build(plan: &Plan) -> Result<()> {
    println!("building; the first time takes some minutes");
    if plan.has(Kind::Unit) {
        let mut tests = build::cargo();
        tests.args(["test", "--quiet", "--workspace", "--no-run"]);
        tool::run_visibly(&mut tests)?;
        guest::small()?;
    }
    if plan.has(Kind::System) {
        build::host_programs()?;
        guest::small()?;
        guest::debian::image()?;
    }
    if plan.has(Kind::Fuzz) {
        tool::run_visibly(fuzzer().arg("--build"))?;
    }
    Ok(())
}

fn unit() -> Result<Part> {
    let mut tests = build::cargo();
    tests.args(["test", "--workspace", "--no-fail-fast"]);
    // They were installed: a test that skips for want of one would hide something.
    tests.env("STRAKE_REQUIRE_PEERS", "1");
    // For those in which another VMM runs a guest on one of our disks.
    let guest = guest::small()?;
    tests.env("STRAKE_GUEST_KERNEL", guest.kernel);
    tests.env("STRAKE_GUEST_INITRD", guest.initrd);
    Ok(Part::new("unit", tests))
}

fn fuzz(time: Duration) -> Result<Vec<Part>> {
    let list = tool::run(fuzzer().arg("--list"))?;
    let part = |target: &str| {
        let mut command = fuzzer();
        command.arg(target).arg(time.as_secs().to_string());
        Part::new(format!("fuzz {target}"), command)
    };
    Ok(list.split_whitespace().map(part).collect())
}

fn fuzzer() -> Command {
    let mut command = Command::new(workspace::root().join("fuzz/run.sh"));
    // Its workspace is its own, and so are its artifacts.
    command.env_remove("CARGO_TARGET_DIR");
    command
}

fn system() -> Result<Part> {
    let own = std::env::current_exe().os("readlink", "/proc/self/exe")?;
    let mut command = Command::new(own);
    command.arg("system");
    Ok(Part::new("system", command))
}

fn report(ended: &[Ended], took: Duration) -> Result<()> {
    let mut all = Count::default();
    println!("\n{:<24} {:>7} {:>7} {:>8}", "", "passed", "failed", "time");
    for part in ended {
        all += part.count;
        println!(
            "{:<24} {:>7} {:>7} {:>6.0} s",
            part.name,
            part.count.passed,
            part.count.failed,
            part.took.as_secs_f64()
        );
    }
    println!(
        "in {:.1} minutes; logs are in target/test-logs",
        took.as_secs_f64() / 60.0
    );
    println!("{} passed, {} failed", all.passed, all.failed);
    if all.failed == 0 {
        return Ok(());
    }
    let names: Vec<&str> = ended
        .iter()
        .filter(|part| part.count.failed > 0)
        .map(|part| part.name.as_str())
        .collect();
    Err(ChecksFailed {
        failed: all.failed,
        names: names.join(", "),
    }
    .into())
}
