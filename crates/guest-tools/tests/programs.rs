//! The programs as a test guest runs them: ended by `stop`, by a signal, and killed.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const STAMP: &str = env!("CARGO_BIN_EXE_strake-guest-stamp");
const ECHO: &str = env!("CARGO_BIN_EXE_strake-guest-echo");

fn disk(directory: &Path) -> PathBuf {
    let path = directory.join("disk.raw");
    File::create(&path).unwrap().set_len(16 << 20).unwrap();
    path
}

fn start(disk: &Path, options: &[&str]) -> Child {
    Command::new(STAMP)
        .arg(disk)
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn wait_for(child: &mut Child, word: &str) -> BufReader<std::process::ChildStdout> {
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(word) {
        line.clear();
        assert_ne!(out.read_line(&mut line).unwrap(), 0, "no '{word}'");
    }
    out
}

fn verify(disk: &Path) -> (bool, String) {
    let out = Command::new(STAMP)
        .arg("verify")
        .arg(disk)
        .output()
        .unwrap();
    (out.status.success(), String::from_utf8(out.stdout).unwrap())
}

#[test]
fn stop_and_sigterm_end_a_run_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let disk = disk(directory.path());
    for by_signal in [false, true] {
        let mut child = start(&disk, &["--threads", "2"]);
        let mut out = wait_for(&mut child, "stamp: writes=");
        if by_signal {
            let pid = child.id().to_string();
            Command::new("kill").arg(&pid).status().unwrap();
        } else {
            child.stdin.take().unwrap().write_all(b"stop\n").unwrap();
        }
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        assert!(child.wait().unwrap().success(), "{rest}");
        let last = rest.lines().last().unwrap();
        assert!(last.starts_with("stamp: ok sectors="), "{last}");
        assert!(last.contains(" writes="), "{last}");
        let (good, text) = verify(&disk);
        assert!(good && text.contains("map=complete"), "{text}");
    }
}

#[test]
fn a_killed_run_is_checked_by_its_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let disk = disk(directory.path());
    let mut child = start(&disk, &["--checkpoint", "1", "--seed", "77"]);
    let mut out = wait_for(&mut child, "stamp: writes=");
    let mut line = String::new();
    for _ in 0..2 {
        out.read_line(&mut line).unwrap();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let (good, text) = verify(&disk);
    assert!(good, "{text}");
    assert!(
        text.contains("map=checkpoint") && text.contains("run=0x4d"),
        "{text}"
    );

    // An image that lost what was flushed is found out.
    let file = File::options().write(true).open(&disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 1 << 20], 0).unwrap();
    let (good, text) = verify(&disk);
    assert!(
        !good && text.contains("stamp: BAD") && text.contains("lost"),
        "{text}"
    );
}

#[test]
fn wrong_use_is_said() {
    let nowhere = Path::new("/nonexistent/disk");
    let (good, text) = verify(nowhere);
    assert!(
        !good && text.starts_with("stamp: BAD /nonexistent/disk"),
        "{text}"
    );
    let out = Command::new(STAMP).arg("--help").output().unwrap();
    assert!(out.status.success() && out.stdout.starts_with(b"strake-guest-stamp"));
    let out = Command::new(ECHO).args(["client", "x"]).output().unwrap();
    assert!(!out.status.success());
}

#[test]
fn echo_server_and_client() {
    let mut server = Command::new(ECHO)
        .arg("127.0.0.1:0")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(server.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let address = line.trim().rsplit(' ').next().unwrap().to_owned();
    let client = Command::new(ECHO)
        .args(["client", &address, "1"])
        .output()
        .unwrap();
    let text = String::from_utf8(client.stdout).unwrap();
    assert!(client.status.success(), "{text}");
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("echo: ok n="), "{last}");
    server.kill().unwrap();
    server.wait().unwrap();
}
