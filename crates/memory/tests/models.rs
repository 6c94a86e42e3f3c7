//! The protocol between eviction, faults, discards and DMA, under random interleavings: the same
//! source file as in the crate, compiled against shuttle's primitives, around a model of what the
//! kernel does with pages.
#![allow(
    unreachable_pub,
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod sync {
    pub(crate) use shuttle::sync::atomic::{AtomicU16, AtomicU32, Ordering};
}

#[path = "../src/pager/table.rs"]
mod table;

use shuttle::sync::{Arc, Mutex};
use shuttle::thread;
use table::{Backing, Fault, State, Table};

/// One page of a machine: what the kernel keeps of it, behind one lock, as the kernel's own is.
#[derive(Debug, Default)]
struct Kernel {
    /// The memfd's page: which incarnation of it, and what is in it.
    cached: Option<(u64, u64)>,
    incarnations: u64,
    mapped: bool,
    /// Write-protected, or was when it was unmapped.
    clean: bool,
    /// What the slots hold.
    slots: Vec<u64>,
}

struct Machine {
    table: Table,
    kernel: Mutex<Kernel>,
    /// Held by who evicts and by who discards.
    evicting: Mutex<()>,
}

const P: usize = 0;

impl Machine {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            table: Table::new(1),
            kernel: Mutex::new(Kernel::default()),
            evicting: Mutex::new(()),
        })
    }

    /// What the fault thread does for the page; it need not succeed.
    fn serve(&self) {
        match self.table.begin_fault(P) {
            Fault::Busy => {}
            Fault::Zero => {
                let mut kernel = self.kernel.lock().unwrap();
                assert!(kernel.cached.is_none(), "an empty page is in the memfd");
                kernel.incarnations += 1;
                kernel.cached = Some((kernel.incarnations, 0));
                kernel.mapped = true;
                kernel.clean = false;
                drop(kernel);
                self.table.settle(P, State::Mapped, Backing::None);
            }
            Fault::Map(_, backing) => {
                let mut kernel = self.kernel.lock().unwrap();
                assert!(
                    kernel.cached.is_some(),
                    "a page in memory is not in the memfd"
                );
                if !kernel.mapped {
                    kernel.mapped = true;
                    kernel.clean &= backing != Backing::None;
                }
                drop(kernel);
                self.table.settle(P, State::Mapped, backing);
            }
            Fault::Fill(Backing::Slot(slot)) => {
                {
                    let mut kernel = self.kernel.lock().unwrap();
                    assert!(
                        kernel.cached.is_none(),
                        "a page that is out is in the memfd"
                    );
                    kernel.incarnations += 1;
                    let content = kernel.slots[slot as usize];
                    kernel.cached = Some((kernel.incarnations, content));
                }
                thread::yield_now();
                let mut kernel = self.kernel.lock().unwrap();
                kernel.mapped = true;
                kernel.clean = true;
                drop(kernel);
                self.table.settle(P, State::Mapped, Backing::Slot(slot));
            }
            Fault::Fill(other) => panic!("{other:?}"),
        }
    }

    /// Waits until the page is mapped; `then` is done at the same instant.
    fn access<T>(&self, then: impl Fn(&mut Kernel) -> T) -> T {
        loop {
            {
                let mut kernel = self.kernel.lock().unwrap();
                if kernel.mapped {
                    return then(&mut kernel);
                }
            }
            self.serve();
            thread::yield_now();
        }
    }

    fn write(&self, value: u64) {
        self.access(|kernel| {
            kernel.clean = false;
            if let Some((_, content)) = &mut kernel.cached {
                *content = value;
            }
        });
    }

    fn read(&self) -> u64 {
        self.access(|kernel| kernel.cached.unwrap().1)
    }

    /// A transfer into the page: it gets hold of it, and its data comes later.
    fn transfer(&self, value: u64) {
        self.table.begin_transfer(P);
        let pinned = self.access(|kernel| {
            kernel.clean = false;
            kernel.cached.unwrap().0
        });
        thread::yield_now();
        {
            let mut kernel = self.kernel.lock().unwrap();
            // The page that was got hold of, whether it still is the memfd's or not.
            if let Some((incarnation, content)) = &mut kernel.cached
                && *incarnation == pinned
            {
                *content = value;
            }
        }
        self.table.end_transfer(P);
    }

    fn evict(&self) {
        if self.table.stage(P) {
            self.kernel.lock().unwrap().mapped = false;
        }
        thread::yield_now();
        let _evicting = self.evicting.lock().unwrap();
        let Some((state, old)) = self.table.leave(P) else {
            return;
        };
        assert_ne!(state, State::Fresh);
        let unwritten = self.kernel.lock().unwrap().clean;
        let new = match old {
            Backing::Slot(_) if unwritten => old,
            _ => {
                let mut kernel = self.kernel.lock().unwrap();
                let content = kernel.cached.unwrap().1;
                kernel.slots.push(content);
                Backing::Slot(kernel.slots.len() as u32 - 1)
            }
        };
        thread::yield_now();
        if self.table.go(P, old) {
            {
                let mut kernel = self.kernel.lock().unwrap();
                assert!(!kernel.mapped, "a page is punched out from under the guest");
                kernel.cached = None;
            }
            self.table.settle(P, State::Out, new);
        }
    }

    fn discard(&self) {
        let _held = self.evicting.lock().unwrap();
        let Some((state, backing)) = self.table.begin_discard(P) else {
            return;
        };
        if state.resident() {
            self.kernel.lock().unwrap().mapped = false;
            if self.table.in_transfer(P) {
                self.table.settle(P, State::Mapped, backing);
                return;
            }
            self.kernel.lock().unwrap().cached = None;
        }
        self.table.settle(P, State::Empty, Backing::None);
    }
}

const RUNS: usize = 20_000;

#[test]
fn no_write_of_the_guest_is_lost() {
    shuttle::check_random(
        || {
            let machine = Machine::new();
            let theirs = Arc::clone(&machine);
            let evictor = thread::spawn(move || {
                for _ in 0..3 {
                    theirs.evict();
                }
            });
            let theirs = Arc::clone(&machine);
            let other = thread::spawn(move || {
                theirs.read();
                theirs.read();
            });
            for value in 1..4 {
                machine.write(value);
                assert_eq!(machine.read(), value);
            }
            evictor.join().unwrap();
            other.join().unwrap();
            assert_eq!(machine.read(), 3);
        },
        RUNS,
    );
}

#[test]
fn no_transfer_is_lost() {
    shuttle::check_random(
        || {
            let machine = Machine::new();
            let theirs = Arc::clone(&machine);
            let evictor = thread::spawn(move || {
                for _ in 0..3 {
                    theirs.evict();
                }
            });
            for value in 1..4 {
                machine.transfer(value);
                assert_eq!(machine.read(), value);
            }
            evictor.join().unwrap();
            assert_eq!(machine.read(), 3);
        },
        RUNS,
    );
}

#[test]
fn a_discard_leaves_zero_or_what_came_after() {
    shuttle::check_random(
        || {
            let machine = Machine::new();
            machine.write(1);
            let theirs = Arc::clone(&machine);
            let evictor = thread::spawn(move || {
                for _ in 0..3 {
                    theirs.evict();
                }
            });
            let theirs = Arc::clone(&machine);
            let discarder = thread::spawn(move || theirs.discard());
            let seen = machine.read();
            assert!(seen <= 1);
            discarder.join().unwrap();
            machine.write(2);
            evictor.join().unwrap();
            assert_eq!(machine.read(), 2);
        },
        RUNS,
    );
}

#[test]
fn a_discard_takes_no_transfer_away() {
    shuttle::check_random(
        || {
            let machine = Machine::new();
            machine.write(1);
            let theirs = Arc::clone(&machine);
            let discarder = thread::spawn(move || theirs.discard());
            let theirs = Arc::clone(&machine);
            let evictor = thread::spawn(move || theirs.evict());
            machine.transfer(7);
            discarder.join().unwrap();
            evictor.join().unwrap();
            let seen = machine.read();
            assert!(seen == 7 || seen == 0, "{seen}");
        },
        RUNS,
    );
}

#[test]
fn counts_that_overflow_hold_for_ever() {
    shuttle::check_random(
        || {
            let table = Table::new(1);
            for _ in 0..70_000u32 {
                table.begin_transfer(P);
            }
            for _ in 0..70_000u32 {
                table.end_transfer(P);
            }
            assert!(table.in_transfer(P));
        },
        1,
    );
}
