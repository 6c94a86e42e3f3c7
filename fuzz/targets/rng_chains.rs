//! Chains of an entropy source's queue.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strake_devices::testing::Bare;
use strake_devices::virtio::rng::VirtioRng;
use strake_fuzz::{SIZE, Step, memory, play};

fuzz_target!(|input: (u64, Vec<Step>)| {
    let (features, steps) = input;
    let mut bare = Bare::new(&VirtioRng::new("rng-fuzz"), &memory(), features, SIZE);
    play(&mut bare, &steps, || {});
    bare.stop();
});
