use std::io::Write;
use std::os::unix::fs::FileExt;

use strake_observe::Kind;

use super::*;
use crate::observations::SwapOfAnother;

fn owner(name: &str, id: u8) -> Owner {
    Owner {
        name: name.to_owned(),
        uuid: [id; 16],
    }
}

fn open(path: &std::path::Path, owner: &Owner) -> Result<SwapFile> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    SwapFile::open(file.into(), "s", owner, 8 << 20, Provision::Grown)
}

#[test]
fn the_file_of_another_vm_is_refused_and_stays_as_it_is() {
    let file = tempfile::NamedTempFile::new().unwrap();
    drop(open(file.path(), &owner("a", 1)).unwrap());
    let before = std::fs::read(file.path()).unwrap();
    for other in [owner("b", 2), owner("a", 2), owner("b", 1)] {
        let seen = open(file.path(), &other).unwrap_err();
        assert_eq!(seen.id(), SwapOfAnother::ID);
    }
    assert!(std::fs::read(file.path()).unwrap() == before);
    drop(open(file.path(), &owner("a", 1)).unwrap());
}

#[test]
fn whatever_else_is_refused_and_stays_as_it_is() {
    for content in [b"notes".to_vec(), vec![0; 4096], vec![7; 9000]] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&content).unwrap();
        let seen = open(file.path(), &owner("a", 1)).unwrap_err();
        assert_eq!(seen.id(), NotASwapFile::ID);
        assert!(std::fs::read(file.path()).unwrap() == content);
    }
}

#[test]
fn two_monitors_cannot_have_it_at_once() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let first = open(file.path(), &owner("a", 1)).unwrap();
    let seen = open(file.path(), &owner("a", 1)).unwrap_err();
    assert_eq!(seen.id(), SwapBusy::ID);
    drop(first);
    open(file.path(), &owner("a", 1)).unwrap();
}

#[test]
fn nothing_of_an_earlier_run_stays() {
    let file = tempfile::NamedTempFile::new().unwrap();
    drop(open(file.path(), &owner("a", 1)).unwrap());
    file.as_file()
        .write_all_at(b"secret", DATA_START + 4096)
        .unwrap();
    drop(open(file.path(), &owner("a", 1)).unwrap());
    let content = std::fs::read(file.path()).unwrap();
    assert!(content[4096..].iter().all(|byte| *byte == 0));
    let (found, bytes) = SwapFile::identify(file.as_file(), "s").unwrap();
    assert_eq!((found, bytes), (owner("a", 1), 8 << 20));
}

#[test]
fn a_preallocated_file_has_its_room_at_once() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let fd = file.reopen().unwrap();
    let swap = SwapFile::open(
        fd.into(),
        "s",
        &owner("a", 1),
        8 << 20,
        Provision::Preallocated,
    )
    .unwrap();
    let blocks = fstat(&**swap.fd()).unwrap().st_blocks;
    assert!(blocks * 512 >= 8 << 20);
}
