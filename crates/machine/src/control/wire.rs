//! Packets over `SOCK_SEQPACKET`, with descriptors.
//!
//! The other end is the daemon, which is trusted with what it asks for, but not with how: a packet
//! may be damaged, too long, or carry too many descriptors. Each such packet is refused as a whole,
//! its descriptors closed, and the connection goes on.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendFlags, recvmsg, sendmsg,
};
use strake_api::control::{Body, Event, MAX_FDS, MAX_PACKET, Packet};
use strake_observe::{Because, Observation, OsContext, Result};

use super::fit;
use crate::Descriptors;
use crate::observations::{BadPacket, ControlFailed};

/// One connection with a daemon.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

/// What [`Connection::receive`] found.
#[allow(clippy::large_enum_variant, reason = "it is taken apart at once")]
#[derive(Debug)]
pub enum Received {
    /// A packet.
    Packet(Packet, Descriptors),
    /// A packet that is none; with its identifier, as far as that could be read.
    Damaged(u64, Observation),
    /// Nothing for now.
    Nothing,
    /// The other end has gone.
    Closed,
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Done,
    /// The other end does not read; nothing was sent.
    Full,
    /// The other end has gone.
    Closed,
}

impl Connection {
    /// Speaks over a connected socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Takes one packet, without waiting.
    ///
    /// # Errors
    /// [`ControlFailed`] if the socket itself does not work.
    pub fn receive(&self) -> Result<Received> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let message = loop {
            match recvmsg(&self.socket, &mut parts, &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Received::Closed),
                other => {
                    break other
                        .os("recvmsg", "the control socket")
                        .because_of(|| step("receiving"))?;
                }
            }
        };
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if message.bytes == 0 && fds.is_empty() {
            return Ok(Received::Closed);
        }
        let bytes = bytes.get(..message.bytes).unwrap_or_default();
        if message.flags.contains(ReturnFlags::TRUNC) {
            return Ok(damaged(bytes, format!("it exceeds {MAX_PACKET} bytes")));
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Ok(damaged(
                bytes,
                format!("it carries more than {MAX_FDS} descriptors, or the monitor has none left"),
            ));
        }
        match serde_json::from_slice(bytes) {
            Ok(packet) => Ok(Received::Packet(packet, Descriptors::new(fds))),
            Err(error) => Ok(damaged(bytes, error.to_string())),
        }
    }

    /// Sends one packet, without waiting. What is too large is cut until it fits.
    ///
    /// # Errors
    /// If it is too long even so, or the socket itself does not work.
    pub fn send(&self, packet: &Packet) -> Result<Sent> {
        self.send_with(packet, &[])
    }

    /// Sends one packet with descriptors, without waiting.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_with(&self, packet: &Packet, fds: &[BorrowedFd<'_>]) -> Result<Sent> {
        let bytes = fit::encode(packet)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(fds)) {
            return Err(bad(format!("it carries more than {MAX_FDS} descriptors")));
        }
        let parts = [IoSlice::new(&bytes)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            return match sendmsg(&self.socket, &parts, &mut ancillary, flags) {
                Ok(_) => Ok(Sent::Done),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN | Errno::NOBUFS) => Ok(Sent::Full),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Ok(Sent::Closed),
                Err(error) => Err(error)
                    .os("sendmsg", "the control socket")
                    .because_of(|| step("sending")),
            };
        }
    }

    /// Sends an event, without waiting.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_event(&self, event: &Event) -> Result<Sent> {
        self.send(&Packet {
            id: 0,
            body: Body::Event(event.clone()),
        })
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A refusal for a packet that is none: its identifier is read as far as it can be, so that the
/// daemon knows which request was meant.
fn damaged(bytes: &[u8], reason: String) -> Received {
    #[derive(serde::Deserialize)]
    struct Identifier {
        id: u64,
    }
    let id = serde_json::from_slice::<Identifier>(bytes).map_or(0, |found| found.id);
    Received::Damaged(id, bad(reason))
}

pub(super) fn bad(reason: String) -> Observation {
    BadPacket { reason }.into()
}

fn step(step: &str) -> ControlFailed {
    ControlFailed {
        step: step.to_owned(),
    }
}
