//! What the tests of this folder share: images in a scratch folder, and the peer's tools.
#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use strake_block::{Access, Blocking, Image};
use strake_qcow2::{
    ChainPart, CreateOptions, FileStore, Format, Qcow2Image, create, open_chain, open_member,
    survey,
};

/// Whether qemu-img is there; its absence is a failure where peers are required.
pub fn peers() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        assert!(
            std::env::var_os("STRAKE_REQUIRE_PEERS").is_none_or(|it| it != "1"),
            "qemu-img is missing and STRAKE_REQUIRE_PEERS=1"
        );
        eprintln!("skipped: qemu-img is missing (Debian: qemu-utils)");
    }
    there
}

/// Runs qemu-img; gives its exit status and what it said.
pub fn qemu_img(args: &[&str]) -> (i32, String) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), text)
}

pub fn qemu_io(path: &Path, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.arg("-f").arg("qcow2").arg(path);
    for one in commands {
        command.args(["-c", one]);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !said.contains("error"), "{said}");
}

/// No errors and no leaks.
pub fn check(path: &Path) {
    let (status, said) = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert_eq!(status, 0, "{}: {said}", path.display());
}

/// Leaks are allowed, errors are not.
pub fn check_after_crash(path: &Path) {
    let (status, said) = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(status == 0 || status == 3, "{}: {said}", path.display());
}

/// The whole content as qemu-img reads it.
pub fn content(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("content");
    let (path, out) = (path.to_str().unwrap(), raw.to_str().unwrap());
    let (status, said) = qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path, out]);
    assert_eq!(status, 0, "{said}");
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

pub fn store(path: &Path, access: Access) -> FileStore {
    let flags = match access {
        Access::ReadOnly => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR | OFlags::CREATE,
    };
    let direct = std::env::var_os("STRAKE_QCOW2_BUFFERED").is_none();
    let mode = Mode::RUSR | Mode::WUSR;
    let fd = if direct {
        rustix::fs::open(path, flags | OFlags::DIRECT, mode)
            .or_else(|_| rustix::fs::open(path, flags, mode))
    } else {
        rustix::fs::open(path, flags, mode)
    };
    FileStore::from_fd(fd.unwrap(), path.display().to_string(), access).unwrap()
}

pub fn make(path: &Path, options: &CreateOptions) {
    create(&store(path, Access::ReadWrite), options).unwrap();
}

/// Opens a chain as daemon and monitor do together.
pub fn open(path: &Path) -> Arc<Qcow2Image> {
    open_as(path, Access::ReadWrite)
}

pub fn open_as(path: &Path, access: Access) -> Arc<Qcow2Image> {
    let members = survey(path, Format::Qcow2, &|_| true).unwrap();
    let parts = members
        .iter()
        .enumerate()
        .map(|(number, member)| {
            let access = if number == 0 {
                access
            } else {
                Access::ReadOnly
            };
            let fd = open_member(member, access, true).unwrap();
            let path = member.path.display().to_string();
            ChainPart {
                store: Arc::new(FileStore::from_fd(fd, path, access).unwrap()),
                format: member.format,
                access,
            }
        })
        .collect();
    open_chain(parts).unwrap()
}

pub fn queue(image: &Arc<Qcow2Image>) -> Blocking {
    Blocking::new(&**image).unwrap()
}

pub fn read_all(image: &dyn Image) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(0, &mut data).unwrap();
    data
}

pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(len + 8);
    while data.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend(state.to_le_bytes());
    }
    data.truncate(len);
    data
}

pub fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(std::env::var_os("STRAKE_TEST_DIR").map_or_else(
        // O_DIRECT: not on a tmpfs.
        || PathBuf::from("/var/tmp"),
        PathBuf::from,
    ))
    .unwrap()
}
