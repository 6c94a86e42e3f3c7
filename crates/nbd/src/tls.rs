//! TLS by certificates (X.509), through rustls with the provider `ring`, which needs nothing but a
//! C compiler to build. Pre-shared keys are not supported: rustls has none.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use strake_observe::{Observation, OsContext, Result};

use crate::TlsUnusable;

/// The names of the files in a directory of certificates: those that QEMU and nbdkit use.
const CA_FILE: &str = "ca-cert.pem";

/// Certificates and a key in PEM.
#[derive(Clone)]
pub struct Identity {
    /// The certificate, and those between it and the authority.
    pub certificates: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(..)")
    }
}

fn unusable(what: &str, why: impl fmt::Display) -> Observation {
    TlsUnusable {
        what: what.to_owned(),
        why: why.to_string(),
    }
    .into()
}

fn roots(authorities: &[u8]) -> Result<RootCertStore> {
    let what = "the authority's certificate";
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authorities) {
        let certificate = certificate.map_err(|why| unusable(what, why))?;
        store.add(certificate).map_err(|why| unusable(what, why))?;
    }
    if store.is_empty() {
        return Err(unusable(what, "there is none in it"));
    }
    Ok(store)
}

type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn pair(identity: &Identity) -> Result<Pair> {
    let what = "the certificate";
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&identity.certificates)
        .collect::<std::result::Result<_, _>>()
        .map_err(|why| unusable(what, why))?;
    if chain.is_empty() {
        return Err(unusable(what, "there is none in it"));
    }
    let key = PrivateKeyDer::from_pem_slice(&identity.key)
        .map_err(|why| unusable("the private key", why))?;
    Ok((chain, key))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn read(directory: &Path, name: &str) -> Result<Vec<u8>> {
    let path = directory.join(name);
    std::fs::read(&path).os("read", path.display())
}

/// What a server needs for TLS.
#[derive(Debug, Clone)]
pub struct TlsServer(Arc<ServerConfig>);

impl TlsServer {
    /// With its identity. If authorities are given, clients must have a certificate by one of
    /// them; without, whoever can connect is let in.
    ///
    /// # Errors
    /// When a certificate or the key cannot be used.
    pub fn new(identity: &Identity, client_authorities: Option<&[u8]>) -> Result<Self> {
        let what = "TLS for a server";
        let (chain, key) = pair(identity)?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|why| unusable(what, why))?;
        let builder = match client_authorities {
            Some(authorities) => {
                let roots = Arc::new(roots(authorities)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                    .build()
                    .map_err(|why| unusable(what, why))?;
                builder.with_client_cert_verifier(verifier)
            }
            None => builder.with_no_client_auth(),
        };
        let config = builder
            .with_single_cert(chain, key)
            .map_err(|why| unusable(what, why))?;
        Ok(Self(Arc::new(config)))
    }

    /// From a directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`: clients must
    /// have a certificate by that authority.
    ///
    /// # Errors
    /// When a file cannot be read or used.
    pub fn from_directory(directory: &Path) -> Result<Self> {
        let identity = Identity {
            certificates: read(directory, "server-cert.pem")?,
            key: read(directory, "server-key.pem")?,
        };
        Self::new(&identity, Some(&read(directory, CA_FILE)?))
    }

    pub(crate) fn session(&self) -> Result<rustls::Connection> {
        ServerConnection::new(Arc::clone(&self.0))
            .map(rustls::Connection::from)
            .map_err(|why| unusable("a TLS session", why))
    }
}

/// What a client needs for TLS.
#[derive(Debug, Clone)]
pub struct TlsClient(Arc<ClientConfig>);

impl TlsClient {
    /// Trusting these authorities, with an identity of its own if the server asks for one.
    ///
    /// # Errors
    /// When a certificate or the key cannot be used.
    pub fn new(authorities: &[u8], identity: Option<&Identity>) -> Result<Self> {
        let what = "TLS for a client";
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|why| unusable(what, why))?
            .with_root_certificates(roots(authorities)?);
        let config = match identity {
            Some(identity) => {
                let (chain, key) = pair(identity)?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|why| unusable(what, why))?
            }
            None => builder.with_no_client_auth(),
        };
        Ok(Self(Arc::new(config)))
    }

    /// From a directory with `ca-cert.pem` and, if there is one, `client-cert.pem` with
    /// `client-key.pem`.
    ///
    /// # Errors
    /// When a file cannot be read or used.
    pub fn from_directory(directory: &Path) -> Result<Self> {
        let authorities = read(directory, CA_FILE)?;
        let identity = match directory.join("client-cert.pem").exists() {
            true => Some(Identity {
                certificates: read(directory, "client-cert.pem")?,
                key: read(directory, "client-key.pem")?,
            }),
            false => None,
        };
        Self::new(&authorities, identity.as_ref())
    }

    pub(crate) fn session(&self, name: &str) -> Result<rustls::Connection> {
        let name = ServerName::try_from(name.to_owned())
            .map_err(|_| unusable("the server's name", format!("'{name}' is no host name")))?;
        ClientConnection::new(Arc::clone(&self.0), name)
            .map(rustls::Connection::from)
            .map_err(|why| unusable("a TLS session", why))
    }
}
