//! Signals that end a command in good order.

use strake_observe::{OsContext, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Ctrl-C. From the first one of these on, the signal no longer ends the process by itself.
#[derive(Debug)]
pub(crate) struct Interrupts(Signal);

impl Interrupts {
    pub(crate) fn new() -> Result<Self> {
        signal(SignalKind::interrupt())
            .os("sigaction", "SIGINT")
            .map(Self)
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// Every signal that asks a process to end: what a terminal in raw mode must be restored for.
#[derive(Debug)]
pub(crate) struct Endings([Signal; 4]);

impl Endings {
    pub(crate) fn new() -> Result<Self> {
        let listen = |kind, name: &str| signal(kind).os("sigaction", name);
        Ok(Self([
            listen(SignalKind::interrupt(), "SIGINT")?,
            listen(SignalKind::terminate(), "SIGTERM")?,
            listen(SignalKind::hangup(), "SIGHUP")?,
            listen(SignalKind::quit(), "SIGQUIT")?,
        ]))
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        let [interrupt, terminate, hangup, quit] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }
}
