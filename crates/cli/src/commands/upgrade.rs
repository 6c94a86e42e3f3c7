//! `strake upgrade`

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use strake_api::rest::{RestartVm, Restarted, VmState};
use strake_observe::{Because, Observation, Result};
use tokio::task::JoinSet;

use super::restart::said;
use crate::context::Context;
use crate::exit::Exit;
use crate::observations::UpgradeStopped;

/// Bring the monitors of all running VMs to the installed version, under their guests
///
/// Each running VM is restarted as by `strake restart --fast`, one after another or a few at a time.
/// At the first failure no further one is begun; that guest goes on as before.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake upgrade
  strake upgrade --parallel 4
  strake upgrade --dry-run        only say which VMs it would be")]
pub struct Args {
    /// How many VMs at a time
    #[arg(long, value_name = "N", default_value = "1")]
    pub parallel: NonZeroUsize,

    /// Only say which VMs would be restarted
    #[arg(long)]
    pub dry_run: bool,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let vms = context.client.vms().await?;
    let mut waiting: VecDeque<String> = vms
        .into_iter()
        .filter(|vm| matches!(vm.state, VmState::Running | VmState::Paused))
        .map(|vm| vm.name)
        .collect();
    if args.dry_run {
        context.output.answer(&waiting, |names| {
            let lines = names
                .iter()
                .map(|name| format!("{name} would be restarted fast\n"));
            lines.collect()
        })?;
        return Ok(Exit::Done);
    }
    let mut under_way = JoinSet::new();
    let mut done: Vec<Restarted> = Vec::new();
    let mut failed: Option<(String, Observation)> = None;
    loop {
        while failed.is_none()
            && under_way.len() < args.parallel.get()
            && let Some(name) = waiting.pop_front()
        {
            let client = context.client.clone();
            under_way.spawn(async move {
                let how = RestartVm {
                    fast: true,
                    ..RestartVm::default()
                };
                let restarted = client.restart(&name, &how).await;
                (name, restarted)
            });
        }
        match under_way.join_next().await {
            None => break,
            Some(Ok((_, Ok(restarted)))) => {
                context.output.remark(said(&restarted).trim_end());
                done.push(restarted);
            }
            Some(Ok((name, Err(seen)))) => {
                failed.get_or_insert((name, seen));
            }
            Some(Err(ended)) => {
                let seen = std::io::Error::other(ended).into();
                failed.get_or_insert(("?".to_owned(), seen));
            }
        }
    }
    if let Some((vm, seen)) = failed {
        return Err(seen).because_of(|| UpgradeStopped {
            vm,
            done: done.len(),
            left: waiting.len(),
        });
    }
    context.output.answer(&done, |done| {
        format!(
            "{} VMs run in monitors of the installed version\n",
            done.len()
        )
    })?;
    Ok(Exit::Done)
}
