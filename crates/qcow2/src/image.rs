//! The disk that a chain of layers makes.

use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use strake_block::{Access, BadRequest, Event, Image, ImageQueue, Operation};
use strake_observe::Result;

use crate::header::Backing;
use crate::layer::{Layer, Place, read, resolve};
use crate::map::Told;
use crate::queue::Queue;
use crate::state::Qcow;

/// A qcow2 image with everything below it. Its first layer is qcow2 always.
///
/// Dropping the last handle writes what is left to be written and makes the file as short as its
/// content; without that (a killed process) the image is whole as well, but may be longer and have
/// clusters that are counted and not used.
#[derive(Debug)]
pub struct Qcow2Image {
    pub(crate) shared: Arc<Shared>,
}

/// What the queues of an image share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) path: String,
    pub(crate) top: Arc<Qcow>,
    layers: RwLock<Arc<Vec<Layer>>>,
    /// One job at a time changes the header or the list of layers.
    pub(crate) changing: Mutex<()>,
    /// All that it has is elsewhere too: nothing is worth the writing any more.
    pub(crate) merged: AtomicBool,
}

/// A part of a disk that is alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Where, in bytes.
    pub range: Range<u64>,
    /// What is there.
    pub kind: ExtentKind,
}

/// What a layer, or a chain, has somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, which may happen to be zeroes.
    Data,
    /// Zeroes, without looking. Of one layer: it hides what is below.
    Zeroes,
}

impl Shared {
    pub(crate) fn layers(&self) -> Arc<Vec<Layer>> {
        Arc::clone(&self.layers.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives back the list that was in use.
    pub(crate) fn set_layers(&self, layers: Vec<Layer>) -> Arc<Vec<Layer>> {
        let mut list = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *list, Arc::new(layers))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.merged.load(Ordering::Relaxed) {
            return;
        }
        for layer in self.layers().iter() {
            if let Layer::Qcow(qcow) = layer
                && qcow.access == Access::ReadWrite
            {
                // What fails here fails for the guest's last flush too, and that one was told.
                let _ = qcow.close();
            }
        }
    }
}

impl Qcow2Image {
    pub(crate) fn new(layers: Vec<Layer>) -> Arc<Self> {
        let top = layers.first().and_then(|layer| match layer {
            Layer::Qcow(qcow) => Some(Arc::clone(qcow)),
            Layer::Raw(_) => None,
        });
        // `open_chain`, the only caller, has seen to it.
        let Some(top) = top else {
            unreachable!("a chain begins with a qcow2 image");
        };
        Arc::new(Self {
            shared: Arc::new(Shared {
                path: top.store.path().to_owned(),
                top,
                layers: RwLock::new(Arc::new(layers)),
                changing: Mutex::new(()),
                merged: AtomicBool::new(false),
            }),
        })
    }

    /// How many layers it has.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.shared.layers().len()
    }

    /// The next part at or after `from` about which the layer with that number (0 is the first)
    /// says anything itself. Everything that is not told is what the layers below have.
    ///
    /// # Errors
    /// When the image is damaged or the file system fails.
    pub fn extent_of_layer(&self, layer: usize, from: u64) -> Result<Option<Extent>> {
        match self.shared.layers().get(layer) {
            Some(Layer::Qcow(qcow)) => Ok(qcow.told(from)?.map(|(range, told)| Extent {
                range,
                kind: match told {
                    Told::Data => ExtentKind::Data,
                    Told::Zeroes => ExtentKind::Zeroes,
                },
            })),
            Some(Layer::Raw(raw)) => Ok(raw.store.allocated(from)?.map(|range| Extent {
                range,
                kind: ExtentKind::Data,
            })),
            None => Ok(None),
        }
    }

    /// Names another image below in the header, for an image that stays open: its content must be
    /// the same as that of the layers below now. The layers in use do not change.
    ///
    /// # Errors
    /// When the name does not fit or the file system fails.
    pub fn rebase(&self, backing: Option<&Backing>) -> Result<()> {
        let _changing = self
            .shared
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.shared.top.rebase(backing)
    }

    /// Whether everything that was written is in the file too, if not yet on the disk.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        !self.shared.top.is_dirty()
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        let size = self.size();
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(BadRequest {
                path: self.shared.path.clone(),
                operation: Operation::Read.name().to_owned(),
                offset,
                length,
                size,
            }
            .into());
        }
        Ok(())
    }
}

impl Image for Qcow2Image {
    fn path(&self) -> &str {
        &self.shared.path
    }

    fn size(&self) -> u64 {
        self.shared.top.size()
    }

    fn access(&self) -> Access {
        self.shared.top.access
    }

    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        Ok(Box::new(Queue::new(&self.shared, depth, event)?))
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.check(offset, data.len() as u64)?;
        read(&self.shared.layers(), 0, offset, data)
    }

    fn flush(&self) -> Result<()> {
        self.shared.top.flush()
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        let layers = self.shared.layers();
        let size = self.size();
        let mut at = from;
        let mut found: Option<Range<u64>> = None;
        while at < size {
            let (zero, len) = extent(&layers, 0, at, size - at)?;
            match &mut found {
                None if !zero => found = Some(at..at + len),
                Some(range) if !zero => range.end = at + len,
                Some(_) => break,
                None => {}
            }
            at += len;
        }
        Ok(found)
    }

    fn is_removed(&self) -> Result<bool> {
        self.shared.top.store.is_removed()
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

/// As [`resolve`], and a raw image's holes are zeroes too: whether it reads as zeroes, and how far.
pub(crate) fn extent(layers: &[Layer], from: usize, at: u64, len: u64) -> Result<(bool, u64)> {
    let (place, len) = resolve(layers, from, at, len)?;
    let Place::Data { layer, host, .. } = place else {
        return Ok((matches!(place, Place::Zero), len));
    };
    let Some(Layer::Raw(raw)) = layers.get(layer) else {
        return Ok((false, len));
    };
    Ok(match raw.store.allocated(host)? {
        Some(range) if range.start <= host => (false, len.min(range.end - host)),
        Some(range) => (true, len.min(range.start - host)),
        None => (true, len),
    })
}

impl Qcow {
    /// How much of its file was ever used, in bytes; the length if that is not known.
    pub(crate) fn end_of_use(&self) -> u64 {
        let state = self.lock();
        let known = state.refs.as_ref().and_then(|refs| refs.end_of_use());
        known.unwrap_or(state.length)
    }

    /// Writes what is left and cuts off what is not used at the end.
    pub(crate) fn close(self: &Arc<Self>) -> Result<()> {
        if self.is_dirty() || !self.lock().batches.is_empty() {
            self.flush()?;
            // What the first one freed on the disk is counted as free by the second.
            self.flush()?;
        }
        let mut guard = self.lock();
        let state = &mut *guard;
        let store = Arc::clone(&self.store);
        if !store.grows() || state.flushing {
            return Ok(());
        }
        let Some(refs) = state.refs.as_mut() else {
            return Ok(());
        };
        let end = refs.end(&*store)?;
        if end > 0 && end < store.len()? {
            store.set_len(end)?;
            // Other images may still use it.
            state.length = end;
        }
        Ok(())
    }
}
