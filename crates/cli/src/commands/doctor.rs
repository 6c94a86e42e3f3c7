//! `strake doctor`

use std::path::PathBuf;

use strake_observe::{Result, Style};

use crate::context::Context;
use crate::doctor::{Report, Where, examine};
use crate::exit::Exit;

/// Check what this host can and cannot do, with the remedy for each "cannot"
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake doctor
  strake doctor --json | jq '.checks[] | select(.result != \"ok\")'

It works without the daemon. The exit code is 1 if something is missing without which no stock
guest runs.")]
pub struct Args {
    /// Where the daemon keeps its state
    #[arg(
        long,
        value_name = "DIR",
        env = "STRAKE_STATE_DIR",
        default_value = "/var/lib/strake",
        hide_env_values = true
    )]
    pub state_dir: PathBuf,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let at = Where {
        state_dir: args.state_dir,
        kvm: PathBuf::from("/dev/kvm"),
    };
    let report = examine(&at, &context.client).await;
    let style = context.output.stdout_style();
    context
        .output
        .answer(&report, |report| text(report, style))?;
    Ok(if report.fit { Exit::Done } else { Exit::Failed })
}

fn text(report: &Report, style: Style) -> String {
    crate::doctor::render(report, style)
}
