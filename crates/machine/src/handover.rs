//! A guest moves from one monitor to another.
//!
//! ```text
//!   predecessor                                        successor
//!   Here ──hand_over──▶ Given ──may_retire──▶ gone     Awaited ──receive──▶ Received ──take_over──▶ Arrived
//!     ▲                   │
//!     └─────call_off──────┘
//! ```
//!
//! The successor was built while the guest ran: VM, memory slots, vCPUs and devices stand ready. It
//! also gets a *sketch* of the devices before anything is stopped, and sets up from it what takes long:
//! doorbells, interrupt routes, queues on images. What is left for the pause is to stop the vCPUs, to finish what is in flight, and to carry some
//! kilobytes of records from one process to the other. Guest memory is mapped by both and never
//! copied; images and taps are the same open files.
//!
//! # Who may run the guest
//! A monitor runs it in `Here` and `Arrived` only, and goes there only by the daemon's word: by
//! [`Machine::call_off`] in the one, by [`Machine::take_over`] in the other, of which the daemon gives
//! one. A daemon that goes away in between leaves a guest that stands still and two monitors that
//! wait for the next one. Before `Given`, whatever fails, the predecessor goes on by itself: then no
//! complete set of records has left it, and no successor can be `Received`.
//!
//! | instant | authoritative | the other |
//! | --- | --- | --- |
//! | until `Given` | the predecessor | has nothing that runs |
//! | `Given`, `Received` | whom the inventory names: the predecessor until its transaction | stands still |
//! | after `take_over` | the successor | stands still until it is told to end |
//!
//! # Interrupts
//! vCPUs are saved while their devices still finish requests, so an interrupt may reach a local APIC
//! that has been saved already. Nothing depends on it: devices raise theirs once more when they are
//! resumed in the successor, and look at all of their queues.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use strake_api::control::{Event, FdIndex, Lent, LentTap, RunState};
use strake_devices::console_hub::STREAM_LIMIT;
use strake_devices::lifecycle::Component;
use strake_kvm::{SavedVm, monotonic_ns};
use strake_observe::{Because, Observation, OsContext, Result, State, recorder};
use strake_state::observations::ShapeDiffers;
use strake_state::{Records, SET_LIMIT};

use crate::Machine;
use crate::machine::{Place, Run, wrong_state};
use crate::observations::{JobsRun, NotHandedOver, NotTakenOver, RecordsLost};

/// How long a successor waits for records: longer than all that its predecessor may wait for.
const RECORDS_PATIENCE: Duration = Duration::from_secs(60);

/// How long a predecessor waits until its successor is prepared; the guest runs meanwhile.
const PREPARE_PATIENCE: Duration = Duration::from_secs(20);

/// How long a predecessor waits for a successor that does not read.
const SEND_PATIENCE: Duration = Duration::from_secs(5);

const MACHINE: &str = "machine";
const VM: &str = "vm";

strake_state::saved! {
    /// The machine as a whole.
    pub record SavedMachine("machine", version 1) {
        /// The VM's name.
        1 => vm: String,
        /// How many vCPUs it has.
        2 => cpus: u8,
        /// Bytes of RAM.
        3 => memory: u64,
        /// Whether the daemon paused it.
        4 => paused: bool,
        /// Milliseconds since the guest was started.
        5 => uptime_ms: u64,
        /// When it was stopped to be handed over, in nanoseconds of the host's monotonic clock.
        6 => stopped_ns: u64,
    }
}

impl Machine {
    /// What another monitor of this VM needs, as descriptors of its own.
    ///
    /// # Errors
    /// An image is of a kind that cannot be given away, or there are no descriptors left.
    pub fn lend(&self) -> Result<(Lent, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut add = |fd: OwnedFd| {
            fds.push(fd);
            FdIndex(u8::try_from(fds.len() - 1).unwrap_or(u8::MAX))
        };
        let guest = self.guest("lend what it has")?;
        let memory = add(guest.ram.memfd()?);
        let mut images = Vec::new();
        for disk in &self.disks {
            images.extend(disk.image().files()?.into_iter().map(&mut add));
        }
        let mut taps = Vec::new();
        for (nic, tap) in &guest.taps {
            taps.push(LentTap {
                nic: nic.clone(),
                tap: add(tap.try_clone().os("dup", nic)?),
            });
        }
        let lent = Lent {
            memory,
            images,
            taps,
        };
        Ok((lent, fds))
    }

    /// Stops the guest, brings everything to rest, and sends the records over `stream`. The guest
    /// stands still then; it runs on if anything fails.
    ///
    /// # Errors
    /// [`NotHandedOver`], with the reason.
    pub fn hand_over(&self, stream: OwnedFd) -> Result<()> {
        let failed = || NotHandedOver {
            vm: self.name.clone(),
        };
        let mut run = self.lock();
        if !run.live() || run.holds > 0 {
            return Err(wrong_state("hand the guest over", "not running")).because_of(failed);
        }
        let jobs: Vec<String> = self
            .jobs
            .statuses()
            .iter()
            .filter(|job| !job.phase.is_final())
            .map(|job| job.job.to_string())
            .collect();
        if !jobs.is_empty() {
            return Err(Observation::from(JobsRun { jobs })).because_of(failed);
        }
        let mut stream = UnixStream::from(stream);
        self.send_sketch(&mut stream).because_of(failed)?;
        let stopped_ns = monotonic_ns();
        let given = self
            .save_all(&run, stopped_ns)
            .and_then(|(records, streams)| send(&mut stream, &records.encode(), &streams));
        if let Err(seen) = given {
            self.go_on(&run);
            return Err(seen).because_of(failed);
        }
        run.place = Place::Given;
        Ok(())
    }

    /// The guest goes on here.
    ///
    /// # Errors
    /// It was never here.
    pub fn call_off(&self) -> Result<()> {
        let mut run = self.lock();
        match run.place {
            Place::Here | Place::Arrived { .. } => Ok(()),
            Place::Given => {
                run.place = Place::Here;
                self.go_on(&run);
                Ok(())
            }
            Place::Awaited | Place::Received { .. } => Err(wrong_state(
                "call the handover off",
                "the one that the guest was to come to",
            )),
        }
    }

    /// Whether the guest was given away, so that this process may end.
    ///
    /// # Errors
    /// It was not.
    pub fn may_retire(&self) -> Result<()> {
        match self.lock().place {
            Place::Given => Ok(()),
            _ => Err(wrong_state("retire", "the one that has the guest")),
        }
    }

    /// Takes everything over from the records that come through `stream`.
    ///
    /// # Errors
    /// [`NotTakenOver`], with the reason. This machine is of no use any more then.
    pub fn receive(&self, stream: OwnedFd) -> Result<()> {
        let failed = || NotTakenOver {
            vm: self.name.clone(),
        };
        let mut run = self.lock();
        if run.place != Place::Awaited || run.stopped {
            return Err(wrong_state("receive a guest", "not waiting for one")).because_of(failed);
        }
        let mut stream = UnixStream::from(stream);
        self.receive_sketch(&mut stream).because_of(failed)?;
        let (bytes, streams) = receive(&mut stream).because_of(failed)?;
        let records = Records::decode(&bytes).because_of(failed)?;
        let guest = self.guest("receive a guest").because_of(failed)?;
        guest.console.bring(streams);
        let saved = self.restore_all(records).because_of(failed)?;
        let uptime = Duration::from_millis(saved.uptime_ms);
        run.started = Some(
            Instant::now()
                .checked_sub(uptime)
                .unwrap_or_else(Instant::now),
        );
        run.paused = saved.paused;
        run.place = Place::Received {
            since_ns: saved.stopped_ns,
        };
        Ok(())
    }

    /// The guest runs here from now on. Says how long it stood still, in microseconds; asked again,
    /// the same.
    ///
    /// # Errors
    /// It was not received.
    pub fn take_over(&self) -> Result<u64> {
        let mut run = self.lock();
        let since_ns = match run.place {
            Place::Arrived { pause_us } => return Ok(pause_us),
            Place::Received { since_ns } if !run.stopped => since_ns,
            _ => return Err(wrong_state("take a guest over", "without one")),
        };
        // Here the daemon has decided: what fails is told and the guest runs all the same, as it
        // does when a device breaks.
        for seen in self.resume_components(&self.components) {
            recorder().record(seen, State::Open);
        }
        let pause_us = monotonic_ns().saturating_sub(since_ns) / 1000;
        run.place = Place::Arrived { pause_us };
        if run.shall_run() {
            self.vcpus.let_run();
        }
        let state = if run.paused {
            RunState::Paused
        } else {
            RunState::Running
        };
        drop(run);
        self.mailbox.post(Event::State(state));
        Ok(pause_us)
    }

    /// Sends a sketch and waits until the successor has prepared for it.
    fn send_sketch(&self, stream: &mut UnixStream) -> Result<()> {
        let mut sketch = Records::default();
        for component in &self.components {
            component.sketch(&mut sketch)?;
        }
        send(stream, &sketch.encode(), &[])?;
        let preparing = || lost("waiting until the other monitor is prepared");
        stream
            .set_read_timeout(Some(PREPARE_PATIENCE))
            .os("setsockopt", "the stream of records")
            .because_of(preparing)?;
        stream
            .read_exact(&mut [0])
            .os("read", "the stream of records")
            .because_of(preparing)
    }

    fn receive_sketch(&self, stream: &mut UnixStream) -> Result<()> {
        let (bytes, _) = receive(stream)?;
        let mut sketch = Records::decode(&bytes)?;
        for component in &self.components {
            component.prepare(&mut sketch)?;
        }
        sketch.finish()?;
        stream
            .write_all(&[1])
            .os("write", "the stream of records")
            .because_of(|| lost("telling that all is prepared"))
    }

    fn save_all(&self, run: &Run, stopped_ns: u64) -> Result<(Records, Vec<OwnedFd>)> {
        let guest = self.guest("hand the guest over")?;
        let mut records = Records::default();
        let vcpus = self.vcpus.park_and_save()?;
        for component in self.components.iter().rev() {
            component.quiesce()?;
        }
        let uptime = run.started.map_or(0, |since| since.elapsed().as_millis());
        records.put(
            MACHINE,
            &SavedMachine {
                vm: self.name.clone(),
                cpus: u8::try_from(vcpus.len()).unwrap_or(u8::MAX),
                memory: guest.ram.size(),
                paused: run.paused,
                uptime_ms: u64::try_from(uptime).unwrap_or(u64::MAX),
                stopped_ns,
            },
        )?;
        for (index, vcpu) in vcpus.iter().enumerate() {
            records.put(&vcpu_name(index), vcpu)?;
        }
        records.put(VM, &guest.vm.save()?)?;
        for component in &self.components {
            component.save(&mut records)?;
        }
        Ok((records, guest.console.streams()?))
    }

    fn restore_all(&self, mut records: Records) -> Result<SavedMachine> {
        let guest = self.guest("receive a guest")?;
        let saved: SavedMachine = records.take(MACHINE)?;
        let differs = |what: &str, saved: String, found: String| -> Result<()> {
            Err(ShapeDiffers {
                component: self.name.clone(),
                what: what.to_owned(),
                saved,
                found,
            }
            .into())
        };
        if saved.vm != self.name {
            differs("the name", saved.vm.clone(), self.name.clone())?;
        }
        let cpus = self.vcpus.count();
        if usize::from(saved.cpus) != cpus {
            differs("vCPUs:", saved.cpus.to_string(), cpus.to_string())?;
        }
        let size = guest.ram.size();
        if saved.memory != size {
            differs(
                "bytes of memory:",
                saved.memory.to_string(),
                size.to_string(),
            )?;
        }
        let vcpus = (0..cpus)
            .map(|index| records.take(&vcpu_name(index)))
            .collect::<Result<Vec<_>>>()?;
        self.vcpus.restore(vcpus)?;
        let vm: SavedVm = records.take(VM)?;
        guest.vm.restore(&vm)?;
        for component in &self.components {
            component.restore(&mut records)?;
        }
        records.finish()?;
        Ok(saved)
    }

    /// Undoes as much of a handover as was done.
    fn go_on(&self, run: &Run) {
        use strake_devices::lifecycle::Phase;
        let quiesced: Vec<_> = self
            .components
            .iter()
            .filter(|component| component.phase() == Phase::Quiesced)
            .cloned()
            .collect();
        for seen in self.resume_components(&quiesced) {
            recorder().record(seen, State::Open);
        }
        if run.shall_run() {
            self.vcpus.let_run();
        }
    }

    fn resume_components(&self, components: &[Arc<dyn Component>]) -> Vec<Observation> {
        let resumed = components.iter().map(|component| component.resume());
        resumed.filter_map(Result::err).collect()
    }
}

fn vcpu_name(index: usize) -> String {
    format!("vcpu{index}")
}

fn lost(doing: &str) -> RecordsLost {
    RecordsLost {
        doing: doing.to_owned(),
    }
}

/// Length, then the records; the descriptors come with the length.
fn send(stream: &mut UnixStream, records: &[u8], fds: &[OwnedFd]) -> Result<()> {
    let sending = || lost("sending them");
    stream
        .set_write_timeout(Some(SEND_PATIENCE))
        .os("setsockopt", "the stream of records")
        .because_of(sending)?;
    let length = u32::try_from(records.len())
        .unwrap_or(u32::MAX)
        .to_le_bytes();
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(STREAM_LIMIT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let parts = [IoSlice::new(&length)];
    let sent = rustix::io::retry_on_intr(|| {
        sendmsg(&*stream, &parts, &mut ancillary, SendFlags::NOSIGNAL)
    });
    let sent = sent
        .os("sendmsg", "the stream of records")
        .because_of(sending)?;
    if sent != length.len() {
        return Err(sending().into());
    }
    stream
        .write_all(records)
        .os("write", "the stream of records")
        .because_of(sending)
}

fn receive(stream: &mut UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let waiting = || lost("waiting for them");
    stream
        .set_read_timeout(Some(RECORDS_PATIENCE))
        .os("setsockopt", "the stream of records")
        .because_of(waiting)?;
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(STREAM_LIMIT))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::io::retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut length)];
        recvmsg(
            &*stream,
            &mut parts,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    });
    let message = message
        .os("recvmsg", "the stream of records")
        .because_of(waiting)?;
    let fds: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let bytes = u32::from_le_bytes(length) as usize;
    if message.bytes != length.len() || bytes > SET_LIMIT {
        return Err(waiting().into());
    }
    let mut records = vec![0; bytes];
    stream
        .read_exact(&mut records)
        .os("read", "the stream of records")
        .because_of(waiting)?;
    Ok((records, fds))
}
