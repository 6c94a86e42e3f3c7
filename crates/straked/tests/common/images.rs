//! Images as other tools see them.

use std::process::Command;

use super::World;

/// What a disk reads as by its image and everything below it.
pub(crate) fn content(world: &World, image: &str, format: &str) -> Vec<u8> {
    let out = world.path("content");
    // Also while a monitor has it locked: what the guest flushed is there.
    qemu_img(&[
        "convert",
        "-U",
        "-f",
        format,
        "-O",
        "raw",
        image,
        out.to_str().unwrap(),
    ]);
    let bytes = std::fs::read(&out).unwrap();
    std::fs::remove_file(out).unwrap();
    bytes
}

/// Six bytes of a disk.
pub(crate) fn word(world: &World, image: &str, format: &str, at: usize) -> String {
    let bytes = content(world, image, format);
    String::from_utf8_lossy(&bytes[at..at + 6]).into_owned()
}

/// The tables are sound. While somebody writes it may have clusters that are counted too often.
pub(crate) fn check(image: &str) {
    qemu_img(&["check", "-U", "-f", "qcow2", image]);
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
