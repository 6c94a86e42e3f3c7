//! `strake start`

use strake_api::rest::Vm;
use strake_observe::Result;

use crate::context::Context;
use crate::exit::Exit;

/// Start a VM
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  strake start web1 && strake console web1")]
pub struct Args {
    /// The VM
    pub name: String,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let vm = context.client.start(&args.name).await?;
    context.output.answer(&vm, started)?;
    Ok(Exit::Done)
}

/// What is said about a VM that was started.
pub(super) fn started(vm: &Vm) -> String {
    match vm.pid {
        Some(pid) => format!("{} runs (pid {pid})\n", vm.name),
        None => format!("{} runs\n", vm.name),
    }
}
