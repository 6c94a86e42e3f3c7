//! Running other programs: what they print is kept and shown only if they fail.

use std::process::{Command, Output, Stdio};

use strake_observe::{OsContext, Result};

use crate::observations::ToolFailed;

/// How many lines of a failed program are repeated.
const TAIL_LINES: usize = 25;

/// Runs it to its end and returns its standard output.
///
/// # Errors
/// If it cannot be started or ends badly; the observation repeats its last lines.
pub fn run(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output = command.stdin(Stdio::null()).output().os("exec", &shown)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(ToolFailed {
        command: shown,
        status: output.status.to_string(),
        tail: words_of(&output),
    }
    .into())
}

/// Runs it with our own terminal, so that its progress is seen.
///
/// # Errors
/// If it cannot be started or ends badly.
pub fn run_visibly(command: &mut Command) -> Result<()> {
    let shown = show(command);
    let status = command.stdin(Stdio::null()).status().os("exec", &shown)?;
    if status.success() {
        return Ok(());
    }
    Err(ToolFailed {
        command: shown,
        status: status.to_string(),
        tail: "its output stands above".to_owned(),
    }
    .into())
}

/// Whether a program of this name is in the PATH or in one of the folders of the administrator.
#[must_use]
pub fn exists(name: &str) -> bool {
    path_of(name).is_some()
}

/// Where a program of this name is.
#[must_use]
pub fn path_of(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// A command by name, found even where the PATH lacks the administrator's folders.
#[must_use]
pub fn command(name: &str) -> Command {
    Command::new(path_of(name).unwrap_or_else(|| name.into()))
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

fn words_of(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    tail(&text, TAIL_LINES)
}

/// The last lines of a text.
#[must_use]
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all.get(from..).unwrap_or_default().join("\n")
}
