//! What the tests of this folder share: disks on files, servers on sockets, certificates, and the
//! programs of others.
#![allow(
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::cast_possible_truncation
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::{Access, LiveDisk, RawImage};
use strake_nbd::{Address, Export, Listener, LiveExport, Security, Server, ServerConfig, Uri};

pub const MIB: u64 = 1024 * 1024;

pub fn dir() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("strake-nbd-")
        .tempdir()
        .unwrap()
}

/// A small generator of pseudo-random numbers (xorshift*), the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    pub fn fill(&mut self, data: &mut [u8]) {
        for chunk in data.chunks_mut(4) {
            let number = (self.below(u64::from(u32::MAX)) as u32).to_le_bytes();
            chunk.copy_from_slice(&number[..chunk.len()]);
        }
    }
}

/// A sparse file with some data in it: every third MiB, and its last sector.
pub fn create(path: &Path, size: u64) -> Vec<u8> {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut content = vec![0u8; size as usize];
    let mut random = Random::new(size);
    let mut at = 0;
    while at < size {
        let end = (at + MIB).min(size) as usize;
        random.fill(&mut content[at as usize..end]);
        file.write_all_at(&content[at as usize..end], at).unwrap();
        at += 3 * MIB;
    }
    let last = content.len() - 512;
    random.fill(&mut content[last..]);
    file.write_all_at(&content[last..], last as u64).unwrap();
    file.sync_all().unwrap();
    content
}

pub fn open(path: &Path, access: Access) -> Arc<RawImage> {
    let file = File::options()
        .read(true)
        .write(access == Access::ReadWrite)
        .open(path)
        .unwrap();
    let name = path.display().to_string();
    Arc::new(RawImage::from_fd(file.into(), name, access).unwrap())
}

pub fn disk(path: &Path) -> Arc<LiveDisk> {
    LiveDisk::new("root", open(path, Access::ReadWrite))
}

/// A server of one disk on a unix socket in `dir`.
pub fn serve(dir: &Path, export: LiveExport) -> (Server, Uri) {
    let socket = dir.join("strake.sock");
    let exports: Vec<(String, Arc<dyn Export>)> = vec![("root".to_owned(), Arc::new(export))];
    let config = ServerConfig { exports, tls: None };
    let listener = Listener::unix(&socket).unwrap();
    let server = Server::start(config, vec![listener]).unwrap();
    (server, Uri::new(Address::Unix(socket), "root"))
}

/// The path of a program of others, or none after saying that the test is skipped. With
/// STRAKE_REQUIRE_PEERS=1 it must be there.
pub fn peer(name: &str) -> Option<PathBuf> {
    let directories = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&directories)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        let required = std::env::var_os("STRAKE_REQUIRE_PEERS").is_some_and(|value| value == "1");
        assert!(!required, "{name} is missing, and STRAKE_REQUIRE_PEERS=1");
        eprintln!("skipped: no {name}");
    }
    found
}

/// Runs a program to its end; its output.
pub fn run(program: &Path, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    assert!(
        output.status.success(),
        "{} {arguments:?}: {}{}",
        program.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn output(program: &Path, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Whether somebody listens on this unix socket. Its file is there before; and to try would use up
/// the only connection that some servers take.
fn listens(socket: &Path) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace();
        let listening = fields.nth(3) == Some("00010000");
        listening && fields.next_back() == socket.to_str()
    })
}

/// A server of others; ended with the test.
pub struct Peer {
    child: Child,
}

impl Peer {
    /// Starts a server in the foreground and waits for its socket.
    pub fn start(program: &Path, arguments: &[&str], socket: &Path) -> Self {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut peer = Self { child };
        let until = Instant::now() + Duration::from_secs(20);
        while !listens(socket) {
            assert!(Instant::now() < until, "{arguments:?} does not listen");
            if let Some(status) = peer.child.try_wait().unwrap() {
                panic!("{arguments:?} ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        peer
    }

    /// Ends it without any warning.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Certificates in a directory, named as QEMU, nbdkit and libnbd want them: one authority, a
/// server for `localhost`, a client.
pub fn certificates(dir: &Path) -> PathBuf {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
        KeyPair, KeyUsagePurpose,
    };
    let directory = dir.join("pki");
    std::fs::create_dir_all(&directory).unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
    let named = |names: &[&str], who: &str| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, who);
        params
    };
    let mut authority = named(&[], "strake test authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_key = KeyPair::generate().unwrap();
    write(
        "ca-cert.pem",
        &authority.self_signed(&authority_key).unwrap().pem(),
    );
    let issuer = Issuer::from_params(&authority, &authority_key);
    for (file, names, purpose) in [
        (
            "server",
            &["localhost", "127.0.0.1"][..],
            ExtendedKeyUsagePurpose::ServerAuth,
        ),
        ("client", &[][..], ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = named(names, file);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        write(&format!("{file}-cert.pem"), &certificate.pem());
        write(&format!("{file}-key.pem"), &key.serialize_pem());
    }
    directory
}

/// The same export over TLS.
pub fn with_tls(uri: &Uri, certificates: &Path) -> Uri {
    Uri {
        security: Security::Tls,
        certificates: Some(certificates.to_owned()),
        ..uri.clone()
    }
}
