//! The images of a disk as a tree: what a disk is based on, and what nobody needs any more.

use std::collections::HashSet;

use strake_api::rest::{DiskLayer, DiskTree, Snapshot};
use strake_observe::{Observation, Result};

use super::{Host, note};
use crate::crash;
use crate::inventory::{DiskRecord, LayerId, LayerRecord, VmRecord};
use crate::observations::NoSuchDisk;
use crate::storage::image;

/// A disk of a VM.
pub(super) fn disk_of<'a>(vm: &'a VmRecord, disk: &str) -> Result<&'a DiskRecord> {
    vm.disks.iter().find(|of| of.name == disk).ok_or_else(|| {
        let has: Vec<_> = vm.disks.iter().map(|of| of.name.as_str()).collect();
        Observation::from(NoSuchDisk {
            vm: vm.name.clone(),
            disk: disk.to_owned(),
            has: has.join(", "),
        })
    })
}

/// The layers that the disk of now is based on, from the upper ones down.
pub(super) fn chain_of(disk: &DiskRecord) -> Vec<&LayerRecord> {
    let mut chain: Vec<&LayerRecord> = Vec::new();
    let mut next = disk.parent;
    while let Some(id) = next
        && let Some(layer) = disk.layers.iter().find(|layer| layer.id == id)
        && chain.len() <= disk.layers.len()
    {
        chain.push(layer);
        next = layer.parent;
    }
    chain
}

/// How many images of the disk are based on a layer.
pub(super) fn children(disk: &DiskRecord, layer: LayerId) -> usize {
    let layers = disk.layers.iter().filter(|of| of.parent == Some(layer));
    layers.count() + usize::from(disk.parent == Some(layer))
}

/// The snapshots of a disk.
pub(super) fn snapshots(disk: &DiskRecord) -> Vec<Snapshot> {
    let current: HashSet<LayerId> = chain_of(disk).iter().map(|layer| layer.id).collect();
    let named = |layer: &LayerRecord| layer.name.clone();
    disk.layers
        .iter()
        .filter_map(|layer| {
            // Layers without a name between two snapshots are nobody's business.
            let mut parent = layer.parent;
            let mut above = None;
            while let Some(id) = parent
                && above.is_none()
            {
                let below = disk.layers.iter().find(|of| of.id == id);
                above = below.and_then(named);
                parent = below.and_then(|below| below.parent);
            }
            Some(Snapshot {
                name: layer.name.clone()?,
                image: layer.image.to_string(),
                format: layer.image.format,
                taken_ms: layer.taken_ms,
                parent: above,
                current: current.contains(&layer.id),
            })
        })
        .collect()
}

impl Host {
    /// A disk's images and snapshots.
    ///
    /// # Errors
    /// No such VM or disk, or the inventory cannot be read.
    pub fn disk_tree(&self, vm: &str, disk: &str) -> Result<DiskTree> {
        let record = self.inventory.vm(vm)?;
        let disk = disk_of(&record, disk)?;
        let current: HashSet<LayerId> = chain_of(disk).iter().map(|layer| layer.id).collect();
        let place = |id: Option<LayerId>| {
            let id = id?;
            disk.layers.iter().position(|layer| layer.id == id)
        };
        let allocated = |image: &crate::Binding| {
            let looks = image::look(image.file().ok()?).ok().flatten();
            looks.map(|looks| looks.allocated)
        };
        let mut layers: Vec<DiskLayer> = disk
            .layers
            .iter()
            .map(|layer| DiskLayer {
                image: layer.image.to_string(),
                format: layer.image.format,
                datastore: layer.datastore.clone(),
                allocated_bytes: allocated(&layer.image),
                parent: place(layer.parent),
                snapshot: layer.name.clone(),
                taken_ms: layer.name.as_ref().map(|_| layer.taken_ms),
                current: current.contains(&layer.id),
            })
            .collect();
        layers.push(DiskLayer {
            image: disk.image.to_string(),
            format: disk.image.format,
            datastore: disk.datastore.clone(),
            allocated_bytes: allocated(&disk.image),
            parent: place(disk.parent),
            snapshot: None,
            taken_ms: None,
            current: true,
        });
        Ok(DiskTree {
            vm: record.name.clone(),
            disk: disk.name.clone(),
            layers,
        })
    }

    /// Removes the layers of a VM's disks that are no snapshots and that no image is based on. One
    /// that cannot be removed now stays in the inventory, and is tried again when the next job of the
    /// VM ends.
    pub(super) fn drop_unneeded(&self, vm: &str) {
        // Each that goes may leave the one below it without a use.
        while let Ok(record) = self.inventory.vm(vm) {
            let unneeded = record.disks.iter().find_map(|disk| {
                let mut layers = disk.layers.iter();
                let layer =
                    layers.find(|layer| layer.name.is_none() && children(disk, layer.id) == 0)?;
                Some((disk, layer))
            });
            let Some((disk, layer)) = unneeded else {
                return;
            };
            if let Err(seen) = self.drop_layer(vm, disk, layer) {
                return note(seen);
            }
        }
    }

    fn drop_layer(&self, vm: &str, disk: &DiskRecord, layer: &LayerRecord) -> Result<()> {
        let path = layer.image.file()?;
        let shared = self.is_below_other_disks(vm, &disk.name, path)?;
        // The file goes first: a daemon that dies in between does it again.
        if layer.created && !shared {
            image::remove(path, layer.file.as_ref(), "an image that no snapshot needs")?;
            crash::point("after-layer-removal");
        }
        self.inventory.forget_layer(layer.id)
    }
}
