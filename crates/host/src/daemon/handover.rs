//! Fast restart: a guest moves into a new monitor.
//!
//! | instant | the inventory's process | may run the guest | whoever dies then |
//! | --- | --- | --- | --- |
//! | the successor is started and built | predecessor | predecessor | successor: the guest does not notice; predecessor: the VM has failed |
//! | records on their way, `Given` | predecessor | nobody: the predecessor if it is called off | successor: called off; predecessor: the successor has all and takes over; daemon: the next one calls off |
//! | after the transaction, before `TakeOver` | successor | nobody: the successor once it is told | predecessor: nothing; daemon: the next one tells it; successor: as any monitor that dies |
//! | after `TakeOver` | successor | successor | predecessor: nothing |
//!
//! The transaction ([`Inventory::vm_handed_over`]) is the decision. A daemon that comes back finds
//! two processes in the record: it ends the one that may not run the guest, then tells the other one
//! that it may ([`settle_place`]). That order, and that no monitor resumes a guest by itself once it
//! has given it away, is why there are never two that run.
//!
//! [`Inventory::vm_handed_over`]: crate::inventory::Inventory::vm_handed_over

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use strake_api::control::{FdIndex, ImageConfig, Lent, Reply, Request};
use strake_api::rest::{Restarted, VmState};
use strake_api::spec::VmSpec;
use strake_observe::{Observation, OsContext, Result, Task};

use super::lifecycle::{CONFIGURE_PATIENCE, Newborn};
use super::live::{Cell, Monitor};
use super::supervise::Recorded;
use super::{Host, guard, note, private, task};
use crate::FileIdentity;
use crate::config::show;
use crate::crash;
use crate::inventory::{DiskRecord, VmRecord, Workload};
use crate::monitor::connection::{Connection, Events, QUICK};
use crate::monitor::descriptors::Descriptors;
use crate::monitor::process::Process;
use crate::monitor::spawn;
use crate::observations::{
    HandoverFailed, HandoverMeetsJobs, MonitorGarbled, MonitorRefused, NotLent, TakeOverUnclear,
    WrongState,
};
use crate::storage::store::remove_file;

/// How long the predecessor may take to pause and drain; it gives up by itself before.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(40);

/// How long the successor may take to restore what it got.
const RECEIVE_PATIENCE: Duration = Duration::from_secs(10);

/// Pause between attempts to record that a handover was called off.
const RECORD_INTERVAL: Duration = Duration::from_secs(1);

/// How long a monitor that is not needed any more may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// What a monitor lent for its successor.
#[derive(Debug)]
pub(super) struct LentFiles {
    pub(super) memory: OwnedFd,
    images: Vec<File>,
    taps: Vec<(String, OwnedFd)>,
}

impl LentFiles {
    fn new(vm: &str, lent: Lent, fds: Vec<OwnedFd>) -> Result<Self> {
        let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
        let mut take = |index: FdIndex, what: &str| {
            let fd = fds.get_mut(usize::from(index.0)).and_then(Option::take);
            fd.ok_or_else(|| not_lent(vm, what))
        };
        let memory = take(lent.memory, "its guest's memory")?;
        let images = lent.images.into_iter();
        let images = images
            .map(|index| take(index, "an image").map(File::from))
            .collect::<Result<_>>()?;
        let taps = lent.taps.into_iter();
        let taps = taps
            .map(|tap| Ok((tap.nic, take(tap.tap, "a tap")?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            memory,
            images,
            taps,
        })
    }

    pub(super) fn tap(&mut self, vm: &str, nic: &str) -> Result<OwnedFd> {
        let at = self.taps.iter().position(|(name, _)| name == nic);
        let at = at.ok_or_else(|| not_lent(vm, &format!("the tap of interface '{nic}'")))?;
        Ok(self.taps.swap_remove(at).1)
    }

    /// The image that the disk is bound to: the file of that identity, with the lock on it.
    pub(super) fn image(
        &mut self,
        vm: &str,
        disk: &DiskRecord,
        fds: &mut Descriptors,
    ) -> Result<(ImageConfig, FileIdentity)> {
        let path = disk.image.file()?;
        let wanted = FileIdentity::at(path)?;
        let missing = || not_lent(vm, &format!("the image {}", show(path)));
        let wanted = wanted.ok_or_else(missing)?;
        let found = self
            .images
            .iter()
            .position(|file| FileIdentity::of(file, path).is_ok_and(|of| of.is(&wanted)));
        let file = self.images.swap_remove(found.ok_or_else(missing)?);
        let config = ImageConfig::Raw {
            file: fds.add(file)?,
            path: show(path),
        };
        Ok((config, wanted))
    }
}

/// Tells a monitor that its guest is its own, in whatever instant of a handover it was left. It must
/// be the one that the inventory names, and the other one must be gone or known to stand still.
pub(super) fn settle_place(connection: &Connection) -> Result<()> {
    // The one that gave its guest away goes on with it; one that has it does nothing.
    let called_off = connection.call("call a handover off", Request::CallOff, &[], QUICK);
    match called_off {
        Ok(_) => Ok(()),
        // The one that received it.
        Err(seen) if seen.is::<MonitorRefused>() => {
            match connection.call("take over", Request::TakeOver, &[], QUICK) {
                Ok(_) => Ok(()),
                // One that has no guest at all: what it is, its state tells.
                Err(seen) if seen.is::<MonitorRefused>() => Ok(()),
                Err(seen) => Err(seen),
            }
        }
        Err(seen) => Err(seen),
    }
}

/// A successor that is ready for the guest.
struct Successor {
    connection: Connection,
    events: Events,
    newborn: Newborn,
    identity: (u32, u64),
    version: String,
    /// What its machine was given.
    spec: Option<VmSpec>,
}

impl Host {
    /// Moves the VM's guest into a new monitor of the installed version, which the guest does not
    /// notice; with `spec`, the VM is that from then on. What the guest can see cannot change so, and
    /// a change of it is refused by the new monitor.
    ///
    /// This is what applies a change of class `restart`.
    ///
    /// # Errors
    /// [`HandoverFailed`]: the guest goes on in the monitor that it was in. [`TakeOverUnclear`] if
    /// the new one has it and does not answer.
    pub fn restart_fast(self: &Arc<Self>, name: &str, spec: Option<&VmSpec>) -> Result<Restarted> {
        // An export has no guest to move.
        self.inventory.vm(name)?.spec()?;
        let cell = self.cell(name)?;
        let operation = guard(&cell.operation);
        let failed = || HandoverFailed {
            vm: name.to_owned(),
        };
        let outcome = task(format!("restart VM '{name}' fast"), failed, |task| {
            self.move_guest(&cell, spec, task)
        })?;
        drop(operation);
        let moved = outcome?;
        Ok(Restarted {
            vm: self.vm(name)?,
            pause_us: Some(moved.pause_us),
            old_pid: Some(moved.old_pid),
            old_version: moved.old_version,
            new_version: Some(moved.new_version),
        })
    }

    /// The caller holds the VM's operation lock. An error means that the guest is where it was; an
    /// error inside, that it is in the new monitor, which does not answer.
    fn move_guest(
        self: &Arc<Self>,
        cell: &Arc<Cell>,
        spec: Option<&VmSpec>,
        task: &mut Task,
    ) -> Result<Result<Moved>> {
        let name = cell.name.as_str();
        let old = {
            let live = cell.live();
            let advice = format!("start it first with `strake start {name}`");
            let monitor = live.running(name, &advice)?;
            if live.stop_asked {
                return Err(stopping(name));
            }
            monitor
        };
        let jobs = self.inventory.active_jobs(name)?;
        if !jobs.is_empty() {
            return Err(HandoverMeetsJobs {
                vm: name.to_owned(),
                jobs: jobs.iter().map(|job| job.id.to_string()).collect(),
            }
            .into());
        }
        let mut record = self.inventory.vm(name)?;
        if let Some(spec) = spec {
            record.what = Workload::Vm(spec.clone());
        }
        // From here on until it is decided, nobody else says where the guest is.
        let mut retired = guard(&old.retired);
        let watch = self.watch(cell)?;
        let successor = match self.successor(&record, &old) {
            Ok(successor) => successor,
            Err(seen) => {
                self.forget_successor(name, task);
                return Err(seen);
            }
        };
        if let Err(seen) = self.carry(cell, &old, &successor, spec) {
            // The guest first: the successor runs it only if it is told to, which nobody does now.
            self.call_off(&old, task);
            successor.newborn.end();
            self.forget_successor(name, task);
            return Err(seen);
        }
        *retired = true;
        crash::point("after-handover-commit");
        let Successor {
            connection,
            events,
            newborn,
            version,
            spec: given,
            ..
        } = successor;
        let mut monitor = Monitor::new(newborn.keep()?, connection, old.started_ms);
        monitor.version = Some(version.clone());
        let monitor = Arc::new(monitor);
        let took_over = monitor
            .connection()
            .call("take over", Request::TakeOver, &[], QUICK);
        crash::point("after-take-over");
        let renamed = self.take_names(name);
        crash::point("after-socket-renamed");
        let stop_asked = cell.change(|live| {
            live.trouble = None;
            live.stop_asked
        });
        watch.adopt(
            cell,
            Arc::clone(&monitor),
            Some(events),
            Recorded::Yes,
            |_| {},
        );
        drop(retired);
        if let Some(given) = given
            && let Err(seen) = self.given_anew(cell, &given)
        {
            note(seen);
        }
        if let Err(seen) = renamed {
            note(seen); // The monitor is reached over the connection that there is.
        }
        self.retire(&old);
        crash::point("before-handover-end");
        if let Err(seen) = self.inventory.vm_handover_ended(name) {
            note(seen); // The next daemon finds one of the two gone.
        }
        if stop_asked {
            // Somebody stopped it by force in between, and reached the one that the guest has left.
            let _ = monitor.connection().call("stop", Request::Stop, &[], QUICK);
        }
        let pid = monitor.process.pid();
        let unclear = |seen: Observation| {
            // On the next connection the supervisor tells it again.
            monitor.connection().close();
            let vm = name.to_owned();
            Observation::from(TakeOverUnclear { vm, pid }).because(seen)
        };
        Ok(match took_over {
            Ok(Reply::TookOver { pause_us }) => Ok(Moved {
                pause_us,
                old_pid: old.process.pid(),
                old_version: old.version.clone(),
                new_version: version,
            }),
            Ok(other) => Err(unclear(
                MonitorGarbled {
                    reason: format!("it answers a takeover with {other:?}"),
                }
                .into(),
            )),
            Err(seen) => Err(unclear(seen)),
        })
    }

    /// Starts a monitor and lets it build everything that it can while the guest runs.
    fn successor(&self, record: &VmRecord, old: &Monitor) -> Result<Successor> {
        let name = record.name.as_str();
        let lend = Request::Lend;
        let (reply, fds) = old.connection().call_for_fds("lend", lend, QUICK)?;
        let Reply::Lent(lent) = reply else {
            return Err(MonitorGarbled {
                reason: "it does not lend what it was asked for".to_owned(),
            }
            .into());
        };
        let lent = LentFiles::new(name, lent, fds)?;
        let launch = self.prepare_successor(record, lent)?;
        private(&self.config.vm_run(name))?;
        let socket = self.config.next_socket(name);
        let log = self.config.monitor_log(name);
        crash::point("before-successor");
        let child = spawn::spawn(&self.config.vmm, name, &socket, &log)?;
        let mut newborn = Newborn::child(child);
        let built = self.build_successor(name, &launch, &socket, &mut newborn);
        match built {
            Ok((connection, events, identity, version)) => Ok(Successor {
                connection,
                events,
                newborn,
                identity,
                version,
                spec: launch.spec,
            }),
            Err(seen) => Err(seen.because_all(self.end_of_newborn(newborn, name, &log))),
        }
    }

    fn build_successor(
        &self,
        name: &str,
        launch: &super::launch::Launch,
        socket: &Path,
        newborn: &mut Newborn,
    ) -> Result<(Connection, Events, (u32, u64), String)> {
        // Before it has anything of the VM's: a daemon that comes back must find and end it.
        if let Some(identity) = newborn.identity()? {
            self.inventory.vm_handover_begins(name, identity)?;
        }
        crash::point("after-successor-spawned");
        let (connection, greeting, events) = Connection::open(socket)?;
        let identity = newborn.hold(&greeting)?.identity();
        self.inventory.vm_handover_begins(name, identity)?;
        let configure = launch.configure.clone();
        connection.call("configure", configure, &launch.fds(), CONFIGURE_PATIENCE)?;
        crash::point("after-successor-built");
        Ok((connection, events, identity, greeting.version))
    }

    /// From the order to pause to the decision. An error means that the guest stays.
    fn carry(
        &self,
        cell: &Cell,
        old: &Monitor,
        successor: &Successor,
        spec: Option<&VmSpec>,
    ) -> Result<()> {
        let name = cell.name.as_str();
        let (from, to) = UnixStream::pair().os("socketpair", "a handover")?;
        let records = FdIndex(0);
        let receive = Request::Receive { records };
        let receiving = successor
            .connection
            .begin("receive", receive, &[to.as_fd()])?;
        drop(to);
        let hand_over = Request::HandOver { records };
        let fds = [from.as_fd()];
        old.connection()
            .call("hand over", hand_over, &fds, HAND_OVER_PATIENCE)?;
        drop(from);
        crash::point("after-handed-over");
        successor.connection.finish(receiving, RECEIVE_PATIENCE)?;
        if cell.live().stop_asked {
            return Err(stopping(name));
        }
        crash::point("before-handover-commit");
        let (from, to) = (old.process.identity(), successor.identity);
        let given = successor.spec.as_ref();
        let decided = self.inventory.vm_handed_over(name, from, to, spec, given);
        let Err(seen) = decided else {
            return Ok(());
        };
        let undone = seen
            .find("host.inventory-failed")
            .and_then(|failed| failed.datum("undone"))
            .is_none_or(|undone| *undone == true);
        note(seen.clone());
        // It may have got through. The guest stands still until it is certain that it has not.
        if !undone {
            while let Err(seen) = self.inventory.vm_handover_called_off(name, from) {
                note(seen);
                std::thread::sleep(RECORD_INTERVAL);
            }
        }
        Err(seen)
    }

    /// The successor is the VM's monitor: it gets the names by which the next daemon, and this one after
    /// a loss, looks for that and for what it saw.
    fn take_names(&self, name: &str) -> Result<()> {
        let rename =
            |next: &Path, place: &Path| std::fs::rename(next, place).os("rename", next.display());
        let (next, socket) = (
            self.config.next_socket(name),
            self.config.control_socket(name),
        );
        let kept = (
            self.config.next_observations(name),
            self.config.monitor_observations(name),
        );
        rename(&next, &socket).and(rename(&kept.0, &kept.1))
    }

    /// The guest goes on in the monitor that it was in. One that does not hear it now is told when
    /// its supervisor has reached it again.
    fn call_off(&self, old: &Monitor, task: &mut Task) {
        let connection = old.connection();
        if let Err(seen) = connection.call("call a handover off", Request::CallOff, &[], QUICK) {
            task.saw(seen);
            connection.close();
        }
    }

    fn forget_successor(&self, name: &str, task: &mut Task) {
        task.attempt(remove_file(&self.config.next_socket(name)));
        task.attempt(remove_file(&self.config.next_observations(name)));
        task.attempt(self.inventory.vm_handover_ended(name));
    }

    /// Lets the monitor go that the guest has left; its supervisor sees it end.
    fn retire(&self, old: &Monitor) {
        let connection = old.connection();
        let retired = connection.call("retire", Request::Retire, &[], QUICK);
        if retired.is_err() && !old.process.wait(END_PATIENCE) {
            old.process.kill();
        }
        connection.close();
    }

    /// What a daemon before left of a handover: the monitor that may not run the guest is ended, the
    /// other one gets the place of the VM's monitor.
    pub(super) fn finish_handover(&self, record: &VmRecord) {
        let name = record.name.as_str();
        let Some((pid, started)) = record.other_process else {
            // What is there then is of one that was not started any more.
            if let Err(seen) = remove_file(&self.config.next_observations(name)) {
                note(seen);
            }
            return;
        };
        match Process::find(pid, started) {
            Ok(Some(other)) => {
                tracing::info!(
                    vm = name,
                    pid,
                    "ends a monitor that does not have the guest"
                );
                other.kill();
                other.wait(END_PATIENCE);
            }
            Ok(None) => {}
            Err(seen) => return note(seen), // It may live: nothing is changed.
        }
        let next = self.config.next_socket(name);
        let at_next = Connection::open_within(&next, QUICK);
        let is_next = at_next.is_ok_and(|(_, greeting, _)| {
            greeting.pid.is_some() && greeting.pid == record.process.map(|(pid, _)| pid)
        });
        let moved = if is_next {
            self.take_names(name)
        } else {
            remove_file(&next).and(remove_file(&self.config.next_observations(name)))
        };
        if let Err(seen) = moved {
            note(seen);
        }
        if let Err(seen) = self.inventory.vm_handover_ended(name) {
            note(seen);
        }
    }
}

/// What a handover came to.
struct Moved {
    pause_us: u64,
    old_pid: u32,
    old_version: Option<String>,
    new_version: String,
}

fn not_lent(vm: &str, what: &str) -> Observation {
    NotLent {
        vm: vm.to_owned(),
        what: what.to_owned(),
    }
    .into()
}

fn stopping(vm: &str) -> Observation {
    WrongState {
        vm: vm.to_owned(),
        state: super::live::state_name(VmState::Stopping).to_owned(),
        needed: "running".to_owned(),
        advice: "it is being stopped, so there is nothing to restart".to_owned(),
    }
    .into()
}
