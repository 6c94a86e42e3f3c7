//! An export with both of its front-ends, from its configuration to its end.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use strake_api::control::{DiskConfig, Event, FdIndex, ImageConfig, RunState};
use strake_api::job::{JobId, MigrationLimits, Phase as JobPhase};
use strake_block::{Access, Blocking, Operation, RawImage};
use strake_nbd::{Address, NbdImage, Uri};

use super::*;
use crate::MigrationRequest;

const SIZE: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

fn image(path: &Path) -> OwnedFd {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    file.set_len(SIZE).unwrap();
    file.into()
}

fn config() -> ExportConfig {
    ExportConfig {
        export: "web1".to_owned(),
        disk: DiskConfig {
            name: "root".to_owned(),
            slot: 0,
            image: ImageConfig::Raw {
                file: FdIndex(0),
                path: "root.raw".to_owned(),
            },
            read_only: false,
            serial: "root".to_owned(),
            queues: 4,
            limits: strake_api::control::DiskLimits::default(),
        },
        observations: None,
        front_ends: vec![
            FrontEndConfig::VhostUser {
                listener: FdIndex(1),
            },
            FrontEndConfig::Nbd(NbdConfig {
                listener: FdIndex(2),
                transport: Transport::Unix,
                name: "root".to_owned(),
                tls: None,
            }),
        ],
    }
}

struct World {
    dir: tempfile::TempDir,
    mailbox: Arc<Mailbox>,
    machine: Arc<Machine>,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let mailbox = Mailbox::new().unwrap();
    let listener =
        |name: &str| -> OwnedFd { UnixListener::bind(dir.path().join(name)).unwrap().into() };
    let mut fds = Descriptors::new([
        image(&dir.path().join("root.raw")),
        listener("vhost.sock"),
        listener("nbd.sock"),
    ]);
    let machine = Machine::export(config(), &mut fds, &mailbox).unwrap();
    World {
        dir,
        mailbox,
        machine,
    }
}

impl World {
    fn client(&self) -> NbdImage {
        let address = Address::Unix(self.dir.path().join("nbd.sock"));
        NbdImage::connect(&Uri::new(address, "root"), Access::ReadWrite).unwrap()
    }

    fn wait(&self, wanted: impl Fn(&Event) -> bool) {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match self.mailbox.take() {
                Some(event) if wanted(&event) => return,
                Some(_) => {}
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        panic!("the event never came");
    }
}

#[test]
fn what_clients_wrote_is_in_the_image_when_the_export_has_ended() {
    let world = world();
    assert_eq!(world.machine.run_state(), RunState::Built);
    world.machine.start().unwrap();
    let client = world.client();
    Blocking::new(&client)
        .unwrap()
        .write(4096, &[7; 4096])
        .unwrap();
    drop(client);
    assert!(world.machine.press_power_button().is_err());
    assert!(world.machine.stop().is_empty());
    let mut found = vec![0; 4096];
    File::open(world.dir.path().join("root.raw"))
        .unwrap()
        .read_exact_at(&mut found, 4096)
        .unwrap();
    assert_eq!(found, [7; 4096]);
}

#[test]
fn its_disk_is_migrated_under_its_clients() {
    let world = world();
    world.machine.start().unwrap();
    let client = world.client();
    let mut queue = Blocking::new(&client).unwrap();
    queue.write(0, &[1; 4096]).unwrap();
    let moved = world.dir.path().join("moved.raw");
    let job = JobId("j1".to_owned());
    let request = MigrationRequest {
        job: job.clone(),
        disk: "root".to_owned(),
        destination: Arc::new(
            RawImage::from_fd(image(&moved), "moved.raw", Access::ReadWrite).unwrap(),
        ),
        journal: tempfile::tempfile().unwrap().into(),
        limits: MigrationLimits::default(),
        keep: strake_block::Keep::Nothing,
    };
    // As if a daemon listened.
    let (ours, _theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let connection = Arc::new(crate::control::Connection::new(ours));
    world.mailbox.set_connection(Some(connection));
    world.mailbox.set_heard();
    world.machine.migrate(request).unwrap();
    world.wait(|event| matches!(event, Event::JobAwaitsCommit { .. }));
    world.machine.decide_job(&job, true).unwrap();
    world.wait(|event| matches!(event, Event::JobEnded(_)));
    assert_eq!(
        world.machine.job_status(&job).unwrap().phase,
        JobPhase::Completed
    );
    queue.write(8192, &[2; 4096]).unwrap();
    queue.operate(Operation::Flush, 0).unwrap();
    let mut found = vec![0; 12288];
    File::open(&moved)
        .unwrap()
        .read_exact_at(&mut found, 0)
        .unwrap();
    assert_eq!((found[0], found[4096], found[8192]), (1, 0, 2));
    drop((queue, client));
    assert!(world.machine.stop().is_empty());
}

#[test]
fn a_configuration_that_makes_no_export_is_refused() {
    let mailbox = Mailbox::new().unwrap();
    let changes: [fn(&mut ExportConfig); 4] = [
        |config| config.export.clear(),
        |config| config.disk.name.clear(),
        |config| config.front_ends.clear(),
        |config| config.disk.queues = 0,
    ];
    for change in changes {
        let mut config = config();
        change(&mut config);
        let seen = Machine::export(config, &mut Descriptors::default(), &mailbox).unwrap_err();
        assert_eq!(seen.id(), "machine.bad-config");
    }
    let seen = Machine::export(config(), &mut Descriptors::default(), &mailbox).unwrap_err();
    assert_eq!(seen.id(), "machine.build-failed");
}
