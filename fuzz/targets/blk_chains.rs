//! Chains of a disk's queue.
#![no_main]

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use strake_block::{Access, LiveDisk, RawImage};
use strake_devices::testing::Bare;
use strake_devices::virtio::blk::{BlkConfig, VirtioBlk};
use strake_fuzz::{SIZE, Step, memory, play};

const DISK_BYTES: i64 = 4 << 20;

static DISK: LazyLock<Arc<LiveDisk>> = LazyLock::new(|| {
    // SAFETY: plain calls with a literal name; the descriptor is owned from here on.
    let fd = unsafe {
        let fd = libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0 && libc::ftruncate(fd, DISK_BYTES) == 0);
        OwnedFd::from_raw_fd(fd)
    };
    let image = RawImage::from_fd(fd, "memfd", Access::ReadWrite).expect("an image");
    LiveDisk::new("fuzz", Arc::new(image))
});

fuzz_target!(|input: (u64, bool, Vec<Step>)| {
    let (features, read_only, steps) = input;
    let device = VirtioBlk::new(
        "blk-fuzz",
        Arc::clone(&DISK),
        &BlkConfig {
            queues: 2,
            serial: "fuzz".to_owned(),
            read_only,
        },
    )
    .expect("a device");
    let mut bare = Bare::new(&device, &memory(), features, SIZE);
    play(&mut bare, &steps, || {});
    bare.stop();
});
