//! The thread of an interface: both directions, so that neither needs a lock.
//!
//! The tap is watched by edges: after an edge it is read until it is empty or the guest has no
//! buffers left; in the latter case the guest's next kick goes on reading. Room at the tap is only
//! watched while a packet waits for it.

use std::sync::Arc;

use strake_memory::GuestMemory;
use strake_observe::Result;

use super::device::Shared;
use super::rx::Rx;
use super::tap::NetBackend;
use super::tx::Tx;
use crate::virtio::guest::as_fd;
use crate::virtio::worker::Wanted;
use crate::virtio::{ActiveQueue, Fault, Poller, Progress, Ready, Work};

const RX_KICK: u64 = 0;
const TX_KICK: u64 = 1;
const TAP: u64 = 2;

/// The work of one interface.
pub(super) struct NetWork {
    name: String,
    backend: Arc<dyn NetBackend>,
    shared: Arc<Shared>,
    memory: Arc<GuestMemory>,
    rx: Option<Rx>,
    tx: Option<Tx>,
    /// Which directions have more to do.
    more: (bool, bool),
    watching_room: bool,
    accepting: bool,
}

impl NetWork {
    pub(super) fn new(
        name: String,
        backend: Arc<dyn NetBackend>,
        shared: Arc<Shared>,
        memory: Arc<GuestMemory>,
        rx: Option<ActiveQueue>,
        tx: Option<ActiveQueue>,
        mergeable: bool,
    ) -> Self {
        Self {
            name,
            backend,
            shared,
            memory,
            rx: rx.map(|rx| Rx::new(rx, mergeable)),
            tx: tx.map(Tx::new),
            more: (false, false),
            watching_room: false,
            accepting: false,
        }
    }

    fn step(&mut self, receive: bool, send: bool) -> Result<Progress, Fault> {
        if !self.accepting {
            return Ok(Progress::Wait);
        }
        if let (true, Some(rx)) = (receive, &mut self.rx) {
            let progress = rx.step(&*self.backend, &self.shared, &self.memory)?;
            self.more.0 = progress == Progress::More;
        }
        if let (true, Some(tx)) = (send, &mut self.tx) {
            let progress = tx.step(&*self.backend, &self.shared, &self.memory)?;
            self.more.1 = progress == Progress::More;
        }
        Ok(if self.more == (false, false) {
            Progress::Wait
        } else {
            Progress::More
        })
    }

    /// Watches for room at the tap exactly while a packet waits for it.
    fn watch_room(&mut self, poller: &Poller) -> Result<(), Fault> {
        let blocked = self.tx.as_ref().is_some_and(|tx| tx.blocked);
        if blocked != self.watching_room {
            let wanted = if blocked { Wanted::Yes } else { Wanted::No };
            poller
                .room(self.backend.packets(), TAP, wanted)
                .map_err(|cause| Fault::backend(1, cause))?;
            self.watching_room = blocked;
        }
        Ok(())
    }
}

impl Work for NetWork {
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
        poller.arrival(self.backend.packets(), TAP)
    }

    fn start(&mut self) -> Result<Progress, Fault> {
        self.accepting = true;
        // A packet that waits for room is tried again; if there is still none, the step after
        // this one watches for it.
        self.watching_room = false;
        self.step(true, true).map(|progress| {
            let blocked = self.tx.as_ref().is_some_and(|tx| tx.blocked);
            self.more.1 |= blocked;
            if blocked { Progress::More } else { progress }
        })
    }

    fn ready(&mut self, why: Ready, poller: &Poller) -> Result<Progress, Fault> {
        let (receive, send) = match why {
            Ready::Again => self.more,
            Ready::Source(RX_KICK) => {
                let _ = self.rx.as_ref().map(|rx| rx.kick.read());
                (true, false)
            }
            Ready::Source(TX_KICK) => {
                let _ = self.tx.as_ref().map(|tx| tx.kick.read());
                (false, true)
            }
            Ready::Source(_) => (true, self.watching_room),
        };
        let progress = self.step(receive, send)?;
        self.watch_room(poller)?;
        Ok(progress)
    }

    fn stop(&mut self) {
        self.accepting = false;
        self.more = (false, false);
        if let Some(rx) = &mut self.rx {
            rx.stop();
        }
    }

    fn idle(&self) -> bool {
        // Packets are moved within a step: between two steps nothing is in flight.
        true
    }
}
