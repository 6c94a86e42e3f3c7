//! Single steps and their failures, and the bounds of what a queue takes.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::failures::{Call, Failure};
use super::job::{Job, Next, Planned};
use super::probe::Backing;
use super::queue::{BOUNCE_BUDGET, RawQueue};
use super::{RawFile, RawImage, failed};
use crate::uring::Step;
use crate::{Access, Blocking, Buffer, Event, ImageQueue, Operation, Request, WriteFailed};

/// An image of `size` bytes of 1, whose device wants blocks of 4096 bytes.
fn image(size: u64) -> (tempfile::TempDir, PathBuf, RawImage) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![1u8; usize::try_from(size).unwrap()]).unwrap();
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(&path)
    };
    let file = open(libc::O_DIRECT).or_else(|_| open(0)).unwrap();
    let image = RawImage::from_fd(file.into(), "disk.raw", Access::ReadWrite).unwrap();
    (dir, path, image.with_alignment(512, 4096))
}

fn request(op: Operation, offset: u64, buffers: Vec<Buffer>) -> Request {
    Request {
        tag: 1,
        op,
        offset,
        buffers,
    }
}

fn plan(job: &mut Job, file: &RawFile) -> Step {
    match job.plan(file, &RawFile::zeroes(), BOUNCE_BUDGET) {
        Ok(Planned::Step(step)) => step,
        other => panic!("{other:?}"),
    }
}

/// Does a read step by hand, but at most `most` bytes of it.
fn read(step: &mut Step, file: &File, most: usize) -> i32 {
    let Step::Read {
        offset,
        buffers,
        bounce: Some(bounce),
    } = step
    else {
        panic!("{step:?}");
    };
    let len = buffers[0].len().min(most);
    let at = buffers[0].address() - bounce.bytes().as_ptr() as usize;
    let room = &mut bounce.bytes_mut()[at..at + len];
    i32::try_from(file.read_at(room, *offset).unwrap()).unwrap()
}

#[test]
fn what_a_short_read_left_out_is_read_before_it_is_written_back() {
    let (_dir, path, image) = image(8 * 4096);
    let file = File::open(path).unwrap();
    let mut data = [7u8; 2 * 4096];
    // SAFETY: `data` outlives the job.
    let buffer = unsafe { Buffer::new(data.as_mut_ptr(), data.len()) };
    // Parts of three blocks.
    let mut job = Job::new(request(Operation::Write, 4096 + 512, vec![buffer]));
    let mut step = plan(&mut job, &image.file);
    let result = read(&mut step, &file, 4096 + 1024);
    let Next::AtOnce(mut step) = job.after(step, result, &image.file) else {
        panic!("not gone on with");
    };
    let Step::Read { offset, .. } = &step else {
        panic!("the rest was taken for the end of the file: {step:?}");
    };
    assert_eq!(*offset, 2 * 4096);
    let result = read(&mut step, &file, usize::MAX);
    let Next::AtOnce(Step::Write {
        offset,
        buffers,
        bounce: Some(bounce),
    }) = job.after(step, result, &image.file)
    else {
        panic!("not written back");
    };
    assert_eq!((offset, buffers[0].len()), (4096, 3 * 4096));
    let bytes = &bounce.bytes()[..3 * 4096];
    assert!(bytes[..512].iter().all(|&byte| byte == 1));
    assert!(bytes[512..512 + data.len()].iter().all(|&byte| byte == 7));
    assert!(bytes[512 + data.len()..].iter().all(|&byte| byte == 1));
}

#[test]
fn a_block_is_not_written_back_if_its_file_was_truncated() {
    let (_dir, _path, image) = image(8 * 4096);
    let mut job = Job::new(request(
        Operation::WriteZeroes {
            len: 512,
            unmap: false,
        },
        4096,
        Vec::new(),
    ));
    image.file.no_zero_range.store(true, Ordering::Relaxed);
    let step = plan(&mut job, &image.file);
    let next = job.after(step, 0, &image.file);
    let Next::Failed(failure) = next else {
        panic!("{next:?}");
    };
    assert_eq!(failure, Failure::new(Call::Read, libc::EIO));
}

#[test]
fn writing_the_last_sectors_makes_no_file_longer() {
    for size in [9 * 512, 700 * 512, 700 * 512 + 100] {
        let (_dir, path, image) = image(size);
        let whole = size - size % 512;
        let mut io = Blocking::new(&image).unwrap();
        let len = || std::fs::metadata(&path).unwrap().len();
        io.write(whole - 512, &[7; 512]).unwrap();
        assert_eq!(len(), size);
        image.file.no_punch.store(true, Ordering::Relaxed);
        image.file.no_zero_range.store(true, Ordering::Relaxed);
        let zeroes = Operation::WriteZeroes {
            len: 1024,
            unmap: true,
        };
        io.operate(zeroes, whole - 1536).unwrap();
        io.operate(Operation::Flush, 0).unwrap();
        assert_eq!(len(), size);
        let content = std::fs::read(&path).unwrap();
        let (disk, beyond) = content.split_at(usize::try_from(whole).unwrap());
        let (rest, last) = disk.split_at(disk.len() - 1536);
        assert!(rest.iter().all(|&byte| byte == 1));
        assert!(last[..1024].iter().all(|&byte| byte == 0));
        assert!(last[1024..].iter().all(|&byte| byte == 7));
        assert!(beyond.iter().all(|&byte| byte == 1));
    }
}

#[test]
fn a_failure_names_the_call_that_failed() {
    let (_dir, _path, mut image) = image(8 * 4096);
    let mut data = [7u8; 512];
    let fail = |job: &mut Job, file: &RawFile| {
        let step = plan(job, file);
        match job.after(step, -libc::EIO, file) {
            Next::Failed(failure) => failure.call,
            other => panic!("{other:?}"),
        }
    };
    // SAFETY: `data` outlives the job.
    let buffer = unsafe { Buffer::new(data.as_mut_ptr(), data.len()) };
    // A part of a block: its read fails.
    let mut job = Job::new(request(Operation::Write, 512, vec![buffer]));
    assert_eq!(fail(&mut job, &image.file), Call::Read);
    // Zeroes by hand.
    let zeroes = Operation::WriteZeroes {
        len: 4096,
        unmap: false,
    };
    let mut job = Job::new(request(zeroes, 4096, Vec::new()));
    assert_eq!(fail(&mut job, &image.file), Call::Allocate);
    image.file.no_zero_range.store(true, Ordering::Relaxed);
    let mut job = Job::new(request(zeroes, 4096, Vec::new()));
    assert_eq!(fail(&mut job, &image.file), Call::Write);
    // A discard by ioctl; a file knows none.
    image.file.no_punch.store(true, Ordering::Relaxed);
    Arc::get_mut(&mut image.file).unwrap().backing = Backing::BlockDevice;
    let mut job = Job::new(request(Operation::Discard { len: 4096 }, 4096, Vec::new()));
    let planned = job.plan(&image.file, &RawFile::zeroes(), BOUNCE_BUDGET);
    let Err(failure) = planned else {
        panic!("{planned:?}");
    };
    assert_eq!(failure.call, Call::DiscardDevice);

    // And it is what the observation says.
    let failure = Failure::new(Call::Read, libc::EIO);
    let seen = failed(Operation::Write, "disk.raw", 512, 512, failure);
    assert!(seen.is::<WriteFailed>());
    let cause = seen.causes()[0].text();
    assert!(cause.contains("readv"), "{cause}");
}

#[test]
fn misaligned_requests_wait_for_bounce_memory_instead_of_taking_more() {
    const EACH: usize = 256 * 1024;
    let count = 4 * usize::try_from(BOUNCE_BUDGET).unwrap() / EACH;
    let (_dir, path, image) = image((count * EACH) as u64);
    let event = Arc::new(Event::new().unwrap());
    let mut queue = RawQueue::new(&image.file, 256, &event).unwrap();
    let mut memory = vec![9u8; count * EACH + 1];
    for index in 0..count {
        let part = &mut memory[index * EACH + 1..(index + 1) * EACH + 1];
        // SAFETY: `memory` outlives the requests.
        let buffer = unsafe { Buffer::new(part.as_mut_ptr(), part.len()) };
        queue.submit(request(
            Operation::Write,
            (index * EACH) as u64,
            vec![buffer],
        ));
    }
    let (mut done, mut most) = (0, 0);
    while done < count {
        queue.push().unwrap();
        most = most.max(queue.bounced());
        assert!(event.wait(Duration::from_secs(10)), "a job starved");
        event.clear();
        queue.reap(&mut |completion| {
            completion.result.unwrap();
            done += 1;
        });
    }
    assert!(most > BOUNCE_BUDGET / 2 && most <= BOUNCE_BUDGET, "{most}");
    assert_eq!(queue.bounced(), 0);
    assert!(std::fs::read(path).unwrap().iter().all(|&byte| byte == 9));
}
