//! `strake set`

use std::collections::BTreeMap;

use strake_api::steer::SetValues;
use strake_observe::Result;

use super::profile::show_plan;
use crate::context::Context;
use crate::exit::Exit;

/// Change values of a VM and its devices; says what each change takes
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake set web1 cpus=4 memory=2G --dry-run    what would change, and what it takes
  strake set web1 disk.root.iops=500            limit a disk, at once
  strake set web1 disk.root.iops=               no value of its own: as profiles say

`strake profile fields` lists the fields.")]
pub struct Args {
    /// The VM
    pub name: String,

    /// FIELD=VALUE; an empty value takes the VM's own value away
    #[arg(required = true, value_name = "FIELD=VALUE", value_parser = pair)]
    pub values: Vec<(String, String)>,

    /// Only tell what would change
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// `KEY=VALUE`
pub(super) fn pair(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE, or KEY= to take it away".to_owned()),
    }
}

/// An empty value takes away.
pub(super) fn changes(pairs: Vec<(String, String)>) -> BTreeMap<String, Option<String>> {
    let changes = pairs.into_iter();
    changes
        .map(|(key, value)| (key, (!value.is_empty()).then_some(value)))
        .collect()
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let request = SetValues {
        values: changes(args.values),
        plan: args.dry_run,
    };
    let plan = context.client.set_values(&args.name, &request).await?;
    show_plan(&plan, context)
}
