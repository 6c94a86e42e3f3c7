//! Images and datastores on a real file system.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use strake_api::image::ImageFormat;

use super::identity::FileIdentity;
use super::image::{self, Mode};
use super::location::Binding;
use super::removal::{self, Claim, Removal};
use super::store;

fn raw(path: &Path) -> Binding {
    Binding::new(path, ImageFormat::Raw)
}

fn nobody() -> String {
    "somebody".to_owned()
}

#[test]
fn an_image_is_created_exactly_once_and_of_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    let held = image::create(&raw(&path), 1 << 20).unwrap();
    let looks = image::look(&path).unwrap().unwrap();
    assert_eq!(
        (looks.size, looks.allocated, looks.regular),
        (1 << 20, 0, true)
    );
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let seen = image::create(&raw(&path), 1 << 20).unwrap_err();
    assert_eq!(seen.id(), "host.image-not-created");
    assert!(
        path.exists(),
        "the failed creation must not remove what was there"
    );
    // The descriptor holds the lock.
    let seen = image::open(&path, Mode::Read, nobody).unwrap_err();
    assert_eq!(seen.id(), "host.image-in-use");
    assert!(seen.text().contains("somebody"));
    drop(held);
    image::open(&path, Mode::Write, nobody).unwrap();
}

#[test]
fn readers_share_and_writers_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    drop(image::create(&raw(&path), 4096).unwrap());
    let first = image::open(&path, Mode::Read, nobody).unwrap();
    let second = image::open(&path, Mode::Read, nobody).unwrap();
    assert_eq!(
        image::open(&path, Mode::Write, nobody).unwrap_err().id(),
        "host.image-in-use"
    );
    drop((first, second));
    image::open(&path, Mode::Write, nobody).unwrap();
}

#[test]
fn what_is_no_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd");
    fs::write(&odd, [0; 1000]).unwrap();
    for path in [&odd, dir.path(), &dir.path().join("missing")] {
        let seen = image::open(path, Mode::Write, nobody).unwrap_err();
        assert_eq!(seen.id(), "host.image-refused", "{seen}");
    }
    assert!(image::look(&dir.path().join("missing")).unwrap().is_none());
}

#[test]
fn a_size_that_the_file_system_cannot_hold_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge.raw");
    let seen = image::create(&raw(&path), 1 << 62).unwrap_err();
    // ext4 says EFBIG; other file systems may hold any size, and then fail otherwise.
    assert!(seen.find("os.call-failed").is_some(), "{seen}");
    assert!(!path.exists());
}

#[test]
fn two_names_of_one_image_look_alike() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real");
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, dir.path().join("link")).unwrap();
    for name in ["there", "missing"] {
        let _ = fs::write(real.join("there"), b"");
        assert_eq!(
            image::canonical(&dir.path().join("link").join(name)).unwrap(),
            fs::canonicalize(&real).unwrap().join(name)
        );
    }
    assert!(image::canonical(&dir.path().join("no/such")).is_err());
}

#[test]
fn a_datastore_is_a_reachable_directory_with_room() {
    let dir = tempfile::tempdir().unwrap();
    let path = store::admit("fast", dir.path().to_str().unwrap()).unwrap();
    assert!(store::room("fast", &path).unwrap().free > 0);
    store::require_room("fast", &path, 0).unwrap();
    let seen = store::require_room("fast", &path, u64::MAX).unwrap_err();
    assert_eq!(seen.id(), "host.datastore-full");
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    for wrong in ["relative", "/no/such/directory", file.to_str().unwrap()] {
        assert_eq!(
            store::admit("fast", wrong).unwrap_err().id(),
            "host.datastore-refused"
        );
    }
    let seen = store::room("gone", &dir.path().join("gone")).unwrap_err();
    assert_eq!(seen.id(), "host.datastore-unavailable");
}

#[test]
fn only_the_file_that_is_meant_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    let meant = image::create(&raw(&path), 4096).unwrap().identity;
    // Removed and made again: often with the same inode number.
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"precious").unwrap();
    for claim in [Claim::Unused, Claim::Ours] {
        let found = removal::remove(&path, &meant, claim).unwrap();
        assert_eq!(found, Removal::Another);
    }
    let seen = image::remove(&path, Some(&meant), "a test").unwrap_err();
    assert_eq!(seen.id(), "host.not-removed");
    assert!(seen.find("host.image-refused").is_some());
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    let now = FileIdentity::at(&path).unwrap().unwrap();
    assert_eq!(
        removal::remove(&path, &now, Claim::Unused).unwrap(),
        Removal::Gone
    );
    assert!(!path.exists());
    assert_eq!(
        removal::remove(&path, &now, Claim::Unused).unwrap(),
        Removal::Gone
    );
}

#[test]
fn an_image_that_somebody_uses_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    let made = image::create(&raw(&path), 4096).unwrap();
    let seen = image::remove(&path, Some(&made.identity), "a test").unwrap_err();
    assert!(seen.find("host.image-in-use").is_some(), "{seen}");
    let seen = removal::remove_stale(&path).unwrap_err();
    assert_eq!(seen.id(), "host.image-in-use");
    assert!(path.exists());
    drop(made.fd);
    image::remove(&path, Some(&made.identity), "a test").unwrap();
    assert!(!path.exists());
}
