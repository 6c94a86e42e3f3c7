//! The client: an export of a server as an image.
//!
//! * `negotiation`: until the export is open;
//! * `decoder`: the server's replies, without a socket; `coverage`: what of a read has come;
//! * `asks`: what waits for a reply; `outbox`: how it gets to the thread; `link`: the connection
//!   and its thread;
//! * `queue`: a disk's requests.

mod asks;
pub mod coverage;
pub mod decoder;
mod link;
mod negotiation;
mod outbox;
mod queue;
#[cfg(test)]
mod tests;

use std::net::{TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use strake_block::{Access, Blocking, Event, Image, ImageQueue, Operation, SECTOR_BYTES};
use strake_observe::{Because, Observation, OsContext, Result};

use self::asks::{Ask, Failure, To};
use self::link::Link;
use self::negotiation::{Agreed, Wanted};
use self::queue::{Export, Flushing, NbdQueue};
use crate::channel::Channel;
use crate::memory::Scattered;
use crate::protocol::transmission::{Extent, STATE_ZERO, command, flag};
use crate::socket::Socket;
use crate::tls::TlsClient;
use crate::uri::{Address, Security, Uri};
use crate::{
    BadSize, BlocksTooLarge, ConnectFailed, ConnectionLost, NegotiationFailed, NotWritable,
    TlsUnusable,
};

/// How long connecting to a host may take.
const CONNECT: Duration = Duration::from_secs(10);

/// The most bytes that a server is asked about at once.
const STATUS_BYTES: u64 = 1024 * 1024 * 1024;

/// A hole shorter than this does not end an allocated range.
const LEAST_HOLE: u64 = 64 * 1024;

/// How much [`Image::read_at`] reads at once.
const SYNC_PIECE: usize = 1024 * 1024;

/// An export of an NBD server as an image. All queues share one connection; when that is lost,
/// every request fails with an observation that says so, and the image has to be opened again.
#[derive(Debug)]
pub struct NbdImage {
    export: Arc<Export>,
    link: Arc<Link>,
    /// Whether the server tells what is allocated.
    tells_allocation: bool,
}

/// A connection to the server of `uri`.
///
/// # Errors
/// When it cannot be reached.
pub fn dial(uri: &Uri) -> Result<Socket> {
    let server = uri.server();
    let dialled = match &uri.address {
        Address::Unix(path) => UnixStream::connect(path)
            .os("connect", &server)
            .map(Socket::Unix),
        Address::Tcp { host, port } => dial_tcp(host, *port, &server).map(Socket::Tcp),
    };
    dialled.because_of(|| ConnectFailed { server })
}

fn dial_tcp(host: &str, port: u16, server: &str) -> Result<TcpStream> {
    let addresses = (host, port).to_socket_addrs().os("resolve", server)?;
    let mut last = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT).os("connect", address) {
            Ok(stream) => return Ok(stream),
            Err(seen) => last = Some(seen),
        }
    }
    Err(last.unwrap_or_else(|| {
        ConnectionLost {
            path: server.to_owned(),
            why: "the name has no address".to_owned(),
        }
        .into()
    }))
}

/// The TLS that `uri` asks for, from the certificates that it names.
fn tls_of(uri: &Uri) -> Result<Option<TlsClient>> {
    match (uri.security, &uri.certificates) {
        (Security::Plain, _) => Ok(None),
        (Security::Tls, Some(directory)) => TlsClient::from_directory(directory).map(Some),
        (Security::Tls, None) => Err(TlsUnusable {
            what: "TLS for a client".to_owned(),
            why: "no certificates are named (tls-certificates=DIRECTORY)".to_owned(),
        }
        .into()),
    }
}

fn wanted<'a>(uri: &'a Uri, tls: Option<&'a TlsClient>) -> Wanted<'a> {
    match tls {
        Some(tls) => Wanted::Tls(tls, uri.expected_name()),
        None => Wanted::Plain,
    }
}

/// The exports of the server of `uri`: names, and words for people.
///
/// # Errors
/// When it cannot be reached or does not tell.
pub fn exports(uri: &Uri) -> Result<Vec<(String, String)>> {
    let tls = tls_of(uri)?;
    let mut channel = Channel::new(dial(uri)?)?;
    negotiation::list(&mut channel, wanted(uri, tls.as_ref())).because_of(|| NegotiationFailed {
        server: uri.server(),
        export: String::new(),
    })
}

impl NbdImage {
    /// Connects to the server of `uri` and opens the export.
    ///
    /// # Errors
    /// When the server cannot be reached, does not give the export, or the export is of no use as
    /// a disk with this access.
    pub fn connect(uri: &Uri, access: Access) -> Result<Self> {
        let tls = tls_of(uri)?;
        Self::open(dial(uri)?, uri, tls.as_ref(), access)
    }

    /// The same on a connection that was made already, by whoever may make one. Of `uri` only the
    /// export and the names count.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn open(
        socket: Socket,
        uri: &Uri,
        tls: Option<&TlsClient>,
        access: Access,
    ) -> Result<Self> {
        let mut channel = Channel::new(socket)?;
        let wanted = wanted(uri, tls);
        let agreed =
            negotiation::negotiate(&mut channel, &uri.export, wanted).because_of(|| {
                NegotiationFailed {
                    server: uri.server(),
                    export: uri.export.clone(),
                }
            })?;
        let path = uri.to_string();
        let export = Arc::new(usable(&path, &agreed, access)?);
        let link = Link::start(channel, &path, agreed.structured, agreed.allocation)?;
        Ok(Self {
            export,
            link: Arc::new(link),
            tells_allocation: agreed.allocation.is_some(),
        })
    }

    /// The extents from `from` on, as far as the server tells at once.
    fn status(&self, from: u64) -> Result<Vec<Extent>> {
        let length = (self.export.size - from).min(STATUS_BYTES);
        let (sender, receiver) = sync_channel(1);
        self.link.send(&mut vec![Ask {
            command: command::BLOCK_STATUS,
            flags: 0,
            offset: from,
            length: u32::try_from(length).unwrap_or(u32::MAX),
            memory: Scattered::default(),
            to: To::Extents(sender),
        }]);
        let path = self.export.path.clone();
        match receiver.recv() {
            Ok(Ok(extents)) => Ok(extents),
            Ok(Err(Failure { errno, seen })) => {
                let advice = "do what the cause below asks for".to_owned();
                Err(Observation::from(strake_block::ReadFailed {
                    path,
                    offset: from,
                    length,
                    errno,
                    advice,
                })
                .because(seen))
            }
            Err(_) => Err(ConnectionLost {
                path,
                why: "its thread has ended".to_owned(),
            }
            .into()),
        }
    }
}

/// Checks that the export can be used as a disk.
fn usable(path: &str, agreed: &Agreed, access: Access) -> Result<Export> {
    let path = path.to_owned();
    let has = |flag| agreed.flags & flag != 0;
    let (size, minimum) = (agreed.size, agreed.sizes.minimum);
    if u64::from(minimum) > SECTOR_BYTES {
        return Err(BlocksTooLarge { path, minimum }.into());
    }
    // Offsets in files and requests are signed in the kernel's world.
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || i64::try_from(size).is_err() {
        return Err(BadSize { path, size }.into());
    }
    let refuse = |why: &str, advice: &str| NotWritable {
        path: path.clone(),
        why: why.to_owned(),
        advice: advice.to_owned(),
    };
    let flushing = match access {
        Access::ReadOnly => Flushing::Never,
        Access::ReadWrite if has(flag::READ_ONLY) => {
            return Err(refuse(
                "the server exports it read-only",
                "let the server export it for writing, or use it read-only",
            )
            .into());
        }
        Access::ReadWrite if has(flag::SEND_FLUSH) => Flushing::Flush,
        Access::ReadWrite if has(flag::SEND_FUA) => Flushing::EachWrite,
        Access::ReadWrite => {
            return Err(refuse(
                "the server has neither FLUSH nor FUA, so no write is ever known to be durable",
                "use a server that has one of them, or use it read-only",
            )
            .into());
        }
    };
    Ok(Export {
        size,
        access,
        maximum: agreed.sizes.maximum,
        flushing,
        trims: has(flag::SEND_TRIM),
        zeroes: has(flag::SEND_WRITE_ZEROES),
        path,
    })
}

impl Image for NbdImage {
    fn path(&self) -> &str {
        &self.export.path
    }

    fn size(&self) -> u64 {
        self.export.size
    }

    fn access(&self) -> Access {
        self.export.access
    }

    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        let queue = NbdQueue::new(&self.export, &self.link, depth, event);
        Ok(Box::new(queue))
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let len = data.len() as u64;
        let end = offset.checked_add(len);
        let Some(end) = end.filter(|end| *end <= self.export.size) else {
            return Err(self.export.bad_request(Operation::Read, offset, len));
        };
        let mut queue = Blocking::new(self)?;
        if offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES) {
            return queue.read(offset, data);
        }
        let mut at = offset - offset % SECTOR_BYTES;
        let mut to = data;
        let mut memory = vec![0u8; SYNC_PIECE];
        while at < end {
            let left = end.next_multiple_of(SECTOR_BYTES) - at;
            let count = usize::try_from(left).unwrap_or(SYNC_PIECE).min(SYNC_PIECE);
            let piece = memory.get_mut(..count).unwrap_or(&mut []);
            queue.read(at, piece)?;
            let skip = usize::try_from(offset.saturating_sub(at)).unwrap_or(0);
            let from = piece.get(skip..).unwrap_or(&[]);
            let (now, later) = to.split_at_mut(from.len().min(to.len()));
            for (to, from) in now.iter_mut().zip(from) {
                *to = *from;
            }
            to = later;
            at += count as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Blocking::new(self)?.operate(Operation::Flush, 0)
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        let size = self.export.size;
        if from >= size {
            return Ok(None);
        }
        if !self.tells_allocation {
            return Ok(Some(from..size));
        }
        let mut found: Option<Range<u64>> = None;
        let mut at = from;
        while at < size {
            for extent in self.status(at)? {
                let end = at.saturating_add(u64::from(extent.length)).min(size);
                match (&mut found, extent.state & STATE_ZERO != 0) {
                    // Zeroes after data: the end of it, unless they are few.
                    (Some(range), true) if end - range.end >= LEAST_HOLE => {
                        return Ok(found);
                    }
                    (_, true) => {}
                    (Some(range), false) => range.end = end,
                    (None, false) => found = Some(at..end),
                }
                at = end;
                if at == size {
                    break;
                }
            }
            // A long range is told in parts.
            if found.as_ref().is_some_and(|range| range.end == at) {
                return Ok(found);
            }
        }
        Ok(found)
    }

    fn is_removed(&self) -> Result<bool> {
        Ok(false)
    }
}
