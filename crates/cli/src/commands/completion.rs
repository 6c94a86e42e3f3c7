//! `strake completion`

use clap_complete::{Shell, generate};
use strake_observe::Result;

use crate::context::Context;
use crate::exit::Exit;
use crate::{app, output};

/// Print the completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake completion bash > /etc/bash_completion.d/strake
  strake completion zsh > /usr/local/share/zsh/site-functions/_strake")]
pub struct Args {
    /// The shell
    pub shell: Shell,
}

pub(super) async fn run(args: Args, _: &Context) -> Result<Exit> {
    let mut script = Vec::new();
    generate(args.shell, &mut app::command(), "strake", &mut script);
    output::bytes(&script)?;
    Ok(Exit::Done)
}
