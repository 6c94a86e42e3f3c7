//! Method `snapshot`: the guest goes on on an overlay while its image is copied. No sector is lost,
//! whatever is copied to what; it turns back when the overlay gets too large or the destination fails;
//! and wherever it ends the disk is whole and can be consolidated.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod common;
#[path = "../../block/tests/common/mod.rs"]
mod guest;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{check, content, dir, make, open, peers, store};
use guest::{Guest, Habit, Hooks, SECTOR, stamp, verify};
use strake_api::job::{
    JobId, Method, MethodReason, MigrationLimits, MigrationStatus, OverlayStep, Phase, Stage,
};
use strake_block::{
    Access, Blocking, CommitRefused, Delta, Fault, FaultImage, FaultOn, Image, LeftOnOverlay,
    LiveDisk, Migration, NoOverlay, OverlayFull, SwitchHooks, WriteFailed,
};
use strake_observe::Kind;
use strake_qcow2::{Backing, CreateOptions, Format, Header, NewOverlay};

const SIZE: u64 = 12 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Raw,
    /// With clusters of that many bits.
    Qcow2(u32),
    /// Over another one.
    Chain(u32),
}

impl Kept {
    fn format(self) -> Format {
        match self {
            Self::Raw => Format::Raw,
            _ => Format::Qcow2,
        }
    }
}

struct Bench {
    dir: tempfile::TempDir,
    from: Kept,
    to: Kept,
    disk: Arc<LiveDisk>,
    destination: Arc<FaultImage>,
    expected: Vec<u64>,
}

impl Bench {
    fn new(from: Kept, to: Kept, bits: u32) -> Self {
        let dir = dir();
        let path = |name: &str| dir.path().join(name);
        let made = |kept: Kept, name: &str| -> Arc<dyn Image> {
            let options = |bits| CreateOptions::new(SIZE).cluster_bits(bits);
            match kept {
                Kept::Raw => return guest::create(&path(name), SIZE),
                Kept::Qcow2(bits) => make(&path(name), &options(bits)),
                Kept::Chain(bits) => {
                    make(&path("rest"), &options(bits));
                    make(&path(name), &options(bits).backing("rest", Format::Qcow2));
                }
            }
            open(&path(name))
        };
        let source = made(from, "source");
        let mut expected = vec![0; (SIZE / SECTOR as u64) as usize];
        let mut data = vec![0; 1 << 20];
        // The odd megabytes are holes.
        for at in (0..SIZE).step_by(2 << 20) {
            for (number, sector) in data.chunks_mut(SECTOR).enumerate() {
                let number = at as usize / SECTOR + number;
                stamp(number as u64, 1, sector);
                expected[number] = 1;
            }
            Blocking::new(source.as_ref())
                .unwrap()
                .write(at, &data)
                .unwrap();
        }
        let destination = FaultImage::new(made(to, "copy"));
        let options = CreateOptions::new(SIZE).cluster_bits(bits);
        make(&path("overlay"), &options.backing("source", from.format()));
        Self {
            disk: LiveDisk::new("root", source),
            dir,
            from,
            to,
            destination,
            expected,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn guest(&self, habit: Habit) -> Guest {
        Guest::start(&self.disk, self.expected.clone(), habit)
    }

    fn delta(&self) -> Arc<dyn Delta> {
        let copy = Backing {
            path: "copy".to_owned(),
            format: Some(self.to.format().name().to_owned()),
        };
        Arc::new(NewOverlay::new(
            Arc::new(store(&self.path("overlay"), Access::ReadWrite)),
            copy,
        ))
    }

    fn job(&self, limits: MigrationLimits) -> guest::Job {
        let (hooks, asked) = Hooks::new();
        let migration = Migration::start_with_overlay(
            Arc::clone(&self.disk),
            (
                Arc::clone(&self.destination) as Arc<dyn Image>,
                self.delta(),
            ),
            tempfile::tempfile().unwrap(),
            JobId("job-1".into()),
            limits,
            Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
        )
        .unwrap();
        guest::Job {
            migration,
            hooks,
            asked,
        }
    }

    fn is_on(&self, name: &str) {
        assert_eq!(self.disk.image().path(), self.path(name).to_str().unwrap());
    }

    /// The disk as it is found by whoever starts the VM again, by its file of that name.
    fn ends_on(self, name: &str, kept: Kept, expected: &Vec<u64>) {
        let path = self.path(name);
        let Self {
            dir,
            disk,
            destination,
            ..
        } = self;
        drop((disk, destination));
        let image: Arc<dyn Image> = match kept {
            Kept::Raw => guest::open(&path),
            _ => open(&path),
        };
        verify(image.as_ref(), expected);
        let data = common::read_all(image.as_ref());
        drop(image);
        if kept != Kept::Raw {
            check(&path);
            assert!(content(&path) == data, "qemu-img reads something else");
        }
        drop(dir);
    }
}

fn limits() -> MigrationLimits {
    MigrationLimits {
        pause_ms: 10_000,
        method: Method::Snapshot,
        ..MigrationLimits::default()
    }
}

/// Waits for the question and says what it is.
fn question(job: &guest::Job) -> Option<Stage> {
    job.asked().then(|| {
        let stage = job.migration.question();
        stage.expect("it asked, and forgot it")
    })
}

fn commit(job: &guest::Job, stage: Stage) {
    let asked = question(job);
    assert_eq!(asked, Some(stage), "{:?}", job.migration.status());
    // An answer to something else is none.
    for other in [Stage::Overlay, Stage::Destination, Stage::Source] {
        if other != stage {
            job.migration.decide_stage(other, false);
        }
    }
    job.migration.decide_stage(stage, true);
}

fn failed_because<K: Kind>(status: &MigrationStatus) {
    assert_eq!(status.phase, Phase::Failed, "{status:?}");
    let failure = status.failure.as_ref().unwrap();
    assert!(failure.find(K::ID).is_some(), "{failure}");
}

const HABITS: [Habit; 2] = [
    Habit::SMALL,
    Habit {
        discards: false,
        ..Habit::MIXED
    },
];

#[test]
fn no_sector_is_lost_from_any_image_to_any_other() {
    if !peers() {
        return;
    }
    let ways = [
        (Kept::Raw, Kept::Raw, 16),
        (Kept::Raw, Kept::Qcow2(16), 12),
        (Kept::Qcow2(12), Kept::Raw, 16),
        (Kept::Chain(16), Kept::Qcow2(12), 18),
    ];
    for (number, (from, to, bits)) in ways.into_iter().enumerate() {
        for habit in HABITS {
            let bench = Bench::new(from, to, bits);
            let guest = bench.guest(habit);
            std::thread::sleep(Duration::from_millis(20 * number as u64));
            let job = bench.job(limits());
            commit(&job, Stage::Overlay);
            // What the guest writes from here on does not come to the source.
            assert_eq!(question(&job), Some(Stage::Destination));
            bench.is_on("overlay");
            let overlay = job.migration.status().overlay.unwrap();
            assert_eq!(overlay.step, OverlayStep::Consolidate);
            let header = Header::read(&store(&bench.path("overlay"), Access::ReadOnly)).unwrap();
            assert_eq!(header.backing().unwrap().path, "copy");
            guest::same(
                bench.disk.image().as_ref(),
                bench.destination.as_ref(),
                SIZE,
            );
            job.migration.decide_stage(Stage::Destination, true);
            let status = job.migration.join();
            assert_eq!(status.phase, Phase::Completed, "{status:?}");
            assert_eq!(status.overlay, None);
            let used = status.method.unwrap();
            assert_eq!(
                (used.method, used.why),
                (Method::Snapshot, MethodReason::Asked)
            );
            bench.is_on("copy");
            std::fs::remove_file(bench.path("overlay")).unwrap();
            std::fs::remove_file(bench.path("source")).unwrap();
            let before = guest.writes.load(Ordering::Relaxed);
            while guest.writes.load(Ordering::Relaxed) < before + 50 {
                std::thread::sleep(Duration::from_millis(1));
            }
            let expected = guest.stop();
            bench.ends_on("copy", to, &expected);
        }
    }
}

#[test]
fn the_image_does_not_change_while_it_is_copied() {
    if !peers() {
        return;
    }
    let bench = Bench::new(Kept::Raw, Kept::Raw, 16);
    bench
        .destination
        .add(Fault::delaying(FaultOn::Change, Duration::from_millis(40)));
    let guest = bench.guest(Habit::SMALL);
    let job = bench.job(limits());
    assert_eq!(question(&job), Some(Stage::Overlay));
    let source = bench.disk.image();
    let before = common::read_all(source.as_ref());
    job.migration.decide_stage(Stage::Overlay, true);
    let writes = guest.writes.load(Ordering::Relaxed);
    while guest.writes.load(Ordering::Relaxed) < writes + 200 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(common::read_all(source.as_ref()) == before);
    bench.destination.clear();
    commit(&job, Stage::Destination);
    assert_eq!(job.migration.join().phase, Phase::Completed);
    assert!(common::read_all(source.as_ref()) == before);
    let expected = guest.stop();
    bench.ends_on("copy", Kept::Raw, &expected);
}

#[test]
fn an_overlay_that_gets_too_large_goes_back_into_the_source() {
    if !peers() {
        return;
    }
    for from in [Kept::Raw, Kept::Qcow2(16), Kept::Chain(12)] {
        let bench = Bench::new(from, Kept::Raw, 16);
        bench
            .destination
            .add(Fault::delaying(FaultOn::Change, Duration::from_millis(100)));
        let guest = bench.guest(Habit::SMALL);
        let job = bench.job(MigrationLimits {
            delta_bytes: Some(1 << 20),
            ..limits()
        });
        commit(&job, Stage::Overlay);
        assert_eq!(question(&job), Some(Stage::Source));
        let overlay = job.migration.status().overlay.unwrap();
        assert_eq!(overlay.step, OverlayStep::TurnBack);
        assert!(overlay.bytes > 1 << 19, "{overlay:?}");
        job.migration.decide_stage(Stage::Source, true);
        let status = job.migration.join();
        failed_because::<OverlayFull>(&status);
        assert_eq!(status.overlay, None);
        bench.is_on("source");
        std::fs::remove_file(bench.path("overlay")).unwrap();
        let expected = guest.stop();
        bench.ends_on("source", from, &expected);
    }
}

#[test]
fn a_job_that_rests_does_not_let_the_overlay_grow_without_bound() {
    if !peers() {
        return;
    }
    let bench = Bench::new(Kept::Raw, Kept::Raw, 16);
    bench
        .destination
        .add(Fault::delaying(FaultOn::Change, Duration::from_millis(100)));
    let job = bench.job(MigrationLimits {
        delta_bytes: Some(2 << 20),
        ..limits()
    });
    commit(&job, Stage::Overlay);
    // As soon as it has heard the answer.
    while job.migration.pause().is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let guest = bench.guest(Habit::SMALL);
    assert_eq!(question(&job), Some(Stage::Source));
    assert!(job.migration.pause().is_err());
    job.migration.decide_stage(Stage::Source, true);
    failed_because::<OverlayFull>(&job.migration.join());
    bench.is_on("source");
    let expected = guest.stop();
    bench.ends_on("source", Kept::Raw, &expected);
}

#[test]
fn a_destination_that_fails_leaves_the_disk_on_its_source() {
    if !peers() {
        return;
    }
    for (on, skip) in [
        (FaultOn::Change, 0),
        (FaultOn::Change, 5),
        (FaultOn::Flush, 0),
    ] {
        let bench = Bench::new(Kept::Raw, Kept::Raw, 16);
        bench
            .destination
            .add(Fault::failing(on, libc::EIO).after(skip));
        let guest = bench.guest(HABITS[1]);
        let job = bench.job(limits());
        commit(&job, Stage::Overlay);
        commit(&job, Stage::Source);
        let status = job.migration.join();
        assert_eq!(status.phase, Phase::Failed, "{status:?}");
        if on == FaultOn::Change {
            failed_because::<WriteFailed>(&status);
        }
        bench.is_on("source");
        let expected = guest.stop();
        bench.ends_on("source", Kept::Raw, &expected);
    }
}

#[test]
fn it_is_refused_or_cancelled_anywhere_and_the_disk_is_whole() {
    if !peers() {
        return;
    }
    // At the first question the disk is on the source.
    let bench = Bench::new(Kept::Raw, Kept::Raw, 16);
    let guest = bench.guest(HABITS[1]);
    let job = bench.job(limits());
    assert_eq!(question(&job), Some(Stage::Overlay));
    job.migration.decide_stage(Stage::Overlay, false);
    failed_because::<CommitRefused>(&job.migration.join());
    bench.is_on("source");
    let expected = guest.stop();
    bench.ends_on("source", Kept::Raw, &expected);

    // At the second one it is on the overlay, and stays there.
    let bench = Bench::new(Kept::Qcow2(16), Kept::Qcow2(16), 16);
    let guest = bench.guest(HABITS[1]);
    let job = bench.job(limits());
    commit(&job, Stage::Overlay);
    assert_eq!(question(&job), Some(Stage::Destination));
    job.migration.decide_stage(Stage::Destination, false);
    let status = job.migration.join();
    failed_because::<CommitRefused>(&status);
    failed_because::<LeftOnOverlay>(&status);
    assert_eq!(status.overlay.unwrap().step, OverlayStep::Consolidate);
    bench.is_on("overlay");
    let expected = guest.stop();
    bench.disk.flush().unwrap();
    bench.ends_on("overlay", Kept::Chain(0), &expected);

    // In between.
    for millis in [0, 2, 10, 30, 60, 120] {
        let bench = Bench::new(Kept::Raw, Kept::Raw, 12);
        bench
            .destination
            .add(Fault::delaying(FaultOn::Change, Duration::from_millis(20)));
        let guest = bench.guest(HABITS[1]);
        let job = bench.job(limits());
        commit(&job, Stage::Overlay);
        std::thread::sleep(Duration::from_millis(millis));
        if job.migration.cancel().is_err() {
            job.migration.decide_stage(Stage::Destination, false);
        }
        let status = job.migration.join();
        let failure = status.failure.unwrap();
        assert!(failure.find(LeftOnOverlay::ID).is_some(), "{failure}");
        assert!(status.overlay.is_some());
        bench.is_on("overlay");
        let expected = guest.stop();
        bench.disk.flush().unwrap();
        bench.ends_on("overlay", Kept::Chain(0), &expected);
    }
}

#[test]
fn auto_takes_the_overlay_if_the_guest_writes_too_fast_and_there_is_room() {
    if !peers() {
        return;
    }
    for (room, method) in [(u64::MAX, Method::Snapshot), (1, Method::Mirror)] {
        let bench = Bench::new(Kept::Raw, Kept::Raw, 16);
        bench
            .destination
            .add(Fault::delaying(FaultOn::Change, Duration::from_millis(60)));
        let guest = bench.guest(Habit::SMALL);
        let job = bench.job(MigrationLimits {
            delta_bytes: Some(room),
            method: Method::Auto,
            ..limits()
        });
        while job
            .migration
            .status()
            .method
            .is_none_or(|it| it.method == Method::Dirty)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        let used = job.migration.status().method.unwrap();
        assert_eq!(used.method, method, "{}", used.why);
        bench.destination.clear();
        if method == Method::Snapshot {
            assert!(matches!(used.why, MethodReason::OverlayFits { .. }));
            commit(&job, Stage::Overlay);
        }
        commit(&job, Stage::Destination);
        let status = job.migration.join();
        assert_eq!(status.phase, Phase::Completed, "{status:?}");
        bench.is_on("copy");
        let expected = guest.stop();
        bench.ends_on("copy", Kept::Raw, &expected);
    }
}

#[test]
fn without_an_overlay_it_is_refused() {
    let dir = dir();
    let (a, b) = guest::two(&dir);
    let disk = LiveDisk::new("root", guest::create(&a, SIZE));
    let seen = guest::Job::start(&disk, &guest::create(&b, SIZE), limits()).err();
    assert!(seen.unwrap().find(NoOverlay::ID).is_some());
    // And one that is none is found before anything has changed.
    let bench = Bench::new(Kept::Raw, Kept::Raw, 16);
    common::queue(&open(&bench.path("overlay")))
        .write(0, &[1; 512])
        .unwrap();
    let job = bench.job(limits());
    assert_eq!(question(&job), None);
    failed_because::<strake_qcow2::BadOption>(&job.migration.join());
    assert_eq!(bench.from, Kept::Raw);
    bench.is_on("source");
}
