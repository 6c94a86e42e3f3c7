//! A panic anywhere is a fault of the monitor: it is told, and the process ends. Going on with a
//! part of the machine gone would let the guest see what no hardware does.
//!
//! One thread is exempt: the search for a kernel on a guest's disk ([`SEARCH`]) runs a file system
//! reader over hostile data before the guest runs, in a thread that it may lose. Its panic fails
//! the request that it works for.

use std::sync::Arc;

use strake_machine::Mailbox;
use strake_machine::observations::Panicked;
use strake_observe::{Observation, Style, render};

/// The name of the thread whose panic is its own affair.
const SEARCH: &str = "boot-disk";

/// Installs the hook.
pub(crate) fn install(mailbox: &Arc<Mailbox>) {
    let mailbox = Arc::clone(mailbox);
    std::panic::set_hook(Box::new(move |info| {
        let message = info
            .payload()
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| info.payload().downcast_ref::<String>().cloned())
            .unwrap_or_default();
        let place = info
            .location()
            .map_or_else(String::new, |place| format!("{place}: "));
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let seen = Observation::from(Panicked {
            thread: thread.to_owned(),
            message: format!("{place}{message}"),
        });
        eprint!("{}", render(&seen, Style::Plain));
        if thread == SEARCH {
            mailbox.observe(seen);
            return;
        }
        mailbox.last_word(seen);
        std::process::abort();
    }));
}
