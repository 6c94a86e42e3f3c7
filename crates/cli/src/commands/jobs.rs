//! `strake jobs`

use std::time::Duration;

use clap::Subcommand;
use strake_api::job::{JobId, Phase};
use strake_api::rest::Job;
use strake_observe::{Result, Style, render};

use crate::context::Context;
use crate::exit::Exit;
use crate::job;
use crate::output::{Align, Table};

/// How long a watch waits for a daemon that is away: a restart takes a second, one with an upgrade
/// of its package some ten.
pub(super) const PATIENCE_S: u64 = 30;

/// See and control long work
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  strake jobs ls && strake jobs wait JOB")]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Jobs,
}

/// What can be done with jobs.
#[derive(Debug, Subcommand)]
pub enum Jobs {
    /// List the jobs
    #[command(after_help = "Example:\n  strake jobs ls")]
    Ls,
    /// Show a job and its passes
    #[command(after_help = "Example:\n  strake jobs show JOB")]
    Show {
        /// The job
        job: String,
    },
    /// End a job; the disk stays where it was
    #[command(after_help = "Example:\n  strake jobs cancel JOB")]
    Cancel {
        /// The job
        job: String,
    },
    /// Watch a job until its end; fails if it fails
    #[command(after_help = "Example:\n  strake jobs wait JOB")]
    Wait {
        /// The job
        job: String,
        /// How long to wait for the daemon if it goes away meanwhile
        #[arg(long, value_name = "SECONDS", default_value_t = PATIENCE_S)]
        patience: u64,
    },
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    match args.command {
        Jobs::Ls => {
            let jobs = context.client.jobs().await?;
            context.output.answer(&jobs, |jobs| table(jobs))?;
        }
        Jobs::Show { job } => {
            let job = context.client.job(&JobId(job)).await?;
            context.output.answer(&job, text)?;
        }
        Jobs::Cancel { job } => {
            let job = context.client.cancel(&JobId(job)).await?;
            context.output.answer(&job, |job| {
                let id = &job.status.job;
                format!(
                    "job {id} is asked to end; the disk stays on {}\n",
                    job.source
                )
            })?;
        }
        Jobs::Wait { job, patience } => {
            let patience = Duration::from_secs(patience);
            let job = job::watch(context, &JobId(job), patience).await?;
            ended(context, &job)?;
        }
    }
    Ok(Exit::Done)
}

/// What is said at the end of a job that was waited for.
pub(super) fn ended(context: &Context, job: &Job) -> Result<()> {
    context.output.answer(job, |job| {
        format!("{}{}\n", job::passes(job), job::summary(job))
    })
}

fn table(jobs: &[Job]) -> String {
    let mut table = Table::new(&[
        ("JOB", Align::Left),
        ("VM", Align::Left),
        ("DISK", Align::Left),
        ("TO", Align::Left),
        ("PROGRESS", Align::Left),
    ]);
    for job in jobs {
        table.row([
            job.status.job.to_string(),
            job.vm.clone(),
            job.status.disk.clone(),
            job.to.clone(),
            job::line(job),
        ]);
    }
    table.render()
}

fn text(job: &Job) -> String {
    let mut out = format!(
        "job {} of {}, disk {}\nfrom {}\nto   {} ({})\n{}\n",
        job.status.job,
        job.vm,
        job.status.disk,
        job.source,
        job.destination,
        job.to,
        job::line(job)
    );
    if let Some(method) = job::method(job) {
        out.push_str("method ");
        out.push_str(&method);
        out.push('\n');
    }
    if !job.status.passes.is_empty() {
        out.push('\n');
        out.push_str(&job::passes(job));
    }
    if job.status.phase == Phase::Completed {
        out.push_str(&job::summary(job));
        out.push('\n');
    }
    if let Some(failure) = &job.status.failure {
        out.push('\n');
        out.push_str(&render(failure, Style::Plain));
    }
    out
}
