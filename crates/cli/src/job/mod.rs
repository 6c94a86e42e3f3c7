//! Watching a job to its end.
//!
//! The daemon is asked again and again ([`INTERVAL`]): the simplest thing that survives its
//! restart. While it is away the job goes on in the monitor, so the watch waits for it to come back,
//! but not for ever.

mod show;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use strake_api::job::{JobId, Phase};
use strake_api::rest::Job;
use strake_observe::{Observation, Result, Task};

use crate::context::Context;
use crate::exit::Exit;
use crate::observations::{
    DaemonGone, DaemonSilent, Interrupted, MigrationCancelled, MigrationFailed,
    MigrationInterrupted,
};
use crate::signals::Interrupts;

pub(crate) use show::{latency, limits, line, method, passes, summary};

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(200);

/// Watches `job` until it is final, with a progress bar on a terminal. `patience` bounds the time
/// for which the daemon may be away.
///
/// # Errors
/// The job failed or was cancelled; Ctrl-C; the daemon went away.
pub(crate) async fn watch(context: &Context, id: &JobId, patience: Duration) -> Result<Job> {
    let mut interrupts = Interrupts::new()?;
    let bar = Bar::new(context);
    let ended = tokio::select! {
        ended = until_final(context, id, patience, &bar) => ended,
        () = interrupts.next() => Err(Interrupted {
            remains: format!("job {id} continues without this client"),
            advice: format!(
                "watch it with `strake jobs wait {id}`, end it with `strake jobs cancel {id}`"
            ),
        }
        .into()),
    };
    bar.clear();
    verdict(ended?)
}

async fn until_final(context: &Context, id: &JobId, patience: Duration, bar: &Bar) -> Result<Job> {
    let mut away: Option<Away> = None;
    loop {
        let left = away.as_ref().map_or(patience, |away| away.left(patience));
        let asked = match tokio::time::timeout(left, context.client.job(id)).await {
            Ok(asked) => asked,
            Err(_) => Err(DaemonSilent {
                socket: context.client.socket().display().to_string(),
                request: format!("the question for job {id}"),
                seconds: left.as_secs(),
            }
            .into()),
        };
        match asked {
            Ok(job) => {
                if let Some(away) = away.take() {
                    away.came_back(context, bar);
                }
                bar.show(&job);
                if job.status.phase.is_final() {
                    return Ok(job);
                }
            }
            Err(failure) if Exit::is_away(&failure) => {
                let now = match away.take() {
                    Some(away) => away,
                    None => Away::begin(context, bar, patience),
                };
                if now.left(patience).is_zero() {
                    return Err(now.give_up(id, patience, failure));
                }
                away = Some(now);
            }
            Err(refused) => {
                if let Some(away) = away.take() {
                    away.task.succeed();
                }
                return Err(refused);
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// The time for which the daemon is away.
struct Away {
    since: Instant,
    task: Task,
}

impl Away {
    fn begin(context: &Context, bar: &Bar, patience: Duration) -> Self {
        bar.aside(|| {
            context.output.remark(&format!(
                "the daemon is away; the job goes on in the VM's monitor; waiting up to {} s for \
                 the daemon",
                patience.as_secs()
            ));
        });
        Self {
            since: Instant::now(),
            task: Task::begin("find the daemon again"),
        }
    }

    fn left(&self, patience: Duration) -> Duration {
        patience.saturating_sub(self.since.elapsed())
    }

    fn came_back(self, context: &Context, bar: &Bar) {
        bar.aside(|| context.output.remark("the daemon is back"));
        self.task.succeed();
    }

    fn give_up(mut self, id: &JobId, patience: Duration, last: Observation) -> Observation {
        self.task.saw(last);
        self.task.fail(DaemonGone {
            job: id.to_string(),
            seconds: patience.as_secs(),
        })
    }
}

/// What a final job means for the one who waited for it.
fn verdict(job: Job) -> Result<Job> {
    let (vm, disk) = (job.vm.clone(), job.status.disk.clone());
    let (id, source) = (job.status.job.to_string(), job.source.clone());
    let failure = match job.status.phase {
        Phase::Cancelled => Observation::from(MigrationCancelled {
            vm,
            disk,
            job: id,
            source,
        }),
        Phase::Interrupted => Observation::from(MigrationInterrupted { vm, disk, job: id }),
        Phase::Failed => Observation::from(MigrationFailed {
            vm,
            disk,
            job: id,
            source,
        }),
        _ => return Ok(job),
    };
    Err(failure.because_all(job.status.failure))
}

/// A progress line on a terminal, nothing elsewhere.
struct Bar {
    line: ProgressBar,
    speed: RefCell<Speed>,
}

impl Bar {
    fn new(context: &Context) -> Self {
        let line = if context.output.live() {
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
        } else {
            ProgressBar::hidden()
        };
        // `wide_msg` is cut at the terminal's edge: a wrapped line could not be drawn over.
        if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
            line.set_style(style);
        }
        Self {
            line,
            speed: RefCell::default(),
        }
    }

    fn show(&self, job: &Job) {
        let speed = self.speed.borrow_mut().next(job);
        self.line.set_message(show::bar(job, speed));
    }

    fn aside(&self, say: impl FnOnce()) {
        self.line.suspend(say);
    }

    fn clear(&self) {
        self.line.finish_and_clear();
    }
}

/// How fast a job really goes, waits of a rate limit included: bytes over the last
/// [`WINDOW_MS`] of the job's own clock.
#[derive(Debug, Default)]
struct Speed(VecDeque<(u64, u64)>);

const WINDOW_MS: u64 = 2_000;

impl Speed {
    fn next(&mut self, job: &Job) -> Option<u64> {
        let now = job.status.elapsed_ms;
        let bytes = job.status.passes.iter().map(|pass| pass.read_bytes).sum();
        self.0.push_back((now, bytes));
        while self.0.len() > 2
            && self
                .0
                .front()
                .is_some_and(|(at, _)| now - (*at).min(now) > WINDOW_MS)
        {
            self.0.pop_front();
        }
        let (first_at, first) = *self.0.front()?;
        let moved: u64 = bytes.checked_sub(first)?;
        moved
            .checked_mul(1000)?
            .checked_div(now.checked_sub(first_at)?)
    }
}

#[cfg(test)]
mod tests;
