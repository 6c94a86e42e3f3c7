//! The lab: a real KVM host anywhere.
//!
//! Where `/dev/kvm` is missing, or cannot run a stock kernel at a usable speed, QEMU's software
//! emulation of an AMD processor with nested virtualisation gives a slow but complete one. It runs
//! Debian's own kernel with `kvm-amd`, gets the programs to be tested in its first file system,
//! and has three named ports to us (`control`, `output`, `files`) besides its console.
//!
//! One processor only: with two, a few runs in a hundred were lost to a hang of the emulation. A
//! lab that gives no sign of life is started once more; a command that fails or takes too long is
//! not, because that is what the command's owner must see.

mod image;
mod machine;
mod watch;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use strake_observe::{OsContext, Result};

pub(crate) use image::{busybox, write as write_archive};
pub(crate) use machine::STORES;

use crate::cpio::Tree;
use crate::observations::LabStalled;
use crate::{kernel, setup, workspace};

/// How often a lab that stalls is started, if its command gets on.
const STARTS: u32 = 4;

/// Where the command's output goes besides the log of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// To our own standard output as it comes.
    Stream,
    /// Only to the log.
    Quiet,
}

/// One command to be run in a lab of its own.
#[derive(Debug, Clone)]
pub struct LabCommand {
    /// The program and its arguments; looked up in the lab's PATH.
    pub words: Vec<String>,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// Host files and folders to bring in, and where to put them.
    pub files: Vec<(PathBuf, String)>,
    /// Raw images to attach as `/dev/disks/NAME`; what the lab writes to them is dropped.
    pub disks: Vec<(String, PathBuf)>,
    /// Where the lab's `/out` goes at the end.
    pub files_out: Option<PathBuf>,
    /// How many processors the lab has.
    pub cpus: u8,
    /// How long the command may take once the lab is up.
    pub timeout: Duration,
    /// Where its output goes.
    pub output: Output,
    /// Words to add when the lab stalled and is started once more, from what the command had
    /// printed by then: what is done need not be done again. Without it the command begins anew.
    pub resume: Option<fn(&str) -> Vec<String>>,
}

impl LabCommand {
    /// A command with nothing around it and ten minutes of time.
    #[must_use]
    pub fn new(words: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            words: words.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            files: Vec::new(),
            disks: Vec::new(),
            files_out: None,
            cpus: 1,
            timeout: Duration::from_secs(600),
            output: Output::Stream,
            resume: None,
        }
    }

    /// Runs it and returns its exit status.
    ///
    /// # Errors
    /// If the lab cannot be made, stalls too often, or the command does not end in time.
    pub fn run(&self) -> Result<i32> {
        let mut command = self.clone();
        let mut starts = 1;
        loop {
            let mut printed = String::new();
            let stalled = match command.run_once(&mut printed) {
                Err(seen) if seen.is::<LabStalled>() => seen,
                ended => return ended,
            };
            let done = self.resume.map_or_else(Vec::new, |resume| resume(&printed));
            // A command that came nowhere twice will come nowhere a third time.
            if starts == STARTS || (starts > 1 && done.is_empty()) {
                return Err(stalled);
            }
            eprintln!("lab: {}\nlab: starting it once more", stalled.text());
            command.words.extend(done);
            starts += 1;
        }
    }

    fn run_once(&self, printed: &mut String) -> Result<i32> {
        setup::require(&["qemu-system-x86_64", "mke2fs", "strip", "xz"])?;
        let (kernel, base) = {
            let _lock = workspace::CacheLock::take()?;
            let kernel = kernel::cloud()?;
            let base = image::base(&kernel)?;
            (kernel, base)
        };
        let folder = RunFolder::make()?;
        let archive = folder.path.join("lab.cpio");
        image::write(&self.own_files()?, &archive, Some(&base))?;
        let machine = machine::Machine::start(self, &kernel.image, &archive, &folder.path)?;
        let ended = watch::to_the_end(machine, self, &folder.path);
        let log = fs::read(folder.path.join("output.log")).unwrap_or_default();
        printed.push_str(&String::from_utf8_lossy(&log));
        let status = ended?;
        if let Some(out) = &self.files_out {
            fs::create_dir_all(out).os("mkdir", out.display())?;
            let tar = folder.path.join("files.tar");
            crate::tool::run(
                crate::tool::command("tar")
                    .arg("-x")
                    .arg("-f")
                    .arg(&tar)
                    .arg("-C")
                    .arg(out),
            )?;
        }
        Ok(status)
    }

    /// The archive of this run: the files asked for and the script that runs the command.
    fn own_files(&self) -> Result<Tree> {
        let mut tree = Tree::default();
        let mut words = self.words.clone();
        if let Some(program) = words.first_mut() {
            // A program of ours, named by its path here, is brought along.
            let path = PathBuf::from(&*program);
            let brought = self.files.iter().any(|(_, place)| place == program);
            if program.contains('/') && path.is_file() && !brought {
                let path = path.canonicalize().os("realpath", path.display())?;
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let place = format!("/lab/bin/{name}");
                image::add_file(&mut tree, &path, &place)?;
                *program = place;
            }
        }
        for (host, place) in &self.files {
            image::add_file(&mut tree, host, place)?;
        }
        let mut script = "#!/bin/sh\n".to_owned();
        script.push_str("export STRAKE_LAB=1\n");
        for (name, value) in &self.env {
            script.push_str(&format!("export {name}={}\n", quote(value)));
        }
        let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
        script.push_str(&format!("exec {}\n", words.join(" ")));
        tree.file("lab/run", 0o755, script);
        Ok(tree)
    }
}

/// A word as the shell reads it back.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The folder of one run. When it is dropped its logs become `target/lab/last` and its disks go.
#[derive(Debug)]
struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    fn make() -> Result<Self> {
        let lab = workspace::lab_dir()?;
        let path = (0..)
            .map(|number| lab.join(format!("run-{}-{number}", std::process::id())))
            .find(|path| !path.exists())
            .unwrap_or_else(|| lab.join("run"));
        fs::create_dir_all(&path).os("mkdir", path.display())?;
        Ok(Self { path })
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if entry
                .path()
                .extension()
                .is_none_or(|extension| extension != "log")
            {
                let _ = fs::remove_file(entry.path());
            }
        }
        let last = self.path.with_file_name("last");
        let _ = fs::remove_dir_all(&last);
        if fs::rename(&self.path, &last).is_err() {
            let _ = writeln!(
                std::io::stderr(),
                "lab: logs are in {}",
                self.path.display()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let word = "a 'b' $c \\ \"d\"";
        let output = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("printf %s {}", quote(word)))
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
    }
}
