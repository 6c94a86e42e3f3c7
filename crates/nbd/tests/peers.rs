//! Against the programs of others: as servers `qemu-nbd` and `nbdkit`, as clients `qemu-img`,
//! `qemu-io`, `nbdinfo` and `nbdcopy`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod common;

use std::path::Path;
use std::sync::Arc;

use strake_block::{Access, Blocking, Image, Operation};
use strake_nbd::{
    Address, Export, Listener, LiveExport, NbdImage, Security, Server, ServerConfig, TlsServer, Uri,
};

use common::{MIB, Peer, certificates, create, dir, disk, output, peer, run, serve, with_tls};

/// Everything that a disk does, on the export of a server of others; compares with what must be.
fn exercise(image: &NbdImage, content: &[u8]) {
    assert_eq!(image.size(), content.len() as u64);
    let mut model = content.to_vec();
    let mut queue = Blocking::new(image).unwrap();
    let write = |queue: &mut Blocking, model: &mut [u8], at: u64, byte: u8, len: usize| {
        model[at as usize..at as usize + len].fill(byte);
        queue
            .write(at, &model[at as usize..at as usize + len])
            .unwrap();
    };
    write(&mut queue, &mut model, 0, 1, 512);
    write(&mut queue, &mut model, MIB + 512, 2, 6 * MIB as usize);
    for (unmap, at) in [(false, 2 * MIB), (true, 3 * MIB + 512)] {
        let len = MIB / 2;
        queue
            .operate(Operation::WriteZeroes { len, unmap }, at)
            .unwrap();
        model[at as usize..(at + len) as usize].fill(0);
    }
    queue
        .operate(Operation::Discard { len: MIB }, 12 * MIB)
        .unwrap();
    // It may read as anything from then on.
    write(&mut queue, &mut model, 12 * MIB, 3, MIB as usize);
    queue.operate(Operation::Flush, 0).unwrap();
    let mut data = vec![0u8; model.len()];
    queue.read(0, &mut data).unwrap();
    assert!(data == model);
    let mut from = 0;
    let mut at = 0;
    while let Some(range) = image.allocated(from).unwrap() {
        let hole = &model[at as usize..range.start as usize];
        assert!(hole.iter().all(|byte| *byte == 0));
        (from, at) = (range.end, range.end);
    }
    assert!(model[at as usize..].iter().all(|byte| *byte == 0));
    image.flush().unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn qemu_nbd_serves() {
    let Some(program) = peer("qemu-nbd") else {
        return;
    };
    for more in [
        &[][..],
        &["--cache=none", "--aio=io_uring", "--discard=unmap"],
    ] {
        let dir = dir();
        let (file, socket) = (dir.path().join("disk"), dir.path().join("s"));
        let content = create(&file, 16 * MIB);
        let mut arguments = vec!["-k", text(&socket), "-f", "raw", "-x", "root", "-t"];
        arguments.extend(more);
        arguments.push(text(&file));
        let _peer = Peer::start(&program, &arguments, &socket);
        let uri = Uri::new(Address::Unix(socket.clone()), "root");
        let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
        exercise(&image, &content);
        drop(image);
        // A session that ended well lets the next one in.
        NbdImage::connect(&uri, Access::ReadOnly).unwrap();
    }
}

#[test]
fn qemu_nbd_is_killed() {
    let Some(program) = peer("qemu-nbd") else {
        return;
    };
    let dir = dir();
    let (file, socket) = (dir.path().join("disk"), dir.path().join("s"));
    create(&file, MIB);
    let arguments = ["-k", text(&socket), "-f", "raw", "-t", text(&file)];
    let mut peer = Peer::start(&program, &arguments, &socket);
    let uri = Uri::new(Address::Unix(socket.clone()), "");
    let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
    let mut queue = Blocking::new(&image).unwrap();
    queue.write(0, &[1; 4096]).unwrap();
    peer.kill();
    let seen = queue.write(0, &[1; 4096]).unwrap_err();
    assert_eq!(seen.id(), "block.write-failed");
    assert!(seen.find("nbd.connection-lost").is_some(), "{seen:?}");
}

#[test]
fn nbdkit_serves() {
    let Some(program) = peer("nbdkit") else {
        return;
    };
    // The file plugin as it is; with all that may be missing; with large blocks told in small
    // pieces; with replies in any order.
    for filters in [
        &[][..],
        &["--filter=nozero", "zeromode=none"],
        &["--filter=noextents", "--no-sr"],
        &[
            "--filter=fua",
            "--filter=blocksize",
            "fuamode=emulate",
            "maxlen=64K",
        ],
        &["--filter=delay", "rdelay=1ms", "wdelay=1ms"],
    ] {
        let dir = dir();
        let (file, socket) = (dir.path().join("disk"), dir.path().join("s"));
        let content = create(&file, 16 * MIB);
        let mut arguments = vec!["-f", "-U", text(&socket)];
        let (options, parameters): (Vec<&str>, Vec<&str>) =
            filters.iter().partition(|filter| filter.starts_with("--"));
        arguments.extend(options);
        arguments.extend(["file", text(&file)]);
        arguments.extend(parameters);
        let _peer = Peer::start(&program, &arguments, &socket);
        let uri = Uri::new(Address::Unix(socket.clone()), "");
        let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
        exercise(&image, &content);
    }
}

#[test]
fn nbdkit_says_no() {
    let Some(program) = peer("nbdkit") else {
        return;
    };
    let refused = |arguments: &[&str], access| {
        let dir = dir();
        let socket = dir.path().join("s");
        let mut all = vec!["-f", "-U", text(&socket)];
        all.extend(arguments);
        let _peer = Peer::start(&program, &all, &socket);
        let uri = Uri::new(Address::Unix(socket.clone()), "");
        NbdImage::connect(&uri, access).map(|_| ()).unwrap_err()
    };
    let read_only = refused(&["-r", "memory", "1M"], Access::ReadWrite);
    assert_eq!(read_only.id(), "nbd.not-writable");
    let odd = refused(&["memory", "1000"], Access::ReadOnly);
    assert_eq!(odd.id(), "nbd.bad-size");
}

#[test]
fn an_error_of_nbdkit() {
    let Some(program) = peer("nbdkit") else {
        return;
    };
    let dir = dir();
    let socket = dir.path().join("s");
    let more = [
        "--filter=error",
        "memory",
        "1M",
        "error=ENOSPC",
        "error-pwrite-rate=100%",
    ];
    let mut arguments = vec!["-f", "-U", text(&socket)];
    arguments.extend(more);
    let _peer = Peer::start(&program, &arguments, &socket);
    let uri = Uri::new(Address::Unix(socket.clone()), "");
    let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
    let seen = Blocking::new(&image)
        .unwrap()
        .write(0, &[1; 512])
        .unwrap_err();
    assert_eq!(seen.datum("errno").unwrap(), 28);
    assert!(seen.find("nbd.server-error").is_some());
}

#[test]
fn nbdkit_by_tls() {
    let Some(program) = peer("nbdkit") else {
        return;
    };
    let dir = dir();
    let pki = certificates(dir.path());
    let (file, socket) = (dir.path().join("disk"), dir.path().join("s"));
    let content = create(&file, 16 * MIB);
    let certificates = format!("--tls-certificates={}", pki.display());
    let mut arguments = vec![
        "-f",
        "-U",
        text(&socket),
        "--tls=require",
        "--tls-verify-peer",
    ];
    arguments.extend([certificates.as_str(), "file", text(&file)]);
    let _peer = Peer::start(&program, &arguments, &socket);
    let plain = Uri::new(Address::Unix(socket.clone()), "");
    let seen = NbdImage::connect(&plain, Access::ReadOnly).unwrap_err();
    assert!(seen.find("nbd.tls-mismatch").is_some(), "{seen:?}");
    let image = NbdImage::connect(&with_tls(&plain, &pki), Access::ReadWrite).unwrap();
    exercise(&image, &content);
}

#[test]
fn qemu_nbd_by_tls() {
    let Some(program) = peer("qemu-nbd") else {
        return;
    };
    let dir = dir();
    let pki = certificates(dir.path());
    let (file, socket) = (dir.path().join("disk"), dir.path().join("s"));
    let content = create(&file, 16 * MIB);
    let credentials = format!(
        "tls-creds-x509,id=tls,endpoint=server,dir={},verify-peer=on",
        pki.display()
    );
    let arguments = [
        "-k",
        text(&socket),
        "-f",
        "raw",
        "-x",
        "root",
        "-t",
        "--object",
        &credentials,
        "--tls-creds",
        "tls",
        text(&file),
    ];
    let _peer = Peer::start(&program, &arguments, &socket);
    let uri = Uri::new(Address::Unix(socket.clone()), "root");
    let image = NbdImage::connect(&with_tls(&uri, &pki), Access::ReadWrite).unwrap();
    exercise(&image, &content);
}

#[test]
fn nbdinfo_looks() {
    let Some(program) = peer("nbdinfo") else {
        return;
    };
    let dir = dir();
    let file = dir.path().join("disk");
    create(&file, 16 * MIB);
    let (_server, uri) = serve(dir.path(), LiveExport::new(disk(&file)));
    let uri = uri.to_string();
    let all = run(&program, &[&uri]);
    for line in [
        "export-size: 16777216",
        "structured",
        "disk 'root' served by strake",
        "base:allocation",
        "is_read_only: false",
        "can_block_size: true",
        "can_cache: false",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 512",
        "block_size_maximum: 33554432",
    ] {
        // What an older version does not show is not missed.
        let known = all.contains(line.split(':').next().unwrap());
        assert!(all.contains(line) || !known, "{line}\n{all}");
    }
    assert_eq!(run(&program, &["--size", &uri]).trim(), "16777216");
    assert!(run(&program, &["--list", &uri]).contains("root"));
    let map = run(&program, &["--map", &uri]);
    assert_eq!(map.lines().count(), 11, "{map}");
    assert!(map.lines().next().unwrap().contains("data"), "{map}");
    assert!(run(&program, &["--map", "--totals", &uri]).contains("hole,zero"));
}

#[test]
fn nbdcopy_copies() {
    let Some(program) = peer("nbdcopy") else {
        return;
    };
    let dir = dir();
    let (file, copy, third) = (
        dir.path().join("disk"),
        dir.path().join("copy"),
        dir.path().join("third"),
    );
    let content = create(&file, 32 * MIB);
    let (server, uri) = serve(dir.path(), LiveExport::new(disk(&file)));
    run(&program, &[&uri.to_string(), text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == content);
    // In one request after the other, and with simple replies' way of reading.
    run(&program, &["--synchronous", &uri.to_string(), text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == content);
    server.stop();
    // And onto one of ours.
    std::fs::File::create(&third)
        .unwrap()
        .set_len(32 * MIB)
        .unwrap();
    let (_server, uri) = serve(dir.path(), LiveExport::new(disk(&third)));
    run(&program, &["--flush", text(&file), &uri.to_string()]);
    assert!(std::fs::read(&third).unwrap() == content);
    run(
        &program,
        &[
            "--flush",
            "--destination-is-zero",
            text(&file),
            &uri.to_string(),
        ],
    );
    assert!(std::fs::read(&third).unwrap() == content);
}

#[test]
fn qemu_img_converts_and_compares() {
    let Some(program) = peer("qemu-img") else {
        return;
    };
    let dir = dir();
    let (file, copy, third) = (
        dir.path().join("disk"),
        dir.path().join("copy"),
        dir.path().join("third"),
    );
    let content = create(&file, 32 * MIB);
    std::fs::File::create(&third)
        .unwrap()
        .set_len(32 * MIB)
        .unwrap();
    let (server, uri) = serve(dir.path(), LiveExport::new(disk(&file)));
    let uri = uri.to_string();
    run(
        &program,
        &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&copy)],
    );
    let compared = run(
        &program,
        &["compare", "-f", "raw", "-F", "qcow2", &uri, text(&copy)],
    );
    assert!(compared.contains("identical"), "{compared}");
    let map = run(&program, &["map", "--output=json", "-f", "raw", &uri]);
    assert!(map.contains("\"zero\": true"), "{map}");
    server.stop();
    for more in [
        &["-n"][..],
        &["-n", "-W", "-m", "8"],
        &["-n", "--target-is-zero"],
    ] {
        let fresh = dir.path().join("fresh");
        std::fs::File::create(&fresh)
            .unwrap()
            .set_len(32 * MIB)
            .unwrap();
        let (server, uri) = serve(dir.path(), LiveExport::new(disk(&fresh)));
        let uri = uri.to_string();
        let mut arguments = vec!["convert", "-f", "qcow2", "-O", "raw"];
        arguments.extend(more);
        arguments.extend([text(&copy), uri.as_str()]);
        run(&program, &arguments);
        server.stop();
        assert!(std::fs::read(&fresh).unwrap() == content, "{more:?}");
    }
}

#[test]
fn qemu_io_finds_no_fault() {
    let Some(program) = peer("qemu-io") else {
        return;
    };
    let dir = dir();
    let file = dir.path().join("disk");
    create(&file, 16 * MIB);
    let (_server, uri) = serve(dir.path(), LiveExport::new(disk(&file)));
    let commands = [
        "write -P 7 1M 3M",
        "read -P 7 1M 3M",
        "write -f -P 8 512 512",
        "read -P 8 512 512",
        "write -z 2M 64k",
        "read -P 0 2M 64k",
        "write -z -u 3M 64k",
        "read -P 0 3M 64k",
        "discard 8M 1M",
        "flush",
        "aio_write -P 1 4M 1M",
        "aio_write -P 2 5M 1M",
        "aio_flush",
        "read -P 1 4M 1M",
        "read -P 2 5M 1M",
    ];
    let uri = uri.to_string();
    let mut arguments = vec!["-f", "raw"];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let said = run(&program, &arguments);
    assert!(
        !said.contains("failed") && !said.contains("error"),
        "{said}"
    );
}

/// Both of the others' TLS, at our server.
#[test]
fn clients_by_tls() {
    let dir = dir();
    let pki = certificates(dir.path());
    let file = dir.path().join("disk");
    create(&file, 16 * MIB);
    let listener = Listener::tcp("127.0.0.1:0").unwrap();
    let port = listener.tcp_address().unwrap().port();
    let export: Arc<dyn Export> = Arc::new(LiveExport::new(disk(&file)));
    let config = ServerConfig {
        exports: vec![("root".to_owned(), export)],
        tls: Some(TlsServer::from_directory(&pki).unwrap()),
    };
    let _server = Server::start(config, vec![listener]).unwrap();
    let host = "localhost".to_owned();
    let mut uri = Uri::new(Address::Tcp { host, port }, "root");
    if let Some(nbdinfo) = peer("nbdinfo") {
        let refused = output(&nbdinfo, &[&uri.to_string()]);
        assert!(!refused.status.success());
        uri.security = Security::Tls;
        uri.certificates = Some(pki.clone());
        assert!(run(&nbdinfo, &[&uri.to_string()]).contains("16777216"));
        let copy = dir.path().join("copy");
        if let Some(nbdcopy) = peer("nbdcopy") {
            run(&nbdcopy, &[&uri.to_string(), text(&copy)]);
            assert!(std::fs::read(&copy).unwrap() == std::fs::read(&file).unwrap());
        }
    }
    if let Some(qemu_img) = peer("qemu-img") {
        let credentials = format!(
            "tls-creds-x509,id=tls,endpoint=client,dir={}",
            pki.display()
        );
        let options = format!("driver=nbd,host=localhost,port={port},export=root,tls-creds=tls");
        let said = run(
            &qemu_img,
            &["info", "--object", &credentials, "--image-opts", &options],
        );
        assert!(said.contains("16 MiB"), "{said}");
    }
}
