//! A console as a guest's driver uses it.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::VirtioConsole;
use crate::serial::{ConsoleInput, ConsoleOutput, INPUT_LIMIT};
use crate::testing::{Driver, Host, Line, Piece, eventually};
use crate::virtio::VirtioPci;

const BUFFER: u64 = 0x20_0000;

#[derive(Default)]
struct Screen(Mutex<Vec<u8>>);

impl ConsoleOutput for Screen {
    fn write(&self, bytes: &[u8]) {
        self.0.lock().unwrap().extend(bytes);
    }
}

struct Console {
    function: Arc<VirtioPci<VirtioConsole>>,
    lines: Vec<Arc<Line>>,
    screen: Arc<Screen>,
    input: Arc<dyn ConsoleInput>,
}

fn console(host: &Host) -> Console {
    let screen = Arc::new(Screen::default());
    let device = VirtioConsole::new("console", screen.clone()).unwrap();
    let input = device.input();
    let (function, lines) = host.add(7, device);
    Console {
        function,
        lines,
        screen,
        input,
    }
}

#[test]
fn output_and_input_pass() {
    let host = Host::default();
    let Console {
        function: _function,
        lines,
        screen,
        input,
    } = console(&host);
    let mut driver = Driver::probe(&host, 7, lines);
    driver.bring_up(u64::MAX, 64);
    host.memory()
        .write_slice(b"hello", GuestAddress(BUFFER))
        .unwrap();
    driver.submit(1, &[Piece::readable(BUFFER, 5)]);
    driver.complete(1);
    assert_eq!(*screen.0.lock().unwrap(), b"hello");

    // Input before there is a buffer waits for it.
    assert_eq!(input.offer(b"abcdef"), 6);
    std::thread::sleep(std::time::Duration::from_millis(10));
    driver.submit(0, &[Piece::writable(BUFFER, 4)]);
    assert_eq!(driver.complete(0).1, 4);
    driver.submit(0, &[Piece::writable(BUFFER + 4, 4)]);
    assert_eq!(driver.complete(0).1, 2);
    let mut got = [0; 6];
    host.memory()
        .read_slice(&mut got, GuestAddress(BUFFER))
        .unwrap();
    assert_eq!(&got, b"abcdef");
    // Input after there is a buffer needs no kick.
    driver.submit(0, &[Piece::writable(BUFFER, 4)]);
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(input.offer(b"x"), 1);
    assert_eq!(driver.complete(0).1, 1);
}

#[test]
fn input_that_the_guest_does_not_read_is_bounded_and_outlives_a_reset() {
    let host = Host::default();
    let Console {
        function: _function,
        lines,
        input,
        ..
    } = console(&host);
    assert_eq!(input.offer(&vec![b'x'; INPUT_LIMIT - 1]), INPUT_LIMIT - 1);
    assert_eq!(input.offer(b"yz"), 1);
    assert_eq!(input.offer(b"z"), 0);
    let mut driver = Driver::probe(&host, 7, lines);
    driver.bring_up(u64::MAX, 64);
    driver.reset();
    driver.bring_up(u64::MAX, 64);
    let mut left = INPUT_LIMIT;
    while left > 0 {
        driver.submit(0, &[Piece::writable(BUFFER, 4096)]);
        left -= driver.complete(0).1 as usize;
    }
    assert_eq!(input.offer(b"z"), 1);
}

#[test]
fn buffers_outside_of_ram_ask_for_a_reset() {
    let host = Host::default();
    let Console {
        function: _function,
        lines,
        input,
        ..
    } = console(&host);
    let mut driver = Driver::probe(&host, 7, lines);
    for queue in [0, 1] {
        driver.bring_up(u64::MAX, 64);
        let far = 0x7000_0000_0000;
        let piece = match queue {
            0 => Piece::writable(far, 64),
            _ => Piece::readable(far, 64),
        };
        input.offer(b"x");
        driver.submit(queue, &[piece]);
        driver.expect_needs_reset();
    }
    driver.bring_up(u64::MAX, 64);
    driver.submit(1, &[Piece::readable(BUFFER, 10)]);
    driver.complete(1);
    eventually(|| driver.rings[1].used_index() == 1);
}
