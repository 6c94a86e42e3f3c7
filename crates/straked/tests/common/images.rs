//! Images as other tools see them.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::World;

/// What a disk reads as by its image and everything below it in the same directory.
pub(crate) fn content(_world: &World, image: &str, format: &str) -> Vec<u8> {
    let (dir, image) = copied(image);
    let out = dir.path().join("content");
    let (image, to) = (image.to_str().unwrap(), out.to_str().unwrap());
    qemu_img(&["convert", "-f", format, "-O", "raw", image, to]);
    std::fs::read(&out).unwrap()
}

/// Six bytes of a disk.
pub(crate) fn word(world: &World, image: &str, format: &str, at: usize) -> String {
    let bytes = content(world, image, format);
    String::from_utf8_lossy(&bytes[at..at + 6]).into_owned()
}

/// The tables are sound. While somebody writes, clusters may be counted that are not used.
pub(crate) fn check(image: &str) {
    let (_dir, image) = copied(image);
    qemu_img(&["check", "-f", "qcow2", image.to_str().unwrap()]);
}

/// Other tools do not open what a monitor has locked, but a copy of it: what the guest flushed is
/// there.
fn copied(image: &str) -> (TempDir, PathBuf) {
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = Path::new(image);
    for entry in std::fs::read_dir(image.parent().unwrap()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let copy = dir.path().join(image.file_name().unwrap());
    (dir, copy)
}

pub(crate) fn qemu_img(args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let leaks_only = args.first() == Some(&"check") && out.status.code() == Some(3);
    assert!(
        out.status.success() || leaks_only,
        "qemu-img {args:?}: {text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    text
}
