//! Packets of [`strake_api::control`] over a `SOCK_SEQPACKET` socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use strake_api::control::{MAX_FDS, MAX_PACKET, Packet};
use strake_observe::{OsContext, Result};

use crate::observations::MonitorGarbled;

/// A packet as it came.
#[derive(Debug)]
pub struct Received {
    /// What it says.
    pub packet: Packet,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
    /// The sender's process, if the socket passes credentials.
    pub pid: Option<u32>,
}

/// Sends one packet; waits while the other end does not read.
///
/// # Errors
/// The packet is too large, or the socket fails.
pub fn send(socket: impl AsFd, packet: &Packet, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let bytes = serde_json::to_vec(packet).map_err(|error| garbled(error.to_string()))?;
    if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
        return Err(garbled(format!(
            "{} bytes with {} descriptors are too large for a packet",
            bytes.len(),
            fds.len()
        ))
        .into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let parts = [IoSlice::new(&bytes)];
    rustix::io::retry_on_intr(|| sendmsg(&socket, &parts, &mut ancillary, SendFlags::NOSIGNAL))
        .os("sendmsg", "a control socket")
        .map(drop)
}

/// Waits for one packet; `None` once the other end has gone.
///
/// # Errors
/// The packet is none of the protocol, or the socket fails.
pub fn receive(socket: impl AsFd, buffer: &mut Vec<u8>) -> Result<Option<Received>> {
    buffer.resize(MAX_PACKET, 0);
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut once = || {
        rustix::io::retry_on_intr(|| {
            let mut parts = [IoSliceMut::new(buffer)];
            recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        })
    };
    // The other end closed without having read everything. The kernel tells that once and first;
    // what the other end said before is still there, and its last word matters most.
    let message = match once() {
        Err(Errno::CONNRESET) => once(),
        message => message,
    };
    let message = match message {
        Err(Errno::CONNRESET) => return Ok(None),
        message => message.os("recvmsg", "a control socket")?,
    };
    let mut fds = Vec::new();
    let mut pid = None;
    for part in ancillary.drain() {
        match part {
            RecvAncillaryMessage::ScmRights(passed) => fds.extend(passed),
            RecvAncillaryMessage::ScmCredentials(sender) => {
                pid = u32::try_from(sender.pid.as_raw_nonzero().get()).ok();
            }
            _ => {}
        }
    }
    if message.bytes == 0 && fds.is_empty() {
        return Ok(None);
    }
    if message
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(garbled("it is longer than a packet may be").into());
    }
    let bytes = buffer.get(..message.bytes).unwrap_or_default();
    let packet = serde_json::from_slice(bytes).map_err(|error| garbled(error.to_string()))?;
    Ok(Some(Received { packet, fds, pid }))
}

fn garbled(reason: impl Into<String>) -> MonitorGarbled {
    MonitorGarbled {
        reason: reason.into(),
    }
}
