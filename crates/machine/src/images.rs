//! From what a monitor is told about an image, and the descriptors that came with it, to the image.
//!
//! The only place that knows every kind of image. The daemon has opened, checked and locked the
//! files; here it is only looked whether they fit what was said of them.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use strake_api::image::{ImageConfig, ImageFormat, LayerAccess, LayerConfig};
use strake_block::lock::{self, Share};
use strake_block::{Access, Covered, Image, MakeCover, RawImage};
use strake_observe::{OsContext, Result};
use strake_qcow2::{Below, ChainPart, Consolidation, FileStore, Format, Qcow2Image, open_chain};

use crate::Descriptors;
use crate::observations::{ImageMismatch, ImageShared};

/// How long it is tried to have a file alone that was shared.
const CLAIM_LIMIT: Duration = Duration::from_secs(2);

/// The image that `config` describes, for `purpose`.
///
/// # Errors
/// A descriptor is missing, an image is damaged or is not what was said of it, or
/// [`ImageMismatch`] if it is not to be written where `access` wants to.
pub(crate) fn open(
    config: &ImageConfig,
    access: Access,
    purpose: &str,
    fds: &mut Descriptors,
) -> Result<Arc<dyn Image>> {
    match config {
        ImageConfig::Raw { file, path } => {
            let fd = fds.take(*file, purpose)?;
            Ok(Arc::new(RawImage::from_fd(fd, path.clone(), access)?))
        }
        ImageConfig::Qcow2 { layers } => {
            let writable = layers
                .first()
                .is_some_and(|top| top.access == LayerAccess::ReadWrite);
            if writable != (access == Access::ReadWrite) {
                return Err(ImageMismatch {
                    path: config.path().to_owned(),
                    purpose: purpose.to_owned(),
                    reason: "its top layer is writable and the disk is not, or the other way round"
                        .to_owned(),
                }
                .into());
            }
            let parts = layers
                .iter()
                .map(|layer| part(layer, purpose, fds))
                .collect::<Result<_>>()?;
            Ok(open_chain(parts)?)
        }
    }
}

/// How a snapshot covers an image with `overlay`, and what is done once it has: what is below may be
/// read by others then, for which the daemon takes no lock of its own.
///
/// # Errors
/// A descriptor is missing or is not what was said of it.
pub(crate) fn cover(overlay: &LayerConfig, fds: &mut Descriptors) -> Result<(MakeCover, Covered)> {
    let part = part(overlay, "a snapshot", fds)?;
    let below: Arc<OnceLock<Arc<Qcow2Image>>> = Arc::default();
    let made = Arc::clone(&below);
    let make = move |image: &Arc<dyn Image>| -> Result<Arc<dyn Image>> {
        let any = image.as_any();
        let qcow2 = any.and_then(|any| any.downcast_ref::<Qcow2Image>());
        let raw = any.and_then(|any| any.downcast_ref::<RawImage>());
        let covered = match (qcow2, raw) {
            (Some(qcow2), _) => qcow2.under(part)?,
            (None, Some(raw)) => {
                let fd = raw.descriptor()?;
                let store = FileStore::from_fd(fd, raw.path(), Access::ReadOnly)?;
                let base = ChainPart {
                    store: Arc::new(store),
                    format: Format::Raw,
                    access: Access::ReadOnly,
                };
                open_chain(vec![part, base])?
            }
            (None, None) => {
                return Err(ImageMismatch {
                    path: image.path().to_owned(),
                    purpose: "a snapshot".to_owned(),
                    reason: "it is neither a file nor a block device".to_owned(),
                }
                .into());
            }
        };
        let _ = made.set(Arc::clone(&covered));
        Ok(covered)
    };
    let covered = move || {
        let Some(image) = below.get() else { return };
        // What remains is a lock that is stricter than it needs to be.
        if let Err(seen) = image.share_layer(1, Share::WithReaders) {
            strake_observe::recorder().record(seen, strake_observe::State::Open);
        }
    };
    Ok((Box::new(make), Box::new(covered)))
}

/// The consolidation of the uppermost layer of `image` into what is below it, which `below` has open
/// for writing.
///
/// # Errors
/// It has none below it, or that is not what was said.
pub(crate) fn consolidation(
    image: &dyn Image,
    below: &LayerConfig,
    fds: &mut Descriptors,
) -> Result<Consolidation> {
    let purpose = "a consolidation";
    let any = image.as_any();
    let Some(qcow2) = any.and_then(|any| any.downcast_ref::<Qcow2Image>()) else {
        return Err(ImageMismatch {
            path: image.path().to_owned(),
            purpose: purpose.to_owned(),
            reason: "it has no image below it".to_owned(),
        }
        .into());
    };
    let below = match below.format {
        ImageFormat::Raw => {
            let fd = fds.take(below.file, purpose)?;
            let raw = RawImage::from_fd(fd, below.path.clone(), Access::ReadWrite)?;
            Below::Raw(Arc::new(raw))
        }
        ImageFormat::Qcow2 => Below::Qcow2(part(below, purpose, fds)?.store),
    };
    Consolidation::new(qcow2, below)
}

/// Tries to have the file of a disk's image for this machine alone, as at its start. Somebody who
/// reads it may be in the way; that is told.
pub(crate) fn claim(image: &dyn Image) {
    let any = image.as_any();
    let qcow2 = any.and_then(|any| any.downcast_ref::<Qcow2Image>());
    let raw = any.and_then(|any| any.downcast_ref::<RawImage>());
    let attempt = || match (qcow2, raw) {
        (Some(qcow2), _) => qcow2.share_layer(0, Share::Alone),
        (None, Some(raw)) => {
            let fd = raw.descriptor()?;
            lock::take(fd, Share::Alone).os("fcntl(F_OFD_SETLK)", image.path())
        }
        (None, None) => Ok(true),
    };
    let end = Instant::now() + CLAIM_LIMIT;
    let seen = loop {
        match attempt() {
            Ok(true) => return,
            Ok(false) if Instant::now() < end => {
                // Queues that were idle still have the old image, which has this file below it.
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(false) => {
                break ImageShared {
                    path: image.path().to_owned(),
                }
                .into();
            }
            Err(seen) => break seen,
        }
    };
    strake_observe::recorder().record(seen, strake_observe::State::Open);
}

/// One layer with its file.
pub(crate) fn part(layer: &LayerConfig, purpose: &str, fds: &mut Descriptors) -> Result<ChainPart> {
    let fd = fds.take(layer.file, purpose)?;
    let access = match layer.access {
        LayerAccess::ReadOnly => Access::ReadOnly,
        LayerAccess::ReadWrite => Access::ReadWrite,
    };
    Ok(ChainPart {
        store: Arc::new(FileStore::from_fd(fd, layer.path.clone(), access)?),
        format: match layer.format {
            ImageFormat::Raw => Format::Raw,
            ImageFormat::Qcow2 => Format::Qcow2,
        },
        access,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use strake_api::control::FdIndex;
    use strake_qcow2::CreateOptions;

    use super::*;

    fn read_write(path: &Path) -> OwnedFd {
        let mut options = File::options();
        options.read(true).write(true).create(true);
        options.truncate(false).open(path).unwrap().into()
    }

    fn layer(file: u8, format: ImageFormat, access: LayerAccess) -> LayerConfig {
        LayerConfig {
            file: FdIndex(file),
            path: format!("layer {file}"),
            format,
            access,
        }
    }

    #[test]
    fn a_chain_reads_through_and_a_raw_file_is_never_probed() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.qcow2"));
        std::fs::write(&base, vec![0x5a; 1 << 20]).unwrap();
        let store = FileStore::from_fd(read_write(&top), "top", Access::ReadWrite).unwrap();
        let options = CreateOptions::new(2 << 20).backing("base.raw", Format::Raw);
        strake_qcow2::create(&store, &options).unwrap();
        let config = ImageConfig::Qcow2 {
            layers: vec![
                layer(0, ImageFormat::Qcow2, LayerAccess::ReadWrite),
                layer(1, ImageFormat::Raw, LayerAccess::ReadOnly),
            ],
        };
        let given = || Descriptors::new([read_write(&top), read_write(&base)]);
        let image = open(&config, Access::ReadWrite, "a test", &mut given()).unwrap();
        assert_eq!(image.size(), 2 << 20);
        let mut data = [0; 512];
        image.read_at((1 << 20) - 512, &mut data).unwrap();
        assert_eq!(data, [0x5a; 512]);
        image.read_at(1 << 20, &mut data).unwrap();
        assert_eq!(data, [0; 512]);
        let seen = open(&config, Access::ReadOnly, "a test", &mut given()).unwrap_err();
        assert_eq!(seen.id(), "machine.image-mismatch");
        drop(image);
        // Told to be raw, it is: its header is the guest's data.
        let raw = ImageConfig::Raw {
            file: FdIndex(0),
            path: "top".to_owned(),
        };
        let image = open(&raw, Access::ReadWrite, "a test", &mut given()).unwrap();
        image.read_at(0, &mut data).unwrap();
        assert_eq!(data.get(..4), Some(&b"QFI\xfb"[..]));
    }

    #[test]
    fn what_was_not_said_of_a_chain_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, vec![0; 1 << 20]).unwrap();
        let seen = |layers| {
            let config = ImageConfig::Qcow2 { layers };
            let mut fds = Descriptors::new([read_write(&base)]);
            let opened = open(&config, Access::ReadWrite, "a test", &mut fds);
            opened.unwrap_err().id().to_owned()
        };
        let write = LayerAccess::ReadWrite;
        assert_eq!(seen(Vec::new()), "machine.image-mismatch");
        assert_eq!(
            seen(vec![layer(0, ImageFormat::Qcow2, write)]),
            "qcow2.not-qcow2"
        );
        assert_eq!(
            seen(vec![layer(0, ImageFormat::Raw, write)]),
            "qcow2.chain-changed"
        );
        assert_eq!(
            seen(vec![layer(1, ImageFormat::Qcow2, write)]),
            "machine.descriptor-missing"
        );
    }
}
