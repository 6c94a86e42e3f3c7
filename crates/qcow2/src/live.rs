//! Changing the list of layers while the disk is in use.
//!
//! The images made here share their layers: tables in memory and epochs are the same, so a job
//! that changes a lower layer and the guest that reads through it do not get in each other's way.

use std::sync::{Arc, PoisonError};

use strake_block::Access;
use strake_block::lock::Share;
use strake_observe::Result;

use crate::consolidate::Replaced;
use crate::header::Backing;
use crate::image::Qcow2Image;
use crate::layer::Layer;
use crate::state::Qcow;
use crate::{BadOption, ChainChanged, ChainPart, Format};

impl Qcow2Image {
    fn bad(&self, why: &str) -> BadOption {
        BadOption {
            path: self.shared.path.clone(),
            why: why.to_owned(),
        }
    }

    /// Opens a layer's file as qcow2.
    pub(crate) fn open_part(part: ChainPart, has_below: bool) -> Result<Layer> {
        let path = part.store.path().to_owned();
        let wrong = |why: &str| ChainChanged {
            path: path.clone(),
            why: why.to_owned(),
        };
        if part.format != Format::Qcow2 {
            return Err(wrong("it is not qcow2").into());
        }
        part.store.get_ready();
        let qcow = Qcow::open(part.store, part.access)?;
        if qcow.lock().header.backing.is_some() != has_below {
            return Err(wrong("its header does not fit where it is to be").into());
        }
        Ok(Layer::Qcow(Arc::new(qcow)))
    }

    /// A snapshot: this disk below a new image, which is empty and names this one as its backing
    /// file. Everything that was written is durable in this one when it returns. From then on only
    /// the new one may be written: whoever calls has closed the gate of the disk.
    ///
    /// # Errors
    /// When this image cannot be flushed or the new one cannot be opened.
    pub fn under(&self, part: ChainPart) -> Result<Arc<Self>> {
        self.shared.top.flush()?;
        let mut layers = vec![Self::open_part(part, true)?];
        layers.extend(self.shared.layers().iter().cloned());
        if layers.len() > crate::MAX_LAYERS {
            return Err(self.bad("it has as many layers as a disk may have").into());
        }
        Ok(Self::new(layers))
    }

    /// Changes the lock on the file of the layer with that number, see [`Store::share`](crate::Store::share).
    ///
    /// # Errors
    /// When there is no such layer, or its file system has no locks.
    pub fn share_layer(&self, layer: usize, share: Share) -> Result<bool> {
        match self.shared.layers().get(layer) {
            Some(layer) => layer.store().share(share),
            None => Err(self.bad("it has no such layer").into()),
        }
    }

    /// The disk that the layers from that number on make: what a commit goes into.
    ///
    /// # Errors
    /// When there is no such layer, or it is a raw image: that one is opened as what it is.
    pub fn lower(&self, layer: usize) -> Result<Arc<Self>> {
        let layers = self.shared.layers();
        let lower = layers.get(layer..).unwrap_or_default().to_vec();
        match lower.first() {
            Some(Layer::Qcow(_)) => Ok(Self::new(lower)),
            Some(Layer::Raw(_)) => Err(self.bad("the layer is raw").into()),
            None => Err(self.bad("it has no such layer").into()),
        }
    }

    /// Opens a layer again, mostly to write what was opened for reading. When it returns nobody
    /// reads by the old one's tables any more.
    ///
    /// # Errors
    /// When there is no such layer, its file does not open, or reads of the old one do not end.
    pub fn reopen(&self, layer: usize, part: ChainPart) -> Result<()> {
        self.replace_layer(layer, part)?.wait(&self.shared.path)
    }

    /// As [`reopen`](Self::reopen), without the waiting.
    pub(crate) fn replace_layer(&self, layer: usize, part: ChainPart) -> Result<Replaced> {
        let shared = &self.shared;
        let _changing = shared
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut layers = shared.layers().to_vec();
        let last = layer + 1 >= layers.len();
        let opened = Self::open_part(part, !last)?;
        let old = match layers.get_mut(layer).filter(|_| layer > 0) {
            Some(place) => std::mem::replace(place, opened),
            None => return Err(self.bad("it has no such layer below it").into()),
        };
        Ok(Replaced::new(shared.set_layers(layers), old))
    }

    /// Takes a layer out whose content was committed into the one below, which `backing` names:
    /// first on the disk, in the header of the one above, then for the requests to come.
    ///
    /// # Errors
    /// When there is no such layer, or the header above cannot be changed; nothing has changed
    /// then.
    pub fn remove_layer(&self, layer: usize, backing: &Backing) -> Result<()> {
        let _changing = self
            .shared
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut layers = self.shared.layers().to_vec();
        if layer == 0 || layer + 1 >= layers.len() {
            return Err(self
                .bad("only a layer between two others can be removed")
                .into());
        }
        match layers.get(layer - 1) {
            Some(Layer::Qcow(above)) if above.access == Access::ReadWrite => {
                above.rebase(Some(backing))?;
            }
            _ => return Err(self.bad("the layer above may only be read").into()),
        }
        layers.remove(layer);
        self.shared.set_layers(layers);
        Ok(())
    }
}
