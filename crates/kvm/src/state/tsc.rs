//! The offset of a vCPU's TSC from the host's (Linux 5.16 on).
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::VcpuFd;

const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// What it is, if this kernel tells.
pub(super) fn offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset: u64 = 0;
    let attribute = attribute(&raw mut offset);
    // SAFETY: the call reads the attribute and writes eight bytes to the address in it, which is
    // that of a live number of eight bytes.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attribute) };
    (done == 0).then_some(offset)
}

/// Sets it; says whether this kernel can.
pub(super) fn set_offset(vcpu: &VcpuFd, offset: u64) -> bool {
    let mut offset = offset;
    let attribute = attribute(&raw mut offset);
    // SAFETY: the call reads the attribute and eight bytes from the address in it.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attribute) };
    done == 0
}

fn attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
    }
}
