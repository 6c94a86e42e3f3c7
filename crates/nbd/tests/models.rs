//! Interleavings of a connection's users with its thread, by a model checker: the same file as in
//! the crate, against shuttle's lock.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

mod sync {
    pub(crate) use shuttle::sync::{Mutex, MutexGuard};
}

#[path = "../src/client/outbox.rs"]
mod outbox;

use std::collections::VecDeque;

use outbox::{End, Outbox};
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::thread;
use strake_observe::Observation;

/// An eventfd.
#[derive(Default)]
struct Event(Mutex<bool>, Condvar);

impl Event {
    fn signal(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn clear(&self) {
        *self.0.lock().unwrap() = false;
    }

    fn wait(&self) {
        let mut signalled = self.0.lock().unwrap();
        while !*signalled {
            signalled = self.1.wait(signalled).unwrap();
        }
    }
}

fn lost() -> Observation {
    strake_nbd::ConnectionLost {
        path: "x".to_owned(),
        why: "y".to_owned(),
    }
    .into()
}

/// What became of each thing: how often it was delivered.
type Delivered = Arc<Mutex<[u32; 4]>>;

fn deliver(delivered: &Delivered, things: impl IntoIterator<Item = usize>) {
    let mut delivered = delivered.lock().unwrap();
    for thing in things {
        delivered[thing] += 1;
    }
}

/// The thread: takes until it was told to end, or fails after it has taken `fails_after` things.
fn pump(outbox: &Outbox<usize>, wake: &Event, delivered: &Delivered, fails_after: usize) {
    let mut taken = VecDeque::new();
    let mut count = 0;
    loop {
        wake.clear();
        let end = outbox.take(&mut taken);
        count += taken.len();
        if count >= fails_after || end == Some(End::GivenUp("no")) {
            deliver(delivered, taken.drain(..));
            deliver(delivered, outbox.lose(lost()));
            return;
        }
        deliver(delivered, taken.drain(..));
        if end == Some(End::Closed) {
            return;
        }
        wake.wait();
    }
}

fn scenario(fails_after: usize, gives_up: bool) {
    let outbox = Arc::new(Outbox::new());
    let wake = Arc::new(Event::default());
    let delivered: Delivered = Arc::default();
    let thread = {
        let (outbox, wake, delivered) = (outbox.clone(), wake.clone(), delivered.clone());
        thread::spawn(move || pump(&outbox, &wake, &delivered, fails_after))
    };
    let users: Vec<_> = (0..2)
        .map(|user| {
            let (outbox, wake, delivered) = (outbox.clone(), wake.clone(), delivered.clone());
            thread::spawn(move || {
                for thing in [user * 2, user * 2 + 1] {
                    let mut things = vec![thing];
                    match outbox.send(&mut things) {
                        None => {
                            assert!(things.is_empty());
                            wake.signal();
                        }
                        Some(_) => deliver(&delivered, things),
                    }
                }
            })
        })
        .collect();
    if gives_up {
        outbox.end(End::GivenUp("no"));
        wake.signal();
    }
    for user in users {
        user.join().unwrap();
    }
    outbox.end(End::Closed);
    wake.signal();
    thread.join().unwrap();
    assert_eq!(*delivered.lock().unwrap(), [1; 4]);
}

#[test]
fn each_is_delivered_once() {
    shuttle::check_random(|| scenario(usize::MAX, false), 3000);
}

#[test]
fn each_is_delivered_once_when_the_connection_is_lost() {
    for fails_after in 0..4 {
        shuttle::check_random(move || scenario(fails_after, false), 1000);
    }
}

#[test]
fn each_is_delivered_once_when_it_is_given_up() {
    shuttle::check_random(|| scenario(usize::MAX, true), 3000);
}
