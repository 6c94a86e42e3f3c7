//! `strake man`

use std::path::PathBuf;

use clap_mangen::Man;
use strake_observe::{OsContext, Result};

use crate::context::Context;
use crate::exit::Exit;
use crate::observations::NoSuchCommand;
use crate::{app, output};

/// Print the manual page of strake or of one command
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake man | man -l -
  strake man disk migrate | man -l -
  strake man --dir /usr/local/share/man/man1      writes a page for each command")]
pub struct Args {
    /// The command, `strake` itself if absent
    pub command: Vec<String>,

    /// Write the pages of all commands into this directory
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    pub dir: Option<PathBuf>,
}

pub(super) async fn run(args: Args, _: &Context) -> Result<Exit> {
    let mut root = app::command();
    if let Some(dir) = args.dir {
        clap_mangen::generate_to(root, &dir).os("write manual pages into", dir.display())?;
        return Ok(Exit::Done);
    }
    // Gives the subcommands their full names and the arguments that all share.
    root.build();
    let mut command = &root;
    for name in &args.command {
        command = command.find_subcommand(name).ok_or_else(|| NoSuchCommand {
            command: args.command.join(" "),
        })?;
    }
    let full_name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
        .to_owned();
    let mut page = Vec::new();
    Man::new(command.clone().name(full_name))
        .render(&mut page)
        .os("render", "the manual page")?;
    output::bytes(&page)?;
    Ok(Exit::Done)
}
