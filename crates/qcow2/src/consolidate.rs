//! Live consolidation: the uppermost layer goes into the image below it while the guest goes on.
//!
//! It is a migration ([`strake_block::Migration::consolidate`]): the source is the disk as it is, the
//! destination the image below, opened for writing, and what is copied is what the layer has itself.
//! So it converges whatever the guest writes, and ends with one switch-over.
//!
//! # Why nobody reads a wrong state
//!
//! Let `L(x)` be what the layer has of sector `x`, if it *covers* it (data or zeroes of its own), and
//! `B(x)` what the image below reads as. The disk is `D(x) = L(x)` where `x` is covered, else `B(x)`.
//!
//! 1. *What is covered stays covered*: with an image below, writes, zeroes and discards of the guest
//!    add entries to the layer's tables and never take one away (`plan.rs`).
//! 2. *The job changes `B(x)` in two cases only.* `x` is covered: then nobody reads `B(x)`. Or it lies
//!    beside something covered in the same block of the dirty bitmap: then what is written is what was
//!    read of `D(x)` with nobody in between who changed `B(x)`, so it is `B(x)` itself.
//! 3. *The guest's mirrored write* of `x` goes to both while `x` may not be covered yet. Until it has
//!    ended a read may find the old or the new data, as with any disk; when it has ended, `x` is
//!    covered. The rest of the layer's cluster comes from `B` beside `x`, which does not change.
//! 4. *Where things are.* Changing `B(x)` may move the cluster of `B` that has `x`, neighbours
//!    included. The disk reads `B` through the tables that the job changes, and each read holds the
//!    epoch of its look-up, so what it has found stays what it was until it has read it. Reads from
//!    before, that looked `B` up in tables of their own, have ended before the job writes
//!    ([`Overlay::is_ready`]).
//!
//! # What a crash leaves
//!
//! The layer over the image below, until the daemon's transaction names the image below. By 1 and 2
//! that reads right if all is durable. What is not durable yet of the layer is what the guest has not
//! flushed: `x` may be covered no longer, and `B(x)` then has what was there before or something that
//! the guest wrote there since its last flush. Both is what a disk may have after a crash. The guest's
//! flush goes to the layer, so what it had flushed is covered on the disk too, and `B(x)` is not read.
//! Before the daemon is asked the image below is flushed.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use strake_block::{Access, Has, Image, Overlay};
use strake_observe::Result;

use crate::image::{Qcow2Image, Shared};
use crate::layer::Layer;
use crate::map::Told;
use crate::{BadOption, ChainPart, Format, LayerInUse, Store};

/// How long reads that began before may take, where they must have ended at once.
const READS_END: Duration = Duration::from_secs(5);

/// The image below, open for writing.
#[derive(Debug)]
pub enum Below {
    /// A raw image.
    Raw(Arc<dyn Image>),
    /// The file of a qcow2 image. What is below that one is known already.
    Qcow2(Arc<dyn Store>),
}

/// The uppermost layer of a disk on its way into the image below it.
#[derive(Debug)]
pub struct Consolidation {
    merging: Merging,
    base: Arc<dyn Image>,
    replaced: Mutex<Option<Replaced>>,
}

/// A layer that is no longer in use, but for reads that began before.
#[derive(Debug)]
pub(crate) struct Replaced {
    list: Arc<Vec<Layer>>,
    layer: Layer,
}

impl Replaced {
    pub(crate) fn new(list: Arc<Vec<Layer>>, layer: Layer) -> Self {
        Self { list, layer }
    }

    /// Whether all of them have ended.
    pub(crate) fn is_idle(&self) -> bool {
        // Nobody looks anything up in the old list any more; then nobody holds what was found.
        // What is compared includes what we hold ourselves.
        Arc::strong_count(&self.list) == 1
            && match &self.layer {
                Layer::Qcow(qcow) => Arc::strong_count(&qcow.lock().epoch) == 1,
                // It has no tables; what is read there is not changed by anybody.
                Layer::Raw(_) => true,
            }
    }

    /// Waits for that.
    pub(crate) fn wait(&self, path: &str) -> Result<()> {
        let end = Instant::now() + READS_END;
        while !self.is_idle() {
            if Instant::now() > end {
                let path = path.to_owned();
                return Err(LayerInUse { path }.into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Consolidation {
    /// Makes the image below `disk`'s uppermost layer ready to be written. The disk reads as before,
    /// and goes on so if nothing comes of it. The daemon has seen to it that nobody else uses that
    /// image.
    ///
    /// An image below that is smaller than the disk is made as large, if it is qcow2; a raw one
    /// has to be before.
    ///
    /// # Errors
    /// When the disk has one layer only, the image below is larger than the disk (what is hidden
    /// would come to light), has another format, or does not open.
    pub fn new(disk: &Qcow2Image, below: Below) -> Result<Self> {
        let shared = Arc::clone(&disk.shared);
        let bad = |why: &str| BadOption {
            path: shared.path.clone(),
            why: why.to_owned(),
        };
        let size = shared.top.size();
        // The list itself must not be held: whoever waits for its readers would wait for us.
        let second = shared.layers().get(1).cloned();
        let mut replaced = None;
        let base: Arc<dyn Image> = match (second, below) {
            (Some(Layer::Raw(_)), Below::Raw(image)) => image,
            (Some(Layer::Qcow(qcow)), Below::Qcow2(store)) => {
                // One that is open for writing already has changes in memory: it is the one.
                if qcow.access == Access::ReadOnly {
                    let part = ChainPart {
                        store,
                        format: Format::Qcow2,
                        access: Access::ReadWrite,
                    };
                    replaced = Some(disk.replace_layer(1, part)?);
                }
                let lower = disk.lower(1)?;
                if lower.size() < size {
                    if let Some(replaced) = replaced.take() {
                        replaced.wait(lower.path())?;
                    }
                    lower.grow(size)?;
                }
                lower
            }
            (Some(_), _) => return Err(bad("the image below it has another format").into()),
            (None, _) => return Err(bad("it has no image below it").into()),
        };
        if base.size() > size {
            return Err(
                bad("the image below it is larger: what it hides would come to light").into(),
            );
        }
        Ok(Self {
            merging: Merging(shared),
            base,
            replaced: Mutex::new(replaced),
        })
    }

    /// The image that all goes into: the destination of the migration.
    #[must_use]
    pub fn base(&self) -> Arc<dyn Image> {
        Arc::clone(&self.base)
    }
}

impl Overlay for Consolidation {
    fn has(&self, from: u64) -> Result<Option<(Range<u64>, Has)>> {
        self.merging.has(from)
    }

    fn is_ready(&self) -> bool {
        let mut replaced = self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        if replaced.as_ref().is_some_and(|it| !it.is_idle()) {
            return false;
        }
        *replaced = None;
        true
    }

    fn merged(&self) {
        self.merging.merged();
    }
}

/// A disk whose uppermost layer goes into the image below it, which is the disk's own: nobody has
/// other tables.
#[derive(Debug)]
pub(crate) struct Merging(pub(crate) Arc<Shared>);

impl Overlay for Merging {
    fn has(&self, from: u64) -> Result<Option<(Range<u64>, Has)>> {
        let told = self.0.top.told(from)?;
        Ok(told.map(|(range, told)| {
            let has = match told {
                Told::Data => Has::Data,
                Told::Zeroes => Has::Zeroes,
            };
            (range, has)
        }))
    }

    fn is_ready(&self) -> bool {
        true
    }

    fn merged(&self) {
        self.0.merged.store(true, Ordering::Relaxed);
    }
}
