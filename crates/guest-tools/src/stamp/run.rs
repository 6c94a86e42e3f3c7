//! A run: writers, progress, checkpoints, the last check.

use std::io::{self, BufRead, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::device::{Aligned, Device};
use super::map::{FIRST_WRITE, Layout, Map, Saved, State, UNTOUCHED, ZEROES};
use super::sector;
use super::verify::{self, Report, Strictness};
use super::{BLOCK, BLOCK_LEN, CHUNK_BLOCKS, in_discard_area};
use crate::random::{Random, mix};
use crate::signal;

/// The longest write: 64 KiB.
const MOST_BLOCKS: u64 = 16;

/// Whether the run discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discards {
    /// In a quarter of the chunks, where write-zeroes happens too.
    Yes,
    /// Only write-zeroes does: of a disk that may take a discard as a hint, and so need not read as
    /// zeroes after one.
    ZeroesOnly,
    /// Not at all.
    No,
}

/// What a run is to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Writers.
    pub threads: u64,
    /// Its identity, and what all randomness comes from.
    pub run: u64,
    /// When it ends by itself.
    pub time: Option<Duration>,
    /// Bytes from the beginning of the disk that are used.
    pub limit: Option<u64>,
    /// Operations a second of all writers together.
    pub rate: Option<u64>,
    /// How often a checkpoint is made.
    pub checkpoint: Option<Duration>,
    /// Whether it discards.
    pub discards: Discards,
}

/// What all threads share.
struct Shared {
    device: Device,
    plan: Plan,
    map: Map,
    layout: Layout,
    next_write: AtomicU64,
    stop: AtomicBool,
    writes: AtomicU64,
    verified: AtomicU64,
    discards: AtomicU64,
    errors: AtomicU64,
    longest_write_us: AtomicU64,
    first_error: Mutex<Option<String>>,
}

impl Shared {
    /// Notes an error and says it at once: the test's log shows when it happened.
    fn error(&self, what: &str) {
        if self.errors.fetch_add(1, Ordering::Relaxed) < verify::KEPT_FAULTS as u64 {
            say(&format!("stamp: error: {what}"));
        }
        self.first_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_with(|| what.to_owned());
    }

    fn note(&self, report: &Report) {
        self.verified
            .fetch_add(report.stamped + report.zeroes, Ordering::Relaxed);
        for bad in &report.faults {
            self.error(&bad.to_string());
        }
        let more = report.bad - report.faults.len() as u64;
        self.errors.fetch_add(more, Ordering::Relaxed);
        if report.torn > 0 {
            say(&format!("stamp: torn blocks: {}", report.torn));
        }
    }

    fn progress(&self) -> String {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let longest = Duration::from_micros(load(&self.longest_write_us));
        format!(
            "writes={} verified={} errors={} discards={} max_write_ms={:.1}",
            load(&self.writes),
            load(&self.verified),
            load(&self.errors),
            load(&self.discards),
            longest.as_secs_f64() * 1000.0,
        )
    }
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    // A closed console must not end the run: what it found is on the disk and in its exit status.
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// Runs until it is asked to end or its time is over, and checks everything then. Says on standard
/// output what it does; the result is whether all was well.
///
/// # Errors
/// A text for people if the disk cannot be used at all.
pub fn run(device: Device, plan: Plan) -> Result<bool, String> {
    let layout = Layout::new(device.size(), plan.limit)
        .ok_or_else(|| format!("a disk of {} bytes is too small", device.size()))?;
    let begun = Saved {
        run: plan.run,
        generation: next_generation(&device),
        state: State::Begun,
        blocks: Vec::new(),
    };
    // Both slots, so that no older map can be taken for this run's.
    let mut generation = begun.generation;
    let empty = Layout { data: 0, ..layout };
    for _ in 0..2 {
        let saved = Saved {
            generation,
            ..begun.clone()
        };
        saved
            .write(&device, &empty)
            .map_err(|error| format!("writing the map: {error}"))?;
        generation += 1;
    }

    say(&format!(
        "stamp: begin run={:#x} blocks={} threads={}",
        plan.run, layout.data, plan.threads
    ));
    let shared = Arc::new(Shared {
        map: Map::new(layout.data),
        device,
        layout,
        plan,
        next_write: AtomicU64::new(FIRST_WRITE),
        stop: AtomicBool::new(false),
        writes: AtomicU64::new(0),
        verified: AtomicU64::new(0),
        discards: AtomicU64::new(0),
        errors: AtomicU64::new(0),
        longest_write_us: AtomicU64::new(0),
        first_error: Mutex::new(None),
    });
    listen_for_stop();
    let mut writers = Vec::new();
    for index in 0..shared.plan.threads {
        let shared = Arc::clone(&shared);
        let writer = thread::Builder::new()
            .name(format!("writer-{index}"))
            .spawn(move || Writer::new(&shared, index).work())
            .map_err(|error| format!("starting a thread: {error}"))?;
        writers.push(writer);
    }
    wait(&shared, &mut generation);
    shared.stop.store(true, Ordering::Relaxed);
    for writer in writers {
        if writer.join().is_err() {
            shared.error("a writer panicked");
        }
    }
    Ok(finish(&shared, generation))
}

fn next_generation(device: &Device) -> u64 {
    Saved::read(device).map_or(0, |(saved, _)| saved.generation + 1)
}

/// A line `stop` on standard input ends the run. Its end does not: an init may have closed it.
fn listen_for_stop() {
    let listen = || {
        for line in io::stdin().lock().lines() {
            match line {
                Ok(line) if line.trim() == "stop" => signal::ask_end(),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    };
    // Without the thread there still are signals and the time limit.
    let _ = thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(listen);
}

/// Prints progress and makes checkpoints until the end.
fn wait(shared: &Shared, generation: &mut u64) {
    const TICK: Duration = Duration::from_millis(50);
    const PROGRESS: Duration = Duration::from_secs(1);
    let started = Instant::now();
    let (mut printed, mut saved) = (started, started);
    while !signal::end_asked()
        && shared
            .plan
            .time
            .is_none_or(|limit| started.elapsed() < limit)
    {
        thread::sleep(TICK);
        if printed.elapsed() >= PROGRESS {
            printed = Instant::now();
            say(&format!("stamp: {}", shared.progress()));
        }
        if shared
            .plan
            .checkpoint
            .is_some_and(|every| saved.elapsed() >= every)
        {
            save(shared, *generation, State::Checkpoint);
            *generation += 1;
            saved = Instant::now();
        }
    }
}

/// Loads the map, flushes, writes the map: in this order.
fn save(shared: &Shared, generation: u64, state: State) -> bool {
    let saved = Saved {
        run: shared.plan.run,
        generation,
        state,
        blocks: shared.map.snapshot(),
    };
    let done = shared
        .device
        .flush()
        .and_then(|()| saved.write(&shared.device, &shared.layout));
    if let Err(error) = &done {
        shared.error(&format!("writing the map: {error}"));
    }
    done.is_ok()
}

/// Checks everything, leaves the exact map, and says the last line.
fn finish(shared: &Shared, generation: u64) -> bool {
    if let Err(error) = shared.device.flush() {
        shared.error(&format!("flush: {error}"));
    }
    let blocks = shared.map.snapshot();
    let mut sectors = 0;
    match verify::disk(&shared.device, shared.plan.run, &blocks, Strictness::Exact) {
        Ok(report) => {
            sectors = report.stamped;
            shared.note(&report);
        }
        Err(error) => shared.error(&format!("reading everything: {error}")),
    }
    // Written even if something was bad: an outside check then sees it, too.
    save(shared, generation, State::Complete);
    let writes = shared.writes.load(Ordering::Relaxed);
    let first = shared
        .first_error
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    match first {
        None => say(&format!(
            "stamp: ok sectors={sectors} writes={writes} {}",
            shared
                .progress()
                .trim_start_matches(&format!("writes={writes} "))
        )),
        Some(first) => say(&format!("stamp: BAD {} first: {first}", shared.progress())),
    }
    shared.errors.load(Ordering::Relaxed) == 0
}

/// One writer and the chunks that are its own.
struct Writer<'a> {
    shared: &'a Shared,
    index: u64,
    chunks: u64,
    random: Random,
    buffer: Aligned,
}

impl<'a> Writer<'a> {
    fn new(shared: &'a Shared, index: u64) -> Self {
        let all = shared.layout.data.div_ceil(CHUNK_BLOCKS);
        // How many of 0..all leave `index` when divided by the number of threads.
        let chunks = (all + shared.plan.threads - 1 - index) / shared.plan.threads;
        Self {
            shared,
            index,
            chunks,
            random: Random::new(mix(shared.plan.run) ^ index),
            buffer: Aligned::new(usize::try_from(MOST_BLOCKS).unwrap_or(1) * BLOCK_LEN),
        }
    }

    fn work(&mut self) {
        if self.chunks == 0 {
            return;
        }
        let pace = self
            .shared
            .plan
            .rate
            .map(|rate| Duration::from_secs(self.shared.plan.threads) / u32_of(rate.max(1)));
        let mut next = Instant::now();
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.step();
            if let Some(pace) = pace {
                // After a pause of the whole machine the lost time is not made up for.
                next = (next + pace).max(Instant::now() - Duration::from_millis(100));
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        }
    }

    /// Blocks of one of its own chunks: the first, and how many up to `most`.
    fn place(&mut self, most: u64) -> (u64, u64) {
        let chunk = self.random.below(self.chunks) * self.shared.plan.threads + self.index;
        let start = chunk * CHUNK_BLOCKS;
        let end = (start + CHUNK_BLOCKS).min(self.shared.layout.data);
        let first = start + self.random.below(end - start);
        let count = 1 + self.random.below(most.min(end - first));
        (first, count)
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..50 => self.write(false),
            50..56 => self.write(true),
            56..62 => self.discard(),
            _ => self.check(),
        }
    }

    fn write(&mut self, synced: bool) {
        // Small writes are the usual ones.
        let most = if self.random.below(4) == 0 {
            MOST_BLOCKS
        } else {
            1
        };
        let (first, count) = self.place(most);
        let number = self.shared.next_write.fetch_add(1, Ordering::Relaxed);
        let length = usize::try_from(count).unwrap_or(1) * BLOCK_LEN;
        let bytes = self.buffer.first(length);
        sector::fill(bytes, self.shared.plan.run, first, number);
        // Until it is acknowledged the blocks may have the old or the new content.
        self.shared.map.set(first, count, UNTOUCHED);
        let started = Instant::now();
        let done = if synced {
            self.shared.device.write_synced(first * BLOCK, bytes)
        } else {
            self.shared.device.write(first * BLOCK, bytes)
        };
        let took = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.shared
            .longest_write_us
            .fetch_max(took, Ordering::Relaxed);
        match done {
            Ok(()) => {
                self.shared.map.set(first, count, number);
                self.shared.writes.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => self.shared.error(&format!(
                "write of {length} bytes at {}: {error}",
                first * BLOCK
            )),
        }
    }

    fn discard(&mut self) {
        let (first, count) = self.place(CHUNK_BLOCKS);
        if self.shared.plan.discards == Discards::No || !in_discard_area(first) {
            return self.check();
        }
        let (offset, length) = (first * BLOCK, count * BLOCK);
        self.shared.map.set(first, count, UNTOUCHED);
        let hint = self.random.below(2) == 0 && self.shared.plan.discards == Discards::Yes;
        let (what, done) = if hint {
            ("discard", self.shared.device.discard(offset, length))
        } else {
            (
                "write-zeroes",
                self.shared.device.write_zeroes(offset, length),
            )
        };
        match done {
            Ok(()) => {
                self.shared.map.set(first, count, ZEROES);
                self.shared.discards.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => self
                .shared
                .error(&format!("{what} of {length} bytes at {offset}: {error}")),
        }
    }

    fn check(&mut self) {
        let (first, count) = self.place(MOST_BLOCKS);
        let length = usize::try_from(count).unwrap_or(1) * BLOCK_LEN;
        let bytes = self.buffer.first(length);
        if let Err(error) = self.shared.device.read(first * BLOCK, bytes) {
            let offset = first * BLOCK;
            self.shared
                .error(&format!("read of {length} bytes at {offset}: {error}"));
            return;
        }
        for (block, bytes) in (first..).zip(bytes.chunks_exact(BLOCK_LEN)) {
            let known = self.shared.map.get(block);
            let report =
                verify::block(bytes, self.shared.plan.run, block, known, Strictness::Exact);
            self.shared.note(&report);
        }
    }
}

fn u32_of(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
