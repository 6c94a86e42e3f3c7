//! The "guest": what it was given, and what it is told over its console.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{abort, exit};
use std::sync::Arc;

use strake_api::control::{
    DiskCounters, DiskStatus, Event, ExitReason, MachineConfig, Reply, Request, RunState, VmStatus,
};

use strake_block::Image;

use crate::images::{self, Fds};
use crate::jobs::{Job, Order, To};
use crate::{read_some, say, staged};

pub(crate) struct Disk {
    pub(crate) name: String,
    /// As large as the image was when the guest was started.
    pub(crate) size: u64,
    /// The image that the guest writes to: with its lock, the authoritative one.
    pub(crate) image: Arc<dyn Image>,
}

/// An answer that is to be late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Late {
    No,
    Waits,
    Now,
}

pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) cmdline: String,
    pub(crate) disks: Vec<Disk>,
    pub(crate) consoles: Vec<UnixStream>,
    pub(crate) jobs: Vec<Job>,
    /// Whether the guest powers off once no daemon listens.
    pub(crate) ends_when_alone: bool,
    /// Whether the daemon waits for the answer to a migration that is to be accepted late.
    pub(crate) accepts: Late,
    log: File,
    state: RunState,
    /// Descriptors of which only the holding counts: /dev/kvm, memory, kernel, taps.
    _others: Vec<OwnedFd>,
}

impl Machine {
    pub(crate) fn new(config: &MachineConfig, cmdline: String, fds: Vec<OwnedFd>) -> Self {
        let mut fds = Fds::new(fds);
        let log = fds.take(config.console_log).unwrap_or_else(|| exit(4));
        let disks = config
            .disks
            .iter()
            .map(|disk| {
                let image = images::open(&disk.image, disk.read_only, &mut fds);
                let image = image.unwrap_or_else(|seen| {
                    eprintln!("{seen}");
                    exit(4)
                });
                Disk {
                    name: disk.name.clone(),
                    size: image.size(),
                    image,
                }
            })
            .collect();
        Self {
            name: config.vm.clone(),
            cmdline,
            disks,
            consoles: Vec::new(),
            jobs: Vec::new(),
            ends_when_alone: false,
            accepts: Late::No,
            log: File::from(log),
            state: RunState::Built,
            _others: fds.rest(),
        }
    }

    /// What follows `start` in the command line.
    fn word(&self, start: &str) -> Option<String> {
        let mut words = self.cmdline.split_whitespace();
        words.find_map(|word| word.strip_prefix(start).map(str::to_owned))
    }

    /// The guest has ended; the monitor stays until it is dismissed.
    pub(crate) fn ends(&mut self, reason: ExitReason) {
        self.state = RunState::Exited(reason);
    }

    /// Whether the command line has the word.
    pub(crate) fn told(&self, word: &str) -> bool {
        self.cmdline.split_whitespace().any(|other| other == word)
    }

    pub(crate) fn awaiting(&self) -> impl Iterator<Item = Event> + '_ {
        let awaiting = self.jobs.iter().filter(|job| job.awaits());
        awaiting.map(|job| Event::JobAwaitsCommit {
            job: job.status.job.clone(),
        })
    }

    pub(crate) fn answer(
        &mut self,
        request: Request,
        mut fds: Vec<OwnedFd>,
    ) -> (Option<Reply>, Vec<Event>) {
        let mut events = Vec::new();
        let reply = match request {
            Request::Start => {
                if self.told("crash-on-start") {
                    eprintln!("crashes on start");
                    abort();
                }
                self.state = RunState::Running;
                if self.told("start=silent") {
                    return (None, events);
                }
                if let Some(path) = self.word("fill=") {
                    fill(&path);
                }
                say(&mut self.log, &mut self.consoles, "guest boots\n");
                Reply::Done
            }
            Request::Pause => self.becomes(RunState::Paused, &mut events),
            Request::Resume => self.becomes(RunState::Running, &mut events),
            Request::Status => Reply::Status(self.status()),
            Request::PowerButton => {
                if !self.told("deaf") {
                    events.push(Event::State(RunState::Exited(ExitReason::GuestPowerOff)));
                }
                Reply::Done
            }
            Request::AttachConsole { .. } => match fds.pop() {
                Some(stream) => {
                    self.consoles.push(UnixStream::from(stream));
                    Reply::Done
                }
                None => Reply::Failed(staged("no descriptor")),
            },
            Request::MigrateDisk {
                job,
                disk,
                destination,
                journal,
                ..
            } => {
                let late = self.told("accept-late") && self.jobs.len() == 2;
                let order = Order {
                    job,
                    disk,
                    to: To::Copy {
                        destination,
                        journal,
                    },
                };
                let reply = self.migrate(order, fds, &mut events);
                if late {
                    self.accepts = Late::Waits;
                    return (None, events);
                }
                reply
            }
            Request::SnapshotDisk {
                job, disk, overlay, ..
            } => {
                let to = To::Cover(overlay);
                self.migrate(Order { job, disk, to }, fds, &mut events)
            }
            Request::ConsolidateDisk {
                job, disk, below, ..
            } => {
                let to = To::Below(below);
                self.migrate(Order { job, disk, to }, fds, &mut events)
            }
            Request::JobStatus { job } => match self.job(&job) {
                Some(job) => Reply::Job(job.status.clone()),
                None => Reply::Failed(staged("no such job")),
            },
            Request::CancelJob { job } => self.cancel(&job, &mut events),
            Request::JobDecision { job, committed } => self.decided(&job, committed, &mut events),
            Request::Hello { .. } | Request::Configure(_) | Request::Stop | Request::Dismiss => {
                Reply::Done
            }
        };
        (Some(reply), events)
    }

    fn becomes(&mut self, state: RunState, events: &mut Vec<Event>) -> Reply {
        self.state = state.clone();
        events.push(Event::State(state));
        Reply::Done
    }

    fn status(&self) -> VmStatus {
        VmStatus {
            state: self.state.clone(),
            uptime_ms: 1,
            disks: self
                .disks
                .iter()
                .map(|disk| DiskStatus {
                    name: disk.name.clone(),
                    size_bytes: disk.size,
                    counters: DiskCounters {
                        reads: 7,
                        ..DiskCounters::default()
                    },
                })
                .collect(),
            jobs: self.jobs.iter().map(|job| job.status.clone()).collect(),
        }
    }

    /// Does what the lines say, and says them back.
    pub(crate) fn console_input(&mut self, index: usize) -> Vec<Event> {
        let Some(text) = self.consoles.get_mut(index).and_then(read_some) else {
            self.consoles.remove(index);
            return Vec::new();
        };
        let mut events = Vec::new();
        for line in text.lines() {
            self.command(line, &mut events);
            say(&mut self.log, &mut self.consoles, &format!("did {line}\n"));
        }
        events
    }

    fn command(&mut self, line: &str, events: &mut Vec<Event>) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let exited = |reason| Event::State(RunState::Exited(reason));
        match words.as_slice() {
            ["crash"] => {
                eprintln!("crashes because a test says so");
                abort();
            }
            ["poweroff"] => events.push(exited(ExitReason::GuestPowerOff)),
            ["reset"] => events.push(exited(ExitReason::GuestReset)),
            ["fail"] => events.push(exited(ExitReason::Failed(staged("fail")))),
            ["observe"] => events.push(Event::Observed(staged("observe"))),
            // The guest writes and flushes.
            ["write", at, what] => {
                if let (Some(disk), Ok(at)) = (self.disks.first(), at.parse())
                    && let Err(seen) = images::write(&*disk.image, at, what.as_bytes())
                {
                    eprintln!("{seen}");
                }
            }
            ["poweroff-when-alone"] => self.ends_when_alone = true,
            ["sigsys"] => {
                let us = rustix::process::getpid();
                let _ = rustix::process::kill_process(us, rustix::process::Signal::SYS);
            }
            ["accept"] => self.accepts = Late::Now,
            ["go"] => self.go_on(events),
            _ => {}
        }
    }
}

/// Writes until there is no room.
fn fill(path: &str) {
    use std::io::Write;
    let Ok(mut file) = File::create(path) else {
        return;
    };
    while file.write_all(&[0; 4096]).is_ok() {}
}
