//! `strake label`

use strake_api::steer::SetLabels;
use strake_observe::Result;

use super::profile::show_plan;
use super::set::{changes, pair};
use crate::context::Context;
use crate::exit::Exit;

/// Label a VM, a datastore or the host, so that profiles can select it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake label web1 team=web stage=prod
  strake label web1 stage=                      take a label away
  strake label datastore/slow tier=slow
  strake label host rack=7 --dry-run            what profiles would make of it")]
pub struct Args {
    /// A VM's name, `datastore/NAME`, or `host`
    pub object: String,

    /// KEY=VALUE; an empty value takes the label away
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = pair)]
    pub labels: Vec<(String, String)>,

    /// Only tell what would change
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let request = SetLabels {
        object: args.object,
        labels: changes(args.labels),
        plan: args.dry_run,
    };
    let plan = context.client.set_labels(&request).await?;
    show_plan(&plan, context)
}
