//! The command line: `strake`.
//!
//! A call reads top to bottom: [`main`] parses the arguments ([`app`]), one file of `commands`
//! does the work through the [`client`], and [`exit`] turns what it met into text (or JSON) and
//! an exit code.
//!
//! | code | meaning |
//! | --- | --- |
//! | 0 | it was done |
//! | 1 | it failed; the observation tree says why |
//! | 2 | the command line cannot be understood |
//! | 3 | the daemon cannot be reached, or went away and did not come back |
//! | 130 | interrupted by Ctrl-C |
//! | 141 | whoever read the output closed it |
//!
//! # Threads
//! One thread runs everything on a current-thread tokio runtime. `console` and `run` add one that
//! reads standard input, because a terminal must not be made non-blocking under the shell that
//! owns it; it ends with the process.

pub mod app;
mod attach;
pub mod client;
mod commands;
mod context;
pub mod doctor;
pub mod exit;
mod job;
pub mod observations;
mod output;
mod signals;
mod terminal;
mod units;

use std::process::ExitCode;

use clap::Parser;
use strake_observe::OsContext;

use crate::app::App;
use crate::context::Context;
use crate::exit::Exit;

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    strake_observe::set_process_name("strake");
    // On usage errors clap prints them and exits with 2; for help and version with 0.
    let app = App::parse();
    let context = Context::new(&app.global);
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .os("start", "the event loop")
        .and_then(|runtime| {
            let done = runtime.block_on(commands::run(app.command, &context));
            // The thread that reads standard input may wait forever: it is not waited for.
            runtime.shutdown_background();
            done
        });
    let exit = match done {
        Ok(exit) => exit,
        Err(failure) => {
            let exit = Exit::of(&failure);
            if exit != Exit::OutputClosed {
                context.output.failure(&failure, context.client.refusal());
            }
            exit
        }
    };
    exit.into()
}
