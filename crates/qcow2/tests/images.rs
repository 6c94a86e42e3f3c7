//! Images against qemu-img: what we write it reads, what it writes we read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::{
    check, content, dir, make, open, open_as, pattern, peers, qemu_img, qemu_io, queue, read_all,
};
use strake_block::{Access, Image, Operation};
use strake_qcow2::{CreateOptions, Extent, ExtentKind, Format};

const MIB: u64 = 1024 * 1024;

#[test]
fn what_is_written_is_read_by_us_and_by_the_peer() {
    if !peers() {
        return;
    }
    let dir = dir();
    for bits in [12, 16, 21] {
        let path = dir.path().join(format!("{bits}.qcow2"));
        make(&path, &CreateOptions::new(96 * MIB).cluster_bits(bits));
        check(&path);
        let mut model = vec![0; usize::try_from(96 * MIB).unwrap()];
        {
            let image = open(&path);
            let mut queue = queue(&image);
            for (number, (offset, len)) in [
                (0usize, 4096usize),
                (512, 512),
                (65536 - 512, 1024),
                (3 * 1024 * 1024 + 1536, 5 * 1024 * 1024),
                (96 * 1024 * 1024 - 512, 512),
                (65536 * 40, 65536 * 3),
            ]
            .into_iter()
            .enumerate()
            {
                let data = pattern(number as u64 + 1, len);
                queue.write(offset as u64, &data).unwrap();
                model[offset..offset + len].copy_from_slice(&data);
            }
            queue
                .operate(
                    Operation::WriteZeroes {
                        len: 3 * MIB + 512,
                        unmap: true,
                    },
                    4 * MIB,
                )
                .unwrap();
            model[4 << 20..(7 << 20) + 512].fill(0);
            queue
                .operate(
                    Operation::WriteZeroes {
                        len: 65536,
                        unmap: false,
                    },
                    65536 * 41,
                )
                .unwrap();
            model[65536 * 41..65536 * 42].fill(0);
            queue.operate(Operation::Flush, 0).unwrap();
            assert!(read_all(&*image) == model, "{bits}: through read_at");
            let mut data = vec![1; model.len()];
            queue.read(0, &mut data).unwrap();
            assert!(data == model, "{bits}: through a queue");
        }
        check(&path);
        assert!(content(&path) == model, "{bits}: through qemu-img");
        let image = open_as(&path, Access::ReadOnly);
        assert!(read_all(&*image) == model, "{bits}: opened again");
    }
}

#[test]
fn a_discard_gives_space_back() {
    if !peers() {
        return;
    }
    let dir = dir();
    let path = dir.path().join("a.qcow2");
    make(&path, &CreateOptions::new(64 * MIB));
    {
        let image = open(&path);
        let mut queue = queue(&image);
        let data = pattern(9, 8 << 20);
        for _ in 0..6 {
            queue.write(0, &data).unwrap();
            queue.operate(Operation::Flush, 0).unwrap();
            queue
                .operate(Operation::Discard { len: 64 * MIB }, 0)
                .unwrap();
            queue.operate(Operation::Flush, 0).unwrap();
        }
        assert_eq!(image.allocated(0).unwrap(), None);
    }
    check(&path);
    let length = std::fs::metadata(&path).unwrap().len();
    assert!(length < 18 << 20, "the file has {length} bytes");
}

#[test]
fn images_of_the_peer_are_read_and_written() {
    if !peers() {
        return;
    }
    let dir = dir();
    let raw = dir.path().join("a.raw");
    let mut model = pattern(3, 20 << 20);
    model[1 << 20..9 << 20].fill(0);
    for (at, byte) in model[9 << 20..12 << 20].iter_mut().enumerate() {
        *byte = u8::try_from(at / 1000 % 7).unwrap();
    }
    std::fs::write(&raw, &model).unwrap();
    let raw = raw.to_str().unwrap();
    for options in [
        vec![],
        vec!["-c"],
        vec!["-o", "compat=0.10"],
        vec!["-o", "cluster_size=4k,refcount_bits=1"],
        vec!["-o", "cluster_size=2M,refcount_bits=64"],
        vec!["-c", "-o", "cluster_size=8k,refcount_bits=8"],
    ] {
        let path = dir.path().join("b.qcow2");
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend(&options);
        args.extend([raw, path.to_str().unwrap()]);
        assert_eq!(qemu_img(&args).0, 0);
        let mut model = model.clone();
        {
            let image = open_as(&path, Access::ReadOnly);
            assert!(read_all(&*image) == model, "{options:?}");
            let mut queue = queue(&image);
            let mut data = vec![0; model.len()];
            queue.read(0, &mut data).unwrap();
            assert!(data == model, "{options:?}: by a queue");
        }
        {
            let image = open(&path);
            let mut queue = queue(&image);
            for (number, offset) in (0..19 << 20).step_by(777 * 512).enumerate() {
                let data = pattern(number as u64, 1536);
                queue.write(offset as u64, &data).unwrap();
                model[offset..offset + 1536].copy_from_slice(&data);
            }
            queue
                .operate(
                    Operation::WriteZeroes {
                        len: MIB,
                        unmap: true,
                    },
                    15 * MIB,
                )
                .unwrap();
            model[15 << 20..16 << 20].fill(0);
            assert!(read_all(&*image) == model, "{options:?}: written");
        }
        check(&path);
        assert!(content(&path) == model, "{options:?}: written, by qemu-img");
    }
}

#[test]
fn snapshots_of_the_peer_stay_whole() {
    if !peers() {
        return;
    }
    let dir = dir();
    let path = dir.path().join("a.qcow2");
    make(&path, &CreateOptions::new(8 * MIB));
    qemu_io(&path, &["write -P 17 0 4M"]);
    assert_eq!(
        qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]).0,
        0
    );
    {
        let image = open(&path);
        let mut queue = queue(&image);
        queue.write(MIB, &pattern(1, 300 * 512)).unwrap();
        queue
            .operate(
                Operation::WriteZeroes {
                    len: MIB,
                    unmap: true,
                },
                2 * MIB,
            )
            .unwrap();
    }
    check(&path);
    assert_eq!(
        qemu_img(&["snapshot", "-a", "s", path.to_str().unwrap()]).0,
        0
    );
    check(&path);
    assert!(content(&path)[..4 << 20].iter().all(|byte| *byte == 17));
}

#[test]
fn an_overlay_reads_what_is_below() {
    if !peers() {
        return;
    }
    let dir = dir();
    let base = dir.path().join("base.raw");
    let mut model = pattern(5, (3 << 20) + 700);
    std::fs::write(&base, &model).unwrap();
    model.resize(6 << 20, 0);
    let middle = dir.path().join("middle.qcow2");
    make(
        &middle,
        &CreateOptions::new(5 * MIB)
            .backing("base.raw", Format::Raw)
            .cluster_bits(12),
    );
    let top = dir.path().join("top.qcow2");
    make(
        &top,
        &CreateOptions::new(6 * MIB).backing("middle.qcow2", Format::Qcow2),
    );
    {
        let image = open(&middle);
        let mut queue = queue(&image);
        let data = pattern(6, 4096 * 3);
        queue.write(4096 * 5 + 512, &data).unwrap();
        model[4096 * 5 + 512..][..4096 * 3].copy_from_slice(&data);
        queue
            .operate(
                Operation::WriteZeroes {
                    len: 8192,
                    unmap: true,
                },
                4096 * 100,
            )
            .unwrap();
        model[4096 * 100..4096 * 102].fill(0);
    }
    let image = open(&top);
    assert_eq!(image.depth(), 3);
    {
        let mut queue = queue(&image);
        let data = pattern(7, 512);
        queue.write(4096 * 100, &data).unwrap();
        model[4096 * 100..][..512].copy_from_slice(&data);
        queue
            .operate(
                Operation::WriteZeroes {
                    len: 512,
                    unmap: true,
                },
                1024,
            )
            .unwrap();
        model[1024..1536].fill(0);
        queue
            .operate(Operation::Discard { len: MIB }, 2 * MIB)
            .unwrap();
        model[2 << 20..3 << 20].fill(0);
        let mut data = vec![0; model.len()];
        queue.read(0, &mut data).unwrap();
        assert!(data == model);
        let zeroes = Extent {
            range: 2 * MIB..3 * MIB,
            kind: ExtentKind::Zeroes,
        };
        assert_eq!(image.extent_of_layer(0, MIB).unwrap(), Some(zeroes));
        let told = image.allocated(2 * MIB).unwrap().unwrap();
        assert_eq!(told.start, 3 * MIB);
    }
    assert!(read_all(&*image) == model);
    drop(image);
    check(&top);
    assert!(content(&top) == model);
}

#[test]
fn a_disk_grows() {
    if !peers() {
        return;
    }
    let dir = dir();
    let below = dir.path().join("below.qcow2");
    make(&below, &CreateOptions::new(4 * MIB));
    {
        let image = open(&below);
        queue(&image).write(0, &pattern(1, 4 << 20)).unwrap();
    }
    let path = dir.path().join("a.qcow2");
    make(
        &path,
        &CreateOptions::new(MIB + 512)
            .backing("below.qcow2", Format::Qcow2)
            .cluster_bits(12),
    );
    let mut model = pattern(1, (1 << 20) + 512);
    {
        let image = open(&path);
        let mut queue = queue(&image);
        queue.write(4096, &pattern(2, 512)).unwrap();
        model[4096..4096 + 512].copy_from_slice(&pattern(2, 512));
        // From one cluster of L1 to several, which have to move.
        image.grow(4096 * MIB).unwrap();
        queue.write(4000 * MIB, &pattern(3, 512)).unwrap();
        assert!(image.grow(MIB).is_err());
        assert_eq!(image.size(), 4096 * MIB);
    }
    check(&path);
    let image = Arc::clone(&open(&path));
    assert_eq!(image.size(), 4096 * MIB);
    let mut data = vec![1; 6 << 20];
    image.read_at(0, &mut data).unwrap();
    model.resize(6 << 20, 0);
    assert!(data == model);
    let mut data = vec![1; 512];
    image.read_at(4000 * MIB, &mut data).unwrap();
    assert!(data == pattern(3, 512));
}
