//! Opening what a binding names, for a monitor: the image and everything below it.
//!
//! Nothing is probed. The first image's format is the binding's, that of each image below is named
//! by the header above it, and headers of raw images do not exist: what a guest writes to its disk
//! is never read for this. The headers must name what the inventory has recorded: a monitor that its
//! guest has taken over may write its image's header, and must not be given another VM's image for
//! it. A chain is listed, each file is opened and locked, and then the chain is
//! listed once more: what was changed before the locks were had is seen then.
//!
//! The top of a disk that the guest may write is locked for its monitor alone; all other files
//! against writers.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use strake_api::image::{ImageConfig, ImageFormat, LayerAccess, LayerConfig};
use strake_block::Access;
use strake_observe::{Because, OsContext, Result};
use strake_qcow2::{ChainChanged, Format, Member, open_member, survey};

use super::identity::FileIdentity;
use super::image::{self, LOCK_PATIENCE, Mode};
use super::location::Binding;
use crate::config::show;
use crate::monitor::descriptors::Descriptors;
use crate::observations::ChainRefused;

/// The longest path of a lower layer that a monitor is told: it only names it in observations, and
/// those of the longest chain must fit into a packet.
const TOLD_PATH: usize = 64;

/// What a binding's image is.
#[derive(Debug)]
pub(crate) struct Looks {
    /// The size of the disk.
    pub(crate) size: u64,
    /// Bytes that all of its files take on their stores.
    pub(crate) allocated: u64,
    /// Whether its first file is a regular one.
    pub(crate) regular: bool,
    /// Its files, from the top.
    pub(crate) files: Vec<PathBuf>,
}

/// Looks at an image and what is below it; `None` if there is no such file. `allowed` says which
/// files may be below others, by the paths that they really have.
pub(crate) fn look(binding: &Binding, allowed: &dyn Fn(&Path) -> bool) -> Result<Option<Looks>> {
    let path = binding.file()?;
    let Some(first) = image::look(path)? else {
        return Ok(None);
    };
    let mut looks = Looks {
        size: first.size,
        allocated: first.allocated,
        regular: first.regular,
        files: vec![path.to_owned()],
    };
    if binding.format == ImageFormat::Qcow2 {
        let members = list(path, allowed)?;
        looks.size = members.first().map_or(0, |top| top.size);
        for member in members.into_iter().skip(1) {
            let below = image::look(&member.path)?;
            looks.allocated += below.map_or(0, |below| below.allocated);
            looks.files.push(member.path);
        }
    }
    Ok(Some(looks))
}

/// Lists a qcow2 image and everything below it.
fn list(path: &Path, allowed: &dyn Fn(&Path) -> bool) -> Result<Vec<Member>> {
    survey(path, Format::Qcow2, allowed).because_of(|| ChainRefused { path: show(path) })
}

/// An image with everything below it: open, locked, and what the headers say of each other.
#[derive(Debug)]
pub(crate) struct OpenImage {
    format: ImageFormat,
    layers: Vec<OpenLayer>,
    /// Which file the first is.
    pub(crate) identity: FileIdentity,
}

/// One of its files.
#[derive(Debug)]
pub(super) struct OpenLayer {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
    pub(super) format: ImageFormat,
    access: LayerAccess,
}

/// Opens an image for a monitor and locks it with everything below, which must be the files `below`.
/// `user` names who has a file, should it be locked.
pub(crate) fn open(
    binding: &Binding,
    mode: Mode,
    below: &[PathBuf],
    user: &dyn Fn(&Path) -> String,
) -> Result<OpenImage> {
    let path = binding.file()?;
    if binding.format == ImageFormat::Raw {
        let fd = image::open(path, mode, || user(path))?;
        return OpenImage::single(fd, path, ImageFormat::Raw, mode);
    }
    // Also tells a file that is missing better than the list does.
    image::require(path)?;
    let known = |path: &Path| below.iter().any(|file| file == path);
    let allowed = |real: &Path| known(real) || below.iter().any(|file| leads_to(file, real));
    let members = list(path, &allowed)?;
    let failed = || ChainRefused { path: show(path) };
    if !members.iter().skip(1).map(|of| &of.path).eq(below) {
        let why = "its headers name other images below it than the inventory has recorded";
        return Err(changed(path, why)).because_of(failed);
    }
    let mut layers = Vec::new();
    for (number, member) in members.iter().enumerate() {
        let mode = if number == 0 { mode } else { Mode::Read };
        let fd = match mode {
            Mode::Write => {
                let fd = image::open_any(path, mode, || user(path))?;
                is_member(&fd, member).because_of(failed)?;
                fd
            }
            Mode::Read => {
                let fd = open_member(member, Access::ReadOnly, true).because_of(failed)?;
                let file = File::from(fd);
                let who = || user(&member.path);
                image::take_lock(&file, &member.path, mode, LOCK_PATIENCE, who)
                    .because_of(failed)?;
                file.into()
            }
        };
        layers.push(OpenLayer {
            fd,
            path: member.path.clone(),
            format: match member.format {
                Format::Raw => ImageFormat::Raw,
                Format::Qcow2 => ImageFormat::Qcow2,
            },
            access: mode.access(),
        });
    }
    if list(path, &allowed)? != members {
        return Err(changed(path, "it changed while it was being opened")).because_of(failed);
    }
    let identity = match layers.first() {
        Some(top) => identity(&top.fd, path)?,
        None => return Err(changed(path, "it has no layer")).because_of(failed),
    };
    Ok(OpenImage {
        format: ImageFormat::Qcow2,
        layers,
        identity,
    })
}

impl OpenLayer {
    /// Whether another descriptor is of the same file.
    pub(super) fn is(&self, other: &OwnedFd) -> Result<bool> {
        Ok(identity(&self.fd, &self.path)?.is(&identity(other, &self.path)?))
    }
}

impl OpenImage {
    pub(super) fn layers(&self) -> &[OpenLayer] {
        &self.layers
    }

    /// An image of one file, which is open and locked.
    pub(crate) fn single(
        fd: OwnedFd,
        path: &Path,
        format: ImageFormat,
        mode: Mode,
    ) -> Result<Self> {
        Ok(Self {
            format,
            identity: identity(&fd, path)?,
            layers: vec![OpenLayer {
                fd,
                path: path.to_owned(),
                format,
                access: mode.access(),
            }],
        })
    }

    /// Puts its files among the descriptors of a packet and says what they are.
    pub(crate) fn give(self, fds: &mut Descriptors) -> Result<ImageConfig> {
        let mut layers = Vec::new();
        for (number, layer) in self.layers.into_iter().enumerate() {
            layers.push(LayerConfig {
                file: fds.add(layer.fd)?,
                path: match number {
                    0 => show(&layer.path),
                    _ => told(&layer.path),
                },
                format: layer.format,
                access: layer.access,
            });
        }
        Ok(match (self.format, layers.pop()) {
            (ImageFormat::Raw, Some(only)) => ImageConfig::Raw {
                file: only.file,
                path: only.path,
            },
            (_, last) => {
                layers.extend(last);
                ImageConfig::Qcow2 { layers }
            }
        })
    }
}

/// The end of a path, if it is long.
fn told(path: &Path) -> String {
    let text = show(path);
    let chars = text.chars().count();
    if chars <= TOLD_PATH {
        return text;
    }
    std::iter::once('…')
        .chain(text.chars().skip(chars - TOLD_PATH + 1))
        .collect()
}

fn identity(fd: &OwnedFd, path: &Path) -> Result<FileIdentity> {
    let file = File::from(fd.try_clone().os("dup", path.display())?);
    FileIdentity::of(&file, path)
}

/// Whether a recorded name leads to a file, through whatever links.
fn leads_to(name: &Path, real: &Path) -> bool {
    std::fs::canonicalize(name).is_ok_and(|found| found == real)
}

/// Whether what was opened by name is what was listed.
fn is_member(fd: &OwnedFd, member: &Member) -> Result<()> {
    let path = show(&member.path);
    let meta = File::from(fd.try_clone().os("dup", &path)?)
        .metadata()
        .os("fstat", &path)?;
    let found = if meta.file_type().is_block_device() {
        (u64::MAX, meta.rdev())
    } else {
        (meta.dev(), meta.ino())
    };
    if found == member.identity {
        return Ok(());
    }
    Err(changed(&member.path, "another file has taken its place"))
}

fn changed(path: &Path, why: &str) -> strake_observe::Observation {
    ChainChanged {
        path: show(path),
        why: why.to_owned(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use strake_api::control::FdIndex;
    use strake_qcow2::CreateOptions;

    use super::*;

    fn nobody(_: &Path) -> String {
        "somebody".to_owned()
    }

    /// A raw base with two overlays.
    fn chain(dir: &Path) -> [PathBuf; 3] {
        let [top, middle, base] = ["top.qcow2", "middle.qcow2", "base.raw"].map(|of| dir.join(of));
        drop(image::create(&Binding::new(&base, ImageFormat::Raw), 1 << 20).unwrap());
        for (path, backing, format) in [
            (&middle, "base.raw", Format::Raw),
            (&top, "middle.qcow2", Format::Qcow2),
        ] {
            let options = CreateOptions::new(1 << 20).backing(backing, format);
            drop(image::create_qcow2(path, path, 1 << 20, &options).unwrap());
        }
        [top, middle, base]
    }

    #[test]
    fn a_chain_is_given_with_its_formats_and_only_its_top_is_writable() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let [top, middle, base] = chain(&dir);
        let binding = Binding::new(&top, ImageFormat::Qcow2);
        let looks = look(&binding, &|_| true).unwrap().unwrap();
        assert_eq!(looks.size, 1 << 20);
        assert_eq!(looks.files, [top.clone(), middle.clone(), base.clone()]);
        let below = [middle.clone(), base.clone()];
        let opened = open(&binding, Mode::Write, &below, &nobody).unwrap();
        // Locked: the top against everybody, the others against writers.
        let raw = Binding::new(&base, ImageFormat::Raw);
        for (path, mode, free) in [
            (&top, Mode::Read, false),
            (&middle, Mode::Read, true),
            (&middle, Mode::Write, false),
            (&base, Mode::Read, true),
            (&base, Mode::Write, false),
        ] {
            let taken = image::open_any(path, mode, || "somebody".to_owned());
            assert_eq!(taken.is_ok(), free, "{} {mode:?}", path.display());
        }
        assert!(open(&raw, Mode::Write, &[], &nobody).is_err());
        let mut fds = Descriptors::default();
        let ImageConfig::Qcow2 { layers } = opened.give(&mut fds).unwrap() else {
            panic!("it is no chain");
        };
        let told: Vec<_> = layers
            .iter()
            .map(|layer| (layer.file, layer.format, layer.access))
            .collect();
        assert_eq!(
            told,
            [
                (FdIndex(0), ImageFormat::Qcow2, LayerAccess::ReadWrite),
                (FdIndex(1), ImageFormat::Qcow2, LayerAccess::ReadOnly),
                (FdIndex(2), ImageFormat::Raw, LayerAccess::ReadOnly),
            ]
        );
    }

    #[test]
    fn a_chain_that_leads_elsewhere_is_refused_and_a_raw_disk_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let [top, middle, base] = chain(&dir);
        let binding = Binding::new(&top, ImageFormat::Qcow2);
        let only_qcow2 = |path: &Path| path.extension().is_some_and(|of| of == "qcow2");
        let seen = look(&binding, &only_qcow2).unwrap_err();
        assert!(seen.find("qcow2.outside-of-datastores").is_some(), "{seen}");
        // What is recorded counts, not what a header says.
        let recorded = [middle.clone(), base.clone()];
        for wrong in [&recorded[..1], &[], &[base.clone(), middle.clone()]] {
            let seen = open(&binding, Mode::Write, wrong, &nobody).unwrap_err();
            assert_eq!(seen.id(), "host.chain-refused");
        }
        drop(open(&binding, Mode::Write, &recorded, &nobody).unwrap());
        std::fs::remove_file(&base).unwrap();
        let seen = open(&binding, Mode::Write, &recorded, &nobody).unwrap_err();
        assert!(seen.find("qcow2.backing-missing").is_some(), "{seen}");
        // The same file as a raw disk: what its guest wrote there is nobody's business.
        let binding = Binding::new(&top, ImageFormat::Raw);
        let opened = open(&binding, Mode::Write, &[], &nobody).unwrap();
        let config = opened.give(&mut Descriptors::default()).unwrap();
        assert!(matches!(config, ImageConfig::Raw { .. }));
        // And what is said to be qcow2 must be it.
        let raw = dir.join("plain.qcow2");
        drop(image::create(&Binding::new(&raw, ImageFormat::Raw), 1 << 20).unwrap());
        let binding = Binding::new(&raw, ImageFormat::Qcow2);
        let seen = open(&binding, Mode::Write, &[], &nobody).unwrap_err();
        assert!(seen.find("qcow2.not-qcow2").is_some(), "{seen}");
    }

    #[test]
    fn long_paths_are_told_by_their_end() {
        assert_eq!(told(Path::new("/a/b")), "/a/b");
        let long = told(Path::new(&format!("/{}/é.qcow2", "x".repeat(100))));
        assert_eq!(long.chars().count(), TOLD_PATH);
        assert!(long.starts_with('…') && long.ends_with("/é.qcow2"));
    }
}
