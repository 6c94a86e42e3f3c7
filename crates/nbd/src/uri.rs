//! Addresses of exports: the NBD URIs that other tools take too.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use strake_observe::{Observation, Result};

use crate::BadUri;

/// The port of NBD servers, if none is named.
pub const DEFAULT_PORT: u16 = 10809;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A host's name or number, and a port.
    Tcp {
        /// The host.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Whether the connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// It is not.
    Plain,
    /// By TLS.
    Tls,
}

/// An export at a server.
///
/// ```
/// let uri: strake_nbd::Uri = "nbd+unix:///disk?socket=/run/disk.sock".parse()?;
/// assert_eq!(uri.export, "disk");
/// assert_eq!(uri.to_string(), "nbd+unix:///disk?socket=/run/disk.sock");
/// # Ok::<(), strake_observe::Observation>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// The server.
    pub address: Address,
    /// The export's name; empty for the server's default one.
    pub export: String,
    /// Whether by TLS.
    pub security: Security,
    /// A directory with certificates (`ca-cert.pem`, `client-cert.pem`, `client-key.pem`).
    pub certificates: Option<PathBuf>,
    /// The name that the server's certificate must have, if not the host's.
    pub tls_name: Option<String>,
}

impl Uri {
    /// An export without TLS.
    #[must_use]
    pub fn new(address: Address, export: impl Into<String>) -> Self {
        Self {
            address,
            export: export.into(),
            security: Security::Plain,
            certificates: None,
            tls_name: None,
        }
    }

    /// The server, for people.
    #[must_use]
    pub fn server(&self) -> String {
        match &self.address {
            Address::Unix(path) => path.display().to_string(),
            Address::Tcp { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Address::Tcp { host, port } => format!("{host}:{port}"),
        }
    }

    /// The name that the server's certificate must have.
    #[must_use]
    pub fn expected_name(&self) -> &str {
        match (&self.tls_name, &self.address) {
            (Some(name), _) => name,
            (None, Address::Tcp { host, .. }) => host,
            (None, Address::Unix(_)) => "localhost",
        }
    }
}

fn bad(uri: &str, why: &str) -> Observation {
    BadUri {
        uri: uri.to_owned(),
        why: why.to_owned(),
    }
    .into()
}

/// Replaces %XX; none if that is malformed or gives no UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let high = char::from(bytes.next()?).to_digit(16)?;
        let low = char::from(bytes.next()?).to_digit(16)?;
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    let text = String::from_utf8(out).ok()?;
    (!text.contains('\0')).then_some(text)
}

/// Writes what is not plain as %XX.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

impl FromStr for Uri {
    type Err = Observation;

    fn from_str(uri: &str) -> Result<Self> {
        let fail = |why| bad(uri, why);
        let (scheme, rest) = uri
            .split_once("://")
            .ok_or_else(|| fail("it has no scheme"))?;
        let (unix, security) = match scheme {
            "nbd" => (false, Security::Plain),
            "nbds" => (false, Security::Tls),
            "nbd+unix" => (true, Security::Plain),
            "nbds+unix" => (true, Security::Tls),
            _ => return Err(fail("the scheme is none of nbd, nbds, nbd+unix, nbds+unix")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export).ok_or_else(|| fail("the export's name is malformed"))?;
        if export.len() > crate::protocol::MAX_STRING {
            return Err(fail("the export's name is too long"));
        }
        let mut socket = None;
        let mut certificates = None;
        let mut tls_name = None;
        for pair in query.split(['&', ';']).filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value).ok_or_else(|| fail("a parameter is malformed"))?;
            if value.is_empty() {
                return Err(fail("a parameter is empty"));
            }
            match name {
                "socket" => socket = Some(PathBuf::from(value)),
                "tls-certificates" => certificates = Some(PathBuf::from(value)),
                "tls-hostname" => tls_name = Some(value),
                _ => {
                    return Err(fail(
                        "the only parameters are socket, tls-certificates and tls-hostname",
                    ));
                }
            }
        }
        let address = match (unix, socket) {
            (true, Some(path)) if authority.is_empty() => Address::Unix(path),
            (true, Some(_)) => return Err(fail("a unix socket has no host")),
            (true, None) => return Err(fail("the parameter socket is missing")),
            (false, Some(_)) => return Err(fail("a socket goes with nbd+unix only")),
            (false, None) => parse_authority(authority).map_err(fail)?,
        };
        Ok(Self {
            address,
            export,
            security,
            certificates,
            tls_name,
        })
    }
}

fn parse_authority(authority: &str) -> std::result::Result<Address, &'static str> {
    if authority.contains('@') {
        return Err("user names are not supported");
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(bracketed) => {
            let (host, after) = bracketed.split_once(']').ok_or("the ] is missing")?;
            let port = match after {
                "" => None,
                after => Some(
                    after
                        .strip_prefix(':')
                        .ok_or("nothing but :PORT goes after ]")?,
                ),
            };
            (host, port)
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let host = decode(host).ok_or("the host is malformed")?;
    if host.is_empty() {
        return Err("the host is missing");
    }
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port
            .parse()
            .map_err(|_| "the port is not a number up to 65535")?,
    };
    Ok(Address::Tcp { host, port })
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = match self.security {
            Security::Plain => "",
            Security::Tls => "s",
        };
        let mut parameters = Vec::new();
        match &self.address {
            Address::Unix(path) => {
                write!(f, "nbd{tls}+unix:///")?;
                parameters.push(format!("socket={}", encode(&path.to_string_lossy())));
            }
            Address::Tcp { host, port } => {
                let host = match host.contains(':') {
                    true => format!("[{host}]"),
                    false => encode(host),
                };
                write!(f, "nbd{tls}://{host}")?;
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
            }
        }
        f.write_str(&encode(&self.export))?;
        if let Some(directory) = &self.certificates {
            let directory = encode(&directory.to_string_lossy());
            parameters.push(format!("tls-certificates={directory}"));
        }
        if let Some(name) = &self.tls_name {
            parameters.push(format!("tls-hostname={}", encode(name)));
        }
        if !parameters.is_empty() {
            write!(f, "?{}", parameters.join("&"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn good_ones() {
        for (text, address, export) in [
            ("nbd://host", ("host", 10809), ""),
            ("nbd://host/", ("host", 10809), ""),
            ("nbds://host:77/a/b", ("host", 77), "a/b"),
            ("nbd://[::1]:5/x%20y", ("::1", 5), "x y"),
            ("nbd://[fe80::1]", ("fe80::1", 10809), ""),
        ] {
            let uri: Uri = text.parse().unwrap();
            let (host, port) = address;
            let host = host.to_owned();
            assert_eq!(uri.address, Address::Tcp { host, port }, "{text}");
            assert_eq!(uri.export, export);
            assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
        }
        let uri: Uri = "nbds+unix:///d?socket=/s%3f&tls-certificates=/c&tls-hostname=h"
            .parse()
            .unwrap();
        assert_eq!(uri.address, Address::Unix("/s?".into()));
        assert_eq!(uri.security, Security::Tls);
        assert_eq!(uri.expected_name(), "h");
        assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
    }

    #[test]
    fn bad_ones() {
        for text in [
            "",
            "disk.raw",
            "http://host/",
            "nbd:///x",
            "nbd://host:99999",
            "nbd://host:x/",
            "nbd://[::1",
            "nbd://[::1]7",
            "nbd+unix:///x",
            "nbd+unix://host/x?socket=/s",
            "nbd://host/?socket=/s",
            "nbd://host/%zz",
            "nbd://host/%00",
            "nbd://host/?what=1",
            "nbd://me@host/",
        ] {
            assert!(text.parse::<Uri>().unwrap_err().is::<BadUri>(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "(nbds?(\\+unix)?://)?.{0,40}") {
            if let Ok(uri) = text.parse::<Uri>() {
                prop_assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
            }
        }
    }
}
