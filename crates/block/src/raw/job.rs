//! A request on its way: which steps it takes.
//!
//! A request is done in one step if its memory and its range are aligned, which is the usual case.
//! Otherwise it goes piece by piece through bounce memory:
//!
//! ```text
//!   read, any alignment       read whole blocks ─► copy out
//!   write, misaligned memory  copy in ─► write
//!   write, misaligned range   read whole blocks ─► copy in ─► write      (range held alone)
//!                             ─► cut the file back, if its last block made it longer
//!   write-zeroes              fallocate, or writes of zeroes where the file system cannot
//!   discard                   fallocate or BLKDISCARD, or nothing where the device cannot
//! ```
//!
//! A step that the kernel did only partly leaves the rest as the next step; one that it wants
//! tried again is tried again, [`MAX_RETRIES`] times at most.
//!
//! A step that needs bounce memory needs room for it in its queue's budget: the job waits if there
//! is none.

use std::sync::atomic::Ordering;

use super::aligned::Aligned;
use super::failures::{Call, Failure};
use super::probe::Backing;
use super::{RawFile, discard};
use crate::uring::{MAX_VECTORS, Step};
use crate::{Buffer, Operation, Request, SECTOR_BYTES};

/// The bounce memory of one request at most, whatever its size.
pub(super) const BOUNCE_BYTES: u64 = 256 * 1024;

/// Zeroes written by one step where the file system cannot zero a range.
const ZERO_STEP_BYTES: u64 = 8 * 1024 * 1024;

/// How often a step is tried again when the kernel says EINTR or EAGAIN.
const MAX_RETRIES: u32 = 1000;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// A request on its way.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) tag: u64,
    pub(super) op: Operation,
    /// As it was asked for.
    pub(super) asked: (u64, u64),
    /// What is left of it.
    offset: u64,
    pub(super) left: u64,
    buffers: Vec<Buffer>,
    doing: Doing,
    /// Bounce memory that its step in flight holds.
    pub(super) bounced: u64,
    pub(super) range: Option<u64>,
    retries: u32,
}

/// What the step in flight is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Nothing yet.
    Nothing,
    /// The rest of the request, straight from or to its memory.
    Straight,
    /// Reading whole blocks into bounce memory: `skip` bytes, then `piece` bytes of the request.
    BounceRead { skip: u64, piece: u64 },
    /// Reading whole blocks in order to change them; `got` bytes were there already.
    Before { skip: u64, piece: u64, got: u64 },
    /// Writing bounce memory.
    BounceWrite { skip: u64, piece: u64 },
    /// A flush or fallocate.
    Whole,
}

/// What a job does next.
#[derive(Debug)]
pub(super) enum Planned {
    Step(Step),
    /// Nothing is to be done.
    Nothing,
    /// It needs more bounce memory than there is room for.
    NoRoom,
}

/// What becomes of a job after a step.
#[derive(Debug)]
pub(super) enum Next {
    /// This very step follows. It keeps the bounce memory.
    AtOnce(Step),
    /// It is to be planned again.
    Step,
    Done,
    Failed(Failure),
}

impl Job {
    pub(super) fn new(request: Request) -> Self {
        Self {
            tag: request.tag,
            op: request.op,
            asked: (request.offset, request.len()),
            offset: request.offset,
            left: request.len(),
            buffers: request.buffers,
            doing: Doing::Nothing,
            bounced: 0,
            range: None,
            retries: 0,
        }
    }

    /// The next step, with at most `room` bytes of bounce memory.
    pub(super) fn plan(
        &mut self,
        file: &RawFile,
        zeroes: &Aligned,
        room: u64,
    ) -> std::result::Result<Planned, Failure> {
        match self.op {
            Operation::Flush => {
                self.doing = Doing::Whole;
                Ok(Planned::Step(Step::Sync))
            }
            Operation::Read | Operation::Write => Ok(self.plan_transfer(file, room)),
            Operation::Discard { .. } => self.plan_discard(file),
            Operation::WriteZeroes { unmap, .. } => Ok(self.plan_zeroes(file, unmap, zeroes, room)),
        }
    }

    fn plan_transfer(&mut self, file: &RawFile, room: u64) -> Planned {
        let straight = self.straight_len(file);
        if straight == 0 {
            return self.plan_bounce(file, room);
        }
        self.doing = Doing::Straight;
        let buffers = std::mem::take(&mut self.buffers);
        let (offset, bounce) = (self.offset, None);
        Planned::Step(match self.op {
            Operation::Read => Step::Read {
                offset,
                buffers,
                bounce,
            },
            _ => Step::Write {
                offset,
                buffers,
                bounce,
            },
        })
    }

    /// How many bytes the next step can do without bounce memory.
    fn straight_len(&self, file: &RawFile) -> u64 {
        let align = file.alignment;
        let mut sum = 0u64;
        for buffer in self.buffers.iter().take(MAX_VECTORS) {
            let len = buffer.len() as u64;
            if !(buffer.address() as u64).is_multiple_of(align.memory)
                || !len.is_multiple_of(align.memory)
            {
                return 0;
            }
            sum += len;
        }
        if !self.offset.is_multiple_of(align.offset) || !sum.is_multiple_of(align.offset) {
            return 0;
        }
        sum
    }

    fn plan_bounce(&mut self, file: &RawFile, room: u64) -> Planned {
        // The same for all, so that small ones do not keep a large one waiting for ever.
        if room < BOUNCE_BYTES {
            return Planned::NoRoom;
        }
        let align = file.alignment.offset;
        let start = self.offset - self.offset % align;
        let skip = self.offset - start;
        let piece = self.left.min(BOUNCE_BYTES - align.min(BOUNCE_BYTES) - skip);
        let len = (skip + piece).next_multiple_of(align);
        let mut bounce = Aligned::new(usize::try_from(len).unwrap_or(0));
        self.bounced = len;
        let buffers = vec![bounce.buffer(usize::try_from(len).unwrap_or(0))];
        if self.op == Operation::Read {
            self.doing = Doing::BounceRead { skip, piece };
        } else if skip != 0 || skip + piece != len {
            self.doing = Doing::Before {
                skip,
                piece,
                got: 0,
            };
        } else {
            self.fill(&mut bounce, skip, piece);
            self.doing = Doing::BounceWrite { skip, piece };
            return Planned::Step(Step::Write {
                offset: start,
                buffers,
                bounce: Some(bounce),
            });
        }
        Planned::Step(Step::Read {
            offset: start,
            buffers,
            bounce: Some(bounce),
        })
    }

    /// Puts what the request writes next into bounce memory.
    fn fill(&self, bounce: &mut Aligned, skip: u64, piece: u64) {
        let from = usize::try_from(skip).unwrap_or(0);
        let to = usize::try_from(skip + piece).unwrap_or(0);
        let Some(mut room) = bounce.bytes_mut().get_mut(from..to) else {
            return;
        };
        if matches!(self.op, Operation::WriteZeroes { .. }) {
            room.fill(0);
            return;
        }
        for buffer in &self.buffers {
            let count = buffer.copy_to(room);
            room = room.get_mut(count..).unwrap_or_default();
        }
    }

    fn plan_discard(&mut self, file: &RawFile) -> std::result::Result<Planned, Failure> {
        let (mut offset, mut end) = (self.offset, self.offset + self.left);
        if file.backing == Backing::BlockDevice {
            // A discard is a hint: only the whole blocks of it.
            let align = file.alignment.offset.max(SECTOR_BYTES);
            offset = offset.next_multiple_of(align);
            end -= end % align;
        }
        if offset >= end {
            return Ok(Planned::Nothing);
        }
        let len = end - offset;
        if RawFile::lacks(&file.no_punch) {
            if file.backing == Backing::BlockDevice {
                match discard::discard_device(&file.fd, offset, len) {
                    Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                    Err(error) => {
                        return Err(Failure::new(Call::DiscardDevice, error.raw_os_error()));
                    }
                }
            }
            return Ok(Planned::Nothing);
        }
        self.doing = Doing::Whole;
        Ok(Planned::Step(Step::Allocate {
            mode: PUNCH,
            offset,
            len,
        }))
    }

    fn plan_zeroes(&mut self, file: &RawFile, unmap: bool, zeroes: &Aligned, room: u64) -> Planned {
        let align = match file.backing {
            Backing::RegularFile => 1,
            Backing::BlockDevice => file.alignment.offset.max(SECTOR_BYTES),
        };
        let aligned = self.offset.is_multiple_of(align) && self.left.is_multiple_of(align);
        let mode = if unmap && !RawFile::lacks(&file.no_punch) {
            Some(PUNCH)
        } else if !RawFile::lacks(&file.no_zero_range) {
            Some(ZERO)
        } else {
            None
        };
        if let Some(mode) = mode.filter(|_| aligned) {
            self.doing = Doing::Whole;
            return Planned::Step(Step::Allocate {
                mode,
                offset: self.offset,
                len: self.left,
            });
        }
        // By hand.
        let align = file.alignment.offset;
        let direct = self.left - self.left % align;
        if !self.offset.is_multiple_of(align) || direct == 0 {
            return self.plan_bounce(file, room);
        }
        let mut rest = direct.min(ZERO_STEP_BYTES);
        let mut buffers = Vec::new();
        while rest > 0 {
            let part = rest.min(zeroes.bytes().len() as u64);
            buffers.push(zeroes.buffer(usize::try_from(part).unwrap_or(0)));
            rest -= part;
        }
        self.doing = Doing::Straight;
        Planned::Step(Step::Write {
            offset: self.offset,
            buffers,
            bounce: None,
        })
    }

    /// What follows from a step's end.
    pub(super) fn after(&mut self, step: Step, result: i32, file: &RawFile) -> Next {
        let call = match &step {
            Step::Read { .. } => Call::Read,
            Step::Write { .. } => Call::Write,
            Step::Sync => Call::Sync,
            Step::Allocate { .. } => Call::Allocate,
        };
        if result < 0 {
            return self.after_failure(step, Failure::new(call, -result), file);
        }
        let count = u64::from(result.unsigned_abs());
        let zeroing = matches!(self.op, Operation::WriteZeroes { .. });
        match (self.doing, step) {
            (Doing::Whole, _) => Next::Done,
            (Doing::Straight, Step::Read { buffers, .. } | Step::Write { buffers, .. }) => {
                if !zeroing {
                    self.buffers = buffers;
                }
                self.advance(count, call)
            }
            (Doing::BounceRead { skip, piece }, Step::Read { bounce, .. }) => {
                let got = count.saturating_sub(skip).min(piece);
                let from = usize::try_from(skip).unwrap_or(0);
                let to = usize::try_from(skip + got).unwrap_or(0);
                if let Some(mut bytes) = bounce.as_ref().and_then(|it| it.bytes().get(from..to)) {
                    for buffer in &self.buffers {
                        let count = buffer.copy_from(bytes);
                        bytes = bytes.get(count..).unwrap_or_default();
                    }
                }
                self.advance(got, call)
            }
            (
                Doing::Before { skip, piece, got },
                Step::Read {
                    offset,
                    bounce: Some(bounce),
                    ..
                },
            ) => self.after_before(file, bounce, (skip, piece, got), offset + count),
            (Doing::BounceWrite { skip, piece }, Step::Write { offset, .. }) => {
                match file.cut_back(offset + count) {
                    Ok(()) => self.advance(count.saturating_sub(skip).min(piece), call),
                    Err(failure) => Next::Failed(failure),
                }
            }
            _ => Next::Failed(Failure::new(call, libc::EIO)),
        }
    }

    /// Blocks that are to be changed were read, as far as the byte `end` of the file: reads the
    /// rest of them, or changes them.
    fn after_before(
        &mut self,
        file: &RawFile,
        mut bounce: Aligned,
        (skip, piece, got): (u64, u64, u64),
        end: u64,
    ) -> Next {
        let align = file.alignment.offset;
        let start = self.offset - skip;
        let len = (skip + piece).next_multiple_of(align);
        let whole = bounce.buffer(usize::try_from(len).unwrap_or(0));
        // Only at the end of the file is a short read all there is: the rest of the block does
        // not exist yet, and the bounce memory is zero there.
        if end < (start + len).min(file.length) {
            let now = end.saturating_sub(start);
            if now <= got {
                // The file is shorter than it was when it was opened.
                return Next::Failed(Failure::new(Call::Read, libc::EIO));
            }
            self.doing = Doing::Before {
                skip,
                piece,
                got: now,
            };
            let from = now - now % align;
            return Next::AtOnce(Step::Read {
                offset: start + from,
                buffers: vec![whole.part(usize::try_from(from).unwrap_or(0), usize::MAX)],
                bounce: Some(bounce),
            });
        }
        self.fill(&mut bounce, skip, piece);
        self.doing = Doing::BounceWrite { skip, piece };
        Next::AtOnce(Step::Write {
            offset: start,
            buffers: vec![whole],
            bounce: Some(bounce),
        })
    }

    fn after_failure(&mut self, step: Step, failure: Failure, file: &RawFile) -> Next {
        let errno = failure.errno;
        if self.doing == Doing::Straight {
            if let Step::Read { buffers, .. } | Step::Write { buffers, .. } = step
                && !matches!(self.op, Operation::WriteZeroes { .. })
            {
                self.buffers = buffers;
            }
            self.doing = Doing::Nothing;
        } else if let Step::Allocate { mode, .. } = step
            && matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
        {
            // Not something this file system or device does: planned again without it.
            let flag = if mode == PUNCH {
                &file.no_punch
            } else {
                &file.no_zero_range
            };
            flag.store(true, Ordering::Relaxed);
            return Next::Step;
        }
        if matches!(errno, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
            self.retries += 1;
            return Next::Step;
        }
        Next::Failed(failure)
    }

    /// `count` more bytes of the request are done.
    fn advance(&mut self, count: u64, call: Call) -> Next {
        if count == 0 {
            // The image is shorter than it was when it was opened, or the device writes nothing
            // without saying why.
            return Next::Failed(Failure::new(call, libc::EIO));
        }
        self.offset += count.min(self.left);
        self.left -= count.min(self.left);
        if self.left == 0 {
            return Next::Done;
        }
        let mut skip = usize::try_from(count).unwrap_or(usize::MAX);
        let mut whole = 0;
        for buffer in &mut self.buffers {
            if buffer.len() <= skip {
                skip -= buffer.len();
                whole += 1;
            } else {
                *buffer = buffer.part(skip, usize::MAX);
                break;
            }
        }
        self.buffers.drain(..whole);
        Next::Step
    }
}
