//! The files that a job writes: made and opened here, and described to the monitor.
//!
//! Until it is recorded which file a new one is, it has a name that only Strake gives.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use rustix::io::Errno;
use strake_api::control::{KeepConfig, LayerConfig, Request};
use strake_api::image::{ImageFormat, LayerAccess};
use strake_api::job::{JobKind, Space};
use strake_block::lock::{self, Share};
use strake_observe::{Because, OsContext, Result};
use strake_qcow2::{CreateOptions, Format};

use super::commit::{journal_path, unnamed_path};
use super::interrupted::create_kept;
use crate::config::show;
use crate::inventory::{JobFiles, JobRecord, NewJob};
use crate::monitor::descriptors::Descriptors;
use crate::observations::{DestinationExists, ImageInUse, ImageNotCreated, Internal};
use crate::storage::chain::OpenImage;
use crate::storage::image::{self, Created, Mode};
use crate::storage::{removal, store};
use crate::{Binding, FileIdentity};

/// What a job writes to.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) destination: OwnedFd,
    journal: Option<OwnedFd>,
    kept: Option<OwnedFd>,
    pub(super) known: JobFiles,
}

impl Files {
    /// Makes the files of a job, or opens the one that it writes to; `below` is what a new image is
    /// based on.
    pub(super) fn make(new: &NewJob, job: &JobRecord, below: Option<&Binding>) -> Result<Self> {
        let destination = new.destination.file()?;
        match new.kind {
            JobKind::Migrate => Self::create(new, job, destination),
            JobKind::Snapshot | JobKind::Revert => {
                let unnamed = unnamed_path(destination);
                let options = overlay(new, destination, below)?;
                removal::remove_stale(&unnamed).because_of(|| ImageNotCreated {
                    path: show(destination),
                    size: new.size,
                })?;
                let made = image::create_qcow2(destination, &unnamed, new.size, &options)?;
                Ok(Self {
                    destination: made.fd,
                    journal: None,
                    kept: None,
                    known: JobFiles {
                        destination: made.identity,
                        journal: None,
                        kept: None,
                    },
                })
            }
            JobKind::Consolidate => {
                let file = image::open_beside_readers(destination)?;
                Ok(Self {
                    known: JobFiles {
                        destination: FileIdentity::of(&file, destination)?,
                        journal: None,
                        kept: None,
                    },
                    destination: file.into(),
                    journal: None,
                    kept: None,
                })
            }
        }
    }

    /// An empty destination with its journal.
    fn create(new: &NewJob, job: &JobRecord, destination: &Path) -> Result<Self> {
        let unnamed = unnamed_path(destination);
        let path = journal_path(destination);
        let not_created = || ImageNotCreated {
            path: show(&path),
            size: 0,
        };
        // These names are this job's alone: what is there was left by a job long gone.
        removal::remove_stale(&unnamed).because_of(not_created)?;
        removal::remove_stale(&path).because_of(not_created)?;
        let format = new.destination.format;
        let made = image::create_for(destination, &unnamed, format, new.size)?;
        let guard = Created::new(&unnamed, &made.identity);
        if new.limits.space == Space::Thick {
            fallocate(&made.fd, FallocateFlags::empty(), 0, new.size)
                .map_err(std::io::Error::from)
                .os("fallocate", unnamed.display())
                .because_of(|| ImageNotCreated {
                    path: show(&unnamed),
                    size: new.size,
                })?;
        }
        let journal = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .os("open", path.display())
            .because_of(not_created)?;
        let identity = FileIdentity::of(&journal, &path)?;
        let journal_guard = Created::new(&path, &identity);
        // As long as the monitor has it, nobody takes it for a leftover.
        let locked = lock::take(&journal, Share::Alone).os("fcntl(F_OFD_SETLK)", path.display())?;
        if !locked {
            return Err(ImageInUse {
                path: show(&path),
                user: "another process, which has it locked".to_owned(),
            }
            .into());
        }
        if let Some(directory) = path.parent() {
            store::sync(directory).because_of(not_created)?;
        }
        let (kept, kept_identity) = create_kept(job).unzip();
        journal_guard.keep();
        guard.keep();
        Ok(Self {
            destination: made.fd,
            journal: Some(journal.into()),
            kept,
            known: JobFiles {
                destination: made.identity,
                journal: Some(identity),
                kept: kept_identity,
            },
        })
    }

    /// What the monitor is asked, with the descriptors that it names.
    pub(super) fn request(&self, job: &JobRecord, fds: &mut Descriptors) -> Result<Request> {
        let (id, disk, limits) = (job.id.clone(), job.disk.clone(), job.limits.clone());
        let Binding { location, format } = &job.destination;
        let destination = self.destination.try_clone().os("dup", location)?;
        let path = location.file()?;
        match (job.kind, &self.journal) {
            (JobKind::Migrate, Some(journal)) => {
                let image = OpenImage::single(destination, path, *format, Mode::Write)?;
                let journal = journal.try_clone().os("dup", "a journal")?;
                Ok(Request::MigrateDisk {
                    job: id,
                    disk,
                    destination: image.give(fds)?,
                    journal: fds.add(journal)?,
                    limits,
                    keep: match &self.kept {
                        Some(kept) => {
                            let kept = kept.try_clone().os("dup", "a job's progress")?;
                            Some(KeepConfig::New(fds.add(kept)?))
                        }
                        None => None,
                    },
                })
            }
            (JobKind::Snapshot, _) => Ok(Request::SnapshotDisk {
                job: id,
                disk,
                overlay: LayerConfig {
                    file: fds.add(destination)?,
                    path: show(path),
                    format: ImageFormat::Qcow2,
                    access: LayerAccess::ReadWrite,
                },
                limits,
            }),
            (JobKind::Consolidate, _) => Ok(Request::ConsolidateDisk {
                job: id,
                disk,
                below: LayerConfig {
                    file: fds.add(destination)?,
                    path: show(path),
                    format: *format,
                    access: LayerAccess::ReadWrite,
                },
                limits,
            }),
            _ => Err(Internal {
                what: format!("job {id} is none for a monitor"),
            }
            .into()),
        }
    }
}

/// A new image over `below`, which its header names: relative to its own directory if both are in
/// the same one, so that they may be moved together.
fn overlay(new: &NewJob, destination: &Path, below: Option<&Binding>) -> Result<CreateOptions> {
    let Some(below) = below else {
        return Err(Internal {
            what: "a snapshot of nothing".to_owned(),
        }
        .into());
    };
    let path = below.file()?;
    let name = match path.file_name() {
        // What is before a colon would be taken for a scheme.
        Some(name) if path.parent() == destination.parent() => {
            Path::new("./").join(name).display().to_string()
        }
        _ => show(path),
    };
    let format = match below.format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    };
    Ok(CreateOptions::new(new.size).backing(name, format))
}

/// Gives the destination its own name, if that is still free.
pub(super) fn give_name(destination: &Path) -> Result<()> {
    let unnamed = unnamed_path(destination);
    let renamed = renameat_with(CWD, &unnamed, CWD, destination, RenameFlags::NOREPLACE);
    let named = match renamed {
        // Network file systems cannot refuse to replace; a second name they can give.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            std::fs::hard_link(&unnamed, destination).and_then(|()| std::fs::remove_file(&unnamed))
        }
        result => result.map_err(Into::into),
    };
    match named {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(DestinationExists {
            path: show(destination),
            user: "it was created just now, by somebody else".to_owned(),
        }
        .into()),
        result => result.os("rename", destination.display()),
    }?;
    match destination.parent() {
        Some(directory) => store::sync(directory),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_somebody_took_meanwhile_stays_his() {
        let dir = tempfile::tempdir().unwrap();
        let destination = dir.path().join("root.raw");
        let unnamed = unnamed_path(&destination);
        std::fs::write(&unnamed, b"").unwrap();
        std::fs::write(&destination, b"").unwrap();
        let theirs = FileIdentity::at(&destination).unwrap().unwrap();
        let seen = give_name(&destination).unwrap_err();
        assert_eq!(seen.id(), "host.destination-exists");
        assert!(FileIdentity::at(&destination).unwrap().unwrap().is(&theirs));
        std::fs::remove_file(&destination).unwrap();
        give_name(&destination).unwrap();
        assert!(destination.exists() && !unnamed.exists());
    }
}
