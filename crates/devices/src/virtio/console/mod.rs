//! A console: virtio-console with its one port, over a stream of the host.
//!
//! One thread for both directions. Output that the stream does not take at once is lost, and
//! counted: a guest's console driver spins until its buffer comes back, so a host that does not
//! read must never hold it. Input waits in the stream until the guest offers a buffer.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use strake_memory::GuestMemory;
use strake_observe::{OsContext, Result};

use super::guest::as_fd;
use super::{
    Activation, ActiveQueue, Chain, ConfigSignal, Fault, Kind, Poller, Progress, Ready,
    VirtioDevice, Work,
};

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
const STREAM: u64 = 2;

/// A console.
#[derive(Debug)]
pub struct VirtioConsole {
    name: String,
    stream: Arc<OwnedFd>,
    lost: Arc<AtomicU64>,
}

impl VirtioConsole {
    /// A console named `name` whose other end is `stream`: a socket or a terminal.
    ///
    /// # Errors
    /// The stream cannot be made non-blocking.
    pub fn new(name: impl Into<String>, stream: OwnedFd) -> Result<Self> {
        let name = name.into();
        rustix::io::ioctl_fionbio(&stream, true).os("FIONBIO", &name)?;
        Ok(Self {
            name,
            stream: Arc::new(stream),
            lost: Arc::default(),
        })
    }

    /// How many bytes of output the host did not take.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
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
            stream: Arc::clone(&self.stream),
            lost: Arc::clone(&self.lost),
            memory: activation.memory,
            rx,
            tx,
            ended: false,
            accepting: false,
        })])
    }

    fn reset(&self) {
        // It keeps nothing.
    }
}

struct ConsoleWork {
    name: String,
    stream: Arc<OwnedFd>,
    lost: Arc<AtomicU64>,
    memory: Arc<GuestMemory>,
    rx: Option<ActiveQueue>,
    tx: Option<ActiveQueue>,
    /// Whether the other end is gone.
    ended: bool,
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
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match rustix::io::write(self.stream.as_fd(), rest) {
                Ok(count) if count > 0 => rest = rest.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                _ => break,
            }
        }
        let skipped = chain.readable.len() - len;
        self.lost
            .fetch_add(skipped + rest.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn receive(&mut self, rx: &mut ActiveQueue) -> Result<Progress, Fault> {
        let mut bytes = [0; CHUNK];
        rx.queue.disable_kicks()?;
        for _ in 0..BATCH {
            if self.ended {
                return Ok(Progress::Wait);
            }
            let Some(chain) = rx.queue.pop()? else {
                if rx.queue.enable_kicks()? {
                    continue;
                }
                return Ok(Progress::Wait);
            };
            let room = usize::try_from(chain.writable.len()).unwrap_or(CHUNK);
            let room = bytes.get_mut(..room.min(CHUNK)).unwrap_or_default();
            if room.is_empty() {
                rx.queue.complete(chain.head, 0)?;
                continue;
            }
            match rustix::io::read(self.stream.as_fd(), &mut *room) {
                Ok(0) => {
                    self.ended = true;
                    rx.queue.undo(1);
                }
                Ok(count) => {
                    let got = room.get(..count).unwrap_or_default();
                    chain
                        .writable
                        .write(&self.memory, 0, got)
                        .map_err(|_| rx.queue.fault("an input buffer is not in guest RAM"))?;
                    let count = u32::try_from(count).unwrap_or(0);
                    rx.queue.complete(chain.head, count)?;
                }
                Err(error) => {
                    rx.queue.undo(1);
                    let error = std::io::Error::from(error);
                    match error.kind() {
                        ErrorKind::Interrupted => {}
                        ErrorKind::WouldBlock => return Ok(Progress::Wait),
                        _ => self.ended = true,
                    }
                }
            }
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
        // By edges: input that the guest has no buffer for must not spin.
        poller.arrival(self.stream.as_fd(), STREAM)
    }

    fn start(&mut self) -> Result<Progress, Fault> {
        self.accepting = true;
        self.step()
    }

    fn ready(&mut self, why: Ready, _: &Poller) -> Result<Progress, Fault> {
        let queue = match why {
            Ready::Source(RX_KICK) => &self.rx,
            Ready::Source(TX_KICK) => &self.tx,
            _ => &None,
        };
        if let Some(active) = queue {
            let _ = active.kick.read();
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
