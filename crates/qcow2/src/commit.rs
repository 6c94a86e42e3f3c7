//! Commit: what a layer has goes into the image below it.
//!
//! The parent changes only where the layer hides it, so whoever reads through the layer sees the
//! same at any instant. When it is done, the parent reads as the layer did: the images above the
//! layer are rebased onto the parent, and the layer can be removed.

use std::sync::Arc;

use strake_block::{Blocking, Image, Operation};
use strake_observe::{Because, Result};

use crate::image::Qcow2Image;
use crate::layer::{Layer, read};
use crate::num::us;
use crate::{BadOption, CommitFailed, ExtentKind, Progress};

/// Read and written at once.
const PIECE: u64 = 1024 * 1024;

/// A commit, step by step.
///
/// The layer must not be written meanwhile: it is a read-only one of a live chain, or the first of
/// a chain that nobody writes. Whoever keeps the cursor can go on after a crash: steps may be
/// repeated.
#[derive(Debug)]
pub struct Commit {
    child: Arc<Qcow2Image>,
    layer: usize,
    parent: Arc<dyn Image>,
    queue: Blocking,
    at: u64,
    memory: Vec<u8>,
}

impl Commit {
    /// The commit of the layer with that number in `child` into `parent`: the chain that begins
    /// with the layer's parent, opened for writing, or a raw image. It begins at the byte `from`.
    ///
    /// # Errors
    /// When the parent is smaller than the layer's disk: it has to be made larger before. When it
    /// is larger and there are layers above: they would see what the layer hides.
    pub fn new(
        child: Arc<Qcow2Image>,
        layer: usize,
        parent: Arc<dyn Image>,
        from: u64,
    ) -> Result<Self> {
        let size = child.shared.layers().get(layer).map_or(0, Layer::size);
        if parent.size() < size {
            return Err(BadOption {
                path: parent.path().to_owned(),
                why: format!(
                    "it has {} bytes, what is committed into it has {size}",
                    parent.size()
                ),
            }
            .into());
        }
        if layer > 0 && parent.size() > size {
            // Whoever is above reads zeroes there now.
            return Err(BadOption {
                path: parent.path().to_owned(),
                why: format!(
                    "it has more than the {size} bytes of the layer between it and others"
                ),
            }
            .into());
        }
        let queue = Blocking::new(&*parent)?;
        Ok(Self {
            child,
            layer,
            parent,
            queue,
            at: from,
            memory: Vec::new(),
        })
    }

    /// Goes on, with at most about `bytes` of data. After the last step the parent has everything
    /// and it is durable.
    ///
    /// # Errors
    /// When either image fails; the step can be tried again.
    pub fn step(&mut self, bytes: u64) -> Result<Progress> {
        let at = self.at;
        let (child, parent) = (Arc::clone(&self.child), Arc::clone(&self.parent));
        let failed = || CommitFailed {
            child: child.path().to_owned(),
            parent: parent.path().to_owned(),
            at,
        };
        let mut left = bytes.max(1);
        while left > 0 {
            let Some(extent) = child
                .extent_of_layer(self.layer, self.at)
                .because_of(failed)?
            else {
                parent.flush().because_of(failed)?;
                return Ok(Progress::Done);
            };
            let start = extent.range.start;
            let mut len = extent.range.end - start;
            match extent.kind {
                ExtentKind::Zeroes => self.zero(start, len).because_of(failed)?,
                ExtentKind::Data => {
                    len = len.min(left.next_multiple_of(4096)).min(PIECE);
                    self.copy(start, len).because_of(failed)?;
                    left = left.saturating_sub(len);
                }
            }
            self.at = start + len;
        }
        Ok(Progress::At(self.at))
    }

    fn zero(&mut self, start: u64, len: u64) -> Result<()> {
        self.queue
            .operate(Operation::WriteZeroes { len, unmap: true }, start)
    }

    fn copy(&mut self, start: u64, len: u64) -> Result<()> {
        let layers = self.child.shared.layers();
        let one = layers.get(self.layer..=self.layer).unwrap_or_default();
        self.memory.resize(us(len), 0);
        read(one, 0, start, &mut self.memory)?;
        if self.memory.iter().all(|byte| *byte == 0) {
            return self.zero(start, len);
        }
        self.queue.write(start, &self.memory)
    }
}
