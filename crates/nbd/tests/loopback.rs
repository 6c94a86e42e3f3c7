//! Our client against our server, on a live disk.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_block::{
    Access, BadRequest, Blocking, Buffer, Event, Fault, FaultImage, FaultOn, Image, LiveDisk,
    Operation, Request,
};
use strake_nbd::{
    Address, ConnectFailed, ConnectionLost, Export, Listener, LiveExport, NbdImage, NotWritable,
    OptionRefused, Server, ServerConfig, TlsClient, TlsMismatch, TlsServer, Uri,
};

use common::{MIB, Random, certificates, create, dir, disk, serve, with_tls};

fn whole(image: &dyn Image) -> Vec<u8> {
    let mut data = vec![0u8; image.size() as usize];
    for (index, piece) in data.chunks_mut(7 * MIB as usize).enumerate() {
        image.read_at(index as u64 * 7 * MIB, piece).unwrap();
    }
    data
}

fn ranges(image: &dyn Image) -> Vec<std::ops::Range<u64>> {
    let mut ranges = Vec::new();
    let mut from = 0;
    while let Some(range) = image.allocated(from).unwrap() {
        assert!(range.start >= from && range.end > range.start && range.end <= image.size());
        from = range.end;
        ranges.push(range);
    }
    ranges
}

#[test]
fn reads_what_is_there() {
    let dir = dir();
    let content = create(&dir.path().join("disk"), 16 * MIB + 512);
    let disk = disk(&dir.path().join("disk"));
    let (server, uri) = serve(dir.path(), LiveExport::new(disk));
    let image = NbdImage::connect(&uri, Access::ReadOnly).unwrap();
    assert_eq!(image.size(), content.len() as u64);
    assert!(whole(&image) == content);
    // Unaligned.
    let mut data = vec![0u8; 3 * MIB as usize + 77];
    image.read_at(513, &mut data).unwrap();
    assert!(data[..] == content[513..513 + data.len()]);
    let ranges = ranges(&image);
    assert_eq!(ranges.len(), 6, "{ranges:?}");
    for (index, sector) in content.chunks(512).enumerate() {
        let at = index as u64 * 512;
        let allocated = ranges.iter().any(|range| range.contains(&at));
        assert!(allocated || sector.iter().all(|byte| *byte == 0), "{at}");
    }
    assert_eq!(server.clients(), 1);
    drop(image);
    let until = Instant::now() + Duration::from_secs(5);
    while server.clients() > 0 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn writes_what_is_asked_for() {
    let dir = dir();
    let mut model = create(&dir.path().join("disk"), 8 * MIB);
    let disk = disk(&dir.path().join("disk"));
    let (_server, uri) = serve(dir.path(), LiveExport::new(disk));
    let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
    let mut queue = Blocking::new(&image).unwrap();
    let mut random = Random::new(7);
    for _ in 0..200 {
        let offset = random.below(8 * 2048) * 512;
        let len = ((random.below(600) + 1) * 512).min(8 * MIB - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(5) {
            0 | 1 => {
                random.fill(&mut model[range.clone()]);
                queue.write(offset, &model[range]).unwrap();
            }
            2 => {
                model[range].fill(0);
                let unmap = random.below(2) == 0;
                queue
                    .operate(Operation::WriteZeroes { len, unmap }, offset)
                    .unwrap();
            }
            3 => {
                model[range].fill(0);
                queue.operate(Operation::Discard { len }, offset).unwrap();
            }
            _ => queue.operate(Operation::Flush, 0).unwrap(),
        }
        let offset = random.below(8 * 2048) * 512;
        let len = ((random.below(600) + 1) * 512).min(8 * MIB - offset);
        let mut data = vec![1u8; len as usize];
        queue.read(offset, &mut data).unwrap();
        let range = offset as usize..(offset + len) as usize;
        assert!(data[..] == model[range], "{len} bytes at {offset}");
    }
    image.flush().unwrap();
    assert!(std::fs::read(dir.path().join("disk")).unwrap() == model);
    let refused = queue.write(8 * MIB, &[0; 512]).unwrap_err();
    assert!(refused.is::<BadRequest>());
}

/// Many requests at once, some of them larger than a part, on two queues.
#[test]
fn many_in_flight() {
    let dir = dir();
    let content = create(&dir.path().join("disk"), 48 * MIB);
    let disk = disk(&dir.path().join("disk"));
    let (_server, uri) = serve(dir.path(), LiveExport::new(disk));
    let image = Arc::new(NbdImage::connect(&uri, Access::ReadWrite).unwrap());
    std::thread::scope(|scope| {
        for seed in 0..2u64 {
            let (image, content) = (Arc::clone(&image), &content);
            scope.spawn(move || {
                let event = Arc::new(Event::new().unwrap());
                let mut queue = image.open_queue(32, &event).unwrap();
                let mut random = Random::new(seed);
                let mut memory: HashMap<u64, (u64, Vec<u8>)> = HashMap::new();
                let mut done = 0;
                let mut next = 0;
                while done < 300 {
                    while memory.len() < 64 && next < 300 {
                        let large = random.below(40) == 0;
                        let most = if large { 40_000 } else { 64 };
                        let offset = random.below(48 * 2048) * 512;
                        let len = ((random.below(most) + 1) * 512).min(48 * MIB - offset);
                        let mut data = vec![7u8; len as usize];
                        let (one, other) = data.split_at_mut(len as usize / 3);
                        // SAFETY: the memory is kept in the map until the request was reaped.
                        let buffers = unsafe {
                            vec![
                                Buffer::new(one.as_mut_ptr(), one.len()),
                                Buffer::new(other.as_mut_ptr(), other.len()),
                            ]
                        };
                        queue.submit(Request {
                            tag: next,
                            op: Operation::Read,
                            offset,
                            buffers,
                        });
                        memory.insert(next, (offset, data));
                        next += 1;
                    }
                    queue.push().unwrap();
                    let _ = event.wait(Duration::from_secs(10));
                    event.clear();
                    queue.reap(&mut |completion| {
                        completion.result.unwrap();
                        let (offset, data) = memory.remove(&completion.tag).unwrap();
                        let range = offset as usize..offset as usize + data.len();
                        assert!(data[..] == content[range]);
                        done += 1;
                    });
                }
                assert_eq!(queue.in_flight(), 0);
            });
        }
    });
}

#[test]
fn errors_come_with_their_reason() {
    let dir = dir();
    create(&dir.path().join("disk"), 4 * MIB);
    let faulty = FaultImage::new(common::open(&dir.path().join("disk"), Access::ReadWrite));
    faulty.add(Fault::failing(FaultOn::Write, 28).within(MIB..2 * MIB));
    faulty.add(Fault::failing(FaultOn::Read, 5).within(MIB..2 * MIB));
    let (_server, uri) = serve(dir.path(), LiveExport::new(LiveDisk::new("root", faulty)));
    let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
    let mut queue = Blocking::new(&image).unwrap();
    let seen = queue.write(MIB, &[1; 4096]).unwrap_err();
    assert_eq!(seen.id(), "block.write-failed");
    assert_eq!(seen.datum("errno").unwrap(), 28);
    let cause = seen.find("nbd.server-error").unwrap();
    assert!(cause.text().contains("ENOSPC"), "{}", cause.text());
    assert!(cause.text().contains("errno 28"), "{}", cause.text());
    let seen = queue.read(MIB, &mut [1; 4096]).unwrap_err();
    assert_eq!(seen.datum("errno").unwrap(), 5);
    // Others go on.
    queue.write(0, &[1; 4096]).unwrap();
    queue.read(0, &mut [0; 4096]).unwrap();
}

#[test]
fn a_lost_connection_is_told() {
    let dir = dir();
    create(&dir.path().join("disk"), 4 * MIB);
    let (server, uri) = serve(dir.path(), LiveExport::new(disk(&dir.path().join("disk"))));
    let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
    let mut queue = Blocking::new(&image).unwrap();
    queue.read(0, &mut [0; 4096]).unwrap();
    server.stop();
    let seen = queue.read(0, &mut [0; 4096]).unwrap_err();
    let lost = seen.find("nbd.connection-lost").unwrap();
    assert!(lost.is::<ConnectionLost>() && !lost.remedy().is_empty());
    // And again for whoever comes later.
    assert!(
        image
            .flush()
            .unwrap_err()
            .find("nbd.connection-lost")
            .is_some()
    );
    assert!(
        image
            .allocated(0)
            .unwrap_err()
            .find("nbd.connection-lost")
            .is_some()
    );
    // The socket has gone with the server.
    let seen = NbdImage::connect(&uri, Access::ReadWrite).unwrap_err();
    assert!(seen.is::<ConnectFailed>());
}

#[test]
fn read_only_and_unknown_exports() {
    let dir = dir();
    create(&dir.path().join("disk"), 4 * MIB);
    let export = LiveExport::new(disk(&dir.path().join("disk"))).read_only();
    let (_server, uri) = serve(dir.path(), export);
    let seen = NbdImage::connect(&uri, Access::ReadWrite).unwrap_err();
    assert!(seen.is::<NotWritable>());
    let image = NbdImage::connect(&uri, Access::ReadOnly).unwrap();
    let refused = Blocking::new(&image)
        .unwrap()
        .write(0, &[0; 512])
        .unwrap_err();
    assert_eq!(refused.id(), "block.read-only");
    let mut other = uri.clone();
    other.export = "none".to_owned();
    let seen = NbdImage::connect(&other, Access::ReadOnly).unwrap_err();
    let refused = seen.find("nbd.option-refused").unwrap();
    assert!(refused.is::<OptionRefused>() && refused.text().contains("ERR_UNKNOWN"));
    // The only export has no need of a name.
    other.export = String::new();
    NbdImage::connect(&other, Access::ReadOnly).unwrap();
    let names = strake_nbd::client::exports(&uri).unwrap();
    assert_eq!(names.len(), 1);
    assert_eq!(names[0].0, "root");
}

#[test]
fn over_tls() {
    let dir = dir();
    let pki = certificates(dir.path());
    let content = create(&dir.path().join("disk"), 16 * MIB);
    let export: Arc<dyn Export> = Arc::new(LiveExport::new(disk(&dir.path().join("disk"))));
    let listener = Listener::tcp("127.0.0.1:0").unwrap();
    let port = listener.tcp_address().unwrap().port();
    let config = ServerConfig {
        exports: vec![("root".to_owned(), export)],
        tls: Some(TlsServer::from_directory(&pki).unwrap()),
    };
    let _server = Server::start(config, vec![listener]).unwrap();
    let host = "localhost".to_owned();
    let plain = Uri::new(Address::Tcp { host, port }, "root");
    let uri = with_tls(&plain, &pki);
    let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
    assert!(whole(&image) == content);
    let mut queue = Blocking::new(&image).unwrap();
    let data = vec![9u8; 5 * MIB as usize];
    queue.write(3 * MIB, &data).unwrap();
    let mut back = vec![0u8; data.len()];
    queue.read(3 * MIB, &mut back).unwrap();
    assert!(back == data);
    // In the clear nothing is told.
    let seen = NbdImage::connect(&plain, Access::ReadOnly).unwrap_err();
    assert!(
        seen.find("nbd.tls-mismatch")
            .is_some_and(|seen| seen.is::<TlsMismatch>())
    );
    assert!(strake_nbd::client::exports(&plain).is_err());
    // Another name than the certificate has.
    let mut other = uri.clone();
    other.tls_name = Some("elsewhere".to_owned());
    let seen = NbdImage::connect(&other, Access::ReadOnly).unwrap_err();
    assert!(seen.find("nbd.tls-failed").is_some(), "{seen:?}");
    // Without a certificate of its own.
    let authority = std::fs::read(pki.join("ca-cert.pem")).unwrap();
    let anonymous = TlsClient::new(&authority, None).unwrap();
    let socket = strake_nbd::client::dial(&uri).unwrap();
    let refused = NbdImage::open(socket, &uri, Some(&anonymous), Access::ReadOnly);
    assert!(refused.is_err());
}

#[test]
fn tls_that_the_server_lacks() {
    let dir = dir();
    let pki = certificates(dir.path());
    create(&dir.path().join("disk"), MIB);
    let (_server, uri) = serve(dir.path(), LiveExport::new(disk(&dir.path().join("disk"))));
    let uri = with_tls(&uri, &pki);
    let seen = NbdImage::connect(&uri, Access::ReadOnly).unwrap_err();
    assert!(seen.find("nbd.tls-mismatch").is_some());
}
