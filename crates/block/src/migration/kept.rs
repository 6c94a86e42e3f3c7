//! What a job keeps so that it can be taken up again after a crash: the file of its claims.
//!
//! `live/claims.rs` says what a claim is and why it is true. The file lies beside the *source*: a guest
//! whose change waits for it waits for the device that it writes to anyway, never for the destination.
//! Two slots are written in turn, as in the journal (same frame, another magic); each is durable
//! before the next one is begun, and before anything that relies on it is done. So when the newest was torn the one
//! before it is still true: nothing was released by the torn one.
//!
//! Threads, for as long as the job lasts: the *writer* brings the file up to date, the *flusher* flushes both
//! sides and claims what the job's thread has found. When the job ends other than by being interrupted the
//! file is emptied before anybody may change what it claimed: a later run must not believe it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use strake_api::job::JobId;
use strake_observe::{Because, Observation, OsContext, Result};

use super::journal::{frame, read_newest};
use crate::live::{Claims, region_bytes};
use crate::{Event, Image, KeptDamaged, KeptUnwritable, LiveDisk};

const MAGIC: &[u8; 8] = b"STRAKEK\n";
const SLOT_BYTES: usize = 32 * 1024;

/// Claims are made once in so many parts of the time that the job has taken, so that a crash costs that part of the
/// work at most, twice.
const PART: u32 = 200;

/// But each one flushes both sides.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(10);

/// What the file says, before the map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    job: JobId,
    size_bytes: u64,
    region_bytes: u64,
    /// The map in hexadecimal digits: one bit for each region.
    claimed: String,
}

/// The regions that were claimed when a job ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Known {
    map: Vec<u8>,
    region_bytes: u64,
}

impl Known {
    fn has(&self, number: u64) -> bool {
        let byte = usize::try_from(number / 8)
            .ok()
            .and_then(|at| self.map.get(at));
        byte.is_some_and(|byte| byte >> (number % 8) & 1 == 1)
    }

    /// Where the range ends that begins at `at` and is known throughout, or known nowhere; and
    /// which of the two.
    pub(crate) fn run(&self, at: u64, size: u64) -> (u64, bool) {
        if self.map.is_empty() || self.region_bytes == 0 {
            return (size, false);
        }
        let mut number = at / self.region_bytes;
        let known = self.has(number);
        while number * self.region_bytes < size && self.has(number) == known {
            number += 1;
        }
        (size.min(number * self.region_bytes), known)
    }

    pub(crate) fn map(&self) -> &[u8] {
        &self.map
    }
}

/// Reads what a job left.
pub(crate) fn read(file: &File, job: &JobId, size: u64) -> Result<Known> {
    let (_, payload) = read_newest(file, MAGIC, SLOT_BYTES)?;
    let damaged = |why: String| KeptDamaged { why };
    let head: Head = serde_json::from_slice(&payload)
        .map_err(|error| damaged(format!("it is not understood: {error}")))?;
    if head.job != *job || head.size_bytes != size || head.region_bytes != region_bytes(size) {
        return Err(damaged(format!(
            "it is of {}, a disk of {} bytes in regions of {}",
            head.job, head.size_bytes, head.region_bytes
        ))
        .into());
    }
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|it| u8::try_from(it).ok())
    };
    let map = head.claimed.as_bytes().chunks(2).map(|pair| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    });
    let map = map.collect::<Option<Vec<u8>>>();
    Ok(Known {
        map: map.ok_or_else(|| damaged("its map is none".to_owned()))?,
        region_bytes: head.region_bytes,
    })
}

/// The writing side of the file.
#[derive(Debug)]
struct Slots {
    file: File,
    path: String,
    head: Head,
    sequence: u64,
    /// Nothing is written any more.
    closed: bool,
}

impl Slots {
    fn write(&mut self, map: &[u8]) -> Result<()> {
        if self.closed {
            return Ok(());
        }
        self.put(map).because_of(|| KeptUnwritable {
            source: self.path.clone(),
        })
    }

    fn put(&mut self, map: &[u8]) -> Result<()> {
        self.head.claimed.clear();
        for byte in map {
            for digit in [byte >> 4, byte & 15] {
                self.head
                    .claimed
                    .push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
            }
        }
        let sequence = self.sequence + 1;
        let payload = serde_json::to_vec(&self.head).unwrap_or_default();
        let slot = frame(MAGIC, &payload, sequence, SLOT_BYTES).ok_or_else(|| KeptDamaged {
            why: "the map does not fit".to_owned(),
        })?;
        let at = (sequence % 2) * SLOT_BYTES as u64;
        let what = || format!("the claims of {}", self.head.job);
        self.file.write_all_at(&slot, at).os("pwrite", what())?;
        self.file.sync_data().os("fdatasync", what())?;
        self.sequence = sequence;
        Ok(())
    }

    /// Nobody believes it any more, from when this returns `Ok`.
    fn close(&mut self) -> Result<()> {
        let emptied = self.write(&[]);
        self.closed = true;
        emptied.or_else(|seen| {
            // A file without a record says nothing either.
            let cut = self.file.set_len(0).and_then(|()| self.file.sync_all());
            cut.map_err(|_| seen)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Shared {
    claims: Arc<Claims<Event>>,
    slots: Mutex<Slots>,
    failure: Mutex<Option<Observation>>,
    /// The flusher is at work: candidates must not change meanwhile.
    flushing: AtomicBool,
    /// Wakes the job's thread.
    event: Arc<Event>,
}

impl Shared {
    fn fail(&self, seen: Observation) {
        lock(&self.failure).get_or_insert(seen);
        self.event.signal();
    }
}

/// See the module. Dropping it ends the threads, and the claims as if by [`close`](Keeper::close) unless
/// they were ended before.
#[derive(Debug)]
pub(crate) struct Keeper {
    disk: Arc<LiveDisk>,
    shared: Arc<Shared>,
    flush: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    began: Instant,
    last: Instant,
    over: bool,
}

impl Keeper {
    /// Begins with the claims of `known`, which the file holds. From now on changes go by them.
    pub(crate) fn start(
        disk: &Arc<LiveDisk>,
        (source, destination): (&Arc<dyn Image>, &Arc<dyn Image>),
        file: File,
        (job, known): (&JobId, &Known),
        event: &Arc<Event>,
    ) -> Result<Self> {
        let size = disk.size();
        let claims = Arc::new(Claims::new(size, known.map()));
        let sequence = read_newest(&file, MAGIC, SLOT_BYTES).map_or(0, |(sequence, _)| sequence);
        let shared = Arc::new(Shared {
            claims: Arc::clone(&claims),
            slots: Mutex::new(Slots {
                file,
                path: source.path().to_owned(),
                head: Head {
                    job: job.clone(),
                    size_bytes: size,
                    region_bytes: region_bytes(size),
                    claimed: String::new(),
                },
                sequence,
                closed: false,
            }),
            failure: Mutex::new(None),
            flushing: AtomicBool::new(false),
            event: Arc::clone(event),
        });
        let now = Instant::now();
        let (flush, asked) = channel::<()>();
        let mut keeper = Self {
            disk: Arc::clone(disk),
            shared: Arc::clone(&shared),
            flush: Some(flush),
            threads: Vec::new(),
            began: now,
            last: now,
            over: false,
        };
        let name = |what: &str| format!("{what}-{}", disk.name());
        let of = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name(name("claims"))
            .spawn(move || write(&of))
            .os("clone", "the thread that keeps a job's claims")?;
        keeper.threads.push(writer);
        let images = (Arc::clone(source), Arc::clone(destination));
        let flusher = std::thread::Builder::new()
            .name(name("flush"))
            .spawn(move || {
                while asked.recv().is_ok() {
                    let flushed = images.0.flush().and_then(|()| images.1.flush());
                    match flushed {
                        Ok(()) => shared.claims.claim(),
                        Err(seen) => shared.fail(seen),
                    }
                    shared.flushing.store(false, Ordering::Release);
                }
            })
            .os("clone", "the thread that flushes a job's images")?;
        keeper.threads.push(flusher);
        // Both slots exist from the start, so that no release has to find space.
        {
            let mut slots = lock(&keeper.shared.slots);
            slots.write(known.map())?;
            slots.write(known.map())?;
        }
        disk.begin_claims(claims);
        Ok(keeper)
    }

    /// Why nothing can be claimed or released any more, if so.
    pub(crate) fn failure(&self) -> Option<Observation> {
        lock(&self.shared.failure).clone()
    }

    /// Looks for what can be claimed, if it is time to. `complete` as for [`Claims::look`].
    pub(crate) fn look(
        &mut self,
        now: Instant,
        complete: &mut dyn FnMut(std::ops::Range<u64>) -> bool,
    ) {
        let part = now.saturating_duration_since(self.began) / PART;
        let interval = part.clamp(SHORTEST, LONGEST);
        if now.saturating_duration_since(self.last) < interval
            || self.shared.flushing.load(Ordering::Acquire)
            // Changes from before there were claims: nobody knows which they are.
            || self.disk.has_plain_changes()
        {
            return;
        }
        self.last = now;
        if self.shared.claims.look(complete)
            && let Some(flush) = &self.flush
        {
            self.shared.flushing.store(true, Ordering::Release);
            if flush.send(()).is_err() {
                self.shared.flushing.store(false, Ordering::Release);
            }
        }
    }

    /// The disk is on its destination now: what the file says means nothing any more.
    pub(crate) fn leave(&mut self) {
        self.over = true;
        self.shared.claims.off();
        self.disk.end_claims();
    }

    /// The job is interrupted. What of the guest's changes is still on its way goes by the claims until the
    /// process ends: the thread that writes the file stays for that.
    pub(crate) fn remain(mut self) {
        self.over = true;
        self.flush = None;
        self.threads.clear();
    }

    /// The job ends on its source, and the guest goes on there.
    pub(crate) fn close(&mut self) {
        if self.over {
            return;
        }
        if let Err(seen) = lock(&self.shared.slots).close() {
            strake_observe::recorder().record(seen, strake_observe::State::Open);
        }
        self.leave();
    }

    /// How many bytes the file claims.
    pub(crate) fn claimed_bytes(&self) -> u64 {
        self.shared.claims.claimed_bytes()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.close();
        self.flush = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn write(shared: &Shared) {
    while let Some(work) = shared.claims.work() {
        let written = lock(&shared.slots).write(&work.map);
        match written {
            Ok(()) => shared.claims.written(work),
            Err(seen) => {
                // The job goes on without, once nobody believes the file any more. If that cannot be said
                // either, the job fails and the file is removed.
                strake_observe::recorder().record(seen, strake_observe::State::Open);
                let closed = lock(&shared.slots).close();
                if let Err(seen) = closed {
                    shared.fail(seen);
                }
                shared.claims.off();
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(file: &File, job: &str, size: u64) -> Slots {
        Slots {
            file: file.try_clone().unwrap(),
            path: "/slow/a.raw".into(),
            head: Head {
                job: JobId(job.into()),
                size_bytes: size,
                region_bytes: region_bytes(size),
                claimed: String::new(),
            },
            sequence: 0,
            closed: false,
        }
    }

    #[test]
    fn what_is_written_is_read_and_a_torn_write_leaves_the_one_before() {
        let file = tempfile::tempfile().unwrap();
        let job = JobId("job-1".into());
        assert!(read(&file, &job, 1 << 30).is_err());
        let mut slots = slots(&file, "job-1", 1 << 30);
        slots.write(&[1, 0xa5]).unwrap();
        assert_eq!(read(&file, &job, 1 << 30).unwrap().map, [1, 0xa5]);
        slots.write(&[0xff]).unwrap();
        assert_eq!(read(&file, &job, 1 << 30).unwrap().map, [0xff]);
        let at = (slots.sequence % 2) * SLOT_BYTES as u64;
        file.write_all_at(&[0xff; 64], at + 40).unwrap();
        assert_eq!(read(&file, &job, 1 << 30).unwrap().map, [1, 0xa5]);
        // Of another job or another disk.
        assert!(
            read(&file, &JobId("job-2".into()), 1 << 30)
                .unwrap_err()
                .is::<KeptDamaged>()
        );
        assert!(read(&file, &job, 1 << 31).unwrap_err().is::<KeptDamaged>());
        slots.close().unwrap();
        slots.write(&[3]).unwrap();
        assert_eq!(read(&file, &job, 1 << 30).unwrap().map, [0u8; 0]);
    }

    #[test]
    fn the_largest_map_fits() {
        let size = strake_api::spec::MAX_DISK;
        let regions = size.div_ceil(region_bytes(size));
        assert!(regions <= crate::live::MOST_REGIONS);
        let file = tempfile::tempfile().unwrap();
        let map = vec![0xff; usize::try_from(crate::live::MOST_REGIONS / 8).unwrap()];
        let job = "j".repeat(64);
        slots(&file, &job, size).write(&map).unwrap();
        assert_eq!(read(&file, &JobId(job), size).unwrap().map, map);
    }

    #[test]
    fn runs_are_known_or_not() {
        let known = Known {
            map: vec![0b0110],
            region_bytes: 100,
        };
        assert_eq!(known.run(0, 1000), (100, false));
        assert_eq!(known.run(150, 1000), (300, true));
        assert_eq!(known.run(300, 350), (350, false));
        assert_eq!(known.run(120, 250), (250, true));
        assert_eq!(Known::default().run(7, 350), (350, false));
    }
}
