//! `strake restart`

use std::time::Duration;

use indicatif::ProgressBar;
use strake_api::rest::{RestartVm, Restarted};
use strake_observe::Result;

use crate::context::Context;
use crate::exit::Exit;

/// Restart a VM: reboot its guest, or with --fast only replace its monitor under it
///
/// With --fast the guest keeps running: it stands still for some milliseconds while a monitor of the
/// installed version takes over its memory, its disks and its interfaces. Its connections and clocks
/// go on. Any failure leaves it in the monitor that it was in.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake restart web1 --fast
  strake restart web1 --timeout 30     shut the guest down and start it again")]
pub struct Args {
    /// The VM
    pub name: String,

    /// Replace the monitor under the running guest
    #[arg(long, conflicts_with_all = ["force", "timeout"])]
    pub fast: bool,

    /// Do not ask the guest to shut down
    #[arg(long)]
    pub force: bool,

    /// How long to wait for the guest; then it keeps running and the command fails
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let how = RestartVm {
        fast: args.fast,
        force: args.force,
        timeout_s: args.timeout,
    };
    let spinner = if context.output.live() && !args.fast && !args.force {
        let spinner = ProgressBar::new_spinner()
            .with_message(format!("waiting for {} to shut down", args.name));
        spinner.enable_steady_tick(Duration::from_millis(120));
        spinner
    } else {
        ProgressBar::hidden()
    };
    let restarted = context.client.restart(&args.name, &how).await;
    spinner.finish_and_clear();
    context.output.answer(&restarted?, said)?;
    Ok(Exit::Done)
}

/// What is said about a VM that was restarted.
pub(super) fn said(restarted: &Restarted) -> String {
    let vm = &restarted.vm;
    let pid = |pid: Option<u32>| pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
    let Some(pause_us) = restarted.pause_us else {
        return super::start::started(vm);
    };
    let versions = match (&restarted.old_version, &restarted.new_version) {
        (Some(old), Some(new)) if old != new => format!(", {old} -> {new}"),
        (_, Some(new)) => format!(", {new}"),
        _ => String::new(),
    };
    format!(
        "{} runs in a new monitor (pid {} -> {}{versions}); its guest stood still for {}\n",
        vm.name,
        pid(restarted.old_pid),
        pid(vm.pid),
        pause(pause_us),
    )
}

/// Microseconds for people.
fn pause(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        _ => format!("{}.{:02} ms", us / 1_000, us % 1_000 / 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_readable() {
        assert_eq!(pause(870), "870 us");
        assert_eq!(pause(1_234), "1.23 ms");
        assert_eq!(pause(50_000), "50.00 ms");
    }
}
