//! Layers on each other: where a byte of the disk is.

use std::sync::Arc;

use strake_block::SECTOR_BYTES;
use strake_observe::Result;

use crate::Store;
use crate::map::Mapping;
use crate::num::{put, us};
use crate::state::{Epoch, Qcow};

/// One image of a chain.
#[derive(Debug, Clone)]
pub(crate) enum Layer {
    Qcow(Arc<Qcow>),
    Raw(Arc<RawBase>),
}

/// A raw image below all others. It is only read.
#[derive(Debug)]
pub(crate) struct RawBase {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) end: u64,
}

/// Where a range of the disk is.
#[derive(Debug)]
pub(crate) enum Place {
    /// It reads as zeroes.
    Zero,
    /// In the file of a layer, to be read by a queue.
    Data {
        layer: usize,
        host: u64,
        epoch: Epoch,
    },
    /// In the last bytes of a layer's file, which are no whole sector: not by a queue.
    Tail { layer: usize, host: u64 },
    /// Compressed in a layer's file; it begins `within` bytes into the cluster.
    Packed {
        layer: usize,
        host: u64,
        bytes: u64,
        within: u64,
        _epoch: Epoch,
    },
}

impl RawBase {
    pub(crate) fn open(store: Arc<dyn Store>) -> Result<Self> {
        let end = store.len()?;
        Ok(Self { store, end })
    }
}

impl Layer {
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        match self {
            Self::Qcow(qcow) => &qcow.store,
            Self::Raw(raw) => &raw.store,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Qcow(qcow) => qcow.size(),
            Self::Raw(raw) => raw.end.next_multiple_of(SECTOR_BYTES),
        }
    }

    /// Where its file ends, if it cannot grow.
    fn end(&self) -> u64 {
        match self {
            Self::Qcow(qcow) => qcow.end,
            Self::Raw(raw) => raw.end,
        }
    }

    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Qcow(one), Self::Qcow(two)) => Arc::ptr_eq(one, two),
            (Self::Raw(one), Self::Raw(two)) => Arc::ptr_eq(one, two),
            _ => false,
        }
    }
}

/// Where the byte at `offset` is as the layers from `from` on see it, and for how many of the
/// `len` bytes that holds; at least one, if `len` is not zero.
pub(crate) fn resolve(
    layers: &[Layer],
    from: usize,
    offset: u64,
    mut len: u64,
) -> Result<(Place, u64)> {
    for (number, layer) in layers.iter().enumerate().skip(from) {
        let size = layer.size();
        if offset >= size {
            return Ok((Place::Zero, len));
        }
        len = len.min(size - offset);
        let (host, epoch) = match layer {
            Layer::Raw(_) => (offset, Arc::new(())),
            Layer::Qcow(qcow) => {
                let (mapping, same, epoch) = qcow.map(offset, len)?;
                len = same;
                match mapping {
                    Mapping::Unallocated => continue,
                    Mapping::Zero { .. } => return Ok((Place::Zero, len)),
                    Mapping::Packed { host, bytes } => {
                        let within = offset & (qcow.cluster() - 1);
                        let place = Place::Packed {
                            layer: number,
                            host,
                            bytes,
                            within,
                            _epoch: epoch,
                        };
                        return Ok((place, len));
                    }
                    Mapping::Data { host, .. } => (host, epoch),
                }
            }
        };
        let end = layer.end();
        if host >= end {
            return Ok((Place::Zero, len));
        }
        let layer = number;
        let whole = end - end % SECTOR_BYTES;
        if host >= whole {
            // Inside of the file's last sector: it is zero behind the end.
            let len = len.min((whole + SECTOR_BYTES) - host);
            return Ok((Place::Tail { layer, host }, len));
        }
        len = len.min(whole - host);
        return Ok((Place::Data { layer, host, epoch }, len));
    }
    Ok((Place::Zero, len))
}

/// Reads at once, in this thread, what the layers from `from` on have at `offset`.
pub(crate) fn read(layers: &[Layer], from: usize, offset: u64, data: &mut [u8]) -> Result<()> {
    let mut done = 0u64;
    let len = data.len() as u64;
    while done < len {
        let (place, count) = resolve(layers, from, offset + done, len - done)?;
        let Some(room) = data.get_mut(us(done)..us(done + count)) else {
            break;
        };
        read_place(layers, &place, room)?;
        done += count;
    }
    Ok(())
}

/// Reads one place at once.
pub(crate) fn read_place(layers: &[Layer], place: &Place, room: &mut [u8]) -> Result<()> {
    let store = |layer: &usize| layers.get(*layer).map(Layer::store);
    match place {
        Place::Zero => room.fill(0),
        Place::Data { layer, host, .. } | Place::Tail { layer, host } => {
            if let Some(store) = store(layer) {
                store.read_at(*host, room)?;
            }
        }
        Place::Packed {
            layer,
            host,
            bytes,
            within,
            ..
        } => {
            if let Some(Layer::Qcow(qcow)) = layers.get(*layer) {
                let cluster = qcow.unpack(*host, *bytes)?;
                put(room, 0, cluster.get(us(*within)..).unwrap_or_default());
            }
        }
    }
    Ok(())
}

/// Whether all of a range reads as zeroes without looking at data.
pub(crate) fn is_zero(layers: &[Layer], from: usize, offset: u64, len: u64) -> Result<bool> {
    let mut done = 0;
    while done < len {
        let (place, count) = resolve(layers, from, offset + done, len - done)?;
        if !matches!(place, Place::Zero) {
            return Ok(false);
        }
        done += count;
    }
    Ok(true)
}
