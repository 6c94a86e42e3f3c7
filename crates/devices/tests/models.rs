//! The handshake of workers under every interleaving that shuttle finds.
//!
//! The file is compiled here a second time, against shuttle's atomics. The eventfd that wakes a
//! worker is a counter with a condition variable.

#![allow(clippy::unwrap_used)]

#[path = "../src/virtio/handshake.rs"]
mod handshake;

mod sync {
    pub(crate) use shuttle::sync::atomic::{AtomicU8, Ordering};
}

use handshake::Handshake;
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::thread;

const ITERATIONS: usize = 5_000;

struct Shared {
    handshake: Handshake,
    kicks: Mutex<u32>,
    woken: Condvar,
}

impl Shared {
    fn wake(&self) {
        *self.kicks.lock().unwrap() += 1;
        self.woken.notify_one();
    }

    fn wait(&self) {
        let mut kicks = self.kicks.lock().unwrap();
        while *kicks == 0 {
            kicks = self.woken.wait(kicks).unwrap();
        }
        *kicks = 0;
    }
}

/// What a worker's thread gives back: how often it was told to go on.
fn worker(shared: &Shared) -> u32 {
    let mut stopped = false;
    let mut resumed = 0;
    loop {
        if shared.handshake.stopping() {
            stopped = true;
            if shared.handshake.end() {
                return resumed;
            }
        } else if std::mem::take(&mut stopped) {
            resumed += 1;
            continue;
        }
        shared.wait();
    }
}

#[test]
fn a_request_that_was_taken_back_ends_nobody_and_the_next_one_does() {
    shuttle::check_random(
        || {
            let shared = Arc::new(Shared {
                handshake: Handshake::new(),
                kicks: Mutex::new(0),
                woken: Condvar::new(),
            });
            let theirs = Arc::clone(&shared);
            let thread = thread::spawn(move || worker(&theirs));
            shared.handshake.ask();
            shared.wake();
            if shared.handshake.take_back() {
                // It goes on, so it is there to be asked again; a lost wake-up would hang here.
                shared.wake();
                shared.handshake.ask();
                shared.wake();
                assert!(thread.join().unwrap() <= 1);
            } else {
                assert_eq!(thread.join().unwrap(), 0);
            }
        },
        ITERATIONS,
    );
}
