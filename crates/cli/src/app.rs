//! The arguments that every command shares.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser};

use crate::commands::Command;

/// Strake: virtual machines whose every part can be replaced while they run.
#[derive(Debug, Parser)]
#[command(
    name = "strake",
    version,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    after_help = "\
Examples:
  strake doctor                                 what this host can do
  strake run disk.raw --cpus 2 --memory 1G      create, start and open the console
  strake disk migrate web1 root --to fast       move a disk while the VM runs

Exit codes:
  0    it was done
  1    it failed; the observation tree on standard error says why
  2    the command line cannot be understood
  3    the daemon cannot be reached
  130  interrupted by Ctrl-C
  141  whoever read the output closed it

With --json, standard output carries the answer as JSON; a failure is a JSON problem document
(RFC 9457) with the observation tree.

Colours are used on a terminal only, and never when NO_COLOR is set."
)]
pub struct App {
    /// What every command understands.
    #[command(flatten)]
    pub global: Global,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command understands.
#[derive(Debug, Args)]
pub struct Global {
    /// Print machine-readable JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,

    /// The daemon's socket [default: RUN_DIR/straked.sock]
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "STRAKE_SOCKET",
        hide_env_values = true
    )]
    pub socket: Option<PathBuf>,

    /// The directory of the daemon's socket and of running VMs
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "STRAKE_RUN_DIR",
        default_value = "/run/strake",
        hide = true
    )]
    pub run_dir: PathBuf,
}

impl Global {
    /// Where the daemon listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        match &self.socket {
            Some(socket) => socket.clone(),
            None => self.run_dir.join("straked.sock"),
        }
    }
}

/// The whole command line, for completion and the manual.
#[must_use]
pub fn command() -> clap::Command {
    App::command()
}
