//! Live consolidation: a layer goes into the image below it while the guest writes without pause.
//! No sector is lost whatever the job comes to, both sides are the same when the daemon is asked,
//! and what is left passes `qemu-img check` and reads the same by `qemu-img`.
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
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{check, content, dir, make, open, peers, store};
use guest::{Guest, Habit, Hooks, SECTOR, stamp, verify};
use strake_api::job::{JobId, Method, MigrationLimits, MigrationStatus, Phase};
use strake_block::{
    Access, Blocking, CommitRefused, Fault, FaultImage, FaultOn, Image, LiveDisk, Migration,
    Operation, SwitchHooks, WriteFailed,
};
use strake_observe::Kind;
use strake_qcow2::{
    Backing, Below, ChainPart, Commit, Consolidation, CreateOptions, Format, Progress, Qcow2Image,
};

const SIZE: u64 = 12 << 20;
const SECTORS: u64 = SIZE / SECTOR as u64;

/// How an image below is made.
#[derive(Debug, Clone, Copy)]
enum Base {
    Raw,
    /// With clusters of that many bits.
    Qcow2(u32),
    /// The same over another image, which has the odd megabytes.
    Over(u32),
}

/// A disk of two layers, partly in each, with the number of each sector's write.
struct Bench {
    dir: tempfile::TempDir,
    base: Base,
    expected: Vec<u64>,
}

impl Bench {
    fn new(base: Base, bits: u32) -> Self {
        let dir = dir();
        let mut bench = Self {
            dir,
            base,
            expected: vec![0; SECTORS as usize],
        };
        let path = bench.path("base");
        match base {
            Base::Raw => std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap(),
            Base::Qcow2(bits) => make(&path, &CreateOptions::new(SIZE).cluster_bits(bits)),
            Base::Over(bits) => {
                let rest = bench.path("rest");
                make(&rest, &CreateOptions::new(SIZE).cluster_bits(bits));
                let image = open(&rest);
                for part in (1..12).step_by(2) {
                    bench.write(image.as_ref(), part << 20, 1 << 20, 1);
                }
                drop(image);
                let options = CreateOptions::new(SIZE).cluster_bits(bits);
                make(&path, &options.backing("rest", Format::Qcow2));
            }
        }
        let image = match base {
            Base::Raw => guest::open(&path),
            _ => open(&path),
        };
        for part in (0..12).step_by(3) {
            bench.write(
                image.as_ref(),
                (part << 20) + 9 * 512,
                (1 << 20) + 3 * 512,
                2,
            );
        }
        drop(image);
        let format = match base {
            Base::Raw => Format::Raw,
            _ => Format::Qcow2,
        };
        let options = CreateOptions::new(SIZE).cluster_bits(bits);
        make(&bench.path("top"), &options.backing("base", format));
        let image = open(&bench.path("top"));
        for part in 0..12 {
            let at = (part << 20) + part * 5 * 512;
            bench.write(image.as_ref(), at, (part + 1) * 7 * 1024, 3);
            // Over data of the base, over none, and of whole blocks and less.
            bench.zero(image.as_ref(), at + (512 << 10), (part + 1) * 13 * 1024);
        }
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&mut self, image: &dyn Image, at: u64, len: u64, sequence: u64) {
        let len = len.min(SIZE - at);
        let mut data = vec![0; len as usize];
        let first = at / SECTOR as u64;
        for (number, sector) in data.chunks_mut(SECTOR).enumerate() {
            stamp(first + number as u64, sequence, sector);
            self.expected[first as usize + number] = sequence;
        }
        Blocking::new(image).unwrap().write(at, &data).unwrap();
    }

    fn zero(&mut self, image: &dyn Image, at: u64, len: u64) {
        let len = len.min(SIZE - at);
        let zeroes = Operation::WriteZeroes { len, unmap: true };
        Blocking::new(image).unwrap().operate(zeroes, at).unwrap();
        let first = (at / SECTOR as u64) as usize;
        self.expected[first..first + len as usize / SECTOR].fill(0);
    }

    /// The disk, as it is at the start of a monitor.
    fn disk(&self) -> Arc<LiveDisk> {
        LiveDisk::new("root", open(&self.path("top")))
    }

    fn below(&self, faults: Option<Fault>) -> Below {
        match self.base {
            Base::Raw => {
                let image = FaultImage::new(guest::open(&self.path("base")));
                if let Some(fault) = faults {
                    image.add(fault);
                }
                Below::Raw(image)
            }
            _ => Below::Qcow2(Arc::new(store(&self.path("base"), Access::ReadWrite))),
        }
    }

    fn guest(&self, disk: &Arc<LiveDisk>, habit: Habit) -> Guest {
        Guest::start(disk, self.expected.clone(), habit)
    }

    fn job(&self, disk: &Arc<LiveDisk>, below: Below, method: Method) -> Job {
        let image = disk.image();
        let chain = image
            .as_any()
            .unwrap()
            .downcast_ref::<Qcow2Image>()
            .unwrap();
        let consolidation = Arc::new(Consolidation::new(chain, below).unwrap());
        let base = consolidation.base();
        let (hooks, asked) = Hooks::new();
        let limits = MigrationLimits {
            pause_ms: 10_000,
            method,
            ..MigrationLimits::default()
        };
        let migration = Migration::consolidate(
            Arc::clone(disk),
            Arc::clone(&base),
            consolidation,
            JobId("job-1".into()),
            limits,
            Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
        )
        .unwrap();
        Job {
            base,
            job: guest::Job {
                migration,
                hooks,
                asked,
            },
        }
    }

    /// What is left when the disk was consolidated and is closed.
    fn is_sound(&self, expected: &Vec<u64>) {
        let path = self.path("base");
        let image = match self.base {
            Base::Raw => guest::open(&path),
            _ => open(&path),
        };
        verify(image.as_ref(), expected);
        let data = common::read_all(image.as_ref());
        drop(image);
        if !matches!(self.base, Base::Raw) {
            check(&path);
            assert!(content(&path) == data, "qemu-img reads something else");
        }
    }
}

struct Job {
    base: Arc<dyn Image>,
    job: guest::Job,
}

impl Job {
    /// Commits; both sides are the same before.
    fn commit(self, disk: &Arc<LiveDisk>) -> MigrationStatus {
        assert!(self.job.asked(), "{:?}", self.job.migration.status());
        guest::same(disk.image().as_ref(), self.base.as_ref(), SIZE);
        self.job.migration.decide(true);
        let status = self.job.migration.join();
        assert_eq!(disk.image().path(), self.base.path());
        status
    }
}

/// Everything, but for discards: what is below a part of a cluster may come to light by them.
const HABITS: [Habit; 2] = [
    Habit::SMALL,
    Habit {
        discards: false,
        ..Habit::MIXED
    },
];

const METHODS: [Method; 3] = [Method::Dirty, Method::Mirror, Method::Auto];

#[test]
fn no_sector_is_lost_whatever_is_below() {
    if !peers() {
        return;
    }
    let bases = [
        (Base::Raw, 16),
        (Base::Raw, 12),
        (Base::Qcow2(16), 16),
        (Base::Qcow2(12), 18),
        (Base::Qcow2(18), 12),
        (Base::Over(16), 12),
        (Base::Over(12), 16),
    ];
    for (number, (base, bits)) in bases.into_iter().enumerate() {
        for (other, method) in METHODS.into_iter().enumerate() {
            let habit = HABITS[(number + other) % 2];
            let bench = Bench::new(base, bits);
            let disk = bench.disk();
            verify(disk.image().as_ref(), &bench.expected);
            let guest = bench.guest(&disk, habit);
            std::thread::sleep(Duration::from_millis(50));
            let job = bench.job(&disk, bench.below(None), method);
            let status = job.commit(&disk);
            assert_eq!(status.phase, Phase::Completed, "{status:?}");
            let before = guest.writes.load(Ordering::Relaxed);
            while guest.writes.load(Ordering::Relaxed) < before + 100 {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::fs::remove_file(bench.path("top")).unwrap();
            let expected = guest.stop();
            drop(disk);
            bench.is_sound(&expected);
        }
    }
}

#[test]
fn what_the_layer_does_not_have_is_not_touched() {
    if !peers() {
        return;
    }
    for (base, bits) in [(Base::Raw, 16), (Base::Qcow2(16), 16)] {
        let bench = Bench::new(base, bits);
        let disk = bench.disk();
        let status = bench
            .job(&disk, bench.below(None), Method::Dirty)
            .commit(&disk);
        let read: u64 = status.passes.iter().map(|pass| pass.read_bytes).sum();
        // Twelve small parts of it.
        assert!(read < SIZE / 4, "{read} bytes were read");
        drop(disk);
        bench.is_sound(&bench.expected);
    }
}

#[test]
fn a_refused_or_cancelled_one_changes_nothing_and_the_next_attempt_works() {
    if !peers() {
        return;
    }
    for (base, bits) in [(Base::Raw, 12), (Base::Qcow2(12), 16), (Base::Over(16), 16)] {
        let bench = Bench::new(base, bits);
        let disk = bench.disk();
        let guest = bench.guest(&disk, HABITS[1]);
        for (number, method) in METHODS.into_iter().cycle().take(9).enumerate() {
            let job = bench.job(&disk, bench.below(None), method);
            if number.is_multiple_of(3) {
                let status = job.job.finish(false);
                let failure = status.failure.unwrap();
                assert!(failure.find(CommitRefused::ID).is_some(), "{failure}");
            } else {
                std::thread::sleep(Duration::from_millis(number as u64 * 3));
                if job.job.migration.cancel().is_err() {
                    job.job.migration.decide(false);
                }
                let phase = job.job.migration.join().phase;
                assert!(matches!(phase, Phase::Cancelled | Phase::Failed));
            }
            assert_eq!(disk.image().path(), bench.path("top").to_str().unwrap());
        }
        // The monitor ends here, and another one begins: the layer has all.
        let expected = guest.stop();
        disk.flush().unwrap();
        drop(disk);
        let bench = Bench { expected, ..bench };
        check(&bench.path("top"));
        let disk = bench.disk();
        verify(disk.image().as_ref(), &bench.expected);
        let guest = bench.guest(&disk, HABITS[1]);
        let job = bench.job(&disk, bench.below(None), Method::Auto);
        assert_eq!(job.commit(&disk).phase, Phase::Completed);
        let expected = guest.stop();
        drop(disk);
        bench.is_sound(&expected);
    }
}

#[test]
fn an_image_below_that_fails_is_no_harm_to_the_guest() {
    if !peers() {
        return;
    }
    for method in METHODS {
        for skip in [0, 1, 7, 40, 300] {
            let bench = Bench::new(Base::Raw, 16);
            let disk = bench.disk();
            let guest = bench.guest(&disk, Habit::SMALL);
            let fault = Fault::failing(FaultOn::Change, libc::EIO).after(skip);
            let job = bench.job(&disk, bench.below(Some(fault)), method);
            let asked = job.job.asked();
            if asked {
                // It needed fewer.
                job.job.migration.decide(false);
            }
            let status = job.job.migration.join();
            assert_eq!(status.phase, Phase::Failed, "{status:?}");
            let failure = status.failure.unwrap();
            assert!(
                asked || failure.find(WriteFailed::ID).is_some(),
                "{failure}"
            );
            let expected = guest.stop();
            verify(disk.image().as_ref(), &expected);
            let bench = Bench { expected, ..bench };
            let job = bench.job(&disk, bench.below(None), method);
            assert_eq!(job.commit(&disk).phase, Phase::Completed);
            drop(disk);
            bench.is_sound(&bench.expected);
        }
    }
}

#[test]
fn an_image_below_of_another_size_is_made_as_large_or_refused() {
    if !peers() {
        return;
    }
    let dir = dir();
    let path = |name: &str| dir.path().join(name);
    for (below, disk, works) in [(1 << 20, 4 << 20, true), (4 << 20, 1 << 20, false)] {
        make(&path("base"), &CreateOptions::new(below).cluster_bits(12));
        let data = common::pattern(3, below as usize);
        common::queue(&open(&path("base"))).write(0, &data).unwrap();
        let options = CreateOptions::new(disk).backing("base", Format::Qcow2);
        make(&path("top"), &options);
        let image = open(&path("top"));
        if works {
            common::queue(&image)
                .write((3 << 20) + 512, &data[..5120])
                .unwrap();
        }
        let before = common::read_all(image.as_ref());
        let base = Below::Qcow2(Arc::new(store(&path("base"), Access::ReadWrite)));
        let made = Consolidation::new(&image, base);
        assert_eq!(made.is_ok(), works, "{made:?}");
        if let Ok(made) = made {
            let live = LiveDisk::new("root", image);
            let (hooks, asked) = Hooks::new();
            let base = made.base();
            let migration = Migration::consolidate(
                Arc::clone(&live),
                Arc::clone(&base),
                Arc::new(made),
                JobId("job-1".into()),
                MigrationLimits::default(),
                Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
            )
            .unwrap();
            let job = guest::Job {
                migration,
                hooks,
                asked,
            };
            assert_eq!(job.finish(true).phase, Phase::Completed);
            assert!(common::read_all(base.as_ref()) == before);
            drop((live, base));
            check(&path("base"));
            assert!(content(&path("base")) == before);
        }
    }
}

/// Two immutable layers become one while the guest goes on in the third.
#[test]
fn a_layer_between_others_goes_into_the_one_below() {
    if !peers() {
        return;
    }
    for (base, bits) in [(Base::Qcow2(16), 12), (Base::Over(12), 16)] {
        let bench = Bench::new(base, bits);
        let then = bench.expected.clone();
        let options = CreateOptions::new(SIZE).cluster_bits(16);
        make(
            &bench.path("newest"),
            &options.backing("top", Format::Qcow2),
        );
        let image = open(&bench.path("newest"));
        let disk = LiveDisk::new("root", Arc::clone(&image) as Arc<dyn Image>);
        let guest = bench.guest(&disk, HABITS[1]);
        std::thread::sleep(Duration::from_millis(30));
        let part = ChainPart {
            store: Arc::new(store(&bench.path("base"), Access::ReadWrite)),
            format: Format::Qcow2,
            access: Access::ReadWrite,
        };
        image.reopen(2, part).unwrap();
        let lower = image.lower(2).unwrap();
        let mut commit = Commit::new(Arc::clone(&image), 1, lower, 0).unwrap();
        while commit.step(1 << 20).unwrap() != Progress::Done {}
        drop(commit);
        let backing = Backing {
            path: "base".to_owned(),
            format: Some("qcow2".to_owned()),
        };
        image.remove_layer(1, &backing).unwrap();
        std::fs::remove_file(bench.path("top")).unwrap();
        let expected = guest.stop();
        verify(disk.image().as_ref(), &expected);
        drop((disk, image));
        bench.is_sound(&then);
        sound_chain(&bench.path("newest"), &expected);
    }
}

fn sound_chain(path: &Path, expected: &Vec<u64>) {
    let image = open(path);
    verify(image.as_ref(), expected);
    let data = common::read_all(image.as_ref());
    drop(image);
    check(path);
    assert!(content(path) == data);
}
