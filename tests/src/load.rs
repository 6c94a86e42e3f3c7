//! A guest under load: it stamps and verifies its disk without pause, and answers over TCP.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::check;
use crate::failure::{Failure, Outcome, While};
use crate::guest::Guest;
use crate::process::{self, Running, wait_until};

const QUICK: Duration = Duration::from_secs(60);
const LOG: &str = "/tmp/stamp.log";

/// Lets the guest fill the beginning of its disk, so that a limited copy of it takes long enough
/// for something to happen in its middle.
///
/// # Errors
/// If the guest cannot.
pub fn fill(guest: Guest, mebibytes: u32) -> Outcome {
    let command = format!("dd if=/dev/urandom of=/dev/vda bs=1M count={mebibytes} conv=fsync");
    guest.sh(&command, QUICK).map(drop)
}

/// A running `strake-guest-stamp` in a guest.
#[derive(Debug)]
pub struct Stamps {
    guest: Guest,
}

impl Stamps {
    /// Starts it on the guest's first disk, with these options, and waits for its first writes.
    ///
    /// # Errors
    /// If it does not begin.
    pub fn start(guest: Guest, options: &str) -> Outcome<Self> {
        guest.start(&format!("strake-guest-stamp /dev/vda {options}"), LOG)?;
        let stamps = Self { guest };
        wait_until("the guest stamps its disk", QUICK, || {
            Ok(stamps.writes()? > 0)
        })?;
        Ok(stamps)
    }

    /// How many writes it has had acknowledged.
    ///
    /// # Errors
    /// If it complains, or the guest does not answer.
    pub fn writes(&self) -> Outcome<u64> {
        let last = self
            .guest
            .sh(&format!("grep writes= {LOG} | tail -n 1; true"), QUICK)?;
        if last.is_empty() {
            return Ok(0);
        }
        let errors = number(&last, "errors=").unwrap_or(1);
        if errors != 0 {
            let log = self.guest.sh(&format!("tail -n 20 {LOG}"), QUICK)?;
            return Err(Failure::new(format!(
                "the guest saw {errors} errors:\n{log}"
            )));
        }
        number(&last, "writes=").ok_or_else(|| Failure::new(format!("no count in {last:?}")))
    }

    /// Waits until the guest has written more than at the time of the call.
    ///
    /// # Errors
    /// If it does not go on, or complains.
    pub fn go_on(&self) -> Outcome {
        let before = self.writes()?;
        wait_until("the guest goes on writing", QUICK, || {
            Ok(self.writes()? > before)
        })
    }

    /// Sees that the guest lives while its daemon is dead. Its writes may wait: a migration that
    /// asked for its commit keeps the disk's gate closed until a daemon answers
    /// (`docs/src/decisions/0002`).
    ///
    /// # Errors
    /// If the guest does not answer, or complains.
    pub fn lives_without_daemon(&self) -> Outcome {
        self.writes().map(drop).doing("while the daemon is dead")
    }

    /// Ends it: it verifies everything once more and gives its verdict.
    ///
    /// # Errors
    /// If the verdict is bad.
    pub fn end(self) -> Outcome<String> {
        self.guest
            .sh("kill -TERM $(pidof strake-guest-stamp)", QUICK)?;
        let mut last = String::new();
        wait_until("the guest's verdict", Duration::from_secs(120), || {
            last = self.guest.sh(&format!("tail -n 1 {LOG}"), QUICK)?;
            Ok(last.starts_with("stamp: ok") || last.starts_with("stamp: BAD"))
        })?;
        check!(last.starts_with("stamp: ok"), "the guest says {last}");
        Ok(last)
    }
}

/// Verifies an image that a guest stamped, from outside.
///
/// # Errors
/// If a sector is not what it must be.
pub fn verify_image(image: &Path) -> Outcome<String> {
    let ran = process::run(Command::new("strake-guest-stamp").arg("verify").arg(image))?;
    ran.good()
        .doing(format!("verifying {} from outside", image.display()))
}

/// One TCP connection into the guest, used all the time.
#[derive(Debug)]
pub struct Connection {
    client: Running,
}

impl Connection {
    /// Starts the server in the guest and connects to it.
    ///
    /// # Errors
    /// If that fails.
    pub fn open(guest: Guest) -> Outcome<Self> {
        guest.start("strake-guest-echo", "/tmp/echo.log")?;
        let address = format!("{}:7777", guest.address);
        let client =
            Running::start(Command::new("strake-guest-echo").args(["client", &address, "3600"]))?;
        Ok(Self { client })
    }

    /// Closes it. Returns what the client saw, for example its longest wait.
    ///
    /// # Errors
    /// If the connection did not last.
    pub fn close(self) -> Outcome<String> {
        self.client.signal(Signal::TERM);
        let said = self.client.wait(QUICK)?.good()?;
        Ok(said.lines().last().unwrap_or_default().to_owned())
    }
}

/// The number after `key` in a line.
#[must_use]
pub fn number(line: &str, key: &str) -> Option<u64> {
    let rest = line.split(key).nth(1)?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}
