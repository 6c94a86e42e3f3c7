//! The transport's state in a record.
//!
//! Where the queues are is not in it: they are drained when it is saved, so a queue goes on where its
//! used ring in guest memory ends.

use std::sync::atomic::Ordering;

use strake_observe::{Observation, Result};
use strake_state::observations::ShapeDiffers;

use super::VirtioPci;
use super::common::{DRIVER_OK, From, QueueSetup};
use crate::pci::{CONFIG_SIZE, SavedVector};
use crate::virtio::VirtioDevice;

strake_state::saved! {
    /// A virtio device's transport.
    pub record SavedVirtioPci("virtio-pci", version 1) {
        /// The virtio device number.
        1 => device: u16,
        /// The features that it offered.
        2 => offered: u64,
        /// Its PCI configuration space.
        3 => config: [u8; 256],
        /// Whether MSI-X is enabled.
        4 => msix_enabled: bool,
        /// Whether all vectors are masked.
        5 => msix_masked: bool,
        /// The vectors.
        6 => vectors: Vec<SavedVector>,
        /// The status that the driver wrote.
        7 => status: u8,
        /// Which half of the offered features it reads.
        8 => offered_select: u32,
        /// Which half of the accepted features it writes.
        9 => accepted_select: u32,
        /// The features that it accepted.
        10 => accepted: u64,
        /// Which queue it sets up.
        11 => queue_select: u16,
        /// The queues.
        12 => queues: Vec<SavedQueue>,
        /// The vector for changes of the configuration.
        13 => config_vector: u16,
        /// The ISR.
        14 => isr: u8,
        /// The generation of the configuration.
        15 => generation: u8,
        /// Whether the device cannot go on before its reset.
        16 => needs_reset: bool,
        /// Whether the driver hears of changes.
        17 => driver_ready: bool,
    }

    /// A queue as the driver set it up.
    pub part SavedQueue {
        /// The largest size that it may have.
        1 => limit: u16,
        /// Its size.
        2 => size: u16,
        /// Whether it is enabled.
        3 => enabled: bool,
        /// Where its descriptors are.
        4 => descriptors: u64,
        /// Where the driver's ring is.
        5 => driver: u64,
        /// Where the device's ring is.
        6 => device: u64,
        /// Its vector.
        7 => vector: u16,
    }
}

const _: () = assert!(
    CONFIG_SIZE == 256,
    "a record's field has this size for ever"
);

impl<D: VirtioDevice> VirtioPci<D> {
    /// While the workers stand still.
    pub(super) fn to_saved(&self) -> SavedVirtioPci {
        let config = self.space().config.bytes();
        let (msix_enabled, msix_masked, vectors) = self.msix.save();
        let mut driver = self.driver();
        self.settle_reset(&mut driver);
        let (isr, generation, needs_reset, driver_ready) = self.interrupter.saved();
        let queues = (0..).zip(&driver.queues).map(|(index, queue)| SavedQueue {
            limit: queue.limit,
            size: queue.size,
            enabled: queue.enabled,
            descriptors: queue.descriptors,
            driver: queue.driver,
            device: queue.device,
            vector: self.interrupter.queue_vector(index),
        });
        SavedVirtioPci {
            device: self.device.kind().id,
            offered: self.offered(),
            config,
            msix_enabled,
            msix_masked,
            vectors,
            status: driver.status,
            offered_select: driver.offered_select,
            accepted_select: driver.accepted_select,
            accepted: driver.accepted,
            queue_select: driver.queue_select,
            queues: queues.collect(),
            config_vector: self.interrupter.config_vector(),
            isr,
            generation,
            needs_reset,
            driver_ready,
        }
    }

    /// Does beforehand what of [`become_saved`](Self::become_saved) takes long.
    pub(super) fn prepare_for(&self, mut sketch: SavedVirtioPci) -> Result<()> {
        self.compare(&sketch)?;
        {
            let mut space = self.space();
            space.config.restore(self.device.name(), &sketch.config)?;
            self.follow_bar(&mut space);
        }
        // What waits to be sent is the other process's to send.
        for vector in &mut sketch.vectors {
            vector.pending = false;
        }
        self.msix
            .restore(sketch.msix_enabled, sketch.msix_masked, &sketch.vectors)?;
        let active = sketch.status & DRIVER_OK != 0;
        let queues = sketch.queues.iter().filter(|queue| queue.enabled && active);
        let sizes: Vec<u16> = queues.map(|queue| queue.size).collect();
        self.device.prepare(&sizes)
    }

    /// Takes everything over; its workers stand ready if the driver had it running.
    pub(super) fn become_saved(&self, saved: SavedVirtioPci) -> Result<()> {
        self.compare(&saved)?;
        {
            let mut space = self.space();
            space.config.restore(self.device.name(), &saved.config)?;
            self.follow_bar(&mut space);
        }
        self.msix
            .restore(saved.msix_enabled, saved.msix_masked, &saved.vectors)?;
        self.interrupter.restore((
            saved.isr,
            saved.generation,
            saved.needs_reset,
            saved.driver_ready,
        ));
        self.interrupter.set_config_vector(saved.config_vector);
        for (index, queue) in (0..).zip(&saved.queues) {
            self.interrupter.set_queue_vector(index, queue.vector);
        }
        self.offers.store(saved.offered, Ordering::Relaxed);
        let mut driver = self.driver();
        driver.status = saved.status;
        driver.offered_select = saved.offered_select;
        driver.accepted_select = saved.accepted_select;
        driver.accepted = saved.accepted;
        driver.queue_select = saved.queue_select;
        driver.queues = saved
            .queues
            .iter()
            .map(|queue| QueueSetup {
                limit: queue.limit,
                size: queue.size,
                enabled: queue.enabled,
                descriptors: queue.descriptors,
                driver: queue.driver,
                device: queue.device,
            })
            .collect();
        if saved.status & DRIVER_OK != 0 && !saved.needs_reset {
            self.activate(&mut driver, From::UsedRing, true)
                .map_err(|fault| fault.observed(self.device.name()))?;
            self.arrived.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What the guest knows of the device must be what it is here.
    fn compare(&self, saved: &SavedVirtioPci) -> Result<()> {
        let differs = |what: &str, saved: String, found: String| -> Result<()> {
            Err(Observation::from(ShapeDiffers {
                component: self.device.name().to_owned(),
                what: what.to_owned(),
                saved,
                found,
            }))
        };
        let device = self.device.kind().id;
        if saved.device != device {
            return differs(
                "device number",
                saved.device.to_string(),
                device.to_string(),
            );
        }
        let offered = self.offered();
        if saved.offered & !offered != 0 || saved.accepted & !saved.offered != 0 {
            let show = |features: u64| format!("{features:#x}");
            return differs("the features", show(saved.offered), show(offered));
        }
        let limits =
            |queues: &mut dyn Iterator<Item = u16>| format!("{:?}", queues.collect::<Vec<_>>());
        let theirs = limits(&mut saved.queues.iter().map(|queue| queue.limit));
        let ours = limits(&mut self.driver().queues.iter().map(|queue| queue.limit));
        if theirs != ours {
            return differs("queues of the sizes", theirs, ours);
        }
        Ok(())
    }

    /// Interrupts the driver for every queue: an interrupt may have been on its way to a CPU when
    /// its state was taken. One too many does no harm.
    pub(super) fn interrupt_all(&self) {
        let driver = self.driver();
        for (index, queue) in (0..).zip(&driver.queues) {
            if queue.enabled {
                self.interrupter.queue(index);
            }
        }
    }
}
