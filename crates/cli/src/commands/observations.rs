//! `strake observations`

use strake_observe::{Recorded, Result, State, Style, render};

use crate::context::Context;
use crate::exit::Exit;
use crate::output::printable;
use crate::units::utc;

/// Show what the daemon and the monitors observed, oldest first
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  strake observations
  strake observations --since 120     only what came after number 120")]
pub struct Args {
    /// Only those after this sequence number
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub since: u64,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let recorded = context.client.observations(args.since).await?;
    context.output.answer(&recorded, |recorded| {
        recorded.iter().map(text).collect::<Vec<_>>().join("")
    })?;
    Ok(Exit::Done)
}

fn text(recorded: &Recorded) -> String {
    let seen = &recorded.observation;
    let head = format!("#{} {}", recorded.seq, utc(seen.record().at_ms));
    match &recorded.state {
        State::Open => format!("{head}\n{}", render(seen, Style::Plain)),
        // It did no harm in the end: one line will do.
        State::Cleared { by } => format!(
            "{head} cleared by '{}': {} [{}]\n",
            printable(by),
            printable(&seen.to_string()),
            seen.id()
        ),
    }
}
