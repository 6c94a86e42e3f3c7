//! Several queues in threads of their own, in the same clusters, while the chain is changed under
//! them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{check, content, dir, make, open, pattern, peers, queue, read_all};
use strake_block::{Access, Image, Operation};
use strake_qcow2::{
    Backing, ChainPart, Commit, CreateOptions, Format, Progress, Qcow2Image, Stream,
};

const SIZE: usize = 12 << 20;
const ZONE: usize = 2048;

/// Writes and reads its own zones, which lie between those of the others, and says what it left.
fn writer(
    image: &Arc<Qcow2Image>,
    number: usize,
    of: usize,
    stop: &AtomicBool,
) -> Vec<(usize, Vec<u8>)> {
    let mut queue = queue(image);
    let mut zones: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut random = number as u64 + 99;
    let mut next = move |below: usize| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(random >> 33).unwrap() % below
    };
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let zone = next(SIZE / ZONE / of) * of + number;
        let at = zone * ZONE;
        let len = (1 + next(ZONE / 512)) * 512;
        let known = zones.iter().position(|(zone, _)| *zone == at);
        let known = known.unwrap_or_else(|| {
            let mut data = vec![0; ZONE];
            image.read_at(at as u64, &mut data).unwrap();
            zones.push((at, data));
            zones.len() - 1
        });
        let model = &mut zones[known].1;
        let mut data = vec![0; ZONE];
        queue.read(at as u64, &mut data).unwrap();
        assert!(data == *model, "zone {zone} in round {round}");
        if next(5) == 0 {
            let zeroes = Operation::WriteZeroes {
                len: len as u64,
                unmap: next(2) == 0,
            };
            queue.operate(zeroes, at as u64).unwrap();
            model[..len].fill(0);
        } else {
            let data = pattern(round, len);
            queue.write(at as u64, &data).unwrap();
            model[..len].copy_from_slice(&data);
        }
        if next(60) == 0 {
            queue.operate(Operation::Flush, 0).unwrap();
        }
    }
    zones
}

#[test]
fn queues_do_not_disturb_each_other_nor_a_stream() {
    if !peers() {
        return;
    }
    for (bits, keep) in [(16, false), (12, true), (18, false)] {
        let dir = dir();
        let base = dir.path().join("base.raw");
        let mut below = pattern(1, SIZE);
        below[SIZE / 3..SIZE / 2].fill(0);
        std::fs::write(&base, &below).unwrap();
        let middle = dir.path().join("middle");
        make(
            &middle,
            &CreateOptions::new(SIZE as u64).backing("base.raw", Format::Raw),
        );
        {
            let image = open(&middle);
            let data = pattern(2, 1 << 20);
            queue(&image).write(3 << 20, &data).unwrap();
            below[3 << 20..4 << 20].copy_from_slice(&data);
        }
        let path = dir.path().join("top");
        let options = CreateOptions::new(SIZE as u64).cluster_bits(bits);
        make(&path, &options.backing("middle", Format::Qcow2));
        let image = open(&path);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3)
                .map(|number| {
                    let (image, stop) = (&image, &stop);
                    scope.spawn(move || writer(image, number, 3, stop))
                })
                .collect();
            std::thread::sleep(Duration::from_millis(200));
            let backing = Backing {
                path: "base.raw".to_owned(),
                format: Some("raw".to_owned()),
            };
            let base = keep.then_some((2, backing));
            let mut stream = Stream::new(Arc::clone(&image), base, 0).unwrap();
            let limit = Instant::now() + Duration::from_secs(60);
            while stream.step(1 << 20).unwrap() != Progress::Done {
                assert!(Instant::now() < limit, "the stream does not end");
            }
            assert_eq!(image.depth(), if keep { 2 } else { 1 });
            std::fs::remove_file(&middle).unwrap();
            std::thread::sleep(Duration::from_millis(200));
            stop.store(true, Ordering::Relaxed);
            for writer in writers {
                for (at, data) in writer.join().unwrap() {
                    below[at..at + ZONE].copy_from_slice(&data);
                }
            }
        });
        assert!(read_all(&*image) == below, "bits {bits}");
        drop(image);
        check(&path);
        assert!(content(&path) == below, "bits {bits}, by qemu-img");
    }
}

#[test]
fn a_disk_with_small_clusters_outgrows_its_tables() {
    if !peers() {
        return;
    }
    // The peer makes a refcount table of one cluster, which counts 2 MiB here.
    let dir = dir();
    let path = dir.path().join("a.qcow2");
    let text = path.to_str().unwrap();
    let options = "cluster_size=4k,refcount_bits=64";
    let made = common::qemu_img(&["create", "-f", "qcow2", "-o", options, text, "3G"]);
    assert_eq!(made.0, 0, "{}", made.1);
    let mut model = Vec::new();
    {
        let image = open(&path);
        let mut queue = queue(&image);
        for number in 0..1200u64 {
            let data = pattern(number, 1 << 20);
            queue.write(number * (5 << 19), &data).unwrap();
            if number % 100 == 99 {
                queue.operate(Operation::Flush, 0).unwrap();
            }
            if number % 50 == 0 {
                model.push((number * (5 << 19), data));
            }
        }
    }
    check(&path);
    let image = open(&path);
    for (at, data) in model {
        let mut now = vec![0; data.len()];
        image.read_at(at, &mut now).unwrap();
        assert!(now == data, "at {at}");
    }
}

/// A snapshot of a disk in use, and its consolidation while the guest goes on.
#[test]
fn a_snapshot_is_taken_and_consolidated_live() {
    if !peers() {
        return;
    }
    for (bits, compressed) in [(12, true), (16, false)] {
        let dir = dir();
        let path = |name: &str| dir.path().join(name);
        let part = |name: &str| ChainPart {
            store: Arc::new(common::store(&path(name), Access::ReadWrite)),
            format: Format::Qcow2,
            access: Access::ReadWrite,
        };
        let mut model: Vec<u8> = pattern(1, SIZE);
        for (at, byte) in model.iter_mut().enumerate() {
            *byte = if at % 4096 < 3000 { 5 } else { *byte };
        }
        std::fs::write(path("raw"), &model).unwrap();
        let (raw, base) = (path("raw"), path("base"));
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        if compressed {
            args.push("-c");
        }
        args.extend([raw.to_str().unwrap(), base.to_str().unwrap()]);
        assert_eq!(common::qemu_img(&args).0, 0);
        let overlay = |name: &str, below: &str| {
            let options = CreateOptions::new(SIZE as u64).cluster_bits(bits);
            make(&path(name), &options.backing(below, Format::Qcow2));
        };
        let run = |image: &Arc<Qcow2Image>, model: &mut Vec<u8>, meanwhile: &dyn Fn()| {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let writers: Vec<_> = (0..2)
                    .map(|number| {
                        let stop = &stop;
                        scope.spawn(move || writer(image, number, 2, stop))
                    })
                    .collect();
                std::thread::sleep(Duration::from_millis(100));
                meanwhile();
                std::thread::sleep(Duration::from_millis(100));
                stop.store(true, Ordering::Relaxed);
                for writer in writers {
                    for (at, data) in writer.join().unwrap() {
                        model[at..at + ZONE].copy_from_slice(&data);
                    }
                }
            });
        };
        overlay("one", "base");
        let one = open(&path("one"));
        run(&one, &mut model, &|| {});
        let then = model.clone();
        overlay("two", "one");
        let two = one.under(part("two")).unwrap();
        drop(one);
        run(&two, &mut model, &|| {
            // What the snapshot was is there still, and goes into the base now.
            assert!(read_all(&*two.lower(1).unwrap()) == then);
            two.reopen(2, part("base")).unwrap();
            let lower = two.lower(2).unwrap();
            let mut commit = Commit::new(Arc::clone(&two), 1, lower, 0).unwrap();
            while commit.step(1 << 20).unwrap() != Progress::Done {}
            drop(commit);
            let backing = Backing {
                path: "base".to_owned(),
                format: Some("qcow2".to_owned()),
            };
            two.remove_layer(1, &backing).unwrap();
            assert_eq!(two.depth(), 2);
            std::fs::remove_file(path("one")).unwrap();
        });
        assert!(read_all(&*two) == model);
        drop(two);
        for name in ["two", "base"] {
            check(&path(name));
        }
        assert!(content(&path("base")) == then);
        assert!(content(&path("two")) == model);
    }
}
