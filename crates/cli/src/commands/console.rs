//! `strake console`

use strake_observe::Result;

use crate::attach::{self, Backlog, Input, Left};
use crate::context::Context;
use crate::exit::Exit;

/// Open the serial console of a running VM; Ctrl-] leaves it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake console web1
  printf 'uptime\\n' | strake console web1     works in a pipe too; there, Ctrl-C leaves it")]
pub struct Args {
    /// The VM
    pub name: String,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    open(&args.name, Backlog::None, context).await
}

/// Opens the console and says how it was left.
pub(super) async fn open(name: &str, backlog: Backlog, context: &Context) -> Result<Exit> {
    if context.output.live() {
        context
            .output
            .remark(&format!("console of {name}; Ctrl-] leaves it"));
    }
    let left = attach::attach(context, name, backlog, Input::Standard).await?;
    if context.output.live() {
        // The guest's last line may not have ended.
        context.output.remark("");
    }
    let remains = || format!("{name} keeps running; `strake console {name}` comes back");
    match left {
        Left::Detached => {
            context.output.remark(&remains());
            Ok(Exit::Done)
        }
        Left::Interrupted => {
            context.output.remark(&remains());
            Ok(Exit::Interrupted)
        }
        Left::Ended(vm) => {
            context.output.remark(&attach::ending(&vm)?);
            Ok(Exit::Done)
        }
    }
}
