//! Running something against the whole system: the product's programs, the guests and the test
//! programs are brought to a host whose KVM runs stock kernels. That is this machine if the probe
//! says so, otherwise the lab.

mod direct;

use std::path::PathBuf;
use std::time::Duration;

use strake_observe::Result;

use crate::lab::{LabCommand, Output};
use crate::{build, guest};

/// `lab` or `host` decides instead of the probe: to repeat in the lab what failed there.
pub const PLACE: &str = "STRAKE_TESTS_IN";

/// Whether the whole Debian image is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Debian {
    /// It is attached as `/dev/disks/debian`.
    Attached,
    /// It is left out.
    Absent,
}

impl Debian {
    /// Whether the tests chosen by these words need it.
    #[must_use]
    pub fn for_tests(words: &[String]) -> Self {
        // The only one that does, see `tests/src/cases/boot.rs`.
        let test = "boots-debian-from-its-own-disk";
        if words.is_empty() || words.iter().any(|word| test.contains(word.as_str())) {
            Self::Attached
        } else {
            Self::Absent
        }
    }
}

/// Where whole-system commands run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the lab.
    Lab,
    /// On this machine, in namespaces of its own.
    Host,
}

/// The program that runs the tests one after another.
const TESTS: &str = "strake-system-tests";

/// What [`TESTS`] is told of the tests that ended before the lab stalled.
fn tests_done(printed: &str) -> Vec<String> {
    printed
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "))
        .filter_map(|(name, ended)| match ended.split(' ').next() {
            Some("ok") => Some(format!("--passed={name}")),
            Some("FAILED") => Some(format!("--failed={name}")),
            _ => None,
        })
        .collect()
}

/// Where whole-system commands run here.
#[must_use]
pub fn place() -> Place {
    match std::env::var(PLACE).as_deref() {
        Ok("lab") => Place::Lab,
        Ok("host") => Place::Host,
        _ if rustix::process::geteuid().is_root() && strake_probe::probe().runs_stock_kernels() => {
            Place::Host
        }
        _ => Place::Lab,
    }
}

/// Runs a command of [`command`] where the KVM is, and returns its exit status.
///
/// # Errors
/// If the place cannot be made or the command does not end in time.
pub fn run(command: &LabCommand) -> Result<i32> {
    match place() {
        Place::Lab => command.run(),
        Place::Host => direct::run(command),
    }
}

/// A command with everything that the whole system needs around it, for [`run`].
///
/// # Errors
/// If something cannot be built or fetched.
pub fn command(words: &[String], debian: Debian, timeout: Duration) -> Result<LabCommand> {
    let programs = build::host_programs()?;
    let guest_programs = build::guest_programs()?;
    let small = guest::small()?;
    let mut command = LabCommand::new(words);
    command.timeout = timeout;
    command.output = Output::Stream;
    if words.first().is_some_and(|word| word == TESTS) {
        command.resume = Some(tests_done);
    }
    for program in programs.iter().chain(&guest_programs) {
        command
            .files
            .push((program.clone(), build::place_in_lab(program)));
    }
    command
        .files
        .push((small.kernel, "/guest/vmlinuz".to_owned()));
    command
        .files
        .push((small.initrd, "/guest/initrd.cpio".to_owned()));
    if debian == Debian::Attached {
        let image: PathBuf = guest::debian::image()?;
        command.disks.push(("debian".to_owned(), image));
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_that_ended_are_not_run_again() {
        let printed = "test a ... ok (1.0 s)\ntest b ... FAILED (2.0 s)\nwhy\ntest c ... ";
        assert_eq!(tests_done(printed), ["--passed=a", "--failed=b"]);
    }
}
