//! Runs the tests one after another, each in a process of its own, and counts.
//!
//! ```text
//! strake-system-tests            this process: chooses, waits, counts
//!   └─ strake-system-tests --one NAME      one test; killed at its limit
//!        ├─ strake …                       clients
//!        └─ straked ── strake-vmm          left behind? they become ours, and are ended
//! ```
//!
//! A test that hangs is a failed test and nothing more: this process is the reaper of everything
//! that its tests start, so whatever outlives one is found and killed before the next begins.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, WaitOptions, getpid, set_child_subreaper, wait};

use crate::failure::{Failure, Outcome, While};
use crate::process::signal_pid;
use crate::{host, place};

/// How long one test may take. The longest takes a quarter of it in the lab on an idle machine.
const LIMIT: Duration = Duration::from_secs(900);

/// How long the kernel may take to end what a test left behind.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// A test: its name and what it does. The name also names its folders.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// Short, of letters, digits and dashes.
    pub name: &'static str,
    /// Does it.
    pub run: fn(&str) -> Outcome,
}

/// The tests that ended in an earlier run, which this one goes on with.
#[derive(Debug, Clone, Default)]
pub struct Before {
    /// Those that passed.
    pub passed: Vec<String>,
    /// Those that did not.
    pub failed: Vec<String>,
}

impl Before {
    fn has(&self, test: &Test) -> bool {
        let named = |names: &[String]| names.iter().any(|name| name == test.name);
        named(&self.passed) || named(&self.failed)
    }
}

/// Runs the tests whose names contain one of the words (all if there are none) and says how it
/// went, with those that ended before. Returns how many failed.
#[must_use]
pub fn run(tests: &[Test], words: &[String], before: &Before) -> usize {
    // Without it a hanging test's daemon would live on; nothing else depends on it.
    let _ = set_child_subreaper(Some(getpid()));
    let chosen: Vec<&Test> = tests
        .iter()
        .filter(|test| words.is_empty() || words.iter().any(|word| test.name.contains(word)))
        .filter(|test| !before.has(test))
        .collect();
    let begun = Instant::now();
    let mut failed: Vec<&str> = before.failed.iter().map(String::as_str).collect();
    for test in &chosen {
        print!("test {} ... ", test.name);
        let _ = std::io::stdout().flush();
        let started = Instant::now();
        let ended = in_a_process(test);
        end_what_is_left();
        let took = started.elapsed().as_secs_f64();
        match ended {
            Ok(()) => println!("ok ({took:.1} s)"),
            Err(failure) => {
                println!("FAILED ({took:.1} s)\n{failure}");
                failed.push(test.name);
            }
        }
    }
    for name in &failed {
        println!("failed: {name}");
    }
    println!("in {:.0} s", begun.elapsed().as_secs_f64());
    println!(
        "{} passed, {} failed",
        chosen.len() + before.passed.len() + before.failed.len() - failed.len(),
        failed.len()
    );
    failed.len()
}

/// Runs one test in this process, and prints why it failed. Returns whether it passed.
#[must_use]
pub fn one(tests: &[Test], name: &str) -> bool {
    let ended = match tests.iter().find(|test| test.name == name) {
        Some(test) => (test.run)(name),
        None => Err(Failure::new(format!("there is no test '{name}'"))),
    };
    let Err(failure) = ended else {
        return true;
    };
    println!("{failure}\n{}", host::logs_of_ended());
    false
}

fn in_a_process(test: &Test) -> Outcome {
    let output = place::at(&format!("/tmp/strake-{}.out", test.name));
    if let Some(folder) = output.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = File::create(&output).doing("making the test's output file")?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--one", test.name])
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .doing("starting the test")?;
    let ended = to_its_end(test, &mut child);
    let said = String::from_utf8_lossy(&fs::read(&output).unwrap_or_default()).into_owned();
    let _ = fs::remove_file(&output);
    ended.map_err(|failure| Failure::new(format!("{said}{failure}")))
}

fn to_its_end(test: &Test, child: &mut Child) -> Outcome {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return match status.code() {
                Some(0) => Ok(()),
                Some(_) => Err(Failure::new("")),
                None => Err(Failure::new(format!(
                    "the test's process ended by {status}"
                ))),
            };
        }
        if started.elapsed() > LIMIT {
            let left = Left::look().shown();
            let _ = child.kill();
            let _ = child.wait();
            end_what_is_left();
            let logs = host::take_away(test.name);
            return Err(Failure::new(format!(
                "the test hangs: it has not ended within {} s. Its processes:\n{left}{logs}",
                LIMIT.as_secs()
            )));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Kills what the last test left behind: with each that ends, its children become ours.
fn end_what_is_left() {
    let started = Instant::now();
    while started.elapsed() < ENDS_WITHIN {
        let left = Left::look();
        if left.0.is_empty() {
            return;
        }
        for pid in left.0.keys() {
            signal_pid(*pid, Signal::KILL);
        }
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        thread::sleep(Duration::from_millis(20));
    }
}

/// Every process that descends from this one, with its parent.
struct Left(BTreeMap<u32, u32>);

impl Left {
    fn look() -> Self {
        let parents: BTreeMap<u32, u32> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
                let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
                Some((pid, parent.parse().ok()?))
            })
            .collect();
        let ours = std::process::id();
        let descends = |mut pid: u32| {
            while let Some(parent) = parents.get(&pid) {
                if *parent == ours {
                    return true;
                }
                pid = *parent;
            }
            false
        };
        Self(
            parents
                .iter()
                .filter(|(pid, _)| descends(**pid))
                .map(|(pid, parent)| (*pid, *parent))
                .collect(),
        )
    }

    /// One line for each process and for each of its threads, with what it waits for.
    fn shown(&self) -> String {
        let mut lines = String::new();
        for (pid, parent) in &self.0 {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).replace('\0', " ");
            lines.push_str(&format!("  {pid} (of {parent}) {words}\n"));
            let threads = fs::read_dir(format!("/proc/{pid}/task"));
            for thread in threads.into_iter().flatten().flatten() {
                let read = |what: &str| {
                    fs::read_to_string(thread.path().join(what))
                        .unwrap_or_default()
                        .trim()
                        .to_owned()
                };
                lines.push_str(&format!(
                    "    {} waits in {}\n",
                    read("comm"),
                    read("wchan")
                ));
            }
        }
        lines
    }
}
