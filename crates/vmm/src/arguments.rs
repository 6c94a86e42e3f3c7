//! The command line. A dozen lines by hand: the monitor is started for every VM and every fast
//! restart, and a parser library would be most of its size.

use std::ffi::OsString;
use std::os::fd::OwnedFd;

use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};
use strake_api::control::LISTEN_FD;
use strake_observe::{Observation, Result};

use crate::observations::{BadArguments, NoListener};
use crate::signals::take_fd;

const HELP: &str = "\
Runs one virtual machine. Started by straked.

Usage: strake-vmm --name NAME [--listen-fd N] [--uid N] [--gid N] [--no-jail]

  --name NAME      the VM's name
  --listen-fd N    the descriptor of the listening control socket (3)
  --uid N          the user to become, if started as root (65534)
  --gid N          the group to become, if started as root (65534)
  --no-jail        for debugging only: stay as started
  --help           this text
  --version        the version

Example: strake-vmm --name web1 3<>/run/strake/vms/web1/control.sock";

/// `nobody`, whom every distribution has.
const NOBODY: u32 = 65534;

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    Run(Arguments),
    Print(String),
}

/// How a monitor runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// The VM's name.
    pub(crate) name: String,
    /// Where the listening socket is.
    pub(crate) listen_fd: i32,
    /// Whom to become.
    pub(crate) uid: u32,
    /// Which group to become.
    pub(crate) gid: u32,
    /// Whether to lock itself in.
    pub(crate) jail: Jail,
}

/// Whether to lock itself in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Jail {
    Full,
    None,
}

/// Reads the command line.
pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Asked> {
    let mut words = words
        .into_iter()
        .map(|word| word.into_string().map_err(|_| bad("it is not UTF-8")));
    let mut arguments = Arguments {
        name: String::new(),
        listen_fd: LISTEN_FD,
        uid: NOBODY,
        gid: NOBODY,
        jail: Jail::Full,
    };
    while let Some(word) = words.next() {
        let word = word?;
        let mut value = || {
            words
                .next()
                .unwrap_or_else(|| Err(bad(format!("{word} needs a value"))))
        };
        match word.as_str() {
            "--help" | "-h" => return Ok(Asked::Print(HELP.to_owned())),
            "--version" | "-V" => {
                return Ok(Asked::Print(format!(
                    "strake-vmm {}",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            "--name" => arguments.name = value()?,
            "--listen-fd" => arguments.listen_fd = number(&word, &value()?)?,
            "--uid" => arguments.uid = number(&word, &value()?)?,
            "--gid" => arguments.gid = number(&word, &value()?)?,
            "--no-jail" => arguments.jail = Jail::None,
            other => return Err(bad(format!("'{other}' is unknown"))),
        }
    }
    if arguments.name.is_empty() {
        return Err(bad("--name is missing"));
    }
    if arguments.uid == 0 || arguments.gid == 0 {
        return Err(bad("--uid and --gid cannot be 0: a monitor is never root"));
    }
    if arguments.listen_fd < 3 {
        return Err(bad("--listen-fd must be 3 or more"));
    }
    Ok(Asked::Run(arguments))
}

impl Arguments {
    /// Takes over the inherited socket.
    pub(crate) fn take_listener(&self) -> Result<OwnedFd> {
        let refused = |found: String| {
            Observation::from(NoListener {
                fd: self.listen_fd,
                found,
            })
        };
        let socket = take_fd(self.listen_fd).ok_or_else(|| refused("it is not open".to_owned()))?;
        match socket_type(&socket) {
            Ok(SocketType::SEQPACKET) => {}
            Ok(_) => return Err(refused("a socket of another type".to_owned())),
            Err(error) => return Err(refused(error.to_string())),
        }
        match socket_acceptconn(&socket) {
            Ok(true) => Ok(socket),
            Ok(false) => Err(refused("a connected socket".to_owned())),
            Err(error) => Err(refused(error.to_string())),
        }
    }
}

fn number<T: std::str::FromStr>(option: &str, value: &str) -> Result<T> {
    value
        .parse()
        .map_err(|_| bad(format!("{option} takes a number, not '{value}'")))
}

fn bad(reason: impl Into<String>) -> Observation {
    BadArguments {
        reason: reason.into(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Asked> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn a_name_is_enough() {
        let Asked::Run(arguments) = run("--name web1").unwrap() else {
            panic!("it does not run");
        };
        assert_eq!(arguments.listen_fd, 3);
        assert_eq!((arguments.uid, arguments.gid), (65534, 65534));
        assert_eq!(arguments.jail, Jail::Full);
    }

    #[test]
    fn wrong_lines_are_refused() {
        for line in [
            "",
            "--name",
            "--name a --uid x",
            "--name a --uid 0",
            "--name a --listen-fd 1",
            "--name a --what",
        ] {
            assert!(run(line).is_err(), "{line}");
        }
    }

    #[test]
    fn help_is_printed() {
        assert!(matches!(run("--help").unwrap(), Asked::Print(_)));
    }
}
