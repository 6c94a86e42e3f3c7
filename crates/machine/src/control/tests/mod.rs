//! The control server in this process, with real sockets and, where `/dev/kvm` can be used, real
//! guests of a few bytes.

mod fit;
mod guests;
mod handover;
mod harness;
mod life;
mod protocol;
mod wire;
