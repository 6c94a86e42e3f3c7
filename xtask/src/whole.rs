//! Running something against the whole system: the product's programs, the guests and the test
//! programs are brought to a host whose KVM runs stock kernels.

use std::path::PathBuf;
use std::time::Duration;

use strake_observe::Result;

use crate::lab::{LabCommand, Output};
use crate::{build, guest};

/// Whether the whole Debian image is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Debian {
    /// It is attached as `/dev/disks/debian`.
    Attached,
    /// It is left out.
    Absent,
}

/// A command with everything that the whole system needs around it.
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
