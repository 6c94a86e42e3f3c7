//! One part of a long run: a command whose whole output goes to a log while its marks are shown,
//! and that ends with a count of what passed and failed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use strake_observe::{OsContext, Result};

use crate::{tool, workspace};

/// How much of a failed part's log is repeated.
const TAIL_LINES: usize = 60;

/// How many things passed and failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Those that passed.
    pub passed: u64,
    /// Those that failed.
    pub failed: u64,
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// How a part ended.
#[derive(Debug)]
pub struct Ended {
    /// Its name.
    pub name: String,
    /// What it counted.
    pub count: Count,
    /// How long it took.
    pub took: Duration,
}

/// A part that is about to run.
#[derive(Debug)]
pub struct Part {
    /// Names its log, and stands before each of its lines.
    pub name: String,
    /// What it runs.
    pub command: Command,
}

impl Part {
    /// A part by its name.
    pub fn new(name: impl Into<String>, command: Command) -> Self {
        Self {
            name: name.into(),
            command,
        }
    }

    /// Runs it to its end. That it failed is no error but a count; what went wrong is printed.
    ///
    /// # Errors
    /// If it cannot be started or its log cannot be written.
    pub fn run(mut self) -> Result<Ended> {
        let started = Instant::now();
        let path = log_path(&self.name)?;
        let mut log = File::create(&path).os("create", path.display())?;
        let (ours, theirs) = std::io::pipe().os("pipe", &self.name)?;
        let again = theirs.try_clone().os("dup", &self.name)?;
        let program = self.command.get_program().to_string_lossy().into_owned();
        self.command
            .stdin(Stdio::null())
            .stdout(OwnedFd::from(theirs))
            .stderr(OwnedFd::from(again));
        let mut child = self.command.spawn().os("exec", &program)?;
        // The command holds the pipe's other end, which shall close with the program.
        drop(self.command);
        let mut count = Count::default();
        let mut current = String::new();
        for line in BufReader::new(ours).split(b'\n') {
            let line = line.os("read", &self.name)?;
            let line = String::from_utf8_lossy(&line);
            writeln!(log, "{line}").os("write", path.display())?;
            count += counted(&line);
            if let Some(program) = program_of(&line) {
                current = program.to_owned();
            } else if is_mark(&line) {
                println!("{}: {line}", self.name);
            } else if line.starts_with("test result: ") && counted(&line) != Count::default() {
                println!("{}: {current}: {line}", self.name);
            }
        }
        let status = child.wait().os("wait", &program)?;
        if !status.success() {
            // What ended before it could count is one failure.
            count.failed = count.failed.max(1);
            let text = fs::read(&path).os("read", path.display())?;
            println!(
                "{}: FAILED ({status}); the end of {}:\n{}",
                self.name,
                path.display(),
                tool::tail(&String::from_utf8_lossy(&text), TAIL_LINES)
            );
        } else if count == Count::default() {
            count.passed = 1;
        }
        Ok(Ended {
            name: self.name,
            count,
            took: started.elapsed(),
        })
    }
}

fn log_path(name: &str) -> Result<PathBuf> {
    let dir = workspace::root().join("target/test-logs");
    fs::create_dir_all(&dir).os("mkdir", dir.display())?;
    Ok(dir.join(format!("{}.log", name.replace(' ', "-"))))
}

/// What a line says was counted: cargo's test programs and our own runner each end with one.
fn counted(line: &str) -> Count {
    let number = |word: &str| {
        let (before, _) = line.split_once(word)?;
        before.split_whitespace().last()?.parse().ok()
    };
    let of_cargo = line.starts_with("test result: ");
    let of_ours = line.ends_with(" failed") && line.contains(" passed, ");
    if !of_cargo && !of_ours {
        return Count::default();
    }
    Count {
        passed: number(" passed").unwrap_or(0),
        failed: number(" failed").unwrap_or(0),
    }
}

/// The test program that a line of cargo announces, as `strake_block` or `data_path`.
fn program_of(line: &str) -> Option<&str> {
    let line = line.trim_start();
    if let Some(package) = line.strip_prefix("Doc-tests ") {
        return Some(package);
    }
    let (_, path) = line.strip_prefix("Running ")?.split_once(" (")?;
    let name = path.trim_end_matches(')').rsplit('/').next()?;
    name.rsplit_once('-').map(|(name, _hash)| name)
}

/// Whether a line is shown while it runs: one for each of the large tests, and all that failed.
fn is_mark(line: &str) -> bool {
    let of_runner = line.starts_with("test ") && line.ends_with(" s)");
    let of_one = !line.starts_with("test result: ") && line.contains("FAILED");
    of_runner || of_one || line.starts_with("lab: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_closing_lines_are_counted() {
        let count = |passed, failed| Count { passed, failed };
        assert_eq!(
            counted("test result: ok. 52 passed; 0 failed; 3 ignored; 0 measured; finished in 1s"),
            count(52, 0)
        );
        assert_eq!(
            counted("test result: FAILED. 5 passed; 2 failed; 0 ignored"),
            count(5, 2)
        );
        assert_eq!(counted("24 passed, 1 failed"), count(24, 1));
        assert_eq!(counted("test three_passed_one_failed ... ok"), count(0, 0));
    }

    #[test]
    fn cargo_says_which_program_it_runs() {
        assert_eq!(
            program_of("     Running tests/data_path.rs (target/debug/deps/data_path-1f)"),
            Some("data_path")
        );
        assert_eq!(program_of("   Doc-tests strake_api"), Some("strake_api"));
        assert_eq!(program_of("test a ... ok"), None);
    }

    #[test]
    fn a_part_that_dies_counts_as_failed_and_a_silent_one_as_passed() {
        let run = |script: &str| {
            let mut command = Command::new("sh");
            command.arg("-c").arg(script);
            let name = format!("self-test {}", std::process::id());
            let ended = Part::new(&name, command).run().unwrap();
            fs::remove_file(log_path(&name).unwrap()).unwrap();
            ended.count
        };
        let count = |passed, failed| Count { passed, failed };
        assert_eq!(run("true"), count(1, 0));
        assert_eq!(run("kill -9 $$"), count(0, 1));
        assert_eq!(run("echo '7 passed, 2 failed'; exit 1"), count(7, 2));
        assert_eq!(run("echo '7 passed, 0 failed'; exit 1"), count(7, 1));
    }
}
