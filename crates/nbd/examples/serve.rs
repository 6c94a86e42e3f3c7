//! Serves a raw image by NBD until its input ends: `serve SOCKET FILE`.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use strake_block::{Access, LiveDisk, RawImage};
use strake_nbd::{Listener, LiveExport, Server, ServerConfig};
use strake_observe::{OsContext, Result};

/// O_DIRECT of Linux on x86-64.
const DIRECT: i32 = 0o40000;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, path] = arguments.as_slice() else {
        eprintln!("usage: serve SOCKET FILE");
        return Ok(());
    };
    let open = |flags| {
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
    };
    let direct = std::env::var_os("BUFFERED").is_none();
    let file = open(if direct { DIRECT } else { 0 }).os("open", path)?;
    let image = RawImage::from_fd(file.into(), path.clone(), Access::ReadWrite)?;
    let disk = LiveDisk::new("disk", Arc::new(image));
    let config = ServerConfig {
        exports: vec![(String::new(), Arc::new(LiveExport::new(disk)))],
        tls: None,
    };
    let server = Server::start(config, vec![Listener::unix(Path::new(socket))?])?;
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    server.stop();
    Ok(())
}
