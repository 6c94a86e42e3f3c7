//! Dynamically linked programs of the host, put into a tree with the libraries that they need.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use strake_observe::{OsContext, Result};

use crate::cpio::Tree;
use crate::tool;

/// Adds a program at `place`, and its libraries where the program will look for them.
///
/// Debug information is left out: the lab would have to unpack it into its memory.
///
/// # Errors
/// If it cannot be read.
pub fn add(tree: &mut Tree, program: &Path, place: &str) -> Result<()> {
    tree.file(place, 0o755, stripped(program)?);
    for library in libraries(program) {
        let place = library.to_string_lossy().into_owned();
        if !tree.contains(&place) {
            let content = fs::read(&library).os("read", library.display())?;
            tree.file(&place, 0o755, content);
        }
    }
    Ok(())
}

/// Whether the file is an ELF program.
#[must_use]
pub fn is_elf(file: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    fs::File::open(file)
        .and_then(|mut file| file.read_exact(&mut magic))
        .is_ok()
        && magic == *b"\x7fELF"
}

fn stripped(program: &Path) -> Result<Vec<u8>> {
    let whole = || fs::read(program).os("read", program.display());
    let out = crate::workspace::lab_dir()?.join(format!(".strip.{}", std::process::id()));
    let done = tool::run(
        tool::command("strip")
            .arg("--strip-debug")
            .arg("-o")
            .arg(&out)
            .arg(program),
    );
    let content = match done {
        Ok(_) => fs::read(&out).os("read", out.display()),
        Err(_) => whole(),
    };
    let _ = fs::remove_file(&out);
    content
}

/// What the loader would load. A static program needs nothing, and `ldd` fails on it.
fn libraries(program: &Path) -> BTreeSet<PathBuf> {
    let text = tool::run(tool::command("ldd").arg(program)).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once("=> ").map_or(line, |(_, right)| right);
            let path = path.split(" (").next()?.trim();
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}
