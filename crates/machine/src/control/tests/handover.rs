//! A guest that moves between two servers, with a test as the daemon.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use strake_api::control::{BootConfig, ExitReason, FdIndex, Lent, Reply, Request, RunState};
use strake_observe::Kind;
use strake_state::corpus::{self, Sample};
use strake_state::observations::ShapeDiffers;

use super::guests::{COUNTER, chatter, count, elf, power_off, say};
use super::harness::{Daemon, Monitor, PATIENCE, have_kvm};
use crate::handover::SavedMachine;
use crate::observations::{NotHandedOver, NotTakenOver, RecordsLost};

/// One monitor and the daemon's connection to it.
struct Side {
    monitor: Monitor,
    daemon: Daemon,
}

impl Side {
    /// With a guest that runs.
    fn running(kernel: &[u8], cpus: u8) -> Option<Self> {
        if !have_kvm() {
            return None;
        }
        let monitor = Monitor::start();
        let mut daemon = monitor.daemon();
        let (config, fds) = monitor.machine(kernel, cpus);
        let reply = daemon.ask_with(Request::Configure(Box::new(config)), &fds);
        assert!(matches!(reply, Reply::Done), "{reply:?}");
        daemon.done(Request::Start);
        Some(Self { monitor, daemon })
    }

    /// A monitor of the same machine that waits for this one's guest.
    fn successor(&mut self, cpus: u8) -> Self {
        self.try_successor(cpus).expect("the guest has ended")
    }

    /// The same; none if the guest has ended.
    fn try_successor(&mut self, cpus: u8) -> Option<Self> {
        let (lent, mut fds) = self.try_lend()?;
        assert!(lent.images.is_empty() && lent.taps.is_empty());
        let memory = fds.remove(usize::from(lent.memory.0));
        let monitor = Monitor::start();
        let mut daemon = monitor.daemon();
        let (mut config, mut own) = monitor.machine(&elf(&[]), cpus);
        config.boot = BootConfig::Predecessor;
        own[usize::from(config.memory.memfd.0)] = memory;
        // The same log, as the daemon opens it.
        own[usize::from(config.console_log.0)] = File::options()
            .append(true)
            .open(self.monitor.directory.path().join("console.log"))
            .unwrap()
            .into();
        let reply = daemon.ask_with(Request::Configure(Box::new(config)), &own);
        assert!(matches!(reply, Reply::Done), "{reply:?}");
        Some(Self { monitor, daemon })
    }

    fn lend(&mut self) -> (Lent, Vec<OwnedFd>) {
        self.try_lend().expect("the guest has ended")
    }

    fn try_lend(&mut self) -> Option<(Lent, Vec<OwnedFd>)> {
        let id = self.daemon.send(Request::Lend, &[]);
        match self.daemon.answer_with_fds(id) {
            (Reply::Lent(lent), mut fds) => {
                let count = u8::try_from(fds.count()).unwrap();
                let taken = (0..count).map(|n| fds.take(FdIndex(n), "a test").unwrap());
                Some((lent, taken.collect()))
            }
            (Reply::Failed(_), _) if matches!(self.state(), RunState::Exited(_)) => None,
            (other, _) => panic!("{other:?}"),
        }
    }

    /// The guest's counter.
    fn counter(&mut self) -> Counter {
        let (lent, mut fds) = self.lend();
        Counter(fds.remove(usize::from(lent.memory.0)).into())
    }

    fn state(&mut self) -> RunState {
        match self.daemon.ask(Request::Status) {
            Reply::Status(status) => status.state,
            other => panic!("{other:?}"),
        }
    }
}

/// Both answers: of the one that hands over, of the one that receives.
fn carry(from: &mut Side, to: &mut Side) -> (Reply, Reply) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let records = FdIndex(0);
    let receiving = to
        .daemon
        .send(Request::Receive { records }, &[theirs.into()]);
    let handing = from
        .daemon
        .send(Request::HandOver { records }, &[ours.into()]);
    (from.daemon.answer(handing), to.daemon.answer(receiving))
}

fn take_over(to: &mut Side) -> u64 {
    match to.daemon.ask(Request::TakeOver) {
        Reply::TookOver { pause_us } => pause_us,
        other => panic!("{other:?}"),
    }
}

/// Guest memory, looked at from outside.
struct Counter(File);

impl Counter {
    fn value(&self) -> u32 {
        let mut bytes = [0; 4];
        self.0
            .read_exact_at(&mut bytes, u64::from(COUNTER))
            .unwrap();
        u32::from_le_bytes(bytes)
    }

    #[track_caller]
    fn counts(&self) {
        let before = self.value();
        let end = Instant::now() + PATIENCE;
        while self.value() == before {
            assert!(Instant::now() < end, "the guest does not run");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    fn stands_still(&self) {
        let before = self.value();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(self.value(), before, "the guest runs");
    }
}

#[test]
fn a_guest_goes_on_in_one_monitor_after_another() {
    for cpus in [1, 4] {
        let Some(mut here) = Side::running(&elf(&[count()]), cpus) else {
            return;
        };
        let counter = here.counter();
        counter.counts();
        for _ in 0..5 {
            let mut next = here.successor(cpus);
            assert_eq!(next.state(), RunState::Built);
            let (handed, received) = carry(&mut here, &mut next);
            assert_eq!((handed, received), (Reply::Done, Reply::Done));
            counter.stands_still();
            let pause = take_over(&mut next);
            assert!(pause >= 50_000, "it stood still on purpose: {pause}");
            assert_eq!(take_over(&mut next), pause, "asked again, the same");
            assert_eq!(next.state(), RunState::Running);
            counter.counts();
            here.daemon.done(Request::Retire);
            assert_eq!(here.monitor.join(), ExitReason::Stopped);
            counter.counts();
            here = next;
        }
        here.daemon.done(Request::Stop);
        assert_eq!(here.monitor.join(), ExitReason::Stopped);
    }
}

#[test]
fn a_handover_that_is_called_off_leaves_the_guest_where_it_was() {
    let Some(mut here) = Side::running(&elf(&[count()]), 2) else {
        return;
    };
    let counter = here.counter();
    let mut next = here.successor(2);
    assert_eq!(carry(&mut here, &mut next), (Reply::Done, Reply::Done));
    counter.stands_still();
    let refused = here.daemon.ask(Request::Resume);
    assert!(matches!(refused, Reply::Failed(_)), "it is not its guest");
    here.daemon.done(Request::CallOff);
    counter.counts();
    here.daemon.done(Request::CallOff);
    let refused = here.daemon.ask(Request::Retire);
    assert!(matches!(refused, Reply::Failed(_)), "it has the guest");
    // The one that it did not come to ends; another one gets it.
    next.daemon.done(Request::Stop);
    assert_eq!(next.monitor.join(), ExitReason::Stopped);
    let mut other = here.successor(2);
    assert_eq!(carry(&mut here, &mut other), (Reply::Done, Reply::Done));
    take_over(&mut other);
    here.daemon.done(Request::Retire);
    counter.counts();
}

#[test]
fn a_daemon_that_goes_away_is_waited_for_by_both() {
    let Some(mut here) = Side::running(&elf(&[count()]), 1) else {
        return;
    };
    let counter = here.counter();
    let mut next = here.successor(1);
    assert_eq!(carry(&mut here, &mut next), (Reply::Done, Reply::Done));
    here.daemon = here.monitor.daemon();
    next.daemon = next.monitor.daemon();
    counter.stands_still();
    take_over(&mut next);
    counter.counts();
    here.daemon.done(Request::Retire);
}

#[test]
fn without_a_successor_the_guest_runs_on() {
    let Some(mut here) = Side::running(&elf(&[count()]), 1) else {
        return;
    };
    let counter = here.counter();
    for _ in 0..3 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let records = FdIndex(0);
        let handed = here
            .daemon
            .ask_with(Request::HandOver { records }, &[ours.into()]);
        let Reply::Failed(seen) = handed else {
            panic!("{handed:?}");
        };
        assert!(seen.is::<NotHandedOver>() && seen.find(RecordsLost::ID).is_some());
        counter.counts();
    }
    let mut next = here.successor(1);
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    let records = FdIndex(0);
    let received = next
        .daemon
        .ask_with(Request::Receive { records }, &[theirs.into()]);
    let Reply::Failed(seen) = received else {
        panic!("{received:?}");
    };
    assert!(seen.is::<NotTakenOver>() && seen.find(RecordsLost::ID).is_some());
    let refused = next.daemon.ask(Request::TakeOver);
    assert!(matches!(refused, Reply::Failed(_)), "{refused:?}");
    let refused = next.daemon.ask(Request::Start);
    assert!(matches!(refused, Reply::Failed(_)), "{refused:?}");
}

#[test]
fn another_machine_refuses_the_guest_which_runs_on() {
    let Some(mut here) = Side::running(&elf(&[count()]), 1) else {
        return;
    };
    let counter = here.counter();
    let mut next = here.successor(2);
    let (handed, received) = carry(&mut here, &mut next);
    assert_eq!(handed, Reply::Done);
    let Reply::Failed(seen) = received else {
        panic!("{received:?}");
    };
    let differs = seen.find(ShapeDiffers::ID).expect("why");
    assert!(differs.text().contains("vCPUs: 1"), "{differs}");
    counter.stands_still();
    here.daemon.done(Request::CallOff);
    counter.counts();
}

#[test]
fn a_paused_guest_stays_paused_and_a_terminal_stays_attached() {
    let Some(mut here) = Side::running(&elf(&[chatter()]), 1) else {
        return;
    };
    let (mut terminal, theirs) = UnixStream::pair().unwrap();
    terminal.set_read_timeout(Some(PATIENCE)).unwrap();
    let stream = FdIndex(0);
    let attached = here
        .daemon
        .ask_with(Request::AttachConsole { stream }, &[theirs.into()]);
    assert_eq!(attached, Reply::Done);
    let mut said = [0; 1];
    terminal.read_exact(&mut said).unwrap();
    here.daemon.done(Request::Pause);
    let mut next = here.successor(1);
    assert_eq!(carry(&mut here, &mut next), (Reply::Done, Reply::Done));
    take_over(&mut next);
    assert_eq!(next.state(), RunState::Paused);
    here.daemon.done(Request::Retire);
    // What was said before the pause.
    terminal.set_nonblocking(true).unwrap();
    while terminal.read_exact(&mut said).is_ok() {}
    terminal.set_nonblocking(false).unwrap();
    next.daemon.done(Request::Resume);
    assert_eq!(next.state(), RunState::Running);
    terminal.read_exact(&mut said).unwrap();
    assert_eq!(&said, b".");
    terminal.write_all(b"typed").unwrap();
    next.daemon.done(Request::Stop);
    next.monitor.join();
}

/// What the guest has said comes once, in order, whoever wrote it down.
#[test]
fn what_a_guest_says_is_whole() {
    let words: Vec<String> = (0..200).map(|n| format!("{n} ")).collect();
    let mut parts: Vec<_> = words.iter().map(|word| say(word)).collect();
    parts.push(power_off());
    let Some(mut here) = Side::running(&elf(&parts), 1) else {
        return;
    };
    let log = here.monitor.directory.path().join("console.log");
    let keep = File::open(&log).unwrap();
    let mut old = Vec::new();
    for _ in 0..3 {
        let Some(mut next) = here.try_successor(1) else {
            break; // it has said all
        };
        let (handed, _) = carry(&mut here, &mut next);
        if handed != Reply::Done {
            break; // it has said all
        }
        take_over(&mut next);
        here.daemon.done(Request::Retire);
        // Each side's directory holds the log of the one before.
        let link = next.monitor.directory.path().join("console.log");
        std::fs::remove_file(&link).unwrap();
        std::fs::hard_link(&log, &link).unwrap();
        old.push(std::mem::replace(&mut here, next));
    }
    let end = Instant::now() + PATIENCE;
    let expected = words.concat();
    loop {
        let mut said = String::new();
        let mut from = &keep;
        std::io::Seek::rewind(&mut from).unwrap();
        from.read_to_string(&mut said).unwrap();
        if said == expected {
            break;
        }
        assert!(Instant::now() < end, "{said:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn stored_records_of_every_version_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    corpus::check(
        &folder,
        &[Sample::of(SavedMachine {
            vm: "web1".to_owned(),
            cpus: 4,
            memory: 1 << 30,
            paused: true,
            uptime_ms: 5,
            stopped_ns: 6,
        })],
    );
}
