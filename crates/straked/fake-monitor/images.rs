//! Images as the fake guest has them: real ones, used one request at a time.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use strake_api::control::{FdIndex, ImageConfig, ImageFormat, LayerAccess, LayerConfig};
use strake_block::lock::Share;
use strake_block::{Access, Blocking, Image, RawImage, SECTOR_BYTES};
use strake_observe::Result;
use strake_qcow2::{Below, ChainPart, Consolidation, FileStore, Format, Qcow2Image, open_chain};

use crate::staged;

/// The descriptors of a packet.
pub(crate) struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    pub(crate) fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    pub(crate) fn take(&mut self, index: FdIndex) -> Option<OwnedFd> {
        self.0.get_mut(usize::from(index.0)).and_then(Option::take)
    }

    pub(crate) fn rest(self) -> Vec<OwnedFd> {
        self.0.into_iter().flatten().collect()
    }
}

pub(crate) fn open(config: &ImageConfig, read_only: bool, fds: &mut Fds) -> Result<Arc<dyn Image>> {
    let mut take = |index| {
        fds.take(index)
            .ok_or_else(|| staged("a descriptor is missing"))
    };
    match config {
        ImageConfig::Raw { file, path } => {
            let access = if read_only {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            };
            Ok(Arc::new(RawImage::from_fd(take(*file)?, path, access)?))
        }
        ImageConfig::Qcow2 { layers } => {
            let mut parts = Vec::new();
            for layer in layers {
                let access = match layer.access {
                    LayerAccess::ReadOnly => Access::ReadOnly,
                    LayerAccess::ReadWrite => Access::ReadWrite,
                };
                parts.push(ChainPart {
                    store: Arc::new(FileStore::from_fd(take(layer.file)?, &layer.path, access)?),
                    format: match layer.format {
                        ImageFormat::Raw => Format::Raw,
                        ImageFormat::Qcow2 => Format::Qcow2,
                    },
                    access,
                });
            }
            Ok(open_chain(parts)?)
        }
    }
}

/// A new layer over an image, as a snapshot has it.
pub(crate) fn cover(
    image: &Arc<dyn Image>,
    overlay: &LayerConfig,
    fds: &mut Fds,
) -> Result<Arc<dyn Image>> {
    let fd = fds.take(overlay.file);
    let fd = fd.ok_or_else(|| staged("a descriptor is missing"))?;
    let part = |fd, path: &str, format, access| -> Result<ChainPart> {
        Ok(ChainPart {
            store: Arc::new(FileStore::from_fd(fd, path, access)?),
            format,
            access,
        })
    };
    let top = part(fd, &overlay.path, Format::Qcow2, Access::ReadWrite)?;
    let any = image.as_any();
    if let Some(qcow2) = any.and_then(|any| any.downcast_ref::<Qcow2Image>()) {
        return Ok(qcow2.under(top)?);
    }
    let Some(raw) = any.and_then(|any| any.downcast_ref::<RawImage>()) else {
        return Err(staged("a snapshot of something else"));
    };
    let fd = raw.descriptor()?;
    let base = part(fd, raw.path(), Format::Raw, Access::ReadOnly)?;
    Ok(open_chain(vec![top, base])?)
}

/// What is below the first layer, for writing. What the disk reads as, written there as a whole, is
/// what a consolidation makes of it.
pub(crate) fn below(
    image: &Arc<dyn Image>,
    below: &LayerConfig,
    fds: &mut Fds,
) -> Result<Arc<dyn Image>> {
    let fd = fds.take(below.file);
    let fd = fd.ok_or_else(|| staged("a descriptor is missing"))?;
    let any = image.as_any();
    let qcow2 = any.and_then(|any| any.downcast_ref::<Qcow2Image>());
    match (below.format, qcow2) {
        (ImageFormat::Raw, _) => Ok(Arc::new(RawImage::from_fd(
            fd,
            &below.path,
            Access::ReadWrite,
        )?)),
        (ImageFormat::Qcow2, Some(qcow2)) => {
            let store = FileStore::from_fd(fd, &below.path, Access::ReadWrite)?;
            let consolidation = Consolidation::new(qcow2, Below::Qcow2(Arc::new(store)))?;
            Ok(consolidation.base())
        }
        (ImageFormat::Qcow2, None) => Err(staged("nothing is below")),
    }
}

/// Others may read what is below the first layer.
pub(crate) fn share(image: &Arc<dyn Image>) {
    let any = image.as_any();
    if let Some(qcow2) = any.and_then(|any| any.downcast_ref::<Qcow2Image>()) {
        let _ = qcow2.share_layer(1, Share::WithReaders);
    }
}

/// Writes bytes anywhere, durably.
pub(crate) fn write(image: &dyn Image, at: u64, bytes: &[u8]) -> Result<()> {
    let start = at - at % SECTOR_BYTES;
    let end = (at + bytes.len() as u64).next_multiple_of(SECTOR_BYTES);
    let length = usize::try_from(end - start).unwrap_or(0);
    let mut sectors = vec![0; length];
    image.read_at(start, &mut sectors)?;
    let skip = usize::try_from(at - start).unwrap_or(0);
    if let Some(place) = sectors.get_mut(skip..skip + bytes.len()) {
        place.copy_from_slice(bytes);
    }
    Blocking::new(image)?.write(start, &sectors)?;
    image.flush()
}
