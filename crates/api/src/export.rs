//! Exports: disks that other programs use.
//!
//! An export stands in the inventory beside the VMs: it has a monitor and one disk, which is migrated
//! like that of a VM, and no guest.

use std::fmt;
use std::net::{IpAddr, ToSocketAddrs};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What an export is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportSpec {
    /// The VM's disk that it stands for. As long as it does, the VM cannot be started, and where the
    /// export's disk is moved to, there the VM's disk is too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<DiskOf>,
    /// Whether clients may not write.
    #[serde(default)]
    pub read_only: bool,
    /// The socket at which VMMs find it, by vhost-user-blk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_user: Option<String>,
    /// Where NBD clients find it. They call it by the export's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<NbdListen>,
    /// A directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`: then NBD clients need
    /// a certificate by that authority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskOf {
    /// The VM.
    pub vm: String,
    /// The disk's name in its spec.
    pub disk: String,
}

impl fmt::Display for DiskOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vm, self.disk)
    }
}

/// Where an NBD server listens: as text an absolute path (a unix socket) or `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NbdListen {
    /// A unix socket.
    Unix(String),
    /// A TCP port.
    Tcp {
        /// The host's name or number.
        host: String,
        /// The port; 0 is none that clients could know.
        port: u16,
    },
}

impl NbdListen {
    /// Whether only this host's processes reach it.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, port } => (host.as_str(), *port)
                .to_socket_addrs()
                .is_ok_and(|mut found| found.all(|at| IpAddr::is_loopback(&at.ip()))),
        }
    }
}

impl FromStr for NbdListen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Unix(text.to_owned()));
        }
        let wrong = || format!("'{text}' is neither an absolute path nor HOST:PORT");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        match port.parse() {
            Ok(port) if port > 0 && !host.is_empty() => Ok(Self::Tcp {
                host: host.to_owned(),
                port,
            }),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for NbdListen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<NbdListen> for String {
    fn from(listen: NbdListen) -> Self {
        listen.to_string()
    }
}

impl fmt::Display for NbdListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => f.write_str(path),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// What is to be exported: `VM/DISK` of a stopped VM, `DATASTORE:FILE`, or an absolute path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportSource {
    /// A VM's disk.
    Disk(DiskOf),
    /// An image.
    Image(String),
}

impl ExportSource {
    /// Reads one. An image is looked at later.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.split_once('/') {
            Some((vm, disk)) if !vm.is_empty() && !vm.contains(':') && !disk.contains('/') => {
                Self::Disk(DiskOf {
                    vm: vm.to_owned(),
                    disk: disk.to_owned(),
                })
            }
            _ => Self::Image(text.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_through_their_text() {
        for text in ["/run/nbd.sock", "localhost:10809", "[::1]:10810"] {
            let listen: NbdListen = text.parse().unwrap();
            assert_eq!(listen.to_string(), text);
        }
        for wrong in [
            "",
            "run/nbd.sock",
            "host",
            "host:",
            ":1",
            "host:0",
            "host:99999",
        ] {
            assert!(wrong.parse::<NbdListen>().is_err(), "{wrong}");
        }
        let local = |text: &str| text.parse::<NbdListen>().unwrap().is_local();
        assert!(local("/x") && local("127.0.0.1:1") && local("[::1]:1"));
        assert!(!local("0.0.0.0:1") && !local("192.0.2.1:1"));
    }

    #[test]
    fn a_disk_is_told_from_an_image() {
        let disk = |vm: &str, disk: &str| {
            ExportSource::Disk(DiskOf {
                vm: vm.to_owned(),
                disk: disk.to_owned(),
            })
        };
        assert_eq!(ExportSource::parse("web1/root"), disk("web1", "root"));
        for image in ["/srv/a.raw", "fast:a.raw", "fast:a/b.raw", "a/b/c", "a.raw"] {
            let parsed = ExportSource::parse(image);
            assert_eq!(parsed, ExportSource::Image(image.to_owned()), "{image}");
        }
    }
}
