//! Chains of a console's queues, with input from the host.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use strake_devices::testing::Bare;
use strake_devices::virtio::console::VirtioConsole;
use strake_fuzz::{SIZE, Step, memory, play};

fuzz_target!(|input: (u64, Vec<u8>, Vec<Step>)| {
    let (features, typed, steps) = input;
    let (mut ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).expect("a non-blocking socket");
    let device = VirtioConsole::new("console-fuzz", theirs.into()).expect("a device");
    let mut bare = Bare::new(&device, &memory(), features, SIZE);
    let mut typed = typed.chunks(7);
    let mut sink = vec![0; 64 * 1024];
    play(&mut bare, &steps, || {
        if let Some(chunk) = typed.next() {
            let _ = ours.write(chunk);
        }
        let _ = ours.read(&mut sink);
    });
    bare.stop();
});
