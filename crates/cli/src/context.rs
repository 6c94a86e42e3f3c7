//! What a command works with.

use crate::app::Global;
use crate::client::Client;
use crate::output::Output;

/// What a command works with.
#[derive(Debug)]
pub(crate) struct Context {
    /// The way to the daemon.
    pub(crate) client: Client,
    /// The way to the reader.
    pub(crate) output: Output,
}

impl Context {
    pub(crate) fn new(global: &Global) -> Self {
        Self {
            client: Client::new(global.socket()),
            output: Output::new(global.json),
        }
    }
}
