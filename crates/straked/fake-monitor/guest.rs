//! The "guest": what it was given, and what it is told over its console.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{abort, exit};
use std::sync::Arc;

use strake_api::control::{
    BootConfig, DiskConfig, DiskCounters, DiskStatus, Event, ExitReason, ExportConfig, FdIndex,
    Lent, MachineConfig, Reply, Request, RunState, VmStatus,
};
use strake_api::job::Progress;

use strake_block::Image;
use strake_observe::{Ring, State, recorder};

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

/// Where the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Here,
    Given,
    Awaited,
    Received,
    Arrived,
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
    /// Where the guest is, as with a real monitor.
    pub(crate) place: Place,
    memory: OwnedFd,
    /// Descriptors of which only the holding counts: /dev/kvm, memory, kernel, taps.
    _others: Vec<OwnedFd>,
}

impl Machine {
    pub(crate) fn new(config: &MachineConfig, cmdline: String, fds: Vec<OwnedFd>) -> Self {
        let mut fds = Fds::new(fds);
        let log = fds.take(config.console_log).unwrap_or_else(|| exit(4));
        let memory = fds.take(config.memory.memfd).unwrap_or_else(|| exit(4));
        if let Some(file) = config.observations.and_then(|index| fds.take(index)) {
            recorder().outlive(Ring::new(File::from(file)));
        }
        let mut machine = Self::over(&config.vm, &config.disks, log.into(), memory, cmdline, fds);
        if matches!(config.boot, BootConfig::Predecessor) {
            machine.place = Place::Awaited;
        }
        machine
    }

    /// An export: it listens at nothing, but holds what it was given.
    pub(crate) fn export(config: &ExportConfig, fds: Vec<OwnedFd>) -> Self {
        let log = File::options().write(true).open("/dev/null");
        let log = log.unwrap_or_else(|_| exit(4));
        let disks = std::slice::from_ref(&config.disk);
        let memory = log.try_clone().unwrap_or_else(|_| exit(4));
        let fds = Fds::new(fds);
        Self::over(
            &config.export,
            disks,
            log,
            memory.into(),
            String::new(),
            fds,
        )
    }

    fn over(
        name: &str,
        disks: &[DiskConfig],
        log: File,
        memory: OwnedFd,
        cmdline: String,
        mut fds: Fds,
    ) -> Self {
        let disks = disks
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
            name: name.to_owned(),
            cmdline,
            disks,
            consoles: Vec::new(),
            jobs: Vec::new(),
            ends_when_alone: false,
            accepts: Late::No,
            log,
            state: RunState::Built,
            place: Place::Here,
            memory,
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
            Request::SetDiskLimits { disk, limits } => {
                eprintln!("limits of {disk}: {:?} {:?}", limits.iops, limits.bandwidth);
                Reply::Done
            }
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
                keep,
                ..
            } => {
                let late = self.told("accept-late") && self.jobs.len() == 2;
                let order = Order {
                    job,
                    disk,
                    keep,
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
                let order = Order {
                    job,
                    disk,
                    keep: None,
                    to,
                };
                self.migrate(order, fds, &mut events)
            }
            Request::ConsolidateDisk {
                job, disk, below, ..
            } => {
                let to = To::Below(below);
                let order = Order {
                    job,
                    disk,
                    keep: None,
                    to,
                };
                self.migrate(order, fds, &mut events)
            }
            Request::JobStatus { job } => match self.job(&job) {
                Some(job) => Reply::Job(job.status.clone()),
                None => Reply::Failed(staged("no such job")),
            },
            Request::CancelJob { job } => self.cancel(&job, &mut events),
            Request::PauseJob { job } => self.paused(&job, Progress::Paused),
            Request::ResumeJob { job } => self.paused(&job, Progress::On),
            Request::SetJob { job, change } => self.set(&job, &change),
            Request::JobDecision { job, committed } => self.decided(&job, committed, &mut events),
            Request::HandOver { .. } => self.hand_over(fds.pop()),
            Request::Receive { .. } => self.receive(fds.pop()),
            Request::TakeOver => match self.place {
                Place::Received | Place::Arrived => {
                    if self.told("die-at-take-over") {
                        abort();
                    }
                    self.place = Place::Arrived;
                    self.state = RunState::Running;
                    say(&mut self.log, &mut self.consoles, "guest goes on\n");
                    Reply::TookOver { pause_us: 7 }
                }
                _ => Reply::Failed(staged("no guest to take over")),
            },
            Request::CallOff => match self.place {
                Place::Awaited | Place::Received => Reply::Failed(staged("not the first")),
                Place::Given => {
                    self.place = Place::Here;
                    say(&mut self.log, &mut self.consoles, "guest stays\n");
                    Reply::Done
                }
                Place::Here | Place::Arrived => Reply::Done,
            },
            Request::Hello { .. }
            | Request::Configure(_)
            | Request::ConfigureExport(_)
            | Request::Stop
            | Request::Dismiss
            | Request::Lend
            | Request::Retire => Reply::Done,
        };
        (Some(reply), events)
    }

    /// What a successor needs.
    pub(crate) fn lend(&self) -> Option<(Lent, Vec<OwnedFd>)> {
        let mut fds = vec![self.memory.try_clone().ok()?];
        for disk in &self.disks {
            fds.extend(disk.image.files().ok()?);
        }
        let images = 1..u8::try_from(fds.len()).ok()?;
        let lent = Lent {
            memory: FdIndex(0),
            images: images.map(FdIndex).collect(),
            taps: Vec::new(),
        };
        Some((lent, fds))
    }

    /// The records are what the guest was told at its start.
    fn hand_over(&mut self, stream: Option<OwnedFd>) -> Reply {
        use std::io::Write;
        if self.told("keeps-its-guest") {
            return Reply::Failed(staged("keeps-its-guest"));
        }
        if self.told("die-at-hand-over") {
            abort();
        }
        let sent = stream.map(|stream| UnixStream::from(stream).write_all(self.cmdline.as_bytes()));
        if !matches!(sent, Some(Ok(()))) {
            return Reply::Failed(staged("nobody takes the records"));
        }
        self.place = Place::Given;
        Reply::Done
    }

    fn receive(&mut self, stream: Option<OwnedFd>) -> Reply {
        use std::io::Read;
        let mut records = String::new();
        let read = stream.map(|stream| UnixStream::from(stream).read_to_string(&mut records));
        if !matches!(read, Some(Ok(_))) || self.place != Place::Awaited {
            return Reply::Failed(staged("no records"));
        }
        self.cmdline = records;
        if self.told("die-at-receive") {
            abort();
        }
        if self.told("refuse-guest") {
            return Reply::Failed(staged("refuse-guest"));
        }
        self.place = Place::Received;
        Reply::Done
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
            // Seen, and killed before it could be told.
            ["see-and-die"] => {
                recorder().record(staged("seen in the last moment"), State::Open);
                let us = rustix::process::getpid();
                let _ = rustix::process::kill_process(us, rustix::process::Signal::KILL);
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
