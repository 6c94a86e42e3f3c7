//! Streaming: what is below an image goes into it, while a guest writes it.
//!
//! Cluster by cluster: one that the image says nothing about is reserved as for a guest's write,
//! filled with what the layers below have, and linked. A guest's write to it waits that long, and
//! finds the cluster its own afterwards. At the end nothing is read from below any longer; the
//! header is changed, and only then do the layers leave the chain.

use std::sync::{Arc, PoisonError};

use strake_block::Image;
use strake_observe::{Because, Result};

use crate::header::Backing;
use crate::image::{Qcow2Image, extent};
use crate::layer::{Layer, read};
use crate::map::Mapping;
use crate::num::us;
use crate::{BadOption, Progress, StreamFailed};

/// A stream, step by step. It can begin anywhere again after a crash: what is in the image is not
/// copied twice.
#[derive(Debug)]
pub struct Stream {
    image: Arc<Qcow2Image>,
    /// The layer that stays below, and its name for the header.
    base: Option<(usize, Backing)>,
    at: u64,
}

impl Stream {
    /// Copies everything below `image` into it, or everything above the layer with the number
    /// `base`, which stays. It begins at the byte `from`.
    ///
    /// # Errors
    /// When there is no such layer.
    pub fn new(image: Arc<Qcow2Image>, base: Option<(usize, Backing)>, from: u64) -> Result<Self> {
        if let Some((number, _)) = base
            && (number == 0 || number >= image.depth())
        {
            let path = image.path().to_owned();
            let why = format!("it has no layer {number} below it");
            return Err(BadOption { path, why }.into());
        }
        Ok(Self {
            image,
            base,
            at: from,
        })
    }

    /// Goes on, with at most about `bytes` of data. After the last step the image needs nothing
    /// of what was copied, on the disk too.
    ///
    /// # Errors
    /// When an image fails; the step can be tried again.
    pub fn step(&mut self, bytes: u64) -> Result<Progress> {
        let at = self.at;
        let path = self.image.path().to_owned();
        self.go_on(bytes.max(1))
            .because_of(|| StreamFailed { child: path, at })
    }

    fn go_on(&mut self, bytes: u64) -> Result<Progress> {
        let image = Arc::clone(&self.image);
        let layers = image.shared.layers();
        let copied = self.base.as_ref().map_or(layers.len(), |(base, _)| *base);
        let between = layers.get(1..copied).unwrap_or_default();
        let top = &image.shared.top;
        let cluster = top.cluster();
        let size = top.size();
        self.at -= self.at % cluster;
        let mut done = 0;
        while self.at < size {
            if done >= bytes {
                return Ok(Progress::At(self.at));
            }
            let (mapping, len, _) = top.map(self.at, size - self.at)?;
            let skip = match mapping {
                Mapping::Unallocated if self.base.is_some() => untold(between, self.at, len)?,
                Mapping::Unallocated => match extent(between, 0, self.at, len)? {
                    (true, len) => len,
                    (false, _) => 0,
                },
                _ => len,
            };
            if skip >= cluster || self.at + skip >= size {
                let end = self.at + skip;
                self.at = if end >= size {
                    size
                } else {
                    end - end % cluster
                };
                continue;
            }
            self.fill(&layers)?;
            self.at += cluster;
            done += cluster;
        }
        self.end(copied)?;
        Ok(Progress::Done)
    }

    /// Copies one cluster, unless it has come into the image meanwhile.
    fn fill(&self, layers: &[Layer]) -> Result<()> {
        let top = &self.image.shared.top;
        let cluster = top.cluster();
        let Some(reserved) = top.reserve_unallocated(self.at >> top.cluster_bits)? else {
            return Ok(());
        };
        let mut data = vec![0; us(cluster)];
        let len = us(cluster.min(top.size().saturating_sub(self.at)));
        let content = data.get_mut(..len).unwrap_or_default();
        if let Err(seen) = read(layers, 1, self.at, content) {
            top.unlink(&reserved);
            return Err(seen);
        }
        if data.iter().all(|byte| *byte == 0) && (self.base.is_none() || top.version >= 3) {
            if self.base.is_some() {
                return top.link_zero(&reserved);
            }
            top.unlink(&reserved);
            return Ok(());
        }
        let host = reserved.run.first << top.cluster_bits;
        if let Err(seen) = top.store.write_at(host, &data) {
            top.unlink(&reserved);
            return Err(seen);
        }
        top.link(reserved)
    }

    /// Nothing is read from the copied layers any longer: says so on the disk, then lets them go.
    fn end(&self, copied: usize) -> Result<()> {
        let image = &self.image;
        let _changing = image
            .shared
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        image
            .shared
            .top
            .rebase(self.base.as_ref().map(|(_, backing)| backing))?;
        let layers = image.shared.layers();
        let kept = layers.get(copied..).unwrap_or_default();
        let mut left: Vec<Layer> = layers.iter().take(1).cloned().collect();
        left.extend(kept.iter().cloned());
        image.shared.set_layers(left);
        Ok(())
    }
}

/// For how many bytes from `at` on none of the layers says anything.
fn untold(layers: &[Layer], at: u64, mut len: u64) -> Result<u64> {
    for layer in layers {
        let Layer::Qcow(qcow) = layer else {
            return Ok(0);
        };
        if at >= qcow.size() {
            // Behind its end it reads as zeroes, whatever is below.
            return Ok(0);
        }
        let (mapping, same, _) = qcow.map(at, len.min(qcow.size() - at))?;
        if mapping != Mapping::Unallocated {
            return Ok(0);
        }
        len = same;
    }
    Ok(len)
}
