//! What a guest sees of the platform: x86-64 CPUID, ACPI, memory layout and boot protocols.
//!
//! Everything here is a function from values to values, or from values to guest memory: no KVM
//! call, no file that was not handed in as a reader, and no thread but the one that bounds the
//! search of a hostile disk ([`boot::disk::find`]). That is what lets tables and
//! layouts be tested byte by byte without a virtual machine.
//!
//! * [`layout`] says where RAM, devices, ports and windows are. Every other crate takes the
//!   numbers from there.
//! * [`acpi`] makes the tables by which the guest finds them.
//! * [`cpuid`] makes each vCPU's CPUID out of what the host supports.
//! * [`msr`] lists the model-specific registers that firmware would have set.
//! * [`boot`] loads a kernel, prepares what it expects at its entry, and finds a kernel in a
//!   guest's own disk.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod observations;
