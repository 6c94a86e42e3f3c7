//! One front-end: what it has agreed on and set up, message by message.
//!
//! The `vhost` crate reads the messages and sends the replies; here is what each of them does. An
//! error ends the connection. All of it runs in the server's thread.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use strake_observe::{State, recorder};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::inflight::Area;
use super::regions::{Place, REGIONS, Regions};
use super::ring::{Ring, SIZE_LIMIT};
use crate::virtio::guest::nonblocking_event;
use crate::virtio::queue::{Kept, VirtQueue};
use crate::virtio::transport::Interrupter;
use crate::virtio::worker::Workers;
use crate::virtio::{Activation, ActiveQueue, EVENT_IDX, INDIRECT_DESC, VERSION_1, VirtioDevice};

pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Largest piece of the configuration that is asked for at once (the protocol's own bound).
const CONFIG_LIMIT: u32 = 256;

/// A connection's state.
pub(super) struct Session {
    device: Arc<dyn VirtioDevice>,
    interrupter: Interrupter,
    features: u64,
    regions: Regions,
    rings: Vec<Ring>,
    inflight: Option<Area>,
    /// Why the last message was refused, in words.
    refusal: Option<String>,
}

impl Session {
    pub(super) fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let count = device.queue_sizes().len();
        device.reset();
        Self {
            interrupter: Interrupter::with_calls(device.name(), count),
            device,
            features: 0,
            regions: Regions::default(),
            rings: (0..count).map(|_| Ring::new()).collect(),
            inflight: None,
            refusal: None,
        }
    }

    pub(super) fn take_refusal(&mut self) -> Option<String> {
        self.refusal.take()
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1 | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES
    }

    fn refuse(&mut self, reason: impl Into<String>) -> Error {
        self.refusal = Some(reason.into());
        Error::InvalidParam
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let known = usize::try_from(index).is_ok_and(|index| index < self.rings.len());
        if !known {
            return Err(self.refuse(format!("there is no ring {index}")));
        }
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Changes a ring that stands still meanwhile.
    fn change(&mut self, index: u32, how: impl FnOnce(&mut Ring)) -> Result<()> {
        let ring = self.ring(index)?;
        ring.stop();
        how(ring);
        self.settle(index)
    }

    /// Changes something that all rings depend on.
    fn change_all(&mut self, how: impl FnOnce(&mut Self)) {
        self.stop_all();
        how(self);
        for index in (0u32..).take(self.rings.len()) {
            // A ring that is not in this memory may be in the next: it waits.
            if self.settle(index).is_err() {
                self.refusal = None;
            }
        }
    }

    fn stop_all(&mut self) {
        for ring in &mut self.rings {
            ring.stop();
        }
    }

    /// Lets a ring run if the front-end wants it to.
    fn settle(&mut self, index: u32) -> Result<()> {
        let ring = self.ring(index)?;
        if !ring.wanted() || ring.runs() {
            return Ok(());
        }
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        match self.active(number) {
            Ok(active) => self.launch(number, active),
            Err(reason) => Err(self.refuse(format!("ring {index} cannot run: {reason}"))),
        }
    }

    fn active(&mut self, index: u16) -> std::result::Result<ActiveQueue, String> {
        let memory = Arc::clone(self.regions.memory());
        let ring = self.rings.get(usize::from(index)).ok_or("it is unknown")?;
        let mut rings = ring.rings(&self.regions)?;
        rings.set_event_idx(self.features & EVENT_IDX != 0);
        let kick = ring.kick.as_ref().ok_or("it has no kick")?;
        let kick = kick.try_clone().map_err(|error| error.to_string())?;
        let mut kept = Kept {
            position: Arc::clone(&ring.position),
            journal: None,
            backlog: VecDeque::new(),
        };
        if let Some(area) = &self.inflight {
            let (journal, unfinished) = area.ring(index, rings.size(), rings.next_used())?;
            let chains = VirtQueue::chains(&rings, &memory, &unfinished)
                .map_err(|_| "what was in flight makes no sense")?;
            let taken = u16::try_from(unfinished.len()).unwrap_or(u16::MAX);
            rings.set_next_avail(rings.next_used().wrapping_add(taken));
            kept.journal = Some(journal);
            kept.backlog = chains.into();
            // A completion may have been published and not announced before.
            self.interrupter.queue(index);
        }
        let queue = VirtQueue::new(index, rings, memory, self.interrupter.clone()).keeping(kept);
        Ok(ActiveQueue { queue, kick })
    }

    fn launch(&mut self, index: u16, active: ActiveQueue) -> Result<()> {
        let launched = self
            .device
            .activate(Activation {
                features: self.features,
                memory: Arc::clone(self.regions.memory()),
                queues: vec![Some(active)],
            })
            .and_then(|works| Workers::spawn(self.device.name(), works, &self.interrupter));
        match (launched, self.rings.get_mut(usize::from(index))) {
            (Ok(workers), Some(ring)) => {
                ring.run(workers);
                Ok(())
            }
            (Ok(_), None) => Err(Error::InvalidParam),
            (Err(seen), _) => {
                recorder().record(seen, State::Open);
                Err(Error::BackendInternalError)
            }
        }
    }

    fn event(&mut self, file: Option<File>) -> Result<Option<EventFd>> {
        file.map(|file| nonblocking_event(OwnedFd::from(file)))
            .transpose()
            .map_err(|error| self.refuse(format!("an event cannot be used: {error}")))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop_all();
    }
}

fn place(region: &VhostUserMemoryRegion) -> Place {
    Place {
        gpa: region.guest_phys_addr,
        theirs: region.user_addr,
        len: region.memory_size,
        offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        let with_protocol = self.features & PROTOCOL_FEATURES != 0;
        for ring in &mut self.rings {
            *ring = Ring::new();
            ring.enabled = !with_protocol;
        }
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let device = self.device.features();
        if features & !self.offered() != 0 || !self.device.accepts(features & device) {
            return Err(self.refuse(format!(
                "it accepts features that were not offered ({features:#x})"
            )));
        }
        self.change_all(|session| {
            session.features = features;
            if features & PROTOCOL_FEATURES == 0 {
                for ring in &mut session.rings {
                    ring.enabled = true;
                }
            }
        });
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = Regions::of(regions.iter().map(place).zip(files))
            .map_err(|reason| self.refuse(reason))?;
        self.change_all(|session| session.regions = regions);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num)
            .ok()
            .filter(|size| *size <= SIZE_LIMIT && size.is_power_of_two());
        let Some(size) = size else {
            return Err(self.refuse(format!(
                "ring {index} would have {num} entries; there may be powers of two up to \
                 {SIZE_LIMIT}"
            )));
        };
        self.change(index, |ring| ring.size = size)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.change(index, |ring| {
            ring.addresses = Some([descriptor, available, used]);
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let Ok(base) = u16::try_from(base) else {
            return Err(self.refuse(format!("ring {index} would begin at {base}")));
        };
        self.change(index, |ring| {
            ring.position
                .store(base, std::sync::atomic::Ordering::Release);
        })
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        ring.stop();
        ring.kick = None;
        let position = ring.position();
        Ok(VhostUserVringState::new(index, position.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        if fd.is_none() {
            return Err(self.refuse(format!("ring {index} would have to be polled")));
        }
        let kick = self.event(fd)?;
        self.change(index.into(), |ring| ring.kick = kick)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?;
        let call = self.event(fd)?;
        self.interrupter.set_call(index.into(), call);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?;
        let error = self.event(fd)?;
        self.interrupter.set_error(index.into(), error);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        // The `vhost` crate holds each message against them.
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(index, |ring| ring.enabled = enable)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let (Ok(offset), true) = (usize::try_from(offset), size <= CONFIG_LIMIT) else {
            return Err(self.refuse("it asks for a configuration of impossible size"));
        };
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        self.device.read_config(offset, &mut bytes);
        Ok(bytes)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        if let Ok(offset) = usize::try_from(offset) {
            self.device.write_config(offset, buf);
        }
        Ok(())
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let (rings, entries) = (inflight.num_queues, inflight.queue_size);
        if usize::from(rings) > self.rings.len() || entries > SIZE_LIMIT || entries == 0 {
            return Err(self.refuse("it asks for a record of more rings than there are"));
        }
        let fd = Area::create(rings, entries).map_err(Error::ReqHandlerError)?;
        let mut reply = *inflight;
        reply.mmap_size = Area::bytes(rings, entries);
        reply.mmap_offset = 0;
        Ok((reply, File::from(fd)))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (rings, entries) = (inflight.num_queues, inflight.queue_size);
        if usize::from(rings) > self.rings.len() || entries > SIZE_LIMIT {
            return Err(self.refuse("its record of what is in flight is too large"));
        }
        let area = Area::open(file, inflight.mmap_offset, rings, entries)
            .map_err(|reason| self.refuse(reason))?;
        self.change_all(|session| session.inflight = Some(area));
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let regions = self
            .regions
            .with(place(region), fd)
            .map_err(|reason| self.refuse(reason))?;
        self.change_all(|session| session.regions = regions);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let regions = self
            .regions
            .without(place(region))
            .map_err(|reason| self.refuse(reason))?;
        self.change_all(|session| session.regions = regions);
        Ok(())
    }

    // What follows belongs to protocol features that were not offered.

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(self.refuse("it is no graphics adapter"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("shared objects"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("a log of writes"))
    }
}
