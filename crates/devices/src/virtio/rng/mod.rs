//! Entropy: virtio-rng over the kernel's generator.
//!
//! One queue, one thread. A request may ask for any number of bytes; it gets [`ANSWER_LIMIT`] at
//! most, which is what a guest takes at a time anyway, so that no request costs more than another.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use strake_memory::GuestMemory;
use strake_observe::Result;
use strake_state::Records;
use vmm_sys_util::eventfd::EventFd;

use super::guest::as_fd;
use super::{
    Activation, ActiveQueue, Chain, ConfigSignal, Fault, Kind, Poller, Progress, Ready, VirtQueue,
    VirtioDevice, Work,
};

/// Chains of the queue.
pub const QUEUE_SIZE: u16 = 64;

/// Bytes per request.
pub const ANSWER_LIMIT: usize = 4096;

const BATCH: usize = 16;
const KICK: u64 = 0;

strake_state::saved! {
    /// An entropy source, which remembers nothing.
    pub record SavedRng("virtio-rng", version 1) {}
}

/// An entropy source.
#[derive(Debug)]
pub struct VirtioRng {
    name: String,
}

impl VirtioRng {
    /// An entropy source named `name`.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }
}

impl VirtioDevice for VirtioRng {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> Kind {
        Kind {
            id: 4,
            class: 0x10_80_00, // encryption, other
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn accepts(&self, _: u64) -> bool {
        true
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _: usize, _: &[u8]) {
        // It has no configuration.
    }

    fn connect(&self, _: ConfigSignal) {
        // Nothing of it ever changes.
    }

    fn activate(&self, mut activation: Activation) -> Result<Vec<Box<dyn Work>>> {
        let Some(active) = activation.take(0) else {
            return Ok(Vec::new());
        };
        Ok(vec![Box::new(RngWork::new(
            self.name.clone(),
            active,
            activation.memory,
        ))])
    }

    fn reset(&self) {
        // It keeps nothing.
    }

    fn prepare(&self, _: &[u16]) -> Result<()> {
        Ok(()) // Its worker is all that it needs.
    }

    fn save(&self, records: &mut Records) -> Result<()> {
        records.put(&self.name, &SavedRng {})
    }

    fn restore(&self, records: &mut Records) -> Result<()> {
        records.take(&self.name).map(|SavedRng {}| ())
    }
}

struct RngWork {
    name: String,
    queue: VirtQueue,
    kick: EventFd,
    memory: Arc<GuestMemory>,
    accepting: bool,
}

impl RngWork {
    fn new(name: String, active: ActiveQueue, memory: Arc<GuestMemory>) -> Self {
        Self {
            name,
            queue: active.queue,
            kick: active.kick,
            memory,
            accepting: false,
        }
    }

    fn step(&mut self) -> Result<Progress, Fault> {
        if !self.accepting {
            return Ok(Progress::Wait);
        }
        let progress = self.answer_batch();
        self.queue.notify()?;
        progress
    }

    fn answer_batch(&mut self) -> Result<Progress, Fault> {
        self.queue.disable_kicks()?;
        for _ in 0..BATCH {
            match self.queue.pop()? {
                Some(chain) => self.answer(&chain)?,
                None if self.queue.enable_kicks()? => {}
                None => return Ok(Progress::Wait),
            }
        }
        Ok(Progress::More)
    }

    fn answer(&mut self, chain: &Chain) -> Result<(), Fault> {
        let mut bytes = [0; ANSWER_LIMIT];
        let wanted = usize::try_from(chain.writable.len()).unwrap_or(ANSWER_LIMIT);
        let room = bytes
            .get_mut(..wanted.min(ANSWER_LIMIT))
            .unwrap_or_default();
        // The kernel's generator never fails once it is seeded, which it is long before a guest
        // runs; a short answer is one that the guest asks again for.
        let filled = getrandom(&mut *room, GetRandomFlags::empty()).unwrap_or(0);
        let filled = room.get(..filled).unwrap_or_default();
        chain
            .writable
            .write(&self.memory, 0, filled)
            .map_err(|_| self.queue.fault("a request is not in guest RAM"))?;
        let count = u32::try_from(filled.len()).unwrap_or(0);
        self.queue.complete(chain.head, count)
    }
}

impl Work for RngWork {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn watch(&self, poller: &Poller) -> Result<()> {
        poller.readable(as_fd(&self.kick), KICK)
    }

    fn start(&mut self) -> Result<Progress, Fault> {
        self.accepting = true;
        self.step()
    }

    fn ready(&mut self, why: Ready, _: &Poller) -> Result<Progress, Fault> {
        if why == Ready::Source(KICK) {
            let _ = self.kick.read();
        }
        self.step()
    }

    fn stop(&mut self) {
        self.accepting = false;
    }

    fn idle(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
