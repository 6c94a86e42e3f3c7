//! Chains of an interface's queues, with packets on the wire.
#![no_main]

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use strake_devices::testing::Bare;
use strake_devices::virtio::net::{NetBackend, Offloads, VirtioNet};
use strake_fuzz::{SIZE, Step, memory, play};

#[derive(Debug)]
struct Wire(UnixDatagram);

impl NetBackend for Wire {
    fn packets(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn set_offloads(&self, _: Offloads) -> strake_observe::Result<()> {
        Ok(())
    }
}

fuzz_target!(|input: (u64, Vec<u16>, Vec<Step>)| {
    let (features, lengths, steps) = input;
    let (near, far) = UnixDatagram::pair().expect("a pair of sockets");
    near.set_nonblocking(true).expect("a non-blocking socket");
    far.set_nonblocking(true).expect("a non-blocking socket");
    let device = VirtioNet::over("net-fuzz", Arc::new(Wire(near)), [2; 6]);
    let mut bare = Bare::new(&device, &memory(), features, SIZE);
    let mut lengths = lengths.into_iter();
    let packet = vec![0x5a; usize::from(u16::MAX)];
    play(&mut bare, &steps, || {
        if let Some(length) = lengths.next() {
            let _ = far.send(&packet[..usize::from(length)]);
        }
        // Make room for what the guest sends.
        while far.recv(&mut [0; 16]).is_ok() {}
    });
    bare.stop();
});
