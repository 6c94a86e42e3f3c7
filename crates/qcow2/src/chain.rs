//! A chain of images: listed by the daemon, which may open files, and built by the monitor, which
//! may not.
//!
//! A header is written by whoever made the image, and that may be a guest's owner. So nothing is
//! guessed: the format of every layer is told, by the inventory or by the image above, never by
//! the content; a name that leads out of the host's datastores is refused, whatever links it goes
//! through; and what the monitor is given is checked against what the headers say once more.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};
use strake_block::{Access, Image, RawImage};
use strake_observe::{Because, OsContext, Result};

use crate::image::Qcow2Image;
use crate::layer::{Layer, RawBase};
use crate::state::Qcow;
use crate::{
    BackingMissing, ChainChanged, ChainLoop, ChainTooLong, FileStore, FormatNotNamed, Header,
    NotAPath, OutsideOfStores, Store, UnknownFormat,
};

/// The most layers of one disk. Each costs a look-up per cluster that the ones above do not have;
/// whoever has this many should consolidate.
pub const MAX_LAYERS: usize = 64;

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Byte N of the disk is byte N of the file.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl Format {
    /// Its name in headers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of that name, as headers have it.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            // How other tools call raw files and devices.
            "raw" | "file" | "host_device" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

/// One file of a chain, as the daemon lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its path: as it was given for the first, as the image above names it for the others.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The size of its disk.
    pub size: u64,
    /// Device and inode, by which [`open_member`] knows it again.
    pub identity: (u64, u64),
}

/// Lists the files of a chain from the top down: headers are read, nothing else.
///
/// `allowed` is asked for each file below the first, with the path that it really has.
///
/// # Errors
/// When a file is missing, not allowed, its own ancestor or not what its format says, or the
/// chain is too long.
pub fn survey(path: &Path, format: Format, allowed: &dyn Fn(&Path) -> bool) -> Result<Vec<Member>> {
    let mut members: Vec<Member> = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((path.to_path_buf(), format));
    while let Some((path, format)) = next.take() {
        let shown = path.display().to_string();
        let above = members.last().map(|above| above.path.display().to_string());
        let opened = open(&path, Access::ReadOnly, false);
        let fd = match &above {
            Some(above) => opened.because_of(|| BackingMissing {
                path: above.clone(),
                backing: shown.clone(),
            })?,
            None => opened?,
        };
        if let Some(above) = above {
            let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let real = std::fs::read_link(link).os("readlink", &shown)?;
            if !allowed(&real) {
                return Err(OutsideOfStores {
                    path: above,
                    backing: real.display().to_string(),
                }
                .into());
            }
        }
        let identity = identity(&fd, &shown)?;
        if !seen.insert(identity) {
            return Err(ChainLoop { path: shown }.into());
        }
        if members.len() >= MAX_LAYERS {
            let path = members.first().map(|it| it.path.display().to_string());
            return Err(ChainTooLong {
                path: path.unwrap_or_default(),
                most: MAX_LAYERS as u64,
            }
            .into());
        }
        let store = FileStore::from_fd(fd, shown.clone(), Access::ReadOnly)?;
        let size = match format {
            Format::Raw => store.len()?,
            Format::Qcow2 => {
                let header = Header::read(&store)?;
                next = below(&path, &header)?;
                header.size()
            }
        };
        members.push(Member {
            path,
            format,
            size,
            identity,
        });
    }
    Ok(members)
}

/// The path and format of the image below.
fn below(path: &Path, header: &Header) -> Result<Option<(PathBuf, Format)>> {
    let Some(backing) = header.backing() else {
        return Ok(None);
    };
    let shown = || path.display().to_string();
    let name = backing.path.strip_prefix("file:").unwrap_or(&backing.path);
    // `json:{...}`, `nbd://host/...`: a scheme, unless a slash comes first.
    let scheme = name
        .split_once(':')
        .is_some_and(|(scheme, _)| !scheme.contains('/'));
    if scheme || name.is_empty() {
        return Err(NotAPath {
            path: shown(),
            backing: backing.path.clone(),
        }
        .into());
    }
    let Some(format) = &backing.format else {
        return Err(FormatNotNamed {
            path: shown(),
            backing: backing.path.clone(),
        }
        .into());
    };
    let format = Format::named(format).ok_or_else(|| UnknownFormat {
        path: shown(),
        format: format.clone(),
    })?;
    let folder = path.parent().unwrap_or_else(|| Path::new(""));
    Ok(Some((folder.join(name), format)))
}

/// Opens a file of a chain that was listed. The caller locks it as it does any image.
///
/// # Errors
/// When it cannot be opened, or is another file than the one that was listed.
pub fn open_member(member: &Member, access: Access, direct: bool) -> Result<OwnedFd> {
    let shown = member.path.display().to_string();
    let fd = open(&member.path, access, direct)?;
    if identity(&fd, &shown)? != member.identity {
        let why = "another file has taken its place".to_owned();
        return Err(ChainChanged { path: shown, why }.into());
    }
    Ok(fd)
}

fn open(path: &Path, access: Access, direct: bool) -> Result<OwnedFd> {
    // A pipe must not make the daemon wait, and a terminal must not become its own.
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    flags |= match access {
        Access::ReadOnly => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    let shown = path.display().to_string();
    let opened = if direct {
        // Not every file system has it; the page cache does as well then.
        rustix::fs::open(path, flags | OFlags::DIRECT, Mode::empty())
            .or_else(|_| rustix::fs::open(path, flags, Mode::empty()))
    } else {
        rustix::fs::open(path, flags, Mode::empty())
    };
    let fd = opened.os("open", &shown)?;
    let stat = rustix::fs::fstat(&fd).os("fstat", &shown)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => Ok(fd),
        _ => {
            let what = "neither a file nor a block device".to_owned();
            Err(strake_block::NotAnImage { path: shown, what }.into())
        }
    }
}

fn identity(fd: &OwnedFd, path: &str) -> Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd).os("fstat", path)?;
    // Two nodes of one device are one file.
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => (u64::MAX, stat.st_rdev),
        _ => (stat.st_dev, stat.st_ino),
    })
}

/// One layer as the monitor is given it.
#[derive(Debug)]
pub struct ChainPart {
    /// Its file.
    pub store: Arc<dyn Store>,
    /// Its format.
    pub format: Format,
    /// Whether it may be written. Only the first is, as a rule; a job that commits into a lower
    /// one has that one for itself.
    pub access: Access,
}

/// The disk that a chain makes, from the top down. What only opens a chain of one raw file makes
/// a [`RawImage`] of it instead.
///
/// # Errors
/// When the headers do not say the same as the parts, or an image is damaged or not supported.
pub fn open_chain(parts: Vec<ChainPart>) -> Result<Arc<Qcow2Image>> {
    let paths: Vec<String> = parts.iter().map(|it| it.store.path().to_owned()).collect();
    let changed = |number: usize, why: &str| ChainChanged {
        path: paths.get(number).cloned().unwrap_or_default(),
        why: why.to_owned(),
    };
    let count = parts.len();
    if count == 0 || count > MAX_LAYERS {
        return Err(changed(0, "it has no layer, or too many").into());
    }
    let mut layers = Vec::new();
    for (number, part) in parts.into_iter().enumerate() {
        let last = number + 1 == count;
        part.store.get_ready();
        match part.format {
            Format::Raw if number == 0 => {
                return Err(changed(0, "its first layer is raw").into());
            }
            Format::Raw if !last => {
                return Err(changed(number, "a raw image cannot have one below").into());
            }
            Format::Raw => layers.push(Layer::Raw(Arc::new(RawBase::open(part.store)?))),
            Format::Qcow2 => {
                let qcow = Qcow::open(part.store, part.access)?;
                let named = qcow.lock().header.backing.clone();
                match named {
                    Some(_) if last => {
                        return Err(changed(number, "it names a backing file").into());
                    }
                    None if !last => {
                        return Err(changed(number, "it names no backing file").into());
                    }
                    _ => layers.push(Layer::Qcow(Arc::new(qcow))),
                }
            }
        }
    }
    Ok(Qcow2Image::new(layers))
}

/// An image of one file, whatever its format.
///
/// # Errors
/// As [`open_chain`] and [`RawImage::from_fd`].
pub fn open_single(
    fd: OwnedFd,
    path: &str,
    format: Format,
    access: Access,
) -> Result<Arc<dyn Image>> {
    Ok(match format {
        Format::Raw => Arc::new(RawImage::from_fd(fd, path, access)?),
        Format::Qcow2 => open_chain(vec![ChainPart {
            store: Arc::new(FileStore::from_fd(fd, path, access)?),
            format,
            access,
        }])?,
    })
}
