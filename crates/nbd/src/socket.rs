//! Connected sockets of both kinds.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg, sockopt};
use strake_observe::{OsContext, Result};

/// After how long without an answer a dead peer's connection ends.
const DEAD_AFTER: Duration = Duration::from_secs(30);

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// A unix socket.
    Unix(UnixStream),
    /// TCP.
    Tcp(TcpStream),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Socket {
    /// Never blocks from now on; a dead host is noticed.
    pub(crate) fn prepare(&self) -> Result<()> {
        match self {
            Self::Unix(stream) => stream.set_nonblocking(true).os("fcntl", "a unix socket"),
            Self::Tcp(stream) => {
                let object = "a TCP socket";
                stream.set_nonblocking(true).os("fcntl", object)?;
                stream.set_nodelay(true).os("setsockopt", object)?;
                let millis = u32::try_from(DEAD_AFTER.as_millis()).unwrap_or(u32::MAX);
                sockopt::set_socket_keepalive(stream, true).os("setsockopt", object)?;
                sockopt::set_tcp_keepidle(stream, DEAD_AFTER / 3).os("setsockopt", object)?;
                sockopt::set_tcp_keepintvl(stream, DEAD_AFTER / 6).os("setsockopt", object)?;
                sockopt::set_tcp_keepcnt(stream, 4).os("setsockopt", object)?;
                sockopt::set_tcp_user_timeout(stream, millis).os("setsockopt", object)
            }
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).read(data),
            Socket::Tcp(stream) => (&*stream).read(data),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(data)])
    }

    fn write_vectored(&mut self, data: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut nothing = SendAncillaryBuffer::default();
        Ok(sendmsg(self.as_fd(), data, &mut nothing, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
