//! Our side: a live disk exported over vhost-user-blk, as `strake export` does it, so that the same
//! client can use it as it uses the peer's.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use strake_block::{Access, LiveDisk, RawImage};
use strake_devices::lifecycle::Component;
use strake_devices::virtio::VhostUserServer;
use strake_devices::virtio::blk::{BlkConfig, VirtioBlk};
use strake_observe::{OsContext, Result};

use super::disk;

/// A running export.
#[derive(Debug)]
pub(crate) struct Server(VhostUserServer);

impl Server {
    /// Exports `disk` at `socket`.
    pub(crate) fn start(disk: &Arc<LiveDisk>, socket: &Path) -> Result<Self> {
        let config = BlkConfig {
            queues: 1,
            serial: "bench".to_owned(),
            read_only: false,
        };
        let device = VirtioBlk::new("export", Arc::clone(disk), &config)?;
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).os("bind", socket.display())?;
        let server = VhostUserServer::new(Arc::new(device), OwnedFd::from(listener))?;
        server.start()?;
        Ok(Self(server))
    }

    /// Ends it; its client has gone.
    pub(crate) fn join(self) -> Result<()> {
        self.0.quiesce()
    }
}

/// The same as a process of its own, whose CPU time can be told: until standard input ends.
pub(crate) fn process(image: &Path, socket: &Path) -> Result<()> {
    let fd = disk::open(image)?.into();
    let name = image.display().to_string();
    let image = RawImage::from_fd(fd, name, Access::ReadWrite)?;
    let server = Server::start(&LiveDisk::new("disk", Arc::new(image)), socket)?;
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    server.join()
}
