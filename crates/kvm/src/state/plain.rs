//! The kernel's structures as bytes.
#![allow(unsafe_code)]

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use strake_state::Blob;

/// A structure of numbers.
///
/// # Safety
/// It consists of integers (and unions of such) only, has no padding that the compiler put there,
/// and any bytes are a valid one.
pub(super) unsafe trait Plain: Copy + Default {}

// SAFETY: C structures of the kernel's interface, made of integers; their padding is explicit.
unsafe impl Plain for kvm_cpuid_entry2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_fpu {}
// SAFETY: as above; the union is as large as its largest member, an array of bytes.
unsafe impl Plain for kvm_irqchip {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_mp_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_pit_state2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}

/// Its bytes.
pub(super) fn bytes<T: Plain>(value: &T) -> Blob {
    // SAFETY: `T` has no padding by the contract of `Plain`, so all its bytes are initialised.
    let bytes =
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) };
    Blob(bytes.to_vec())
}

/// The structure that these bytes are, if there are as many.
pub(super) fn value<T: Plain>(blob: &Blob) -> Option<T> {
    if blob.0.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: there are enough bytes, and any bytes are a `T` by the contract of `Plain`.
    Some(unsafe { blob.0.as_ptr().cast::<T>().read_unaligned() })
}

/// Its bytes: the kernel's 4 KiB, without the room for more that the Rust type may have.
pub(super) fn xsave_bytes(xsave: &kvm_xsave) -> Blob {
    Blob(
        xsave
            .region
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect(),
    )
}

/// The structure that these bytes are.
pub(super) fn xsave_value(blob: &Blob) -> Option<kvm_xsave> {
    let mut xsave = kvm_xsave::default();
    let (words, rest) = blob.0.as_chunks::<4>();
    if words.len() != xsave.region.len() || !rest.is_empty() {
        return None;
    }
    for (to, from) in xsave.region.iter_mut().zip(words) {
        *to = u32::from_le_bytes(*from);
    }
    Some(xsave)
}
