//! Debian packages that are unpacked under `target/lab/pkg`, never installed.

use std::fs;
use std::path::{Path, PathBuf};

use strake_observe::{OsContext, Result};

use crate::observations::PackageNotFetched;
use crate::{setup, tool, workspace};

/// The unpacked content of a package of the distribution, fetched at the first use.
///
/// # Errors
/// If it cannot be downloaded or unpacked.
pub fn unpacked(package: &str) -> Result<PathBuf> {
    let base = workspace::lab_dir()?.join("pkg");
    let dir = base.join(package);
    if dir.exists() {
        return Ok(dir);
    }
    let fresh = base.join(format!("{package}.part"));
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh).os("mkdir", fresh.display())?;
    let archive = download(package, &base)?;
    tool::run(
        tool::command("dpkg-deb")
            .arg("--extract")
            .arg(&archive)
            .arg(&fresh),
    )?;
    fs::rename(&fresh, &dir).os("rename", dir.display())?;
    Ok(dir)
}

/// The name of the package that a meta package of the kernel stands for.
///
/// # Errors
/// If the distribution does not know it.
pub fn kernel_package(meta: &str) -> Result<String> {
    let ask = || {
        tool::run(tool::command("apt-cache").args(["depends", "--important", meta]))
            .ok()
            .and_then(|text| {
                text.lines()
                    .filter_map(|line| line.trim().strip_prefix("Depends: "))
                    .find(|name| name.starts_with("linux-image-"))
                    .map(str::to_owned)
            })
    };
    if let Some(name) = ask() {
        return Ok(name);
    }
    update();
    ask().ok_or_else(|| {
        PackageNotFetched {
            package: meta.to_owned(),
        }
        .into()
    })
}

fn download(package: &str, into: &Path) -> Result<PathBuf> {
    let already = |dir: &Path| {
        fs::read_dir(dir)
            .ok()?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| {
                path.file_name()
                    .and_then(|name| name.to_str())
                    .is_some_and(|name| {
                        name.starts_with(&format!("{package}_")) && name.ends_with(".deb")
                    })
            })
    };
    if let Some(path) = already(into) {
        return Ok(path);
    }
    eprintln!("lab: fetching the Debian package {package}");
    let fetch = || tool::run(setup::apt().args(["download", package]).current_dir(into));
    if fetch().is_err() {
        update();
        fetch().map_err(|seen| {
            strake_observe::Observation::from(PackageNotFetched {
                package: package.to_owned(),
            })
            .because(seen)
        })?;
    }
    already(into).ok_or_else(|| {
        PackageNotFetched {
            package: package.to_owned(),
        }
        .into()
    })
}

/// Brings the package lists up to date, where we may. If not, the download says what is missing.
fn update() {
    if rustix::process::geteuid().is_root() {
        let _ = tool::run(setup::apt().arg("update"));
    }
}
