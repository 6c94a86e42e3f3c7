//! Chains of a console's queues, with input from the host.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use strake_devices::serial::ConsoleOutput;
use strake_devices::testing::Bare;
use strake_devices::virtio::console::VirtioConsole;
use strake_fuzz::{SIZE, Step, memory, play};

/// Takes everything and keeps nothing.
struct Nowhere;

impl ConsoleOutput for Nowhere {
    fn write(&self, _: &[u8]) {}
}

fuzz_target!(|input: (u64, Vec<u8>, Vec<Step>)| {
    let (features, typed, steps) = input;
    let device = VirtioConsole::new("console-fuzz", Arc::new(Nowhere)).expect("a device");
    let keyboard = device.input();
    let mut bare = Bare::new(&device, &memory(), features, SIZE);
    let mut typed = typed.chunks(7);
    play(&mut bare, &steps, || {
        if let Some(chunk) = typed.next() {
            keyboard.offer(chunk);
        }
    });
    bare.stop();
});
