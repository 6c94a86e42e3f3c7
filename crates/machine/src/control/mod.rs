//! The control socket: the daemon's way to the machine.
//!
//! * [`wire`]: packets and descriptors over `SOCK_SEQPACKET`.
//! * [`fit`]: what is too large for a packet is cut.
//! * [`session`]: one connection: hello first, replies before events, nothing lost while the
//!   daemon reads slowly.
//! * [`server`]: the control thread: waits, accepts, answers, and ends the process's life.
//! * [`requests`]: what each request does.

mod fit;
mod requests;
mod server;
mod session;
mod wire;

pub use server::{Server, ServerConfig};
pub use wire::{Connection, Received, Sent};

#[cfg(test)]
mod tests;
