//! The API's socket, from its making to the daemon's end.

use std::fs::Permissions;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::process::umask;
use strake_observe::{OsContext, Result};

use crate::storage::store::remove_file;
use crate::{Host, rest};

/// How long requests may go on after the daemon was asked to end. What they began goes on in the
/// monitors, and the next daemon takes it up.
const GRACE: Duration = Duration::from_secs(5);

/// The listening socket, with its permissions.
#[derive(Debug)]
pub struct Socket(UnixListener);

impl Socket {
    /// Makes the socket: readable and writable for the daemon's account and group alone, from the
    /// first moment on. Call it before other threads exist: it changes the process's umask for a
    /// moment. The caller holds the run directory's lock, so a socket that is there is stale.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn bind(path: &Path) -> Result<Self> {
        remove_file(path)?;
        let before = umask(Mode::from_raw_mode(0o117));
        let bound = UnixListener::bind(path).os("bind", path.display());
        umask(before);
        let listener = bound?;
        std::fs::set_permissions(path, Permissions::from_mode(0o660))
            .os("chmod", path.display())?;
        listener.set_nonblocking(true).os("fcntl", path.display())?;
        Ok(Self(listener))
    }
}

/// Serves until `until` comes to pass, then lets running requests end for a moment.
///
/// # Errors
/// The socket fails.
pub async fn serve(
    host: Arc<Host>,
    socket: Socket,
    until: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let listener =
        tokio::net::UnixListener::from_std(socket.0).os("epoll_ctl", "the API socket")?;
    let (asked, told) = tokio::sync::oneshot::channel();
    let until = async move {
        until.await;
        let _ = asked.send(());
    };
    let serving = axum::serve(listener, rest::router(host)).with_graceful_shutdown(until);
    notify_ready();
    let grace = async {
        if told.await.is_ok() {
            tokio::time::sleep(GRACE).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        served = async { serving.await } => served.os("accept", "the API socket"),
        () = grace => {
            tracing::info!("requests that still run are left behind");
            Ok(())
        }
    }
}

/// Tells a service manager that asked for it that the API answers from now on.
fn notify_ready() {
    let Some(to) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = UnixDatagram::unbound().and_then(|socket| {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;
        match to.as_bytes().strip_prefix(b"@") {
            Some(name) => {
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(b"READY=1", &address)
            }
            None => socket.send_to(b"READY=1", &to),
        }
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager could not be told");
    }
}
