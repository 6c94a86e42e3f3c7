//! Live migration with NBD on either side of the disk: clients write while the disk under their
//! server moves, and a disk moves from a file onto an export and back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use strake_api::job::{JobId, MigrationLimits, MigrationStatus, Phase};
use strake_block::{Access, Blocking, Image, LiveDisk, Migration, SwitchHooks};
use strake_nbd::{
    Address, Export, Listener, LiveExport, NbdImage, Server, ServerConfig, TlsServer, Uri,
};
use strake_observe::Result;

use common::{
    MIB, Peer, Random, certificates, create, dir, disk, open, peer, run, serve, with_tls,
};

struct Hooks(Mutex<Sender<()>>);

impl SwitchHooks for Hooks {
    fn can_ask(&self) -> bool {
        true
    }

    fn suspend_vm(&self, _: Duration) -> Result<()> {
        Ok(())
    }

    fn resume_vm(&self) {}

    fn await_commit(&self, _: &JobId) {
        let _ = self.0.lock().unwrap().send(());
    }

    fn ended(&self, _: &MigrationStatus) {}
}

/// Starts to move the disk; and what tells when it asks for its commit.
fn start(
    disk: &Arc<LiveDisk>,
    to: &Arc<dyn Image>,
    limits: MigrationLimits,
) -> (Arc<Migration>, Receiver<()>) {
    let (sender, asked) = channel();
    let migration = Migration::start(
        Arc::clone(disk),
        Arc::clone(to),
        tempfile::tempfile().unwrap(),
        JobId("j".to_owned()),
        limits,
        Arc::new(Hooks(Mutex::new(sender))),
    )
    .unwrap();
    (migration, asked)
}

/// Moves the disk and commits.
fn migrate(disk: &Arc<LiveDisk>, to: &Arc<dyn Image>) {
    let limits = MigrationLimits {
        // What is tested is the data, however busy this host is.
        pause_ms: 10_000,
        ..MigrationLimits::default()
    };
    let (migration, asked) = start(disk, to, limits);
    asked.recv_timeout(Duration::from_secs(120)).unwrap();
    migration.decide(true);
    let status = migration.join();
    assert_eq!(status.phase, Phase::Completed, "{status:?}");
}

/// Writes blocks of its own third of the disk until it is told to stop, reads some back, and gives
/// what it wrote.
fn guest(image: &NbdImage, third: u64, stop: &AtomicBool, writes: &AtomicU64) -> Vec<u8> {
    let size = image.size() / 3 / 4096 * 4096;
    let start = third * size;
    let mut model = vec![0u8; size as usize];
    let mut queue = Blocking::new(image).unwrap();
    queue.read(start, &mut model).unwrap();
    let mut random = Random::new(third);
    while !stop.load(Ordering::Relaxed) {
        let at = random.below(size / 4096) * 4096;
        let len = ((random.below(16) + 1) * 4096).min(size - at);
        let range = at as usize..(at + len) as usize;
        random.fill(&mut model[range.clone()]);
        queue.write(start + at, &model[range]).unwrap();
        let at = random.below(size / 4096) * 4096;
        let mut data = [0u8; 4096];
        queue.read(start + at, &mut data).unwrap();
        assert!(
            data == model[at as usize..at as usize + 4096],
            "block at {at}"
        );
        writes.fetch_add(1, Ordering::Relaxed);
    }
    model
}

/// Waits until that many more writes were done.
fn after(writes: &AtomicU64, more: u64) {
    let until = writes.load(Ordering::Relaxed) + more;
    while writes.load(Ordering::Relaxed) < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn clients_write_while_the_disk_moves() {
    let dir = dir();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    create(&a, 24 * MIB);
    create(&b, 24 * MIB);
    let images: [Arc<dyn Image>; 2] = [open(&a, Access::ReadWrite), open(&b, Access::ReadWrite)];
    let disk = LiveDisk::new("root", Arc::clone(&images[0]));
    let (_server, uri) = serve(dir.path(), LiveExport::new(Arc::clone(&disk)));
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let (stop, writes) = (&stop, &writes);
    std::thread::scope(|scope| {
        let guests: Vec<_> = (0..3)
            .map(|third| {
                let image = NbdImage::connect(&uri, Access::ReadWrite).unwrap();
                scope.spawn(move || guest(&image, third, stop, writes))
            })
            .collect();
        for turn in 1..=6 {
            migrate(&disk, &images[turn % 2]);
            after(writes, 30);
        }
        stop.store(true, Ordering::Relaxed);
        let models: Vec<Vec<u8>> = guests.into_iter().map(|it| it.join().unwrap()).collect();
        let written = models.concat();
        disk.flush().unwrap();
        let end = std::fs::read(&a).unwrap();
        assert!(end[..written.len()] == written);
    });
}

/// From a file onto an export and back, while a client of ours writes.
fn onto(uri: &Uri, file: &Path) {
    let dir = dir();
    let source = dir.path().join("source");
    create(&source, 12 * MIB);
    let disk = disk(&source);
    let (_server, here) = serve(dir.path(), LiveExport::new(Arc::clone(&disk)));
    let image = NbdImage::connect(&here, Access::ReadWrite).unwrap();
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let (stop, writes) = (&stop, &writes);
    std::thread::scope(|scope| {
        let guest = scope.spawn(move || guest(&image, 0, stop, writes));
        after(writes, 10);
        let there: Arc<dyn Image> = Arc::new(NbdImage::connect(uri, Access::ReadWrite).unwrap());
        migrate(&disk, &there);
        assert_eq!(disk.image().path(), uri.to_string());
        after(writes, 50);
        let back: Arc<dyn Image> = open(&source, Access::ReadWrite);
        migrate(&disk, &back);
        drop(there);
        after(writes, 10);
        migrate(&disk, &{
            let there: Arc<dyn Image> =
                Arc::new(NbdImage::connect(uri, Access::ReadWrite).unwrap());
            there
        });
        stop.store(true, Ordering::Relaxed);
        let model = guest.join().unwrap();
        disk.flush().unwrap();
        let end = std::fs::read(file).unwrap();
        assert!(end[..model.len()] == model);
        let (rest, source) = (&end[model.len()..], std::fs::read(&source).unwrap());
        assert!(rest[..] == source[model.len()..]);
    });
}

fn empty(path: &Path) {
    std::fs::File::create(path)
        .unwrap()
        .set_len(12 * MIB)
        .unwrap();
}

#[test]
fn onto_an_export_of_ours() {
    let dir = dir();
    let file = dir.path().join("there");
    empty(&file);
    let (_server, uri) = serve(dir.path(), LiveExport::new(disk(&file)));
    onto(&uri, &file);
}

#[test]
fn onto_qemu_nbd() {
    let Some(program) = peer("qemu-nbd") else {
        return;
    };
    let dir = dir();
    let (file, socket) = (dir.path().join("there"), dir.path().join("s"));
    empty(&file);
    let arguments = ["-k", socket.to_str().unwrap(), "-f", "raw", "-t", "-x", "x"];
    let arguments = [&arguments[..], &[file.to_str().unwrap()]].concat();
    let _peer = Peer::start(&program, &arguments, &socket);
    onto(&Uri::new(Address::Unix(socket), "x"), &file);
}

#[test]
fn onto_nbdkit() {
    let Some(program) = peer("nbdkit") else {
        return;
    };
    let dir = dir();
    let (file, socket) = (dir.path().join("there"), dir.path().join("s"));
    empty(&file);
    let arguments = [
        "-f",
        "-U",
        socket.to_str().unwrap(),
        "file",
        file.to_str().unwrap(),
    ];
    let _peer = Peer::start(&program, &arguments, &socket);
    onto(&Uri::new(Address::Unix(socket), ""), &file);
}

#[test]
fn onto_an_export_by_tls() {
    let dir = dir();
    let file = dir.path().join("there");
    empty(&file);
    let pki = certificates(dir.path());
    let export: Arc<dyn Export> = Arc::new(LiveExport::new(disk(&file)));
    let config = ServerConfig {
        exports: vec![("root".to_owned(), export)],
        tls: Some(TlsServer::from_directory(&pki).unwrap()),
    };
    let listener = Listener::tcp("127.0.0.1:0").unwrap();
    let port = listener.tcp_address().unwrap().port();
    let _server = Server::start(config, vec![listener]).unwrap();
    let host = "127.0.0.1".to_owned();
    let uri = Uri::new(Address::Tcp { host, port }, "root");
    onto(&with_tls(&uri, &pki), &file);
}

/// The destination dies in the middle of the copy: the disk stays where it is, and its clients
/// notice nothing.
#[test]
fn the_destination_is_killed() {
    let Some(program) = peer("qemu-nbd") else {
        return;
    };
    let dir = dir();
    let (source, file) = (dir.path().join("source"), dir.path().join("there"));
    let socket = dir.path().join("s");
    create(&source, 12 * MIB);
    empty(&file);
    let arguments = ["-k", socket.to_str().unwrap(), "-f", "raw", "-t"];
    let arguments = [&arguments[..], &[file.to_str().unwrap()]].concat();
    let mut peer = Peer::start(&program, &arguments, &socket);
    let disk = disk(&source);
    let (_server, here) = serve(dir.path(), LiveExport::new(Arc::clone(&disk)));
    let image = NbdImage::connect(&here, Access::ReadWrite).unwrap();
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let (stop, writes) = (&stop, &writes);
    std::thread::scope(|scope| {
        let guest = scope.spawn(move || guest(&image, 0, stop, writes));
        let uri = Uri::new(Address::Unix(socket), "");
        let there: Arc<dyn Image> = Arc::new(NbdImage::connect(&uri, Access::ReadWrite).unwrap());
        let slowly = MigrationLimits {
            bytes_per_second: Some(MIB),
            ..MigrationLimits::default()
        };
        let (migration, _asked) = start(&disk, &there, slowly);
        after(writes, 20);
        peer.kill();
        let status = migration.join();
        assert_eq!(status.phase, Phase::Failed, "{status:?}");
        let failure = status.failure.unwrap();
        let lost = failure.find("nbd.connection-lost");
        assert!(lost.is_some(), "{failure:?}");
        assert_eq!(disk.image().path(), source.display().to_string());
        after(writes, 20);
        stop.store(true, Ordering::Relaxed);
        let model = guest.join().unwrap();
        disk.flush().unwrap();
        assert!(std::fs::read(&source).unwrap()[..model.len()] == model);
    });
}

/// What nbdcopy copies meanwhile is what is there, on whichever file it is.
#[test]
fn nbdcopy_while_the_disk_moves() {
    let Some(program) = peer("nbdcopy") else {
        return;
    };
    let dir = dir();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let content = create(&a, 24 * MIB);
    create(&b, 24 * MIB);
    let images: [Arc<dyn Image>; 2] = [open(&a, Access::ReadWrite), open(&b, Access::ReadWrite)];
    let disk = LiveDisk::new("root", Arc::clone(&images[0]));
    let (_server, uri) = serve(dir.path(), LiveExport::new(Arc::clone(&disk)));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut turns = 0;
            while !stop.load(Ordering::Relaxed) || turns < 2 {
                turns += 1;
                migrate(&disk, &images[turns % 2]);
            }
        });
        for number in 0..6 {
            let copy = dir.path().join(format!("copy{number}"));
            run(&program, &[&uri.to_string(), copy.to_str().unwrap()]);
            assert!(std::fs::read(&copy).unwrap() == content, "copy {number}");
        }
        stop.store(true, Ordering::Relaxed);
        mover.join().unwrap();
    });
}
