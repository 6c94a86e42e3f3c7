//! Chains as a user's files make them, hostile ones too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;

use common::{dir, make, open, pattern, peers, qemu_img, queue, read_all, store};
use strake_block::{Access, Image};
use strake_qcow2::{Backing, CreateOptions, Format, Header, rebase, survey};

const MIB: u64 = 1024 * 1024;

fn refused(path: &Path, id: &str) {
    let seen = survey(path, Format::Qcow2, &|_| true).unwrap_err();
    assert!(seen.find(id).is_some(), "{id} expected: {seen:?}");
    assert!(!seen.text().is_empty() && !seen.remedy().is_empty());
}

#[test]
fn names_are_relative_to_the_image_that_has_them() {
    let dir = dir();
    std::fs::create_dir(dir.path().join("bases")).unwrap();
    let raw = dir.path().join("bases/raw");
    std::fs::write(&raw, pattern(1, 1 << 20)).unwrap();
    let base = dir.path().join("bases/base.qcow2");
    make(&base, &CreateOptions::new(MIB).backing("raw", Format::Raw));
    let top = dir.path().join("top.qcow2");
    make(
        &top,
        &CreateOptions::new(MIB).backing("bases/base.qcow2", Format::Qcow2),
    );
    let members = survey(&top, Format::Qcow2, &|_| true).unwrap();
    let paths: Vec<_> = members.iter().map(|member| member.path.clone()).collect();
    assert_eq!(paths, [top.clone(), base, raw]);
    assert_eq!(members[2].format, Format::Raw);
    assert!(read_all(&*open(&top)) == pattern(1, 1 << 20));
}

#[test]
fn a_loop_is_seen() {
    let dir = dir();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    make(&a, &CreateOptions::new(MIB).backing("b", Format::Qcow2));
    make(&b, &CreateOptions::new(MIB).backing("c", Format::Qcow2));
    refused(&a, "qcow2.backing-missing");
    symlink("a", dir.path().join("c")).unwrap();
    refused(&a, "qcow2.chain-loop");
}

#[test]
fn a_format_that_lies_or_is_not_named_is_refused() {
    let dir = dir();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, pattern(1, 1 << 20)).unwrap();
    refused(&raw, "qcow2.not-qcow2");
    let top = dir.path().join("top");
    make(&top, &CreateOptions::new(MIB).backing("raw", Format::Qcow2));
    refused(&top, "qcow2.not-qcow2");
    for (backing, format, id) in [
        ("raw", None, "qcow2.format-not-named"),
        ("raw", Some("vmdk"), "qcow2.unknown-format"),
        ("nbd://there/raw", Some("raw"), "qcow2.backing-not-a-path"),
        (
            "json:{\"driver\":\"nbd\"}",
            Some("raw"),
            "qcow2.backing-not-a-path",
        ),
        ("/dev/null", Some("raw"), "block.not-an-image"),
        (".", Some("raw"), "block.not-an-image"),
    ] {
        let backing = Backing {
            path: backing.to_owned(),
            format: format.map(str::to_owned),
        };
        rebase(&store(&top, Access::ReadWrite), Some(&backing)).unwrap();
        refused(&top, id);
    }
}

#[test]
fn a_guest_cannot_make_its_raw_disk_an_overlay() {
    let dir = dir();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, pattern(4, 1 << 20)).unwrap();
    // What a guest could write to its raw disk: the image of an overlay over a host's file.
    let disk = dir.path().join("disk.raw");
    make(
        &disk,
        &CreateOptions::new(MIB).backing("secret", Format::Raw),
    );
    let bytes = std::fs::read(&disk).unwrap();
    let top = dir.path().join("top");
    make(
        &top,
        &CreateOptions::new(MIB).backing("disk.raw", Format::Raw),
    );
    let members = survey(&top, Format::Qcow2, &|_| true).unwrap();
    assert_eq!(members.len(), 2);
    assert!(read_all(&*open(&top))[..65536] == bytes[..65536]);
}

#[test]
fn what_is_in_no_datastore_is_refused_through_links_too() {
    let dir = dir();
    let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(&outside, pattern(1, 1 << 20)).unwrap();
    symlink(&outside, inside.join("link")).unwrap();
    let top = inside.join("top");
    make(&top, &CreateOptions::new(MIB).backing("link", Format::Raw));
    let root = std::fs::canonicalize(&inside).unwrap();
    let seen = survey(&top, Format::Qcow2, &|path| path.starts_with(&root)).unwrap_err();
    assert_eq!(seen.id(), "qcow2.outside-of-datastores");
}

#[test]
fn a_chain_that_is_too_long_is_refused() {
    let dir = dir();
    make(&dir.path().join("0"), &CreateOptions::new(MIB));
    for number in 1..=64 {
        let below = (number - 1).to_string();
        let path = dir.path().join(number.to_string());
        make(
            &path,
            &CreateOptions::new(MIB).backing(below, Format::Qcow2),
        );
    }
    assert_eq!(
        survey(&dir.path().join("63"), Format::Qcow2, &|_| true)
            .unwrap()
            .len(),
        64
    );
    refused(&dir.path().join("64"), "qcow2.chain-too-long");
}

#[test]
fn the_header_is_rebased_as_the_peer_understands() {
    if !peers() {
        return;
    }
    let dir = dir();
    let base = dir.path().join("base");
    std::fs::write(&base, pattern(1, 1 << 20)).unwrap();
    for options in ["", "compat=0.10", "cluster_size=4k", "lazy_refcounts=on"] {
        let path = dir.path().join("a.qcow2");
        let text = path.to_str().unwrap();
        let size = ["1M"];
        let mut args = vec!["create", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.push(text);
        args.extend(size);
        assert_eq!(qemu_img(&args).0, 0);
        let long = "x/../".repeat(200) + "base";
        std::fs::create_dir_all(dir.path().join("x")).unwrap();
        for name in ["base", &long, "./base", "base"] {
            let backing = Backing {
                path: name.to_owned(),
                format: Some("raw".to_owned()),
            };
            rebase(&store(&path, Access::ReadWrite), Some(&backing)).unwrap();
            let (status, said) = qemu_img(&["info", "-f", "qcow2", text]);
            assert_eq!(status, 0, "{said}");
            assert!(
                said.contains(&format!("backing file: {name}")),
                "{options}: {said}"
            );
            assert!(said.contains("backing file format: raw"), "{said}");
            let header = Header::read(&store(&path, Access::ReadOnly)).unwrap();
            assert_eq!(header.backing(), Some(&backing));
            common::check(&path);
            assert!(common::content(&path) == pattern(1, 1 << 20));
        }
        rebase(&store(&path, Access::ReadWrite), None).unwrap();
        let (_, said) = qemu_img(&["info", "-f", "qcow2", text]);
        assert!(!said.contains("backing file"), "{said}");
        common::check(&path);
        assert!(common::content(&path).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn what_must_not_be_written_is_not() {
    if !peers() {
        return;
    }
    let dir = dir();
    let path = dir.path().join("a.qcow2");
    make(&path, &CreateOptions::new(MIB));
    let image = common::open_as(&path, Access::ReadOnly);
    assert!(queue(&image).write(0, &[1; 512]).is_err());
    // Marked as not closed.
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[79] |= 1;
    std::fs::write(&path, bytes).unwrap();
    let part = strake_qcow2::ChainPart {
        store: std::sync::Arc::new(store(&path, Access::ReadWrite)),
        format: Format::Qcow2,
        access: Access::ReadWrite,
    };
    let seen = strake_qcow2::open_chain(vec![part]).unwrap_err();
    assert_eq!(seen.id(), "qcow2.needs-repair");
    assert_eq!(common::open_as(&path, Access::ReadOnly).size(), MIB);
}
