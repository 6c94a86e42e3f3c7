//! What has to be looked at again and again: jobs whose end could not be recorded (`commit`), and
//! logs.
//!
//! Logs are kept short: what a guest writes to its serial console must not fill the host.
//!
//! The monitor appends to its log through a descriptor that it keeps, so the file is never
//! replaced: its end is copied to `console.log.old` and it is truncated. What is written in
//! between is lost, at most what a serial port gives in that moment.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use strake_observe::{OsContext, Result};

use super::Host;

/// The longest log of a console or a monitor.
const LOG_LIMIT: u64 = 16 << 20;

/// How often it looks.
const INTERVAL: Duration = Duration::from_secs(5);

impl Host {
    /// Starts the thread that keeps house for as long as the host lives.
    pub(super) fn keep_house(self: &Arc<Self>) -> Result<()> {
        let host: Weak<Self> = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("housekeeping".to_owned())
            .spawn(move || {
                while let Some(host) = host.upgrade() {
                    host.shorten_logs();
                    host.check_jobs();
                    drop(host);
                    std::thread::sleep(INTERVAL);
                }
            })
            .os("clone", "the housekeeping thread")
            .map(drop)
    }

    fn shorten_logs(&self) {
        let names: Vec<String> = super::guard(&self.cells).keys().cloned().collect();
        for name in names {
            for log in [
                self.config.console_log(&name),
                self.config.monitor_log(&name),
            ] {
                if let Err(error) = shorten(&log, LOG_LIMIT) {
                    tracing::warn!(log = %log.display(), %error, "a log cannot be shortened");
                }
            }
        }
    }
}

fn shorten(log: &Path, limit: u64) -> io::Result<()> {
    match std::fs::metadata(log) {
        Ok(meta) if meta.len() > limit => {}
        _ => return Ok(()),
    }
    let mut from = File::open(log)?;
    let mut to = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(log.with_extension("log.old"))?;
    io::copy(&mut from, &mut to)?;
    OpenOptions::new().write(true).open(log)?.set_len(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_log_is_cut_and_its_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut writer = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .unwrap();
        writer.write_all(b"0123456789").unwrap();
        shorten(&path, 10).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"0123456789");
        writer.write_all(b"a").unwrap();
        shorten(&path, 10).unwrap();
        writer.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        let old = dir.path().join("console.log.old");
        assert_eq!(std::fs::read(old).unwrap(), b"0123456789a");
    }
}
