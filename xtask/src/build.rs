//! Building our own programs: those of the host as cargo does, those of the guest static.

use std::path::{Path, PathBuf};
use std::process::Command;

use strake_observe::Result;

use crate::{tool, workspace};

/// The product and what drives it in the lab, by package and program.
const HOST_PROGRAMS: &[(&str, &str)] = &[
    ("strake-cli", "strake"),
    ("straked", "straked"),
    ("strake-vmm", "strake-vmm"),
    ("strake-system-tests", "strake-system-tests"),
    ("strake-system-tests", "strake-demo"),
];

const GUEST_PACKAGE: &str = "strake-guest-tools";
const GUEST_PROGRAMS: &[&str] = &["strake-guest-stamp", "strake-guest-echo"];

/// Static programs need a target named outright, or build scripts would become static too.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the product and returns its programs. The same profile as the unit tests, so that
/// nothing is compiled twice.
///
/// # Errors
/// If cargo fails; its output stands on the terminal.
pub fn host_programs() -> Result<Vec<PathBuf>> {
    let mut cargo = cargo();
    cargo.args(["build", "--quiet"]);
    for (package, program) in HOST_PROGRAMS {
        cargo.args(["--package", package, "--bin", program]);
    }
    tool::run_visibly(&mut cargo)?;
    let folder = workspace::target_dir().join("debug");
    Ok(HOST_PROGRAMS
        .iter()
        .map(|(_, program)| folder.join(program))
        .collect())
}

/// Builds what runs inside of test guests.
///
/// # Errors
/// As [`host_programs`].
pub fn guest_programs() -> Result<Vec<PathBuf>> {
    let mut cargo = cargo();
    cargo.args(["build", "--quiet", "--release", "--package", GUEST_PACKAGE]);
    cargo.args(["--target", GUEST_TARGET]);
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    tool::run_visibly(&mut cargo)?;
    let folder = workspace::target_dir().join(GUEST_TARGET).join("release");
    Ok(GUEST_PROGRAMS
        .iter()
        .map(|program| folder.join(program))
        .collect())
}

/// The cargo that runs us, in the workspace.
#[must_use]
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace::root());
    cargo
}

/// Where a program goes in the lab.
#[must_use]
pub fn place_in_lab(program: &Path) -> String {
    format!(
        "/usr/bin/{}",
        program.file_name().unwrap_or_default().to_string_lossy()
    )
}
