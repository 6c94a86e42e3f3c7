//! `strake datastore`

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;
use strake_api::rest::{AddDatastore, Datastore};
use strake_observe::{OsContext, Result};

use crate::context::Context;
use crate::exit::Exit;
use crate::output::{Align, Table};
use crate::units::bytes_or_dash;

/// Manage datastores: the directories that disk images lie in
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  strake datastore add fast /srv/nvme/strake && strake datastore ls")]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Datastores,
}

/// What can be done with datastores.
#[derive(Debug, Subcommand)]
pub enum Datastores {
    /// Make an existing directory a datastore
    #[command(after_help = "Example:\n  strake datastore add fast /srv/nvme/strake")]
    Add {
        /// Its name
        name: String,
        /// The directory
        directory: PathBuf,
    },
    /// List the datastores and their space
    #[command(after_help = "Example:\n  strake datastore ls")]
    Ls,
    /// Forget a datastore that no VM uses; its directory and files stay
    #[command(after_help = "Example:\n  strake datastore rm fast")]
    Rm {
        /// Its name
        name: String,
    },
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    match args.command {
        Datastores::Add { name, directory } => add(name, directory, context).await?,
        Datastores::Ls => {
            let stores = context.client.datastores().await?;
            context.output.answer(&stores, |stores| table(stores))?;
        }
        Datastores::Rm { name } => {
            context.client.remove_datastore(&name).await?;
            context.output.answer(&json!({ "removed": name }), |_| {
                format!("datastore {name} forgotten; its files stay\n")
            })?;
        }
    }
    Ok(Exit::Done)
}

async fn add(name: String, directory: PathBuf, context: &Context) -> Result<()> {
    // The daemon has another working directory.
    let shown = directory.display().to_string();
    let path = std::path::absolute(&directory).os("resolve", shown)?;
    let request = AddDatastore {
        name,
        path: path.to_string_lossy().into_owned(),
    };
    let store = context.client.add_datastore(&request).await?;
    context.output.answer(&store, |store| {
        let free = bytes_or_dash(store.free_bytes);
        format!("datastore {} is {} ({free} free)\n", store.name, store.path)
    })
}

fn table(stores: &[Datastore]) -> String {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("SIZE", Align::Right),
        ("FREE", Align::Right),
        ("DISKS", Align::Right),
        ("PATH", Align::Left),
        ("STATE", Align::Left),
    ]);
    for store in stores {
        let state = match &store.problem {
            None => "ok".to_owned(),
            Some(problem) => problem.to_string(),
        };
        table.row([
            store.name.clone(),
            bytes_or_dash(store.size_bytes),
            bytes_or_dash(store.free_bytes),
            store.disks.to_string(),
            store.path.clone(),
            state,
        ]);
    }
    table.render()
}
