//! What the tests of this folder share: images on the real disk, a guest made of one thread that
//! stamps every sector it writes and checks every sector it reads, and the daemon's side of a
//! migration.
#![allow(
    unreachable_pub,
    dead_code,
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]
#![allow(clippy::cast_possible_truncation)]

pub mod cache;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use strake_api::job::{JobId, MigrationLimits, MigrationStatus, Stage};
use strake_block::{
    Access, Buffer, DiskQueue, Image, LiveDisk, Migration, Operation, RawImage, Request,
    SwitchHooks,
};
use strake_observe::Result;

pub const SECTOR: usize = 512;

/// A directory that is removed at the end, under `TMPDIR`.
pub fn dir() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("strake-block-")
        .tempdir()
        .unwrap()
}

/// A sparse file of `size` bytes, open with O_DIRECT where the file system can.
pub fn create(path: &Path, size: u64) -> Arc<dyn Image> {
    File::create(path).unwrap().set_len(size).unwrap();
    open(path)
}

/// An existing file as an image.
pub fn open(path: &Path) -> Arc<dyn Image> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
    };
    let file = open(libc::O_DIRECT).or_else(|_| open(0)).unwrap();
    let name = path.display().to_string();
    Arc::new(RawImage::from_fd(file.into(), name, Access::ReadWrite).unwrap())
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
}

/// The content of a sector: its own number and the sequence number of its write, all over. Zeroes
/// for sequence number 0.
pub fn stamp(sector: u64, sequence: u64, into: &mut [u8]) {
    if sequence == 0 {
        into.fill(0);
        return;
    }
    let mut pair = [0u8; 16];
    pair[..8].copy_from_slice(&sector.to_le_bytes());
    pair[8..].copy_from_slice(&sequence.to_le_bytes());
    for chunk in into.chunks_exact_mut(16) {
        chunk.copy_from_slice(&pair);
    }
}

/// What each sector holds: the sequence number of the last write that was acknowledged.
pub type Expected = Vec<u64>;

/// Compares an image with what it must hold, sector by sector.
pub fn verify(image: &dyn Image, expected: &Expected) {
    let mut data = vec![0u8; 1 << 20];
    let mut want = [0u8; SECTOR];
    for (index, part) in expected.chunks(data.len() / SECTOR).enumerate() {
        let first = index * (data.len() / SECTOR);
        let data = &mut data[..part.len() * SECTOR];
        image.read_at((first * SECTOR) as u64, data).unwrap();
        for (at, (sequence, got)) in part.iter().zip(data.chunks(SECTOR)).enumerate() {
            let sector = (first + at) as u64;
            stamp(sector, *sequence, &mut want);
            assert!(
                got == want,
                "sector {sector} of {}: expected write {sequence}, found {:?}",
                image.path(),
                &got[..16]
            );
        }
    }
}

/// Compares two images of the same size.
pub fn same(one: &dyn Image, other: &dyn Image, size: u64) {
    let mut left = vec![0u8; 1 << 20];
    let mut right = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < size {
        let len = (size - at).min(1 << 20) as usize;
        one.read_at(at, &mut left[..len]).unwrap();
        other.read_at(at, &mut right[..len]).unwrap();
        if left[..len] != right[..len] {
            let sector = left[..len]
                .chunks(SECTOR)
                .zip(right.chunks(SECTOR))
                .position(|(left, right)| left != right);
            panic!(
                "{} and {} differ at {at} + {sector:?} sectors",
                one.path(),
                other.path()
            );
        }
        at += len as u64;
    }
}

/// What a guest does.
#[derive(Debug, Clone, Copy)]
pub struct Habit {
    /// Requests in flight.
    pub depth: usize,
    /// Only 4 KiB writes and some reads, or every size, discards, zeroes and flushes as well.
    pub mixed: bool,
    /// Whether there are discards among them. Without: zeroes instead.
    pub discards: bool,
    /// At most so many requests per second, if any.
    pub per_second: Option<u64>,
    /// Whether failed requests are to be expected; what they wrote is unknown then.
    pub may_fail: bool,
    pub seed: u64,
}

impl Habit {
    pub const SMALL: Self = Self {
        depth: 32,
        mixed: false,
        discards: true,
        per_second: None,
        may_fail: false,
        seed: 1,
    };
    pub const MIXED: Self = Self {
        mixed: true,
        ..Self::SMALL
    };
}

/// A guest: one thread with one queue.
pub struct Guest {
    stop: Arc<AtomicBool>,
    pub writes: Arc<AtomicU64>,
    pub errors: Arc<AtomicU64>,
    /// The longest that a request took, in microseconds.
    pub worst_us: Arc<AtomicU64>,
    thread: JoinHandle<Expected>,
}

impl Guest {
    pub fn start(disk: &Arc<LiveDisk>, expected: Expected, habit: Habit) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let errors = Arc::new(AtomicU64::new(0));
        let worst_us = Arc::new(AtomicU64::new(0));
        let mut runner = Runner {
            queue: disk.queue(habit.depth as u32).unwrap(),
            expected,
            busy: Vec::new(),
            slots: (0..habit.depth).map(|_| Slot::new()).collect(),
            random: Random::new(habit.seed),
            habit,
            sequence: 0,
            writes: Arc::clone(&writes),
            errors: Arc::clone(&errors),
            worst_us: Arc::clone(&worst_us),
        };
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new()
                .name("guest".into())
                .spawn(move || {
                    runner.run(&stop);
                    runner.expected
                })
                .unwrap()
        };
        Self {
            stop,
            writes,
            errors,
            worst_us,
            thread,
        }
    }

    /// Lets every request end and says what the disk must hold.
    pub fn stop(self) -> Expected {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

struct Slot {
    memory: Vec<u8>,
    doing: Option<Doing>,
}

struct Doing {
    op: Operation,
    first: u64,
    sectors: u64,
    sequence: u64,
    began: Instant,
}

const MOST_SECTORS: u64 = 256;

impl Slot {
    fn new() -> Self {
        Self {
            memory: vec![0; MOST_SECTORS as usize * SECTOR + 4096],
            doing: None,
        }
    }

    /// Page-aligned.
    fn bytes(&mut self, sectors: u64) -> &mut [u8] {
        let skew = self.memory.as_ptr().align_offset(4096);
        &mut self.memory[skew..skew + sectors as usize * SECTOR]
    }
}

struct Runner {
    // First: dropped before the memory that its requests are about.
    queue: DiskQueue,
    expected: Expected,
    busy: Vec<(u64, u64)>,
    slots: Vec<Slot>,
    random: Random,
    habit: Habit,
    sequence: u64,
    writes: Arc<AtomicU64>,
    errors: Arc<AtomicU64>,
    worst_us: Arc<AtomicU64>,
}

impl Runner {
    fn run(&mut self, stop: &AtomicBool) {
        self.sequence = self.expected.iter().copied().max().unwrap_or(0);
        let began = Instant::now();
        let mut issued = 0u64;
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            let due = self.habit.per_second.map_or(u64::MAX, |rate| {
                (began.elapsed().as_micros() as u64).saturating_mul(rate) / 1_000_000 + 1
            });
            if !stopping {
                for slot in 0..self.slots.len() {
                    if issued < due && self.slots[slot].doing.is_none() && self.issue(slot) {
                        issued += 1;
                    }
                }
            }
            self.queue.push().unwrap();
            if stopping && self.queue.in_flight() == 0 {
                break;
            }
            self.wait();
            self.reap();
        }
        self.flush();
    }

    fn wait(&self) {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&self.queue.event());
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let limit = if self.habit.per_second.is_some() {
            1
        } else {
            20_000
        };
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(&mut poll, 1, limit) };
        assert!(
            ready == 1 || limit == 1,
            "no wake-up within 20 s: {:?}",
            self.queue
        );
    }

    fn flush(&mut self) {
        self.queue.submit(Request {
            tag: u64::MAX,
            op: Operation::Flush,
            offset: 0,
            buffers: Vec::new(),
        });
        self.queue.push().unwrap();
        while self.queue.in_flight() > 0 {
            self.wait();
            self.queue.reap(&mut |_, _| {}).unwrap();
        }
    }

    fn issue(&mut self, index: usize) -> bool {
        let total = self.expected.len() as u64;
        let kind = self.random.below(100);
        let (op, first, sectors) = if self.habit.mixed {
            let sectors = match self.random.below(4) {
                0 => 1 + self.random.below(8),
                1 => 8,
                2 => 1 + self.random.below(MOST_SECTORS - 1),
                _ => 128,
            };
            let first = self.random.below(total - sectors);
            let len = sectors * SECTOR as u64;
            let op = match kind {
                0..55 => Operation::Write,
                55..80 => Operation::Read,
                80..86 if self.habit.discards => Operation::Discard { len },
                80..92 => Operation::WriteZeroes { len, unmap: false },
                92..96 => Operation::WriteZeroes { len, unmap: true },
                _ => Operation::Flush,
            };
            (op, first, sectors)
        } else {
            let first = self.random.below(total / 8) * 8;
            let op = if kind < 90 {
                Operation::Write
            } else {
                Operation::Read
            };
            (op, first, 8)
        };
        let flush = op == Operation::Flush;
        if !flush {
            // Requests in flight do not overlap, so what a sector holds afterwards is known.
            let end = first + sectors;
            if self
                .busy
                .iter()
                .any(|(from, to)| *from < end && first < *to)
            {
                return false;
            }
            self.busy.push((first, end));
        }
        self.sequence += 1;
        let sequence = self.sequence;
        let slot = &mut self.slots[index];
        let mut buffers = Vec::new();
        if matches!(op, Operation::Read | Operation::Write) {
            let bytes = slot.bytes(sectors);
            if op == Operation::Write {
                for (at, sector) in bytes.chunks_mut(SECTOR).enumerate() {
                    stamp(first + at as u64, sequence, sector);
                }
            }
            // SAFETY: the slot's memory is not touched until the request has ended, and outlives
            // the queue.
            buffers.push(unsafe { Buffer::new(bytes.as_mut_ptr(), bytes.len()) });
        }
        slot.doing = Some(Doing {
            op,
            first,
            sectors,
            sequence,
            began: Instant::now(),
        });
        self.queue.submit(Request {
            tag: index as u64,
            op,
            offset: if flush { 0 } else { first * SECTOR as u64 },
            buffers,
        });
        true
    }

    fn reap(&mut self) {
        let mut ended = Vec::new();
        self.queue
            .reap(&mut |tag, result| ended.push((tag, result)))
            .unwrap();
        for (tag, result) in ended {
            let slot = &mut self.slots[tag as usize];
            let doing = slot.doing.take().expect("reaped twice");
            let took = doing.began.elapsed().as_micros() as u64;
            self.worst_us.fetch_max(took, Ordering::Relaxed);
            let end = doing.first + doing.sectors;
            if doing.op != Operation::Flush {
                self.busy.retain(|range| *range != (doing.first, end));
            }
            if let Err(seen) = result {
                assert!(self.habit.may_fail, "the guest saw an error: {seen}");
                self.errors.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let range = doing.first as usize..end as usize;
            match doing.op {
                Operation::Write => {
                    self.expected[range].fill(doing.sequence);
                    self.writes.fetch_add(1, Ordering::Relaxed);
                }
                Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
                    self.expected[range].fill(0);
                }
                Operation::Flush => {}
                Operation::Read => {
                    let mut want = [0u8; SECTOR];
                    let expected = &self.expected[range];
                    for (at, got) in slot.bytes(doing.sectors).chunks(SECTOR).enumerate() {
                        let sector = doing.first + at as u64;
                        stamp(sector, expected[at], &mut want);
                        assert!(
                            got == want,
                            "sector {sector} read {:?}, expected write {}",
                            &got[..16],
                            expected[at]
                        );
                    }
                }
            }
        }
    }
}

/// What a test does at one of the hooks, in the migration's thread.
pub type Act = Mutex<Option<Box<dyn FnMut() + Send>>>;

fn act(act: &Act) {
    if let Some(act) = act.lock().unwrap().as_mut() {
        act();
    }
}

/// The daemon's and the machine's side of a migration.
pub struct Hooks {
    asked: Mutex<Sender<JobId>>,
    pub suspended: AtomicU64,
    pub resumed: AtomicU64,
    pub ended: Mutex<Vec<MigrationStatus>>,
    pub refuse_suspend: AtomicBool,
    /// No daemon is there to be asked.
    pub no_daemon: AtomicBool,
    pub at_suspend: Act,
    pub at_refusal: Act,
    pub at_resume: Act,
}

impl Hooks {
    pub fn new() -> (Arc<Self>, Receiver<JobId>) {
        let (asked, receiver) = channel();
        let hooks = Self {
            asked: Mutex::new(asked),
            suspended: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            ended: Mutex::new(Vec::new()),
            refuse_suspend: AtomicBool::new(false),
            no_daemon: AtomicBool::new(false),
            at_suspend: Mutex::default(),
            at_refusal: Mutex::default(),
            at_resume: Mutex::default(),
        };
        (Arc::new(hooks), receiver)
    }
}

impl SwitchHooks for Hooks {
    fn suspend_vm(&self, limit: Duration) -> Result<()> {
        assert!(limit <= Duration::from_secs(60), "{limit:?}");
        if self.refuse_suspend.load(Ordering::Relaxed) {
            act(&self.at_refusal);
            return Err(strake_block::NoUring {
                reason: "a vCPU does not stop (for this test)".into(),
            }
            .into());
        }
        act(&self.at_suspend);
        self.suspended.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn resume_vm(&self) {
        act(&self.at_resume);
        self.resumed.fetch_add(1, Ordering::Relaxed);
    }

    fn can_ask(&self) -> bool {
        !self.no_daemon.load(Ordering::Relaxed)
    }

    fn await_commit(&self, job: &JobId) {
        let _ = self.asked.lock().unwrap().send(job.clone());
    }

    fn await_stage(&self, job: &JobId, _stage: Stage) {
        self.await_commit(job);
    }

    fn ended(&self, status: &MigrationStatus) {
        self.ended.lock().unwrap().push(status.clone());
    }
}

/// A migration with everything around it.
pub struct Job {
    pub migration: Arc<Migration>,
    pub hooks: Arc<Hooks>,
    pub asked: Receiver<JobId>,
}

impl Job {
    pub fn start(
        disk: &Arc<LiveDisk>,
        to: &Arc<dyn Image>,
        limits: MigrationLimits,
    ) -> Result<Self> {
        Self::start_with(
            disk,
            to,
            limits,
            Hooks::new(),
            tempfile::tempfile().unwrap(),
        )
    }

    pub fn start_with(
        disk: &Arc<LiveDisk>,
        to: &Arc<dyn Image>,
        limits: MigrationLimits,
        (hooks, asked): (Arc<Hooks>, Receiver<JobId>),
        journal: File,
    ) -> Result<Self> {
        let migration = Migration::start(
            Arc::clone(disk),
            Arc::clone(to),
            journal,
            JobId("job-1".into()),
            limits,
            Arc::clone(&hooks) as Arc<dyn SwitchHooks>,
        )?;
        Ok(Self {
            migration,
            hooks,
            asked,
        })
    }

    /// Waits for the question; false if the job ended without one.
    pub fn asked(&self) -> bool {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if self.asked.recv_timeout(Duration::from_millis(5)).is_ok() {
                return true;
            }
            if self.migration.status().phase.is_final() {
                return false;
            }
            assert!(Instant::now() < end, "stuck: {:?}", self.migration.status());
        }
    }

    /// Answers the question and waits for the end.
    pub fn finish(self, committed: bool) -> MigrationStatus {
        if self.asked() {
            self.migration.decide(committed);
        }
        self.migration.join()
    }
}

/// Two paths in a directory.
pub fn two(dir: &tempfile::TempDir) -> (PathBuf, PathBuf) {
    (dir.path().join("a.raw"), dir.path().join("b.raw"))
}
