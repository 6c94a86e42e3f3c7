//! GRUB's `grub.cfg`.
//!
//! The file is a program in GRUB's own language, though a generated one: conditions on features,
//! an environment block with the entry to boot, functions for graphics, and the menu. Reading it
//! line by line takes the wrong entry as soon as something was saved as default. So its [`syntax`]
//! is parsed and what decides about the default entry is [`run`]: variables, `if`, `test`,
//! `load_env`, `source`, `search`, `menuentry`, `submenu`, `linux`, `initrd`. Everything else is
//! skipped as if it had succeeded or, in a condition, failed.

mod run;
mod syntax;

use std::collections::BTreeMap;

use strake_observe::Task;

use super::candidate::Candidate;
use super::volume::Volume;
use run::Run;

/// Where the file is, on a root file system or on a boot partition.
const DIRECTORIES: &[&str] = &["/boot/grub", "/boot/grub2", "/grub", "/grub2"];

/// Variables that are kept of an environment block, which has 1 KiB.
const MOST_VARIABLES: usize = 256;

/// The entries that the volume's `grub.cfg` shows, the default one first.
pub(super) fn candidates(volume: &Volume, task: &mut Task) -> Vec<Candidate> {
    for directory in DIRECTORIES {
        let path = format!("{directory}/grub.cfg");
        if let Some(Some(text)) = task.attempt(volume.text(&path)) {
            let files = |path: &str| volume.text(path).ok().flatten();
            return Run::new(directory, &files).menu(&text);
        }
    }
    Vec::new()
}

/// The environment block of the GRUB whose files are under `root`; empty if there is none.
pub(super) fn environment(
    volume: &Volume,
    root: &str,
    task: &mut Task,
) -> BTreeMap<String, String> {
    for name in ["grub2", "grub"] {
        if let Some(Some(text)) = task.attempt(volume.text(&format!("{root}/{name}/grubenv"))) {
            return variables(&text);
        }
    }
    BTreeMap::new()
}

fn variables(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .take(MOST_VARIABLES)
        .map(|(name, value)| (name.to_owned(), value.replace("\\\\", "\\")))
        .collect()
}

#[cfg(test)]
pub(crate) mod tests;
