//! Clients and servers that do not behave.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::{Access, Blocking, Image};
use strake_nbd::protocol::handshake::{
    FIXED_NEWSTYLE, Info, InfoRequest, NO_ZEROES, OptionHead, client_flags, greeting, info, option,
    option_message, push_reply, reply,
};
use strake_nbd::protocol::transmission::{ReplyHead, RequestHead, command, flag};
use strake_nbd::server::MAX_CLIENTS;
use strake_nbd::{Address, Export, Listener, LiveExport, NbdImage, Server, ServerConfig, Uri};

use common::{MIB, Random, certificates, create, dir, disk, serve};

fn connect(uri: &Uri) -> UnixStream {
    let Address::Unix(path) = &uri.address else {
        panic!("{uri}")
    };
    let mut stream = UnixStream::connect(path).unwrap();
    let limit = Some(Duration::from_secs(10));
    stream.set_read_timeout(limit).unwrap();
    stream.set_write_timeout(limit).unwrap();
    let mut said = [0u8; 18];
    stream.read_exact(&mut said).unwrap();
    stream
        .write_all(&client_flags(FIXED_NEWSTYLE | NO_ZEROES))
        .unwrap();
    stream
}

/// A client in the transmission phase, with simple replies.
fn enter(uri: &Uri) -> UnixStream {
    let mut stream = connect(uri);
    stream
        .write_all(&option_message(option::EXPORT_NAME, b"root"))
        .unwrap();
    stream.read_exact(&mut [0u8; 10]).unwrap();
    stream
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    RequestHead {
        flags: 0,
        command,
        cookie,
        offset,
        length,
    }
    .encode()
}

fn works(uri: &Uri) {
    let image = NbdImage::connect(uri, Access::ReadWrite).unwrap();
    let mut queue = Blocking::new(&image).unwrap();
    queue.read(0, &mut [0; 4096]).unwrap();
}

fn gone(server: &Server) {
    let until = Instant::now() + Duration::from_secs(10);
    while server.clients() > 0 {
        assert!(Instant::now() < until, "a session does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn clients_that_break_off() {
    let dir = dir();
    create(&dir.path().join("disk"), 64 * MIB);
    let (server, uri) = serve(dir.path(), LiveExport::new(disk(&dir.path().join("disk"))));
    drop(connect(&uri));
    drop(enter(&uri));
    // In the middle of a request, of its payload, and with replies on the way.
    enter(&uri)
        .write_all(&request(command::READ, 1, 0, 512)[..20])
        .unwrap();
    let mut stream = enter(&uri);
    stream
        .write_all(&request(command::WRITE, 1, 0, 4096))
        .unwrap();
    stream.write_all(&[1; 1000]).unwrap();
    drop(stream);
    let mut stream = enter(&uri);
    for cookie in 0..100 {
        stream
            .write_all(&request(command::READ, cookie, 0, 1 << 20))
            .unwrap();
    }
    drop(stream);
    // No magic number; a payload that nobody takes; an option that is far too long.
    enter(&uri).write_all(&[0; 28]).unwrap();
    enter(&uri)
        .write_all(&request(command::WRITE, 1, 0, u32::MAX))
        .unwrap();
    let mut head = option_message(option::LIST, &[]);
    head[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    connect(&uri).write_all(&head).unwrap();
    gone(&server);
    works(&uri);
}

#[test]
fn noise() {
    let dir = dir();
    create(&dir.path().join("disk"), MIB);
    let (server, uri) = serve(dir.path(), LiveExport::new(disk(&dir.path().join("disk"))));
    let mut random = Random::new(3);
    for turn in 0..60 {
        let mut stream = if turn % 2 == 0 {
            connect(&uri)
        } else {
            enter(&uri)
        };
        let mut bytes = vec![0u8; 400];
        random.fill(&mut bytes);
        if turn % 3 == 0 {
            let command = random.below(9) as u16;
            let (offset, length) = (random.below(1 << 21), random.below(1 << 14) as u32);
            stream
                .write_all(&request(command, 1, offset, length))
                .unwrap();
        }
        let _ = stream.write_all(&bytes);
    }
    gone(&server);
    works(&uri);
}

/// What it asks for is limited, and others do not notice it; nor does the end of the server.
#[test]
fn a_client_that_does_not_read() {
    let dir = dir();
    create(&dir.path().join("disk"), 64 * MIB);
    let (server, uri) = serve(dir.path(), LiveExport::new(disk(&dir.path().join("disk"))));
    let mut stream = enter(&uri);
    stream.set_nonblocking(true).unwrap();
    let mut sent = 0;
    for cookie in 0..20_000 {
        match stream.write(&request(command::READ, cookie, 0, 32 << 20)) {
            Ok(28) => sent += 1,
            _ => break,
        }
    }
    assert!(sent > 10);
    for _ in 0..3 {
        works(&uri);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    let kib: u64 = resident.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 600 * 1024, "{resident}");
    let began = Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(8));
}

#[test]
fn a_client_that_says_nothing() {
    let dir = dir();
    create(&dir.path().join("disk"), MIB);
    let (server, uri) = serve(dir.path(), LiveExport::new(disk(&dir.path().join("disk"))));
    let streams = [connect(&uri), enter(&uri)];
    let began = Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(2));
    drop(streams);
}

#[test]
fn too_many_clients() {
    let dir = dir();
    create(&dir.path().join("disk"), MIB);
    let (server, uri) = serve(dir.path(), LiveExport::new(disk(&dir.path().join("disk"))));
    let streams: Vec<_> = (0..MAX_CLIENTS).map(|_| enter(&uri)).collect();
    let Address::Unix(path) = &uri.address else {
        panic!("{uri}")
    };
    let mut one_more = UnixStream::connect(path).unwrap();
    assert_eq!(one_more.read(&mut [0; 18]).unwrap(), 0);
    drop(streams);
    gone(&server);
    works(&uri);
}

fn tls_server(dir: &std::path::Path) -> (Server, Uri) {
    let pki = certificates(dir);
    let file = dir.join("disk");
    create(&file, MIB);
    let export: Arc<dyn Export> = Arc::new(LiveExport::new(disk(&file)));
    let socket = dir.join("strake.sock");
    let config = ServerConfig {
        exports: vec![("root".to_owned(), export)],
        tls: Some(strake_nbd::TlsServer::from_directory(&pki).unwrap()),
    };
    let server = Server::start(config, vec![Listener::unix(&socket).unwrap()]).unwrap();
    (server, Uri::new(Address::Unix(socket), "root"))
}

/// Whatever comes in the clear after STARTTLS must not be taken for something that was encrypted.
#[test]
fn options_smuggled_before_tls() {
    let dir = dir();
    let (server, uri) = tls_server(dir.path());
    let mut stream = connect(&uri);
    let mut both = option_message(option::STARTTLS, &[]);
    both.extend(option_message(option::EXPORT_NAME, b"root"));
    stream.write_all(&both).unwrap();
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    // The ACK at most, perhaps an alert of TLS; no size.
    assert!(all.len() < 40, "{all:?}");
    gone(&server);
}

/// The first option of a client may come in one piece with the end of the handshake.
#[test]
fn an_option_with_the_end_of_the_handshake() {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let dir = dir();
    let (_server, uri) = tls_server(dir.path());
    let pem = |name: &str| dir.path().join("pki").join(name);
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(pem("ca-cert.pem")).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(pem("client-cert.pem")).unwrap()],
            PrivateKeyDer::from_pem_file(pem("client-key.pem")).unwrap(),
        )
        .unwrap();
    for _ in 0..5 {
        let mut stream = connect(&uri);
        stream
            .write_all(&option_message(option::STARTTLS, &[]))
            .unwrap();
        stream.read_exact(&mut [0u8; 20]).unwrap();
        let name = "localhost".try_into().unwrap();
        let mut tls = rustls::ClientConnection::new(Arc::new(config.clone()), name).unwrap();
        // Before the handshake: it goes out with its last message.
        tls.writer()
            .write_all(&option_message(option::LIST, &[]))
            .unwrap();
        let mut out = Vec::new();
        let mut answer = [0u8; 20];
        let mut have = 0;
        while have < answer.len() {
            while tls.wants_write() {
                tls.write_tls(&mut out).unwrap();
            }
            stream.write_all(&out).unwrap();
            out.clear();
            assert!(tls.read_tls(&mut stream).unwrap() > 0);
            tls.process_new_packets().unwrap();
            have += tls.reader().read(&mut answer[have..]).unwrap_or(0);
        }
        assert_eq!(answer[12..16], reply::SERVER.to_be_bytes());
    }
}

/// A server that says what it is told to, once a client of ours is in the transmission phase.
fn bad_server(dir: &std::path::Path, says: Vec<u8>) -> Uri {
    let path = dir.join("bad.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&greeting()).unwrap();
        stream.read_exact(&mut [0u8; 4]).unwrap();
        loop {
            let mut head = [0u8; OptionHead::BYTES];
            stream.read_exact(&mut head).unwrap();
            let head = OptionHead::parse(&head).unwrap();
            let mut data = vec![0u8; head.length as usize];
            stream.read_exact(&mut data).unwrap();
            let mut out = Vec::new();
            if head.option != option::GO {
                push_reply(&mut out, head.option, reply::ERR_UNSUP, &[]);
                stream.write_all(&out).unwrap();
                continue;
            }
            let request = InfoRequest::parse(&data).unwrap();
            assert_eq!(request.wants, [info::BLOCK_SIZE]);
            let told = Info::Export {
                size: MIB,
                flags: flag::HAS_FLAGS | flag::SEND_FLUSH,
            };
            push_reply(&mut out, head.option, reply::INFO, &told.encode());
            push_reply(&mut out, head.option, reply::ACK, &[]);
            stream.write_all(&out).unwrap();
            break;
        }
        stream.read_exact(&mut [0u8; 28]).unwrap();
        stream.write_all(&says).unwrap();
        // Until the client leaves.
        let _ = stream.read(&mut [0u8; 28]);
    });
    Uri::new(Address::Unix(path), "root")
}

#[test]
fn servers_that_break_the_protocol() {
    let unknown = ReplyHead::Simple {
        error: 0,
        cookie: 77,
    };
    for says in [vec![0u8; 64], unknown.encode(), Vec::new()] {
        let ends = says.is_empty();
        let dir = dir();
        let uri = bad_server(dir.path(), says);
        let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
        if ends {
            // It answers nothing: then nothing is known, and nothing is claimed.
            continue;
        }
        let mut queue = Blocking::new(&image).unwrap();
        let mut data = [7u8; 4096];
        let seen = queue.read(0, &mut data).unwrap_err();
        let lost = seen.find("nbd.connection-lost").unwrap();
        assert!(lost.find("nbd.malformed").is_some(), "{seen:?}");
        assert!(image.flush().is_err());
    }
}
