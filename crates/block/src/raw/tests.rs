//! The engine against a model in memory.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::RawImage;
use crate::{
    Access, BadRequest, Blocking, Buffer, Event, Image, NotAnImage, Operation, ReadFailed,
    ReadOnlyDisk, Request,
};

const SECTORS: u64 = 700; // not a multiple of 4096 bytes, and larger than the bounce memory
const SIZE: u64 = SECTORS * 512;

fn file(direct: bool, size: u64) -> (tempfile::TempDir, OwnedFd) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(size).unwrap();
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if direct {
        options.custom_flags(libc::O_DIRECT);
    }
    let opened = options.open(&path).or_else(|_| {
        // tmpfs on older kernels
        OpenOptions::new().read(true).write(true).open(&path)
    });
    (dir, opened.unwrap().into())
}

fn image(direct: bool, align: Option<(u64, u64)>) -> (tempfile::TempDir, RawImage) {
    let (dir, fd) = file(direct, SIZE);
    let image = RawImage::from_fd(fd, "disk.raw", Access::ReadWrite).unwrap();
    match align {
        Some((memory, offset)) => (dir, image.with_alignment(memory, offset)),
        None => (dir, image),
    }
}

#[derive(Debug, Clone)]
enum Act {
    Write {
        at: u64,
        pieces: Vec<usize>,
        skew: usize,
        fill: u8,
    },
    Read {
        at: u64,
        pieces: Vec<usize>,
        skew: usize,
    },
    Discard {
        at: u64,
        sectors: u64,
    },
    Zero {
        at: u64,
        sectors: u64,
        unmap: bool,
    },
    Flush,
}

fn pieces() -> impl Strategy<Value = Vec<usize>> {
    // Lengths of any sort; the last is adjusted so that the sum is in sectors.
    prop::collection::vec(
        prop_oneof![Just(512usize), Just(4096), 1usize..9000, Just(140_000)],
        1..5,
    )
}

fn acts() -> impl Strategy<Value = Act> {
    let at = 0..SECTORS;
    let skew = prop_oneof![Just(0usize), Just(1), Just(512), 0usize..4096];
    prop_oneof![
        4 => (at.clone(), pieces(), skew.clone(), any::<u8>())
            .prop_map(|(at, pieces, skew, fill)| Act::Write { at, pieces, skew, fill }),
        3 => (at.clone(), pieces(), skew).prop_map(|(at, pieces, skew)| Act::Read { at, pieces, skew }),
        1 => (at.clone(), 0u64..300).prop_map(|(at, sectors)| Act::Discard { at, sectors }),
        1 => (at, 0u64..300, any::<bool>())
            .prop_map(|(at, sectors, unmap)| Act::Zero { at, sectors, unmap }),
        1 => Just(Act::Flush),
    ]
}

/// Makes the pieces fit: in sectors together, and within the image from `at`.
fn fit(at: u64, pieces: &[usize]) -> Vec<usize> {
    let room = usize::try_from((SECTORS - at) * 512).unwrap();
    let mut out = Vec::new();
    let mut sum = 0;
    for &piece in pieces {
        let piece = piece.min(room - sum);
        sum += piece;
        out.push(piece);
    }
    out.push(sum.next_multiple_of(512) - sum);
    out
}

fn buffers(memory: &mut [u8], skew: usize, pieces: &[usize]) -> Vec<Buffer> {
    let mut at = skew;
    pieces
        .iter()
        .map(|&len| {
            // SAFETY: within `memory`, which outlives the request in every use here.
            let buffer = unsafe { Buffer::new(memory[at..].as_mut_ptr(), len) };
            at += len;
            buffer
        })
        .collect()
}

fn run(queue: &mut dyn crate::ImageQueue, event: &Event, request: Request) -> bool {
    queue.submit(request);
    let mut ended = None;
    while ended.is_none() {
        queue.push().unwrap();
        assert!(event.wait(Duration::from_secs(10)), "no completion");
        event.clear();
        queue.reap(&mut |completion| ended = Some(completion.result.is_ok()));
    }
    ended.unwrap()
}

fn check_against_model(image: &RawImage, acts: &[Act]) {
    let mut model = vec![0u8; usize::try_from(SIZE).unwrap()];
    let event = Arc::new(Event::new().unwrap());
    let mut queue = image.open_queue(4, &event).unwrap();
    let mut memory = vec![0u8; 700_000];
    for (number, act) in acts.iter().enumerate() {
        let range = |at: u64, len: usize| {
            let at = usize::try_from(at * 512).unwrap();
            at..at + len
        };
        let request = |op, at: u64, buffers| Request {
            tag: number as u64,
            op,
            offset: at * 512,
            buffers,
        };
        match act {
            Act::Write {
                at,
                pieces,
                skew,
                fill,
            } => {
                let pieces = fit(*at, pieces);
                let len: usize = pieces.iter().sum();
                for (index, byte) in memory[*skew..*skew + len].iter_mut().enumerate() {
                    *byte = fill.wrapping_add(u8::try_from(index % 251).unwrap());
                }
                model[range(*at, len)].copy_from_slice(&memory[*skew..*skew + len]);
                let buffers = buffers(&mut memory, *skew, &pieces);
                assert!(run(
                    &mut *queue,
                    &event,
                    request(Operation::Write, *at, buffers)
                ));
            }
            Act::Read { at, pieces, skew } => {
                let pieces = fit(*at, pieces);
                let len: usize = pieces.iter().sum();
                memory[..].fill(0xee);
                let buffers = buffers(&mut memory, *skew, &pieces);
                assert!(run(
                    &mut *queue,
                    &event,
                    request(Operation::Read, *at, buffers)
                ));
                assert!(
                    memory[*skew..*skew + len] == model[range(*at, len)],
                    "read differs"
                );
                assert!(memory[*skew + len..].iter().all(|&byte| byte == 0xee));
            }
            Act::Discard { at, sectors } => {
                let len = (*sectors).min(SECTORS - at) * 512;
                let op = Operation::Discard { len };
                assert!(run(&mut *queue, &event, request(op, *at, Vec::new())));
                // On regular files of the file systems at hand a discard reads as zeroes.
                model[range(*at, usize::try_from(len).unwrap())].fill(0);
            }
            Act::Zero { at, sectors, unmap } => {
                let len = (*sectors).min(SECTORS - at) * 512;
                let op = Operation::WriteZeroes { len, unmap: *unmap };
                assert!(run(&mut *queue, &event, request(op, *at, Vec::new())));
                model[range(*at, usize::try_from(len).unwrap())].fill(0);
            }
            Act::Flush => {
                assert!(run(
                    &mut *queue,
                    &event,
                    request(Operation::Flush, 0, Vec::new())
                ));
            }
        }
    }
    let mut all = vec![0u8; model.len()];
    image.read_at(0, &mut all).unwrap();
    assert!(all == model, "content differs at the end");
    // What `allocated` leaves out reads as zeroes.
    let mut from = 0;
    while let Some(range) = image.allocated(from).unwrap() {
        let hole = usize::try_from(from).unwrap()..usize::try_from(range.start).unwrap();
        assert!(model[hole].iter().all(|&byte| byte == 0));
        from = range.end;
    }
    assert!(
        model[usize::try_from(from).unwrap()..]
            .iter()
            .all(|&byte| byte == 0)
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_request_on_a_direct_file(acts in prop::collection::vec(acts(), 1..30)) {
        let (_dir, image) = image(true, None);
        check_against_model(&image, &acts);
    }

    #[test]
    fn any_request_on_a_device_of_large_blocks(acts in prop::collection::vec(acts(), 1..30)) {
        let (_dir, image) = image(true, Some((4096, 4096)));
        check_against_model(&image, &acts);
    }

    #[test]
    fn any_request_through_the_page_cache(acts in prop::collection::vec(acts(), 1..30)) {
        let (_dir, image) = image(false, None);
        check_against_model(&image, &acts);
    }

    #[test]
    fn any_request_without_fallocate(acts in prop::collection::vec(acts(), 1..30)) {
        let (_dir, image) = image(true, Some((512, 4096)));
        // Only the zeroing by hand is left; discards do nothing, so leave them out.
        image.file.no_punch.store(true, std::sync::atomic::Ordering::Relaxed);
        image.file.no_zero_range.store(true, std::sync::atomic::Ordering::Relaxed);
        let acts: Vec<Act> =
            acts.into_iter().filter(|act| !matches!(act, Act::Discard { .. })).collect();
        check_against_model(&image, &acts);
    }
}

#[test]
fn sectors_of_one_block_written_at_once_from_several_queues_all_arrive() {
    let (_dir, image) = image(true, Some((4096, 4096)));
    let image: Arc<dyn Image> = Arc::new(image);
    let threads: Vec<_> = (0..4u8)
        .map(|thread| {
            let image = Arc::clone(&image);
            std::thread::spawn(move || {
                let event = Arc::new(Event::new().unwrap());
                let mut queue = image.open_queue(16, &event).unwrap();
                // Each thread owns two sectors of each of the first 16 blocks.
                let mut memory = vec![0u8; 16 * 2 * 512];
                for round in 0..20u8 {
                    memory.fill(round ^ (thread << 6));
                    for block in 0..16u64 {
                        for half in 0..2u64 {
                            let sector = block * 8 + u64::from(thread) * 2 + half;
                            let at = usize::try_from((block * 2 + half) * 512).unwrap();
                            let buffers = buffers(&mut memory, at, &[512]);
                            queue.submit(Request {
                                tag: sector,
                                op: Operation::Write,
                                offset: sector * 512,
                                buffers,
                            });
                        }
                    }
                    let mut left = 32;
                    while left > 0 {
                        queue.push().unwrap();
                        assert!(
                            event.wait(Duration::from_secs(10)),
                            "a blocked write was lost"
                        );
                        event.clear();
                        queue.reap(&mut |completion| {
                            completion.result.unwrap();
                            left -= 1;
                        });
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let mut all = vec![0u8; 16 * 4096];
    image.read_at(0, &mut all).unwrap();
    for (sector, bytes) in all.chunks(512).enumerate() {
        let thread = u8::try_from(sector % 8 / 2).unwrap();
        assert!(
            bytes.iter().all(|&byte| byte == 19 ^ (thread << 6)),
            "sector {sector}"
        );
    }
}

#[test]
fn a_request_with_more_vectors_than_the_kernel_takes() {
    let (_dir, image) = image(true, None);
    let event = Arc::new(Event::new().unwrap());
    let mut queue = image.open_queue(4, &event).unwrap();
    let mut memory = vec![0u8; 600 * 512];
    for (index, byte) in memory.iter_mut().enumerate() {
        *byte = u8::try_from(index / 512 % 256).unwrap();
    }
    let pieces = vec![128usize; 600 * 4];
    let request = |op, buffers| Request {
        tag: 1,
        op,
        offset: 0,
        buffers,
    };
    let all = buffers(&mut memory, 0, &pieces);
    assert!(run(&mut *queue, &event, request(Operation::Write, all)));
    let expected = memory.clone();
    memory.fill(0);
    let all = buffers(&mut memory, 0, &pieces);
    assert!(run(&mut *queue, &event, request(Operation::Read, all)));
    assert!(memory == expected);
}

#[test]
fn impossible_requests_come_back_with_their_reason() {
    let (_dir, image) = image(true, None);
    let mut io = Blocking::new(&image).unwrap();
    let mut data = [0u8; 512];
    for (offset, len) in [
        (SIZE, 512),
        (SIZE - 512, 1024),
        (u64::MAX - 511, 512),
        (1, 512),
    ] {
        let seen = io
            .operate(Operation::WriteZeroes { len, unmap: false }, offset)
            .unwrap_err();
        assert!(seen.is::<BadRequest>(), "{seen}");
    }
    assert!(io.read(SIZE, &mut data).unwrap_err().is::<BadRequest>());
    assert!(io.read(0, &mut data[..100]).unwrap_err().is::<BadRequest>());
    io.read(SIZE - 512, &mut data).unwrap();
}

#[test]
fn a_read_only_image_refuses_changes() {
    let (_dir, fd) = file(true, SIZE);
    let image = RawImage::from_fd(fd, "disk.raw", Access::ReadOnly).unwrap();
    let mut io = Blocking::new(&image).unwrap();
    assert!(io.write(0, &[1; 512]).unwrap_err().is::<ReadOnlyDisk>());
    assert!(
        io.operate(Operation::Discard { len: 512 }, 0)
            .unwrap_err()
            .is::<ReadOnlyDisk>()
    );
    io.operate(Operation::Flush, 0).unwrap();
}

#[test]
fn a_truncated_file_is_an_error_with_file_and_offset() {
    let (dir, fd) = file(true, SIZE);
    let image = RawImage::from_fd(fd, "disk.raw", Access::ReadWrite).unwrap();
    File::options()
        .write(true)
        .open(dir.path().join("disk.raw"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    let mut data = [0u8; 8192];
    let seen = Blocking::new(&image)
        .unwrap()
        .read(0, &mut data)
        .unwrap_err();
    assert!(seen.is::<ReadFailed>(), "{seen}");
    assert_eq!(seen.datum("path").unwrap(), "disk.raw");
    assert_eq!(seen.datum("errno").unwrap(), libc::EIO);
    assert!(image.read_at(0, &mut data).unwrap_err().is::<ReadFailed>());
}

#[test]
fn what_is_no_image_is_refused() {
    let refuse = |fd: OwnedFd| RawImage::from_fd(fd, "x", Access::ReadOnly).unwrap_err();
    assert!(refuse(File::open("/tmp").unwrap().into()).is::<NotAnImage>());
    assert!(refuse(File::open("/dev/null").unwrap().into()).is::<NotAnImage>());
    let (_dir, empty) = file(false, 0);
    assert!(refuse(empty).is::<NotAnImage>());
}

#[test]
fn a_removed_file_is_noticed() {
    let (dir, fd) = file(true, SIZE);
    let image = RawImage::from_fd(fd, "disk.raw", Access::ReadWrite).unwrap();
    assert!(!image.is_removed().unwrap());
    std::fs::remove_file(dir.path().join("disk.raw")).unwrap();
    assert!(image.is_removed().unwrap());
}

#[test]
fn dropping_a_queue_waits_for_what_is_in_flight() {
    let (_dir, image) = image(true, None);
    let mut memory = vec![7u8; 64 * 4096];
    for _ in 0..50 {
        let event = Arc::new(Event::new().unwrap());
        let mut queue = image.open_queue(64, &event).unwrap();
        for tag in 0..64u64 {
            let at = usize::try_from(tag).unwrap() * 4096;
            let buffers = buffers(&mut memory, at, &[4096]);
            queue.submit(Request {
                tag,
                op: Operation::Write,
                offset: tag * 4096,
                buffers,
            });
        }
        queue.push().unwrap();
        assert!(queue.in_flight() > 0);
    }
}
