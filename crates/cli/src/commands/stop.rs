//! `strake stop`

use std::time::Duration;

use indicatif::ProgressBar;
use strake_api::rest::StopVm;
use strake_observe::Result;

use crate::context::Context;
use crate::exit::Exit;

/// Stop a VM: press its power button and wait until it has shut down
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake stop web1 --timeout 30
  strake stop web1 --force        at once, as if the power failed; disks are flushed")]
pub struct Args {
    /// The VM
    pub name: String,

    /// Do not ask the guest
    #[arg(long)]
    pub force: bool,

    /// How long to wait for the guest; then it keeps running and the command fails
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let how = StopVm {
        force: args.force,
        timeout_s: args.timeout,
    };
    let spinner = if context.output.live() && !args.force {
        let spinner = ProgressBar::new_spinner()
            .with_message(format!("waiting for {} to shut down", args.name));
        spinner.enable_steady_tick(Duration::from_millis(120));
        spinner
    } else {
        ProgressBar::hidden()
    };
    let stopped = context.client.stop(&args.name, &how).await;
    spinner.finish_and_clear();
    context
        .output
        .answer(&stopped?, |vm| format!("{} stopped\n", vm.name))?;
    Ok(Exit::Done)
}
