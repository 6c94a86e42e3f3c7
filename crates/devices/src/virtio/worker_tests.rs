//! Stopping workers, and taking it back.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use super::*;
use crate::pci::Msix;
use crate::testing::{Host, eventually};
use crate::virtio::bare_interrupter;

#[derive(Default)]
struct Watch {
    starts: AtomicUsize,
    stops: AtomicUsize,
    busy: AtomicBool,
    panic: AtomicBool,
    fault: AtomicBool,
}

struct Dummy {
    name: &'static str,
    event: EventFd,
    watch: Arc<Watch>,
}

impl Work for Dummy {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn watch(&self, poller: &Poller) -> Result<()> {
        poller.readable(as_fd(&self.event), 0)
    }

    fn start(&mut self) -> Result<Progress, Fault> {
        self.watch.starts.fetch_add(1, SeqCst);
        Ok(Progress::Wait)
    }

    fn ready(&mut self, _: Ready, _: &Poller) -> Result<Progress, Fault> {
        let _ = self.event.read();
        assert!(!self.watch.panic.load(SeqCst), "on purpose");
        if self.watch.fault.load(SeqCst) {
            return Err(Fault::ring(0, "on purpose"));
        }
        Ok(Progress::Wait)
    }

    fn stop(&mut self) {
        self.watch.stops.fetch_add(1, SeqCst);
    }

    fn idle(&self) -> bool {
        !self.watch.busy.load(SeqCst)
    }
}

struct Bench {
    interrupter: Interrupter,
    events: Vec<EventFd>,
    watches: Vec<Arc<Watch>>,
    works: Vec<Box<dyn Work>>,
}

fn bench() -> Bench {
    let host = Host::default();
    let msix = Arc::new(Msix::new("dummy", 1, &*host.msi).unwrap());
    let mut bench = Bench {
        interrupter: bare_interrupter("dummy", msix, 1),
        events: Vec::new(),
        watches: Vec::new(),
        works: Vec::new(),
    };
    for name in ["dummy-0", "dummy-1"] {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let watch = Arc::new(Watch::default());
        bench.events.push(event.try_clone().unwrap());
        bench.watches.push(Arc::clone(&watch));
        bench.works.push(Box::new(Dummy { name, event, watch }));
    }
    bench
}

impl Bench {
    fn spawn(&mut self) -> Workers {
        let works = std::mem::take(&mut self.works);
        Workers::spawn("dummy", works, &self.interrupter).unwrap()
    }

    fn starts(&self) -> [usize; 2] {
        [0, 1].map(|index| self.watches[index].starts.load(SeqCst))
    }
}

#[test]
fn idle_workers_end_and_give_their_works_back() {
    let mut bench = bench();
    let workers = bench.spawn();
    eventually(|| bench.starts() == [1, 1]);
    let Ok((works, seen)) = workers.stop(Duration::from_secs(5), &bench.interrupter) else {
        panic!("they did not stop");
    };
    assert_eq!((works.len(), seen.len()), (2, 0));
}

#[test]
fn when_the_bound_passes_all_of_them_go_on() {
    let mut bench = bench();
    let workers = bench.spawn();
    bench.watches[1].busy.store(true, SeqCst);
    let Err(Ok(workers)) = workers.stop(Duration::from_millis(20), &bench.interrupter) else {
        panic!("one of them is busy");
    };
    // The one that had ended and the one that had not both look at everything again.
    eventually(|| bench.starts() == [2, 2]);
    assert!(!workers.wait(Duration::from_millis(20)));
    bench.watches[1].busy.store(false, SeqCst);
    let Ok((works, _)) = workers.stop(Duration::from_secs(5), &bench.interrupter) else {
        panic!("they did not stop");
    };
    assert_eq!(works.len(), 2);
}

#[test]
fn stopping_and_taking_back_race_without_loss() {
    let mut bench = bench();
    let mut workers = bench.spawn();
    for round in 0..300u64 {
        let bound = Duration::from_micros(round % 50);
        workers = match workers.stop(bound, &bench.interrupter) {
            Ok((works, seen)) => {
                assert_eq!((works.len(), seen.len()), (2, 0));
                Workers::spawn("dummy", works, &bench.interrupter).unwrap()
            }
            Err(revived) => revived.unwrap(),
        };
    }
    assert_eq!(workers.join().0.len(), 2);
}

#[test]
fn a_worker_that_dies_is_seen_and_the_guest_is_told() {
    let mut bench = bench();
    let workers = bench.spawn();
    bench.watches[0].panic.store(true, SeqCst);
    bench.events[0].write(1).unwrap();
    eventually(|| bench.interrupter.needs_reset());
    let (works, seen) = workers.join();
    assert_eq!(works.len(), 1);
    assert_eq!(seen[0].id(), "devices.worker-died");
}

#[test]
fn a_fault_stops_the_work_once_and_it_still_ends() {
    let mut bench = bench();
    let workers = bench.spawn();
    bench.watches[0].fault.store(true, SeqCst);
    for _ in 0..3 {
        bench.events[0].write(1).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    eventually(|| bench.interrupter.needs_reset());
    assert_eq!(bench.watches[0].stops.load(SeqCst), 1);
    assert_eq!(workers.join().0.len(), 2);
}
