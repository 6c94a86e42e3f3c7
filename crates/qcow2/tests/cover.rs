//! Snapshots of a live disk: a new image over the old one while the guest writes without pause.
//! The old one is what the disk was at one instant, the new one loses nothing, and what is left
//! passes `qemu-img check` and reads the same by `qemu-img`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod common;
#[path = "../../block/tests/common/mod.rs"]
mod guest;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{check, content, dir, make, open, peers, store};
use guest::{Guest, Habit, Hooks, SECTOR, verify};
use strake_api::job::{JobId, MigrationLimits, Phase};
use strake_block::{Access, CommitRefused, Image, LiveDisk, Migration, RawImage, SwitchHooks};
use strake_observe::Kind;
use strake_qcow2::{
    Below, ChainPart, Consolidation, CreateOptions, FileStore, Format, Qcow2Image, open_chain,
};

const SIZE: u64 = 8 << 20;
const SECTORS: usize = (SIZE / SECTOR as u64) as usize;

/// As the monitor does it.
fn over(image: &Arc<dyn Image>, overlay: &Path) -> Arc<Qcow2Image> {
    let top = ChainPart {
        store: Arc::new(store(overlay, Access::ReadWrite)),
        format: Format::Qcow2,
        access: Access::ReadWrite,
    };
    let any = image.as_any().unwrap();
    if let Some(qcow2) = any.downcast_ref::<Qcow2Image>() {
        return qcow2.under(top).unwrap();
    }
    let raw = any.downcast_ref::<RawImage>().unwrap();
    let fd = raw.descriptor().unwrap();
    let base = ChainPart {
        store: Arc::new(FileStore::from_fd(fd, raw.path(), Access::ReadOnly).unwrap()),
        format: Format::Raw,
        access: Access::ReadOnly,
    };
    open_chain(vec![top, base]).unwrap()
}

fn snapshot(disk: &Arc<LiveDisk>, overlay: &Path) -> (guest::Job, Arc<AtomicBool>) {
    let (hooks, asked) = Hooks::new();
    let covered = Arc::new(AtomicBool::new(false));
    let (path, done) = (overlay.to_owned(), Arc::clone(&covered));
    let migration = Migration::cover(
        Arc::clone(disk),
        Box::new(move |image| Ok(over(image, &path))),
        Box::new(move || done.store(true, Ordering::Relaxed)),
        JobId("job-1".into()),
        MigrationLimits {
            pause_ms: 10_000,
            ..MigrationLimits::default()
        },
        Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
    )
    .unwrap();
    let job = guest::Job {
        migration,
        hooks,
        asked,
    };
    (job, covered)
}

struct Bench {
    dir: tempfile::TempDir,
    format: Format,
}

impl Bench {
    fn new(format: Format) -> (Self, Arc<LiveDisk>) {
        let bench = Self { dir: dir(), format };
        let base = bench.path(0);
        let image: Arc<dyn Image> = match format {
            Format::Raw => {
                std::fs::File::create(&base).unwrap().set_len(SIZE).unwrap();
                guest::open(&base)
            }
            Format::Qcow2 => {
                make(&base, &CreateOptions::new(SIZE));
                open(&base)
            }
        };
        (bench, LiveDisk::new("root", image))
    }

    /// Of the base, and of the overlays from 1 on.
    fn path(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("disk.{number}"))
    }

    fn format(&self, number: usize) -> Format {
        if number == 0 {
            self.format
        } else {
            Format::Qcow2
        }
    }

    fn overlay(&self, number: usize) -> PathBuf {
        let below = format!("disk.{}", number - 1);
        let options = CreateOptions::new(SIZE).backing(below, self.format(number - 1));
        make(&self.path(number), &options);
        self.path(number)
    }

    /// What an image reads as, by us and by others.
    fn read(&self, number: usize) -> Vec<u8> {
        let path = self.path(number);
        if self.format(number) == Format::Raw {
            return std::fs::read(path).unwrap();
        }
        check(&path);
        let image = open(&path);
        let bytes = common::read_all(image.as_ref());
        drop(image);
        assert!(content(&path) == bytes, "qemu-img reads something else");
        bytes
    }
}

#[test]
fn a_snapshot_is_the_disk_of_one_instant_and_the_disk_loses_nothing() {
    if !peers() {
        return;
    }
    for (number, format) in [Format::Raw, Format::Qcow2].into_iter().enumerate() {
        let (bench, disk) = Bench::new(format);
        let habit = Habit {
            discards: false,
            seed: number as u64 + 1,
            ..Habit::MIXED
        };
        let guest = Guest::start(&disk, vec![0; SECTORS], habit);
        let mut kept = Vec::new();
        for layer in 1..=4 {
            let writes = guest.writes.load(Ordering::Relaxed);
            while guest.writes.load(Ordering::Relaxed) < writes + 200 {
                std::thread::sleep(Duration::from_millis(1));
            }
            let (job, covered) = snapshot(&disk, &bench.overlay(layer));
            assert!(job.asked(), "{:?}", job.migration.status());
            // Nothing goes anywhere now: this is the instant.
            disk.flush().unwrap();
            kept.push(common::read_all(disk.image().as_ref()));
            job.migration.decide(true);
            let status = job.migration.join();
            assert_eq!(status.phase, Phase::Completed, "{status:?}");
            assert!(covered.load(Ordering::Relaxed));
            assert_eq!(disk.image().path(), bench.path(layer).to_str().unwrap());
        }
        let expected = guest.stop();
        verify(disk.image().as_ref(), &expected);
        disk.flush().unwrap();
        // A monitor that is killed leaves as much.
        drop(disk);
        for (layer, kept) in kept.iter().enumerate() {
            assert!(bench.read(layer) == *kept, "{format:?}, layer {layer}");
        }
        let top = open(&bench.path(4));
        verify(top.as_ref(), &expected);
        drop(top);
        bench.read(4);
    }
}

#[test]
fn a_snapshot_that_is_refused_or_cancelled_changes_nothing() {
    if !peers() {
        return;
    }
    for format in [Format::Raw, Format::Qcow2] {
        let (bench, disk) = Bench::new(format);
        let guest = Guest::start(&disk, vec![0; SECTORS], Habit::MIXED);
        for attempt in 0..6 {
            let overlay = bench.overlay(1);
            let before = std::fs::read(&overlay).unwrap();
            let (job, covered) = snapshot(&disk, &overlay);
            if attempt % 2 == 0 {
                let failure = job.finish(false).failure.unwrap();
                assert!(failure.find(CommitRefused::ID).is_some(), "{failure}");
            } else {
                std::thread::sleep(Duration::from_millis(attempt));
                if job.migration.cancel().is_err() {
                    job.migration.decide(false);
                }
                let phase = job.migration.join().phase;
                assert!(matches!(phase, Phase::Cancelled | Phase::Failed));
            }
            assert!(!covered.load(Ordering::Relaxed));
            assert_eq!(disk.image().path(), bench.path(0).to_str().unwrap());
            // Not even its length: it may go, or be used for the next one.
            let after = std::fs::read(&overlay).unwrap();
            assert!(after.starts_with(&before) || before.starts_with(&after));
        }
        let expected = guest.stop();
        verify(disk.image().as_ref(), &expected);
        drop(disk);
        bench.read(0);
    }
}

#[test]
fn a_guest_does_not_wait_for_a_daemon_that_is_away() {
    let (bench, disk) = Bench::new(Format::Raw);
    let guest = Guest::start(&disk, vec![0; SECTORS], Habit::SMALL);
    let (hooks, asked) = Hooks::new();
    hooks.no_daemon.store(true, Ordering::Relaxed);
    let overlay = bench.overlay(1);
    let migration = Migration::cover(
        Arc::clone(&disk),
        Box::new(move |image| Ok(over(image, &overlay))),
        Box::new(|| {}),
        JobId("job-1".into()),
        MigrationLimits::default(),
        Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
    )
    .unwrap();
    let writes = guest.writes.load(Ordering::Relaxed);
    while guest.writes.load(Ordering::Relaxed) < writes + 1000 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!migration.status().phase.is_final());
    hooks.no_daemon.store(false, Ordering::Relaxed);
    let job = guest::Job {
        migration,
        hooks,
        asked,
    };
    let phase = job.finish(true).phase;
    assert_eq!(phase, Phase::Completed);
    verify_stopped(guest, &disk);
}

fn verify_stopped(guest: Guest, disk: &Arc<LiveDisk>) {
    let expected = guest.stop();
    verify(disk.image().as_ref(), &expected);
}

/// The whole life: covered again and again, then one image again, while the guest writes.
#[test]
fn snapshots_are_consolidated_while_the_guest_writes() {
    if !peers() {
        return;
    }
    for format in [Format::Raw, Format::Qcow2] {
        let (bench, disk) = Bench::new(format);
        let habit = Habit {
            discards: false,
            ..Habit::MIXED
        };
        let guest = Guest::start(&disk, vec![0; SECTORS], habit);
        for layer in 1..=3 {
            let (job, _) = snapshot(&disk, &bench.overlay(layer));
            assert_eq!(job.finish(true).phase, Phase::Completed);
        }
        for layer in (0..3).rev() {
            let image = disk.image();
            let qcow2 = image
                .as_any()
                .unwrap()
                .downcast_ref::<Qcow2Image>()
                .unwrap();
            let path = bench.path(layer);
            let below = match bench.format(layer) {
                Format::Raw => Below::Raw(guest::open(&path)),
                Format::Qcow2 => Below::Qcow2(Arc::new(store(&path, Access::ReadWrite))),
            };
            let overlay = Arc::new(Consolidation::new(qcow2, below).unwrap());
            drop(image);
            let (hooks, asked) = Hooks::new();
            let migration = Migration::consolidate(
                Arc::clone(&disk),
                overlay.base(),
                overlay,
                JobId("job-1".into()),
                MigrationLimits {
                    pause_ms: 10_000,
                    ..MigrationLimits::default()
                },
                Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
            )
            .unwrap();
            let job = guest::Job {
                migration,
                hooks,
                asked,
            };
            assert_eq!(job.finish(true).phase, Phase::Completed);
            std::fs::remove_file(bench.path(layer + 1)).unwrap();
        }
        let expected = guest.stop();
        disk.flush().unwrap();
        verify(disk.image().as_ref(), &expected);
        drop(disk);
        bench.read(0);
        let image: Arc<dyn Image> = match format {
            Format::Raw => guest::open(&bench.path(0)),
            Format::Qcow2 => open(&bench.path(0)),
        };
        verify(image.as_ref(), &expected);
    }
}
