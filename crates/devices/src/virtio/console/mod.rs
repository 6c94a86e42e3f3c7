//! A console: virtio-console with its one port.
//!
//! One thread for both directions. Output goes to a [`ConsoleOutput`], which never blocks: a guest's
//! console driver spins until its buffer comes back, so a host that does not read must never hold
//! it. Input is queued here (64 KiB at most, as with the serial port) until the guest offers a
//! buffer; whoever offers input only appends and rings.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strake_memory::GuestMemory;
use strake_observe::{OsContext, Result};
use strake_state::{Blob, Records};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::guest::as_fd;
use super::{
    Activation, ActiveQueue, Chain, ConfigSignal, Fault, Kind, Poller, Progress, Ready,
    VirtioDevice, Work,
};
use crate::serial::{ConsoleInput, ConsoleOutput, INPUT_LIMIT};

/// Chains per queue.
pub const QUEUE_SIZE: u16 = 128;

/// Bytes of one buffer that are looked at: more than any driver puts into one.
pub const BUFFER_LIMIT: usize = 64 * 1024;

const RX: usize = 0;
const TX: usize = 1;
const BATCH: usize = 32;
const CHUNK: usize = 4096;

const RX_KICK: u64 = 0;
const TX_KICK: u64 = 1;
const INPUT: u64 = 2;

strake_state::saved! {
    /// What was typed and not yet read.
    pub record SavedConsole("virtio-console", version 1) {
        /// The bytes.
        1 => input: Blob,
    }
}

/// A console.
pub struct VirtioConsole {
    name: String,
    output: Arc<dyn ConsoleOutput>,
    input: Arc<Input>,
}

/// What was typed and not yet read by the guest.
struct Input {
    queue: Mutex<VecDeque<u8>>,
    arrived: EventFd,
}

impl Input {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleInput for Input {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut queue = self.lock();
        let room = INPUT_LIMIT.saturating_sub(queue.len()).min(bytes.len());
        queue.extend(bytes.iter().take(room));
        drop(queue);
        // It fails only if the counter is full, and then the worker is awake.
        let _ = self.arrived.write(1);
        room
    }
}

impl fmt::Debug for VirtioConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioConsole")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl VirtioConsole {
    /// A console named `name` whose output goes to `output`.
    ///
    /// # Errors
    /// The system has no descriptor left.
    pub fn new(name: impl Into<String>, output: Arc<dyn ConsoleOutput>) -> Result<Self> {
        let name = name.into();
        let arrived = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).os("eventfd", &name)?;
        Ok(Self {
            name,
            output,
            input: Arc::new(Input {
                queue: Mutex::default(),
                arrived,
            }),
        })
    }

    /// Where input is offered. What the guest has not read by then outlives the device's reset.
    #[must_use]
    pub fn input(&self) -> Arc<dyn ConsoleInput> {
        self.input.clone()
    }
}

impl VirtioDevice for VirtioConsole {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> Kind {
        Kind {
            id: 3,
            class: 0x07_80_00, // communication, other
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn accepts(&self, _: u64) -> bool {
        true
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, _: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _: usize, _: &[u8]) {
        // Emergency writes are not offered.
    }

    fn connect(&self, _: ConfigSignal) {
        // Nothing of it ever changes.
    }

    fn activate(&self, mut activation: Activation) -> Result<Vec<Box<dyn Work>>> {
        let rx = activation.take(RX);
        let tx = activation.take(TX);
        Ok(vec![Box::new(ConsoleWork {
            name: self.name.clone(),
            output: Arc::clone(&self.output),
            input: Arc::clone(&self.input),
            memory: activation.memory,
            rx,
            tx,
            accepting: false,
        })])
    }

    fn reset(&self) {
        // It keeps nothing.
    }

    fn prepare(&self, _: &[u16]) -> Result<()> {
        Ok(()) // Its worker is all that it needs.
    }

    fn save(&self, records: &mut Records) -> Result<()> {
        let input = Blob(self.input.lock().iter().copied().collect());
        records.put(&self.name, &SavedConsole { input })
    }

    fn restore(&self, records: &mut Records) -> Result<()> {
        let saved: SavedConsole = records.take(&self.name)?;
        *self.input.lock() = saved.input.0.into_iter().take(INPUT_LIMIT).collect();
        Ok(())
    }
}

struct ConsoleWork {
    name: String,
    output: Arc<dyn ConsoleOutput>,
    input: Arc<Input>,
    memory: Arc<GuestMemory>,
    rx: Option<ActiveQueue>,
    tx: Option<ActiveQueue>,
    accepting: bool,
}

impl ConsoleWork {
    fn step(&mut self) -> Result<Progress, Fault> {
        if !self.accepting {
            return Ok(Progress::Wait);
        }
        let mut more = Progress::Wait;
        if let Some(mut tx) = self.tx.take() {
            let sent = self.send(&mut tx);
            let notified = tx.queue.notify();
            self.tx = Some(tx);
            notified?;
            if sent? == Progress::More {
                more = Progress::More;
            }
        }
        if let Some(mut rx) = self.rx.take() {
            let received = self.receive(&mut rx);
            let notified = rx.queue.notify();
            self.rx = Some(rx);
            notified?;
            if received? == Progress::More {
                more = Progress::More;
            }
        }
        Ok(more)
    }

    fn send(&mut self, tx: &mut ActiveQueue) -> Result<Progress, Fault> {
        tx.queue.disable_kicks()?;
        for _ in 0..BATCH {
            match tx.queue.pop()? {
                Some(chain) => {
                    self.write(tx, &chain)?;
                    tx.queue.complete(chain.head, 0)?;
                }
                None if tx.queue.enable_kicks()? => {}
                None => return Ok(Progress::Wait),
            }
        }
        Ok(Progress::More)
    }

    fn write(&mut self, tx: &ActiveQueue, chain: &Chain) -> Result<(), Fault> {
        let len = chain.readable.len().min(BUFFER_LIMIT as u64);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        chain
            .readable
            .read(&self.memory, 0, &mut bytes)
            .map_err(|_| tx.queue.fault("output is not in guest RAM"))?;
        self.output.write(&bytes);
        Ok(())
    }

    fn receive(&mut self, rx: &mut ActiveQueue) -> Result<Progress, Fault> {
        rx.queue.disable_kicks()?;
        for _ in 0..BATCH {
            // Buffers stay in the queue until there is something to put into them. Only this
            // worker takes from the input, so what is seen here is still there below.
            if self.input.lock().is_empty() {
                return Ok(Progress::Wait);
            }
            let Some(chain) = rx.queue.pop()? else {
                if rx.queue.enable_kicks()? {
                    continue;
                }
                return Ok(Progress::Wait);
            };
            let room = usize::try_from(chain.writable.len()).unwrap_or(CHUNK);
            let bytes: Vec<u8> = {
                let mut queue = self.input.lock();
                let count = room.min(CHUNK).min(queue.len());
                queue.drain(..count).collect()
            };
            chain
                .writable
                .write(&self.memory, 0, &bytes)
                .map_err(|_| rx.queue.fault("an input buffer is not in guest RAM"))?;
            let count = u32::try_from(bytes.len()).unwrap_or(0);
            rx.queue.complete(chain.head, count)?;
        }
        Ok(Progress::More)
    }
}

impl Work for ConsoleWork {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn watch(&self, poller: &Poller) -> Result<()> {
        if let Some(rx) = &self.rx {
            poller.readable(as_fd(&rx.kick), RX_KICK)?;
        }
        if let Some(tx) = &self.tx {
            poller.readable(as_fd(&tx.kick), TX_KICK)?;
        }
        poller.readable(as_fd(&self.input.arrived), INPUT)
    }

    fn start(&mut self) -> Result<Progress, Fault> {
        self.accepting = true;
        self.step()
    }

    fn ready(&mut self, why: Ready, _: &Poller) -> Result<Progress, Fault> {
        let rung = match why {
            Ready::Source(RX_KICK) => self.rx.as_ref().map(|active| &active.kick),
            Ready::Source(TX_KICK) => self.tx.as_ref().map(|active| &active.kick),
            Ready::Source(INPUT) => Some(&self.input.arrived),
            _ => None,
        };
        if let Some(event) = rung {
            let _ = event.read();
        }
        self.step()
    }

    fn stop(&mut self) {
        self.accepting = false;
    }

    fn idle(&self) -> bool {
        // A buffer is taken, filled and given back within a step.
        true
    }
}

#[cfg(test)]
mod tests;
