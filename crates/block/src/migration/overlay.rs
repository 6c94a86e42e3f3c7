//! What a consolidation asks of the layer that it takes away.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use strake_observe::Result;

use crate::Image;

/// What a layer has itself of a range, so that what is below is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// Data.
    Data,
    /// Zeroes, which the image below has to become.
    Zeroes,
}

/// The uppermost layer of a disk, of which only what it has itself goes to the image below.
///
/// The destination of such a job is a part of its source. That is right under two conditions, which
/// whoever implements this keeps: what the layer has once it has for ever, whatever the guest does;
/// and the disk finds its way through the image below by the same tables by which the job changes it.
pub trait Overlay: Send + Sync + Debug {
    /// The first range at or after `from` of which the layer has something itself, and what.
    ///
    /// # Errors
    /// When the layer is damaged or the file system fails.
    fn has(&self, from: u64) -> Result<Option<(Range<u64>, Has)>>;

    /// Whether the image below may be written by now: nobody reads it by other tables any more.
    fn is_ready(&self) -> bool;

    /// The daemon has committed: all that the layer has is in the image below, and nobody needs the
    /// layer any more.
    fn merged(&self);
}

/// A new and empty overlay: what the guest's writes go to while the disk's image, which does not
/// change any more, is copied.
pub trait Delta: Send + Sync + Debug {
    /// Its name for observations.
    fn path(&self) -> &str;

    /// The disk that the overlay and `below` make; it reads as `below`.
    ///
    /// # Errors
    /// When the overlay does not fit, or is not empty.
    fn over(&self, below: &Arc<dyn Image>) -> Result<Arc<dyn Image>>;

    /// Puts the overlay on `copy`, which holds the same as the image below and is durable: first
    /// durably in the overlay itself, by one write that a crash leaves undone or done, then for the
    /// requests to come.
    ///
    /// # Errors
    /// When the overlay cannot be written. It may be over either then, which is the same.
    fn rebase(&self, copy: &Arc<dyn Image>) -> Result<()>;

    /// What the overlay has, to consolidate it into what it is over.
    ///
    /// # Errors
    /// When it is over nothing yet.
    fn overlay(&self) -> Result<Arc<dyn Overlay>>;

    /// How many bytes of its store it uses.
    fn bytes(&self) -> u64;
}

/// How many bytes a layer has.
pub(crate) fn covered_bytes(overlay: &dyn Overlay, size: u64) -> Result<u64> {
    let mut sum = 0;
    let mut at = 0;
    while let Some((range, _)) = overlay.has(at)? {
        let end = range.end.min(size);
        if range.start >= end {
            break;
        }
        sum += end - range.start;
        at = end;
    }
    Ok(sum)
}
