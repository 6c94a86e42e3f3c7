//! The serial console: its log and its two-way stream.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use strake_api::control::{FdIndex, Request};
use strake_observe::{OsContext, Result};

use super::Host;
use crate::monitor::connection::QUICK;

/// The most of a console log that one request gets.
const LOG_MAX: u64 = 32 << 20;

impl Host {
    /// The last `tail` bytes of what the guest wrote to its serial console; empty if it never ran.
    ///
    /// # Errors
    /// No such VM, or the log cannot be read.
    pub fn console_log(&self, name: &str, tail: Option<u64>) -> Result<Vec<u8>> {
        self.inventory.vm(name)?;
        let path = self.config.console_log(name);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            file => file.os("open", path.display())?,
        };
        let length = file.metadata().os("stat", path.display())?.len();
        let wanted = tail.unwrap_or(LOG_MAX).min(LOG_MAX);
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(length.saturating_sub(wanted)))
            .and_then(|_| file.take(wanted).read_to_end(&mut bytes))
            .os("read", path.display())?;
        Ok(bytes)
    }

    /// Attaches to the console of a VM that runs: the caller's end of the stream.
    ///
    /// # Errors
    /// No such VM, it does not run, or its monitor refuses.
    pub fn attach_console(&self, name: &str) -> Result<UnixStream> {
        let cell = self.cell(name)?;
        let advice = format!("start it first with `strake start {name}`");
        let monitor = cell.live().running(name, &advice)?;
        let (ours, theirs) = UnixStream::pair().os("socketpair", "a console")?;
        monitor.connection().call(
            "attach a console",
            Request::AttachConsole { stream: FdIndex(0) },
            &[theirs.as_fd()],
            QUICK,
        )?;
        Ok(ours)
    }
}
