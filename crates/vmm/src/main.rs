//! The monitor of one VM.
//!
//! Started by `straked` with a listening control socket and nothing else; it locks itself into a
//! jail, and only then takes requests. Everything it works with comes over the socket as
//! descriptors; it opens nothing.

mod arguments;
mod jail;
mod observations;
mod panics;
mod signals;

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use strake_api::control::ExitReason;
use strake_machine::Mailbox;
use strake_machine::control::{Server, ServerConfig};
use strake_observe::{Result, Style, render, set_process_name};

use crate::arguments::{Arguments, Asked, Jail};

fn main() -> ExitCode {
    let arguments = match arguments::parse(std::env::args_os().skip(1)) {
        Ok(Asked::Run(arguments)) => arguments,
        Ok(Asked::Print(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(seen) => {
            eprint!("{}", render(&seen, Style::Plain));
            return ExitCode::from(2);
        }
    };
    set_process_name(format!("strake-vmm {}", arguments.name));
    match run(&arguments) {
        Ok(reason) => end(&reason),
        Err(seen) => {
            eprint!("{}", render(&seen, Style::Plain));
            ExitCode::FAILURE
        }
    }
}

/// From the inherited socket to the end of the guest.
fn run(arguments: &Arguments) -> Result<ExitReason> {
    let listener = arguments.take_listener()?;
    let terminate = signals::install()?;
    let mailbox = Mailbox::new()?;
    mailbox.follow_recorder();
    panics::install(&mailbox);
    if arguments.jail == Jail::Full {
        for seen in jail::enter(arguments)? {
            mailbox.observe(seen);
        }
    }
    serve(listener, terminate, mailbox)
}

fn serve(
    listener: OwnedFd,
    terminate: OwnedFd,
    mailbox: std::sync::Arc<Mailbox>,
) -> Result<ExitReason> {
    let config = ServerConfig {
        listener,
        terminate: Some(terminate),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let mut server = Server::new(config, mailbox);
    let reason = server.serve()?;
    // The guest is at rest and its disks are flushed. What is left (threads that wait for requests
    // which nobody wants any more) ends with the process, not one by one.
    end_now(&reason, server)
}

fn end_now(reason: &ExitReason, _alive: Server) -> ! {
    std::process::exit(status(reason).into())
}

fn end(reason: &ExitReason) -> ExitCode {
    ExitCode::from(status(reason))
}

/// The exit status says why, for whoever finds the process gone.
fn status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::GuestPowerOff | ExitReason::Stopped => 0,
        ExitReason::Failed(seen) => {
            eprint!("{}", render(seen, Style::Plain));
            1
        }
        ExitReason::GuestReset => 10,
    }
}
