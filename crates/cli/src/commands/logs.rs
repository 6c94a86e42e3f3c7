//! `strake logs`

use strake_api::rest::VmState;
use strake_observe::Result;

use crate::attach::{self, Backlog, Input, Left};
use crate::context::Context;
use crate::exit::Exit;

/// Print what a VM wrote to its serial console
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake logs web1 --tail 20
  strake logs web1 --follow | grep -m1 login:")]
pub struct Args {
    /// The VM
    pub name: String,

    /// Go on with new output until the VM ends or Ctrl-C
    #[arg(short, long)]
    pub follow: bool,

    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    pub tail: Option<u64>,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let backlog = args.tail.map_or(Backlog::All, Backlog::Lines);
    let follow = args.follow && {
        let state = context.client.vm(&args.name).await?.state;
        !matches!(state, VmState::Stopped | VmState::Failed)
    };
    if !follow {
        attach::print_log(context, &args.name, backlog).await?;
        return Ok(Exit::Done);
    }
    match attach::attach(context, &args.name, backlog, Input::None).await? {
        Left::Interrupted => Ok(Exit::Interrupted),
        Left::Detached => Ok(Exit::Done),
        Left::Ended(vm) => attach::ending(&vm).map(|_| Exit::Done),
    }
}
