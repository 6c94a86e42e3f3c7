//! `strake jobs`

use std::time::Duration;

use clap::Subcommand;
use strake_api::job::{Ceiling, JobId, Latency, LimitsChange, Phase};
use strake_api::rest::Job;
use strake_observe::{Result, Style, render};

use super::limits;
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
    /// Let a job rest: it copies nothing and does not switch over until it is resumed
    #[command(after_help = "\
Example:
  strake jobs pause JOB

What the guest writes meanwhile is only marked, so a job that rests costs it nothing.")]
    Pause {
        /// The job
        job: String,
    },
    /// Let a paused job go on where it was
    #[command(after_help = "Example:\n  strake jobs resume JOB")]
    Resume {
        /// The job
        job: String,
    },
    /// Change the limits of a job while it runs
    #[command(after_help = "\
Examples:
  strake jobs set JOB --rate 50M
  strake jobs set JOB --rate unlimited --latency-ms 5")]
    Set(Set),
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

/// The arguments of `strake jobs set`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("changes")
    .required(true)
    .multiple(true)
    .args(["rate", "iops", "latency_ms", "pause_ms"]))]
pub struct Set {
    /// The job
    pub job: String,

    /// Copy at most so many bytes per second, for example 100M; or `unlimited`
    #[arg(long, value_name = "BYTES", value_parser = limits::rate)]
    pub rate: Option<Ceiling>,

    /// Make at most so many requests per second, reads and writes together; or `unlimited`
    #[arg(long, value_name = "NUMBER", value_parser = limits::iops)]
    pub iops: Option<Ceiling>,

    /// Give way when the guest's own requests take longer; `auto`, or `any` to never give way
    #[arg(long, value_name = "MS", value_parser = limits::latency)]
    pub latency_ms: Option<Latency>,

    /// The longest pause that the guest may see at the switch-over
    #[arg(long, value_name = "MS")]
    pub pause_ms: Option<u64>,
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
        Jobs::Pause { job } => {
            let job = context.client.pause(&JobId(job)).await?;
            context
                .output
                .answer(&job, |job| format!("job {} rests\n", job.status.job))?;
        }
        Jobs::Resume { job } => {
            let job = context.client.resume(&JobId(job)).await?;
            context
                .output
                .answer(&job, |job| format!("job {} goes on\n", job.status.job))?;
        }
        Jobs::Set(args) => {
            let change = LimitsChange {
                pause_ms: args.pause_ms,
                bytes_per_second: args.rate,
                iops: args.iops,
                latency: args.latency_ms,
            };
            let job = context.client.set_job(&JobId(args.job), &change).await?;
            context.output.answer(&job, |job| {
                format!("job {}: {}\n", job.status.job, job::limits(job))
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
    out.push_str(&format!("limits {}\n", job::limits(job)));
    if let Some(kept) = &job.status.kept {
        let kept = crate::units::bytes(kept.bytes);
        out.push_str(&format!("kept   {kept}, which a crash would not lose\n"));
    }
    if let Some(latency) = job::latency(job) {
        out.push_str(&format!("guest  {latency}\n"));
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
