//! The daemon's directories: can they be written, how much space is there, do they do direct I/O.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::statvfs;
use strake_observe::{Because, Observation, OsContext, Result};

use super::observations::{LittleSpace, NoDirectIo, NotWritable};
use super::{Check, Need};
use crate::units;

/// Below this much a first image hardly fits.
const LITTLE: u64 = 2 << 30;

pub(super) fn checks(state_dir: &Path) -> Vec<Check> {
    let directory = existing(state_dir);
    vec![
        Check::of("disk space", Need::Useful, space(&directory)),
        Check::of(
            "state directory",
            Need::Useful,
            writable(state_dir, &directory),
        ),
        Check::of("direct I/O", Need::Useful, direct(&directory)),
    ]
}

/// The directory, or the nearest one above it that exists: the daemon creates the rest.
pub(super) fn existing(directory: &Path) -> PathBuf {
    directory
        .ancestors()
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

fn space(directory: &Path) -> Result<String> {
    let shown = directory.display().to_string();
    let fs = statvfs(directory).os("statvfs", &shown)?;
    let free = fs.f_bavail.saturating_mul(fs.f_frsize);
    if free < LITTLE {
        return Err(LittleSpace {
            directory: shown,
            free_bytes: free,
            free: units::bytes(free),
        }
        .into());
    }
    Ok(format!("{} free at {shown}", units::bytes(free)))
}

fn writable(wanted: &Path, directory: &Path) -> Result<String> {
    let shown = directory.display().to_string();
    unnamed(directory, 0)
        .os("create a file", &shown)
        .because_of(|| NotWritable {
            directory: shown.clone(),
        })?;
    if wanted == directory {
        Ok(format!("{shown} can be written"))
    } else {
        Ok(format!("{} can be created", wanted.display()))
    }
}

fn direct(directory: &Path) -> Result<String> {
    const BLOCK: usize = 4096;
    let shown = directory.display().to_string();
    let own = || NoDirectIo {
        directory: shown.clone(),
    };
    let mut file = match unnamed(directory, libc::O_DIRECT) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            return Err(error).os("open with O_DIRECT", &shown).because_of(own);
        }
        // The check before this one has said that already; the reason here is another.
        Err(error) => {
            let why = Observation::from(NotWritable {
                directory: shown.clone(),
            });
            return Err(error)
                .os("create a file", &shown)
                .map_err(|cause| why.because(cause));
        }
    };
    // A block at a multiple of its size: within twice the size there is one.
    let buffer = vec![0_u8; 2 * BLOCK];
    let skip = buffer.as_ptr().align_offset(BLOCK);
    let block = buffer
        .get(skip..skip.saturating_add(BLOCK))
        .unwrap_or_default();
    file.write_all(block)
        .os("write with O_DIRECT", &shown)
        .because_of(own)?;
    Ok(format!("works in the file system of {shown}"))
}

/// A file without a name, which goes by itself.
fn unnamed(directory: &Path, flags: i32) -> std::io::Result<std::fs::File> {
    OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_TMPFILE | flags)
        .open(directory)
}
