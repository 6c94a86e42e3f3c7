//! Images as single files: regular ones and block devices.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;
use strake_api::image::{ImageFormat, LayerAccess};
use strake_api::spec::SECTOR;
use strake_block::Access;
use strake_block::lock::{self, Share};
use strake_observe::{Because, Observation, OsContext, Result};
use strake_qcow2::{CreateOptions, FileStore};

use super::identity::FileIdentity;
use super::location::Binding;
use super::removal::{self, Claim, Removal};
use super::store;
use crate::config::show;
use crate::observations::{
    DestinationTooSmall, ImageInUse, ImageNotCreated, ImageNotOpened, ImageRefused, NotRemoved,
};

/// How long to wait for a lock that somebody else has. A monitor that has just ended may hold its
/// images a moment longer: the kernel takes io_uring rings down after the process.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Whether the guest writes to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Read,
    Write,
}

impl Mode {
    pub(crate) fn of(read_only: bool) -> Self {
        if read_only { Self::Read } else { Self::Write }
    }

    pub(super) fn access(self) -> LayerAccess {
        match self {
            Self::Read => LayerAccess::ReadOnly,
            Self::Write => LayerAccess::ReadWrite,
        }
    }
}

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Looks {
    /// Bytes.
    pub(crate) size: u64,
    /// Bytes that it takes on its store; for a block device all of them.
    pub(crate) allocated: u64,
    /// Whether it is a regular file.
    pub(crate) regular: bool,
}

/// Looks at an image; `None` if there is nothing of that name.
pub(crate) fn look(path: &Path) -> Result<Option<Looks>> {
    let meta = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        meta => meta
            .os("stat", path.display())
            .because_of(|| not_opened(path))?,
    };
    let kind = meta.file_type();
    if kind.is_file() {
        return Ok(Some(Looks {
            size: meta.len(),
            allocated: meta.blocks().saturating_mul(512).min(meta.len()),
            regular: true,
        }));
    }
    if !kind.is_block_device() {
        return Err(refused(
            path,
            "it is neither a regular file nor a block device",
            "name an image file or a block device",
        ));
    }
    let size = File::open(path)
        .and_then(|mut device| device.seek(SeekFrom::End(0)))
        .os("open", path.display())
        .because_of(|| not_opened(path))?;
    Ok(Some(Looks {
        size,
        allocated: size,
        regular: false,
    }))
}

/// Refuses an image whose size no disk can have.
pub(crate) fn check_size(path: &Path, size: u64) -> Result<()> {
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(refused(
            path,
            &format!("its size, {size} bytes, is not a whole number of 512-byte sectors"),
            "name an image; `truncate -s` brings a raw one to a whole number of sectors",
        ));
    }
    Ok(())
}

/// The canonical form of an image's path, whether or not the image exists: two names of one file
/// must look alike in the inventory.
pub(crate) fn canonical(path: &Path) -> Result<PathBuf> {
    match std::fs::canonicalize(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        found => {
            return found
                .os("open", path.display())
                .because_of(|| not_opened(path));
        }
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(not_opened(path).into());
    };
    let directory = std::fs::canonicalize(directory)
        .os("open", directory.display())
        .because_of(|| not_opened(path))?;
    Ok(directory.join(name))
}

/// Looks at an image that must be there.
pub(super) fn require(path: &Path) -> Result<Looks> {
    look(path)?.ok_or_else(|| {
        refused(
            path,
            "there is no such file",
            "restore it, or correct the spec",
        )
    })
}

/// Opens a raw image for a monitor and locks it. `user` names who uses it, should it be locked.
pub(crate) fn open(path: &Path, mode: Mode, user: impl Fn() -> String) -> Result<OwnedFd> {
    check_size(path, require(path)?.size)?;
    open_any(path, mode, user)
}

/// The same for a file of any format.
pub(crate) fn open_any(path: &Path, mode: Mode, user: impl Fn() -> String) -> Result<OwnedFd> {
    let looks = require(path)?;
    let exclusive = !looks.regular && mode == Mode::Write;
    let file = open_free(path, mode, exclusive, &user)?;
    take_lock(&file, path, mode, LOCK_PATIENCE, user)?;
    Ok(file.into())
}

/// Opens an image for writing of which the same monitor reads already: locked against writers only.
pub(crate) fn open_beside_readers(path: &Path) -> Result<File> {
    require(path)?;
    let file = open_direct(path, Mode::Write, false)?;
    let other = || "another process, which writes to it".to_owned();
    take_lock(&file, path, Mode::Read, LOCK_PATIENCE, other)?;
    Ok(file)
}

/// As [`open_direct`]; a block device that is mounted or that somebody else has to himself is told
/// as such.
fn open_free(path: &Path, mode: Mode, exclusive: bool, user: impl Fn() -> String) -> Result<File> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let opened = open_direct(path, mode, exclusive);
        let busy = opened
            .as_ref()
            .is_err_and(|seen| is_errno(seen, Errno::BUSY));
        match opened {
            Err(_) if busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(seen) if busy => {
                return Err(seen).because_of(|| ImageInUse {
                    path: show(path),
                    user: format!("{}, or a file system on it is mounted", user()),
                });
            }
            opened => return opened,
        }
    }
}

/// Whether a system call below gave this error.
fn is_errno(seen: &Observation, errno: Errno) -> bool {
    seen.find("os.call-failed")
        .and_then(|call| call.datum("errno"))
        .is_some_and(|found| *found == errno.raw_os_error())
}

/// With O_DIRECT where the file system can.
fn open_direct(path: &Path, mode: Mode, exclusive: bool) -> Result<File> {
    let open = |flags: OFlags| {
        let exclusive = if exclusive {
            OFlags::EXCL
        } else {
            OFlags::empty()
        };
        let bits = (flags | exclusive).bits();
        OpenOptions::new()
            .read(true)
            .write(mode == Mode::Write)
            .custom_flags(i32::from_ne_bytes(bits.to_ne_bytes()))
            .open(path)
    };
    match open(OFlags::DIRECT) {
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
            open(OFlags::empty())
        }
        result => result,
    }
    .os("open", path.display())
    .because_of(|| not_opened(path))
}

pub(super) fn take_lock(
    file: &File,
    path: &Path,
    mode: Mode,
    patience: Duration,
    user: impl Fn() -> String,
) -> Result<()> {
    let share = match mode {
        Mode::Read => Share::WithReaders,
        Mode::Write => Share::Alone,
    };
    let deadline = Instant::now() + patience;
    loop {
        if lock::take(file, share).os("fcntl(F_OFD_SETLK)", path.display())? {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(ImageInUse {
                path: show(path),
                user: user(),
            }
            .into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// An image that was just created: open, locked, and known.
#[derive(Debug)]
pub(crate) struct NewImage {
    pub(crate) fd: OwnedFd,
    pub(crate) identity: FileIdentity,
}

/// Creates an empty disk of exactly `size` bytes where nothing is yet, locked, and durable by
/// name. Nothing is left behind if that fails.
pub(crate) fn create(binding: &Binding, size: u64) -> Result<NewImage> {
    let path = binding.file()?;
    create_for(path, path, binding.format, size)
}

/// The same under a name for the time being; `shown` is the one that it is to have, by which
/// failures name it.
pub(crate) fn create_for(
    shown: &Path,
    path: &Path,
    format: ImageFormat,
    size: u64,
) -> Result<NewImage> {
    match format {
        ImageFormat::Raw => create_file(shown, path, size, |file| file.set_len(size)),
        ImageFormat::Qcow2 => create_qcow2(shown, path, size, &CreateOptions::new(size)),
    }
}

/// Creates an empty qcow2 image, perhaps over another one.
pub(crate) fn create_qcow2(
    shown: &Path,
    path: &Path,
    size: u64,
    options: &CreateOptions,
) -> Result<NewImage> {
    let new = create_file(shown, path, size, |_| Ok(()))?;
    let guard = Created::new(path, &new.identity);
    let made = new
        .fd
        .try_clone()
        .os("dup", path.display())
        .and_then(|fd| FileStore::from_fd(fd, show(path), Access::ReadWrite))
        .and_then(|store| strake_qcow2::create(&store, options));
    made.because_of(|| ImageNotCreated {
        path: show(shown),
        size,
    })?;
    guard.keep();
    Ok(new)
}

fn create_file(
    shown: &Path,
    path: &Path,
    size: u64,
    extend: impl FnOnce(&File) -> std::io::Result<()>,
) -> Result<NewImage> {
    let not_created = || ImageNotCreated {
        path: show(shown),
        size,
    };
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .os("open", path.display())
        .because_of(not_created)?;
    let identity = FileIdentity::of(&made, path)?;
    let guard = Created::new(path, &identity);
    let file = open_direct(path, Mode::Write, false).because_of(not_created)?;
    if !FileIdentity::of(&file, path)?.is(&identity) {
        return Err(refused(
            path,
            "another file took its place while it was being created",
            "leave the directory alone meanwhile",
        ))
        .because_of(not_created);
    }
    if let Err(error) = extend(&file) {
        let too_small = error.raw_os_error() == Some(Errno::FBIG.raw_os_error());
        let seen = Err(error).os("ftruncate", path.display());
        return if too_small {
            seen.because_of(|| DestinationTooSmall {
                path: show(shown),
                size,
            })
        } else {
            seen.because_of(not_created)
        };
    }
    let other = || "another process".to_owned();
    take_lock(&file, path, Mode::Write, LOCK_PATIENCE, other)?;
    file.sync_all()
        .os("fsync", path.display())
        .because_of(not_created)?;
    if let Some(directory) = path.parent() {
        store::sync(directory).because_of(not_created)?;
    }
    guard.keep();
    Ok(NewImage {
        fd: file.into(),
        identity,
    })
}

/// A file that goes again unless it is kept.
#[derive(Debug)]
pub(crate) struct Created(Option<(PathBuf, FileIdentity)>);

impl Created {
    pub(crate) fn new(path: &Path, identity: &FileIdentity) -> Self {
        Self(Some((path.to_owned(), identity.clone())))
    }

    pub(crate) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if let Some((path, identity)) = self.0.take()
            && let Err(seen) = removal::remove(&path, &identity, Claim::Ours)
        {
            tracing::warn!(%seen, "an unfinished file stays behind");
        }
    }
}

/// Removes an image that is a regular file and that nobody uses; block devices stay as they are.
/// With `identity`, only if it is that file.
pub(crate) fn remove(path: &Path, identity: Option<&FileIdentity>, what: &str) -> Result<()> {
    let not_removed = || NotRemoved {
        path: show(path),
        what: what.to_owned(),
    };
    match look(path) {
        Ok(Some(looks)) if looks.regular => {}
        Ok(_) => return Ok(()),
        Err(seen) => return Err(seen).because_of(not_removed),
    }
    let removed = match identity {
        Some(identity) => removal::remove(path, identity, Claim::Unused),
        None => match FileIdentity::at(path).because_of(not_removed)? {
            Some(identity) => removal::remove(path, &identity, Claim::Unused),
            None => return Ok(()),
        },
    };
    match removed.because_of(not_removed)? {
        Removal::Gone => Ok(()),
        Removal::Another => Err(refused(
            path,
            "another file has taken its place",
            "look at what it is: it was left alone",
        ))
        .because_of(not_removed),
    }
}

fn not_opened(path: &Path) -> ImageNotOpened {
    ImageNotOpened { path: show(path) }
}

fn refused(path: &Path, reason: &str, advice: &str) -> Observation {
    ImageRefused {
        path: show(path),
        reason: reason.to_owned(),
        advice: advice.to_owned(),
    }
    .into()
}
