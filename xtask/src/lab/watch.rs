//! Watching a lab run: pass its output on, read its marks, and tell a stalled lab from a slow or
//! failed command.
//!
//! A thread copies the command's output to the log and to us; the caller's thread reads the
//! control port's file, which grows by `up`, `beat` (every three seconds), `ended N`, `exit N`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::ChildStdout;
use std::thread;
use std::time::{Duration, Instant};

use strake_observe::{OsContext, Result};

use super::machine::Machine;
use super::{LabCommand, Output};
use crate::observations::{LabStalled, LabTimedOut};
use crate::tool;

/// A good lab is up in 3 to 5 seconds; on a busy machine it takes several times as long.
const UP_WITHIN: Duration = Duration::from_secs(90);

/// Between two beats lie three seconds, more when guests starve the lab's one processor.
const BEAT_WITHIN: Duration = Duration::from_secs(120);

/// How often the control port's file is read.
const LOOK_EVERY: Duration = Duration::from_millis(30);

/// How many lines are repeated when something went wrong.
const TAIL_LINES: usize = 30;

pub(super) fn to_the_end(mut machine: Machine, of: &LabCommand, folder: &Path) -> Result<i32> {
    let output_log = folder.join("output.log");
    let log = File::create(&output_log).os("create", output_log.display())?;
    let copier = machine.output().map(|from| {
        let to = of.output;
        thread::spawn(move || copy_output(from, log, to))
    });
    let ended = watch(&mut machine, of, folder);
    drop(machine);
    if let Some(copier) = copier {
        let _ = copier.join();
    }
    ended
}

fn watch(machine: &mut Machine, of: &LabCommand, folder: &Path) -> Result<i32> {
    let control = folder.join("control.log");
    let started = Instant::now();
    let mut up_at = None;
    let mut marks = 0;
    let mut last_mark = started;
    loop {
        let gone = machine
            .child
            .try_wait()
            .os("waitpid", "qemu-system-x86_64")?
            .is_some();
        let text = fs::read_to_string(&control).unwrap_or_default();
        if let Some(status) = text.lines().find_map(|line| line.strip_prefix("exit ")) {
            wait_for_power_off(machine);
            return Ok(status.trim().parse().unwrap_or(1));
        }
        let count = text.lines().count();
        if count > marks {
            marks = count;
            last_mark = Instant::now();
            up_at.get_or_insert(last_mark);
        }
        let stage = stage(&text);
        let silent = last_mark.elapsed();
        let patience = if up_at.is_some() {
            BEAT_WITHIN
        } else {
            UP_WITHIN
        };
        if gone || silent > patience {
            let mut console = read_lossy(&folder.join("console.log"));
            console.push_str(&read_lossy(&folder.join("qemu.log")));
            return Err(LabStalled {
                stage: if gone {
                    format!("{stage}, then it ended")
                } else {
                    stage.to_owned()
                },
                silent_s: silent.as_secs(),
                console: tool::tail(&console, TAIL_LINES),
            }
            .into());
        }
        if up_at.is_some_and(|up_at| up_at.elapsed() > of.timeout) {
            return Err(LabTimedOut {
                limit_s: of.timeout.as_secs(),
                stage: stage.to_owned(),
                output: tool::tail(&read_lossy(&folder.join("output.log")), TAIL_LINES),
            }
            .into());
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn stage(marks: &str) -> &'static str {
    if marks.contains("ended") {
        "bringing files out"
    } else if marks.contains("up") {
        "running the command"
    } else {
        "booting the lab"
    }
}

/// The lab powers off by itself, which says that nothing is left in its ports.
fn wait_for_power_off(machine: &mut Machine) {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(10) {
        if !matches!(machine.child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn copy_output(mut from: ChildStdout, mut log: File, to: Output) {
    let mut buffer = [0; 8192];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = buffer.get(..count).unwrap_or_default();
        let _ = log.write_all(bytes);
        if to == Output::Stream {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        }
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
