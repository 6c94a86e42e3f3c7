//! `strake rm`

use serde_json::json;
use strake_observe::Result;

use crate::client::Disks;
use crate::context::Context;
use crate::exit::Exit;

/// Remove a stopped VM from the inventory
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake rm web1                  its disk images stay
  strake rm web1 --delete-disks   they are deleted too")]
pub struct Args {
    /// The VM
    pub name: String,

    /// Delete the VM's disk images too
    #[arg(long)]
    pub delete_disks: bool,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let disks = if args.delete_disks {
        Disks::Delete
    } else {
        Disks::Keep
    };
    context.client.remove(&args.name, disks).await?;
    let answer = json!({ "removed": args.name, "disks_deleted": args.delete_disks });
    context
        .output
        .answer(&answer, |_| format!("{} removed\n", args.name))?;
    Ok(Exit::Done)
}
