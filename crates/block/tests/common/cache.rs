//! Images with a volatile write cache, and the book that says after each event what a power cut at
//! that instant could leave behind.
//!
//! A write may reach the medium at any time after its submission; it has surely reached it once a
//! flush has ended that was submitted after the write had ended. Sectors are independent of each other. So what a
//! cut can leave of a sector is its last sure value or any value on its way, and what the guest may
//! find is the last value whose flush it was told of, or any that it wrote later. The book compares
//! the two sets, for each sector and for every image that the binding may name: that is every prefix
//! of the log with every subset of the cache, without replaying them one by one.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use strake_block::{Access, Buffer, Completion, Event, Image, ImageQueue, Operation, Request};
use strake_observe::Result;

use super::{Random, SECTOR, stamp};

/// A write on its way: to an image's medium, or of the guest to its next flush.
struct Under {
    id: u64,
    value: u64,
    ended_at: Option<u64>,
}

/// What one side knows of a sector: the value that is sure, and those under way after it, in the order
/// of their submission.
struct Sector {
    sure: u64,
    under: Vec<Under>,
}

impl Sector {
    /// All values that it may turn out to have.
    fn values(&self) -> impl Iterator<Item = u64> + '_ {
        std::iter::once(self.sure).chain(self.under.iter().map(|write| write.value))
    }

    /// A flush that was submitted at `at` has ended.
    fn settle(&mut self, at: u64) {
        let before = |write: &Under| write.ended_at.is_some_and(|ended| ended < at);
        let last = self
            .under
            .iter()
            .filter(|write| before(write))
            .max_by_key(|write| write.ended_at);
        if let Some(last) = last {
            self.sure = last.value;
            self.under.retain(|write| !before(write));
        }
    }
}

/// One side's view of all sectors.
struct Side(Vec<Sector>);

impl Side {
    fn new(sectors: usize, value: u64) -> Self {
        let sector = || Sector {
            sure: value,
            under: Vec::new(),
        };
        Self((0..sectors).map(|_| sector()).collect())
    }

    fn begin(&mut self, id: u64, first: usize, values: &[u64]) {
        for (sector, value) in self.0[first..].iter_mut().zip(values) {
            sector.under.push(Under {
                id,
                value: *value,
                ended_at: None,
            });
        }
    }

    fn end(&mut self, id: u64, first: usize, count: usize, now: u64) {
        for sector in &mut self.0[first..first + count] {
            for write in sector.under.iter_mut().filter(|write| write.id == id) {
                write.ended_at = Some(now);
            }
        }
    }

    fn settle(&mut self, at: u64) {
        self.0.iter_mut().for_each(|sector| sector.settle(at));
    }
}

/// Which images the binding may name at an instant.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bound {
    To(usize),
    /// The daemon was asked and has not said.
    Either,
}

struct Pages {
    now: u64,
    images: [Side; 2],
    guest: Side,
    bound: Bound,
    checks: u64,
}

impl Pages {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A power cut now leaves nothing in these sectors that the guest may not find there.
    fn check(&mut self, sectors: Range<usize>, event: &str) {
        for (number, image) in self.images.iter().enumerate() {
            if self.bound != Bound::Either && self.bound != Bound::To(number) {
                continue;
            }
            self.checks += 1;
            for at in sectors.clone() {
                let allowed = &self.guest.0[at];
                for value in image.0[at].values() {
                    assert!(
                        allowed.values().any(|other| other == value),
                        "{event}: a power cut may leave write {value} in sector {at} of image \
                         {number}; the guest flushed {:?} and may find {:?}",
                        allowed.sure,
                        allowed.values().collect::<Vec<_>>(),
                    );
                }
            }
        }
    }

    fn check_all(&mut self, event: &str) {
        self.check(0..self.guest.0.len(), event);
    }
}

/// The book of one disk.
pub struct Book(Mutex<Pages>);

impl Book {
    /// For a disk of `sectors`, all of which hold write 1 for sure, and an empty image beside it.
    pub fn new(sectors: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Pages {
            now: 0,
            images: [Side::new(sectors, 1), Side::new(sectors, 0)],
            guest: Side::new(sectors, 1),
            bound: Bound::To(0),
            checks: 0,
        })))
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap()
    }

    /// Something that happens to the guest's view only: names the request.
    pub fn guest_issues(&self, first: usize, values: &[u64]) -> u64 {
        let mut pages = self.pages();
        let id = pages.tick();
        pages.guest.begin(id, first, values);
        id
    }

    pub fn guest_is_told(&self, id: u64, first: usize, count: usize) {
        let mut pages = self.pages();
        let now = pages.tick();
        pages.guest.end(id, first, count, now);
    }

    pub fn now(&self) -> u64 {
        self.pages().tick()
    }

    pub fn guest_has_flushed(&self, issued_at: u64) {
        let mut pages = self.pages();
        pages.guest.settle(issued_at);
        pages.check_all("the guest was told of a flush");
    }

    /// The daemon is asked: from now on its inventory may name either.
    pub fn asked(&self) {
        let mut pages = self.pages();
        pages.bound = Bound::Either;
        pages.check_all("the daemon was asked");
    }

    /// The inventory's transaction.
    pub fn decided(&self, image: usize) {
        let mut pages = self.pages();
        pages.bound = Bound::To(image);
        pages.check_all("the inventory decided");
    }

    /// The other image is to be a destination again: it is empty.
    pub fn forget(&self, image: usize) {
        let mut pages = self.pages();
        let sectors = pages.guest.0.len();
        pages.images[image] = Side::new(sectors, 0);
    }

    pub fn checks(&self) -> u64 {
        self.pages().checks
    }
}

/// An image in memory behind a volatile cache; requests end in any order.
pub struct Cached(Arc<Medium>);

struct Medium {
    number: usize,
    name: String,
    book: Arc<Book>,
    /// The write that each sector holds, as every reader sees it.
    content: Mutex<Vec<u64>>,
}

impl std::fmt::Debug for Cached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.name)
    }
}

impl Cached {
    /// Image `number` of the book, every sector holding write `value`.
    pub fn new(book: &Arc<Book>, number: usize, value: u64) -> Arc<Self> {
        let sectors = book.pages().guest.0.len();
        Arc::new(Self(Arc::new(Medium {
            number,
            name: format!("image {number}"),
            book: Arc::clone(book),
            content: Mutex::new(vec![value; sectors]),
        })))
    }
}

impl Medium {
    fn flushed(&self, submitted_at: u64) {
        self.book.pages().images[self.number].settle(submitted_at);
    }

    fn begin(&self, first: usize, values: &[u64]) -> u64 {
        let mut pages = self.book.pages();
        let id = pages.tick();
        pages.images[self.number].begin(id, first, values);
        pages.check(first..first + values.len(), "a write was submitted");
        id
    }

    fn end(&self, id: u64, first: usize, values: &[u64]) {
        let mut content = self.content.lock().unwrap();
        content[first..first + values.len()].copy_from_slice(values);
        let mut pages = self.book.pages();
        let now = pages.tick();
        pages.images[self.number].end(id, first, values.len(), now);
    }
}

impl Image for Cached {
    fn path(&self) -> &str {
        &self.0.name
    }

    fn size(&self) -> u64 {
        (self.0.content.lock().unwrap().len() * SECTOR) as u64
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn open_queue(&self, _depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        Ok(Box::new(CachedQueue {
            medium: Arc::clone(&self.0),
            event: Arc::clone(event),
            waiting: Vec::new(),
            running: Vec::new(),
            random: Random::new(Arc::as_ptr(event) as u64 >> 4),
        }))
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let content = self.0.content.lock().unwrap();
        let first = offset as usize / SECTOR;
        for (at, sector) in data.chunks_mut(SECTOR).enumerate() {
            let at = first + at;
            stamp(at as u64, content[at], sector);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.0.flushed(self.0.book.now());
        Ok(())
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        let content = self.0.content.lock().unwrap();
        let from = from as usize / SECTOR;
        let first = (from..content.len()).find(|at| content[*at] != 0);
        Ok(first.map(|first| {
            let end = (first..content.len()).find(|at| content[*at] == 0);
            let end = end.unwrap_or(content.len());
            (first * SECTOR) as u64..(end * SECTOR) as u64
        }))
    }

    fn is_removed(&self) -> Result<bool> {
        Ok(false)
    }
}

enum Running {
    Read(Request),
    /// Its name in the book, first sector and values.
    Change(u64, usize, Vec<u64>),
    /// When it was submitted.
    Flush(u64),
}

struct CachedQueue {
    medium: Arc<Medium>,
    event: Arc<Event>,
    waiting: Vec<Request>,
    running: Vec<(u64, Running)>,
    random: Random,
}

impl std::fmt::Debug for CachedQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "queue of {}", self.medium.name)
    }
}

/// The values that a write brings: each sector must be some write's whole stamp for that place.
fn values(first: usize, buffers: &[Buffer]) -> Vec<u64> {
    let mut data = Vec::new();
    for buffer in buffers {
        let from = data.len();
        data.resize(from + buffer.len(), 0);
        buffer.copy_to(&mut data[from..]);
    }
    let mut want = [0u8; SECTOR];
    let sectors = data.chunks(SECTOR).enumerate();
    sectors
        .map(|(at, sector)| {
            let value = u64::from_le_bytes(sector[8..16].try_into().unwrap());
            stamp((first + at) as u64, value, &mut want);
            assert!(sector == want, "a torn or misplaced write to {first}+{at}");
            value
        })
        .collect()
}

impl CachedQueue {
    fn start(&self, request: Request) -> Running {
        let first = request.offset as usize / SECTOR;
        let change = |values: Vec<u64>| {
            let id = self.medium.begin(first, &values);
            Running::Change(id, first, values)
        };
        match request.op {
            Operation::Read => Running::Read(request),
            Operation::Write => change(values(first, &request.buffers)),
            Operation::Discard { len } | Operation::WriteZeroes { len, .. } => {
                change(vec![0; len as usize / SECTOR])
            }
            Operation::Flush => Running::Flush(self.medium.book.now()),
        }
    }

    fn end(&self, running: &Running) {
        match running {
            Running::Read(request) => {
                let content = self.medium.content.lock().unwrap();
                let mut at = request.offset as usize / SECTOR;
                for buffer in &request.buffers {
                    let mut data = vec![0; buffer.len()];
                    for sector in data.chunks_mut(SECTOR) {
                        stamp(at as u64, content[at], sector);
                        at += 1;
                    }
                    buffer.copy_from(&data);
                }
            }
            Running::Change(id, first, values) => self.medium.end(*id, *first, values),
            Running::Flush(submitted_at) => self.medium.flushed(*submitted_at),
        }
    }
}

impl ImageQueue for CachedQueue {
    fn submit(&mut self, request: Request) {
        self.waiting.push(request);
    }

    fn push(&mut self) -> Result<()> {
        for request in std::mem::take(&mut self.waiting) {
            let tag = request.tag;
            let running = self.start(request);
            self.running.push((tag, running));
        }
        if !self.running.is_empty() {
            self.event.signal();
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        let mut left = Vec::new();
        for (tag, running) in std::mem::take(&mut self.running) {
            if self.random.below(2) == 0 {
                left.push((tag, running));
                continue;
            }
            self.end(&running);
            done(Completion {
                tag,
                result: Ok(()),
            });
        }
        self.running = left;
        if !self.running.is_empty() {
            self.event.signal();
        }
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.running.len()
    }
}

impl Drop for CachedQueue {
    fn drop(&mut self) {
        for (_, running) in std::mem::take(&mut self.running) {
            self.end(&running);
        }
    }
}
