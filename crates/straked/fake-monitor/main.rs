//! Stands in for `strake-vmm` in tests: it speaks the control protocol, keeps what it is given,
//! copies disks in one go, and fails in the ways that a test asks for.
//!
//! What to do wrong before the machine is configured, it takes from the VM's name; afterwards from
//! the kernel's command line; and while the "guest" runs, from lines written to its console. It is
//! one thread around `poll`, so nothing in it happens at once with something else.

mod guest;
mod images;
mod jobs;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::exit;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, accept_with};
use strake_api::control::{
    Body, BootConfig, Event, ExitReason, LISTEN_FD, PROTOCOL_VERSION, Packet, Reply, Request,
    RunState, VmStatus,
};
use strake_host::packet;
use strake_observe::Observation;

use guest::{Late, Machine};

strake_observe::catalog! {
    /// What the fake monitor claims to have seen.
    pub(crate) static CATALOG;

    /// Something that a test asked for.
    Staged("fake.staged") {
        /// What.
        what: String,
    }
    text "the fake monitor was told to fail: {what}";
    remedy "nothing: this is a test";
}

pub(crate) fn staged(what: &str) -> Observation {
    Staged {
        what: what.to_owned(),
    }
    .into()
}

/// A monitor that no daemon talks to ends after this many seconds, so that a failed test leaves
/// nothing behind for long.
const LONELY_LIMIT: i64 = 60;

struct Monitor {
    listener: OwnedFd,
    daemon: Option<OwnedFd>,
    machine: Option<Machine>,
    /// Events that no daemon has heard yet.
    events: Vec<Event>,
    greeted: bool,
    /// Whether the daemon asked for the end: then the guest's end needs no dismissal.
    stopped: bool,
    /// A request that is to be answered late.
    late: Option<u64>,
}

fn main() {
    let name = std::env::args().nth(2).unwrap_or_default();
    strake_observe::set_process_name(format!("fake-monitor {name}"));
    eprintln!("fake monitor of {name}");
    if name.starts_with("die-") {
        eprintln!("dies before it has said anything");
        exit(3);
    }
    let mut monitor = Monitor {
        listener: inherited(),
        daemon: None,
        machine: None,
        events: Vec::new(),
        greeted: false,
        stopped: false,
        late: None,
    };
    let version = if name.starts_with("old-") {
        PROTOCOL_VERSION + 1
    } else {
        PROTOCOL_VERSION
    };
    loop {
        monitor.step(version);
    }
}

#[allow(unsafe_code)]
fn inherited() -> OwnedFd {
    // SAFETY: the daemon passes its listening socket as this descriptor, and nothing else in this
    // process uses it.
    unsafe { OwnedFd::from_raw_fd(LISTEN_FD) }
}

impl Monitor {
    fn step(&mut self, version: u32) {
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
        fds.extend(
            self.daemon
                .as_ref()
                .map(|fd| PollFd::new(fd, PollFlags::IN)),
        );
        let runs = |m: &&Machine| matches!(m.place, guest::Place::Here | guest::Place::Arrived);
        let machines = self.machine.iter().filter(runs);
        let consoles = machines.flat_map(|machine| &machine.consoles);
        fds.extend(consoles.map(|stream| PollFd::new(stream, PollFlags::IN)));
        let patience = Timespec {
            tv_sec: LONELY_LIMIT,
            tv_nsec: 0,
        };
        if poll(&mut fds, Some(&patience)) == Ok(0) && self.daemon.is_none() {
            exit(0);
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let ready = |index: usize| ready.get(index).copied().unwrap_or(false);
        let first_console = 1 + usize::from(self.daemon.is_some());
        let runs = |m: &&Machine| matches!(m.place, guest::Place::Here | guest::Place::Arrived);
        let consoles = self
            .machine
            .as_ref()
            .filter(runs)
            .map_or(0, |m| m.consoles.len());
        let spoken: Vec<usize> = (0..consoles)
            .filter(|index| ready(first_console + index))
            .collect();
        if self.daemon.is_some() && ready(1) {
            self.hear(version);
        }
        if ready(0)
            && let Ok(daemon) = accept_with(&self.listener, SocketFlags::CLOEXEC)
        {
            self.daemon = Some(daemon);
            self.greeted = false;
        }
        if let Some(machine) = &mut self.machine {
            // From the last, because one that has gone is taken out.
            for index in spoken.into_iter().rev() {
                self.events.extend(machine.console_input(index));
            }
        }
        self.answer_late();
        self.tell();
    }

    fn answer_late(&mut self) {
        let Some(machine) = self.machine.as_mut().filter(|of| of.accepts == Late::Now) else {
            return;
        };
        machine.accepts = Late::No;
        if let (Some(daemon), Some(id)) = (&self.daemon, self.late.take()) {
            let body = Body::Reply(Reply::Done);
            let _ = packet::send(daemon, &Packet { id, body }, &[]);
        }
    }

    /// Sends the events that wait; the end of the guest is the last.
    fn tell(&mut self) {
        while self.greeted
            && let (Some(daemon), Some(event)) = (&self.daemon, self.events.first())
        {
            let body = Body::Event(event.clone());
            if packet::send(daemon, &Packet { id: 0, body }, &[]).is_err() {
                self.daemon = None;
                return;
            }
            if let Event::State(RunState::Exited(reason)) = self.events.remove(0) {
                eprintln!("ends: {reason:?}");
                if self.stopped {
                    exit(0);
                }
                if let Some(machine) = &mut self.machine {
                    machine.ends(reason);
                }
            }
        }
    }

    fn hear(&mut self, version: u32) {
        let Some(daemon) = &self.daemon else { return };
        let mut buffer = Vec::new();
        let received = match packet::receive(daemon, &mut buffer) {
            Ok(Some(received)) => received,
            Ok(None) | Err(_) => {
                self.daemon = None;
                if self.machine.as_ref().is_some_and(|of| of.ends_when_alone) {
                    let reason = ExitReason::GuestPowerOff;
                    self.events.push(Event::State(RunState::Exited(reason)));
                }
                return;
            }
        };
        let Body::Request(request) = received.packet.body else {
            return;
        };
        let retired = request == Request::Retire
            && self
                .machine
                .as_ref()
                .is_some_and(|m| m.place == guest::Place::Given);
        let dismissed = request == Request::Dismiss || retired;
        let lends = request == Request::Lend;
        let reply = self.answer(request, received.fds, version);
        if reply.is_none() {
            self.late = Some(received.packet.id);
        }
        let (Some(daemon), Some(reply)) = (&self.daemon, reply) else {
            return;
        };
        let packet = Packet {
            id: received.packet.id,
            body: Body::Reply(reply),
        };
        let lent = self
            .machine
            .as_ref()
            .filter(|_| lends)
            .and_then(Machine::lend);
        let sent = match lent {
            Some((lent, fds)) => {
                let body = Body::Reply(Reply::Lent(lent));
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                let id = received.packet.id;
                packet::send(daemon, &Packet { id, body }, &fds)
            }
            None => packet::send(daemon, &packet, &[]),
        };
        if sent.is_err() {
            self.daemon = None;
        }
        if dismissed {
            exit(0);
        }
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>, version: u32) -> Option<Reply> {
        match request {
            Request::Hello { .. } => {
                self.greeted = true;
                // Asked again until it is answered.
                let awaiting = self.machine.iter().flat_map(Machine::awaiting);
                let again: Vec<Event> = awaiting.collect();
                self.events
                    .retain(|event| !matches!(event, Event::JobAwaitsCommit { .. }));
                self.events.extend(again);
                return Some(Reply::Hello {
                    version,
                    monitor: "fake".to_owned(),
                    vm: self.machine.as_ref().map(|machine| machine.name.clone()),
                });
            }
            Request::Configure(config) => {
                let cmdline = match &config.boot {
                    BootConfig::Kernel { cmdline, .. } => cmdline.clone(),
                    BootConfig::Disk { cmdline_append, .. } => cmdline_append.clone(),
                    BootConfig::Predecessor => String::new(),
                };
                if cmdline.contains("refuse-configure") {
                    return Some(Reply::Failed(staged("refuse-configure")));
                }
                eprintln!("has {} cpus", config.cpus);
                for disk in &config.disks {
                    let limits = disk.limits;
                    eprintln!("begins with {:?} {:?}", limits.iops, limits.bandwidth);
                }
                self.machine = Some(Machine::new(&config, cmdline, fds));
                return Some(Reply::Done);
            }
            Request::ConfigureExport(config) => {
                self.machine = Some(Machine::export(&config, fds));
                return Some(Reply::Done);
            }
            Request::Stop => {
                self.stopped = true;
                self.events
                    .push(Event::State(RunState::Exited(ExitReason::Stopped)));
                return Some(Reply::Done);
            }
            Request::Status if self.machine.is_none() => {
                return Some(Reply::Status(VmStatus {
                    state: RunState::Unconfigured,
                    uptime_ms: 0,
                    disks: Vec::new(),
                    jobs: Vec::new(),
                }));
            }
            _ => {}
        }
        let Some(machine) = &mut self.machine else {
            return Some(Reply::Failed(staged("not configured")));
        };
        let (reply, events) = machine.answer(request, fds);
        self.events.extend(events);
        reply
    }
}

/// Reads what is there of a line.
pub(crate) fn read_some(stream: &mut UnixStream) -> Option<String> {
    let mut bytes = [0; 4096];
    match stream.read(&mut bytes) {
        Ok(0) | Err(_) => None,
        Ok(n) => Some(String::from_utf8_lossy(bytes.get(..n)?).into_owned()),
    }
}

/// Says something on a console: to its log and to whoever is attached.
pub(crate) fn say(log: &mut File, consoles: &mut [UnixStream], text: &str) {
    let _ = log.write_all(text.as_bytes());
    for console in consoles {
        let _ = console.write_all(text.as_bytes());
    }
}
