//! What this host can and cannot do.
//!
//! Each check tries the thing itself where that is harmless, instead of looking for a version or
//! a configuration that promises it. What it cannot do is an observation, so each "cannot" has a
//! remedy. Nothing here needs the daemon.

mod daemon;
mod host;
mod kvm;
mod limits;
mod observations;
mod storage;
mod sys;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use strake_observe::{Observation, Style};

use crate::client::Client;
use crate::output::printable;

pub use observations::CATALOG;

/// What is examined.
#[derive(Debug, Clone)]
pub struct Where {
    /// Where the daemon keeps its state.
    pub state_dir: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
}

/// What the doctor found.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Whether everything that is required is there.
    pub fit: bool,
    /// The version of this command line.
    pub version: String,
    /// Every check, in the order of the text.
    pub checks: Vec<Check>,
}

/// One check.
#[derive(Debug, Serialize, Deserialize)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Whether it is there.
    pub result: Verdict,
    /// What was found.
    pub found: String,
    /// Why it is not there, with the remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Observation>,
    /// Figures, for machines.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub data: serde_json::Value,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is there.
    Ok,
    /// It is not there or not as it should be; what depends on it is slower, less safe or absent.
    Limited,
    /// It is not there, and without it no stock guest runs.
    Missing,
}

/// How much depends on a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Required,
    Useful,
}

impl Check {
    fn ok(name: &str, found: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            result: Verdict::Ok,
            found: found.into(),
            problem: None,
            data: serde_json::Value::Null,
        }
    }

    fn cannot(name: &str, need: Need, problem: impl Into<Observation>) -> Self {
        let problem = problem.into();
        Self {
            name: name.to_owned(),
            result: match need {
                Need::Required => Verdict::Missing,
                Need::Useful => Verdict::Limited,
            },
            found: problem.text().to_owned(),
            problem: Some(problem),
            data: serde_json::Value::Null,
        }
    }

    fn of(name: &str, need: Need, tried: Result<String, Observation>) -> Self {
        match tried {
            Ok(found) => Self::ok(name, found),
            Err(problem) => Self::cannot(name, need, problem),
        }
    }

    fn with(mut self, data: impl Serialize) -> Self {
        // A figure that cannot be expressed is left out; the text has it.
        self.data = serde_json::to_value(data).unwrap_or_default();
        self
    }
}

/// Checks everything.
pub async fn examine(at: &Where, client: &Client) -> Report {
    let mut checks = kvm::checks(&at.kvm);
    checks.extend(host::checks());
    checks.extend(storage::checks(&at.state_dir));
    checks.extend(limits::checks());
    checks.extend(daemon::checks(client).await);
    Report {
        fit: checks.iter().all(|check| check.result != Verdict::Missing),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        checks,
    }
}

/// The report as text.
#[must_use]
pub fn render(report: &Report, style: Style) -> String {
    let (green, yellow, red, dim, off) = match style {
        Style::Plain => ("", "", "", "", ""),
        Style::Terminal => ("\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[2m", "\x1b[0m"),
    };
    let width = report
        .checks
        .iter()
        .map(|check| check.name.chars().count())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for check in &report.checks {
        let (colour, word) = match check.result {
            Verdict::Ok => (green, "ok"),
            Verdict::Limited => (yellow, "limited"),
            Verdict::Missing => (red, "MISSING"),
        };
        out.push_str(&format!(
            "{:<width$}  {colour}{word:<7}{off}  {}\n",
            printable(&check.name),
            printable(&check.found)
        ));
        let Some(problem) = &check.problem else {
            continue;
        };
        let margin = " ".repeat(width + 11);
        for cause in problem.causes() {
            let cause = printable(&cause.to_string());
            out.push_str(&format!("{margin}{dim}because {cause}{off}\n"));
        }
        out.push_str(&format!(
            "{margin}remedy: {}\n",
            printable(problem.remedy())
        ));
    }
    let count = |result| {
        let checks = report.checks.iter();
        checks.filter(|check| check.result == result).count()
    };
    out.push_str(&match (count(Verdict::Missing), count(Verdict::Limited)) {
        (0, 0) => format!("\n{green}this host can do everything{off}\n"),
        (0, limited) => format!("\n{green}stock guests run here{off}; {limited} limited\n"),
        (missing, limited) => format!(
            "\n{red}stock guests do not run here{off}: {missing} missing, {limited} limited\n"
        ),
    });
    out
}

#[cfg(test)]
mod tests;
