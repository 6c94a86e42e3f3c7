//! The overlay of a migration with method `snapshot`: a new layer over whatever image a disk is on,
//! which is put on a copy of that image later.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use strake_block::{Access, Delta, Event, Image, ImageQueue, Overlay};
use strake_observe::Result;

use crate::consolidate::Merging;
use crate::header::Backing;
use crate::image::{Qcow2Image, Shared};
use crate::layer::{Layer, RawBase};
use crate::{BadOption, ChainPart, Format, Store};

/// An image of any kind as a layer's file: read only.
#[derive(Debug)]
struct ImageStore(Arc<dyn Image>);

impl ImageStore {
    fn refuse(&self, operation: &str) -> strake_observe::Observation {
        strake_block::ReadOnlyDisk {
            path: self.0.path().to_owned(),
            operation: operation.to_owned(),
        }
        .into()
    }
}

impl Store for ImageStore {
    fn path(&self) -> &str {
        self.0.path()
    }

    fn len(&self) -> Result<u64> {
        Ok(self.0.size())
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Err(self.refuse("a change of its length"))
    }

    fn grows(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, data)
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<()> {
        Err(self.refuse("a write"))
    }

    fn sync(&self) -> Result<()> {
        self.0.flush()
    }

    fn release(&self, _range: Range<u64>) {}

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.0.allocated(from)
    }

    fn block_bytes(&self) -> u64 {
        strake_block::SECTOR_BYTES
    }

    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        self.0.open_queue(depth, event)
    }

    fn is_removed(&self) -> Result<bool> {
        self.0.is_removed()
    }
}

/// The layers of an image, for a layer over it. They are the image's own, so whoever writes the image
/// and whoever reads through the layer use the same tables.
fn layers_of(image: &Arc<dyn Image>) -> Result<Vec<Layer>> {
    let chain = image.as_any().and_then(<dyn std::any::Any>::downcast_ref);
    match chain {
        Some(Qcow2Image { shared }) => Ok(shared.layers().to_vec()),
        None => {
            let store = Arc::new(ImageStore(Arc::clone(image)));
            Ok(vec![Layer::Raw(Arc::new(RawBase::open(store)?))])
        }
    }
}

/// A new layer, as the daemon made it: empty, with the name of the disk's image in its header.
#[derive(Debug)]
pub struct NewOverlay {
    store: Arc<dyn Store>,
    /// How the copy is named in its header.
    copy: Backing,
    chain: Mutex<Option<Arc<Shared>>>,
}

impl NewOverlay {
    /// The layer in that file. `copy` names, for its header, the image that the disk's image is
    /// copied to.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, copy: Backing) -> Self {
        Self {
            store,
            copy,
            chain: Mutex::new(None),
        }
    }

    fn chain(&self) -> Result<Arc<Shared>> {
        let chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        chain.clone().ok_or_else(|| {
            BadOption {
                path: self.store.path().to_owned(),
                why: "it is over no image yet".to_owned(),
            }
            .into()
        })
    }
}

impl Delta for NewOverlay {
    fn path(&self) -> &str {
        self.store.path()
    }

    fn over(&self, below: &Arc<dyn Image>) -> Result<Arc<dyn Image>> {
        let part = ChainPart {
            store: Arc::clone(&self.store),
            format: Format::Qcow2,
            access: Access::ReadWrite,
        };
        let mut layers = vec![Qcow2Image::open_part(part, true)?];
        layers.extend(layers_of(below)?);
        let bad = |why: &str| BadOption {
            path: self.store.path().to_owned(),
            why: why.to_owned(),
        };
        if layers.len() > crate::MAX_LAYERS {
            return Err(bad("the disk has as many layers as it may have").into());
        }
        let image = Qcow2Image::new(layers);
        if image.size() != below.size() {
            return Err(bad("it has another size than the disk").into());
        }
        if image.shared.top.told(0)?.is_some() {
            return Err(bad("it is not empty").into());
        }
        *self.chain.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::clone(&image.shared));
        Ok(image)
    }

    fn rebase(&self, copy: &Arc<dyn Image>) -> Result<()> {
        let chain = self.chain()?;
        let _changing = chain
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut layers = vec![Layer::Qcow(Arc::clone(&chain.top))];
        layers.extend(layers_of(copy)?);
        chain.top.rebase(Some(&self.copy))?;
        chain.set_layers(layers);
        Ok(())
    }

    fn overlay(&self) -> Result<Arc<dyn Overlay>> {
        Ok(Arc::new(Merging(self.chain()?)))
    }

    fn bytes(&self) -> u64 {
        let chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        chain.as_ref().map_or(0, |chain| chain.top.end_of_use())
    }
}
