//! Discards on block devices that cannot zero what they discard.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;

use rustix::ioctl::{Setter, ioctl, opcode};

const BLKDISCARD: rustix::ioctl::Opcode = opcode::none(0x12, 119);

/// Discards a range of a block device, in the calling thread. The caller has aligned it.
pub(crate) fn discard_device(fd: &OwnedFd, offset: u64, len: u64) -> rustix::io::Result<()> {
    // SAFETY: BLKDISCARD reads two u64 from the address that it is given, the range, and keeps
    // nothing of it.
    unsafe {
        let range = Setter::<BLKDISCARD, [u64; 2]>::new([offset, len]);
        ioctl(fd, range)
    }
}
