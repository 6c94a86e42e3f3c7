//! What the bench prints: a table for people, one line of JSON for everyone else, in the form that
//! all benches share.

use serde::Serialize;
use strake_observe::Observation;

/// One metric.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    metric: String,
    unit: &'static str,
    better: &'static str,
    /// Ours; none if it could not be measured.
    strake: Option<f64>,
    /// No peer is measured in the same run.
    peer: Option<&'static str>,
    peer_value: Option<f64>,
    target: Option<f64>,
    runs: usize,
    /// Why a value is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl Row {
    /// The median and the 99th percentile of what was measured, with their targets.
    pub(crate) fn pair(
        what: &str,
        of: &str,
        measured: Result<&[f64], &Observation>,
        targets: Option<(f64, f64)>,
    ) -> [Self; 2] {
        let row = |name: &str, share: f64, target: Option<f64>| Self {
            metric: format!("{what}_{name}_{of}"),
            unit: "ms",
            better: "lower",
            strake: measured.ok().and_then(|values| percentile(values, share)),
            peer: None,
            peer_value: None,
            target,
            runs: measured.map_or(0, <[f64]>::len),
            why: match measured {
                Ok([]) => Some("the guest's memory cannot be looked at".to_owned()),
                Ok(_) => None,
                Err(seen) => Some(seen.to_string()),
            },
        };
        [
            row("p50", 0.5, targets.map(|(p50, _)| p50)),
            row("p99", 0.99, targets.map(|(_, p99)| p99)),
        ]
    }
}

/// A whole bench.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) bench: &'static str,
    pub(crate) quick: bool,
    pub(crate) rows: Vec<Row>,
}

impl Report {
    /// Prints both. The line of JSON is the last.
    pub(crate) fn print(&self) {
        println!("\n| metric | ms | target | runs |");
        println!("| --- | ---: | ---: | ---: |");
        let show =
            |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.3}"));
        for row in &self.rows {
            let (ours, target) = (show(row.strake), show(row.target));
            println!("| {} | {ours} | {target} | {} |", row.metric, row.runs);
        }
        for row in &self.rows {
            if let Some(why) = &row.why {
                println!("\n{}: {why}", row.metric);
            }
        }
        println!();
        match serde_json::to_string(self) {
            Ok(line) => println!("{line}"),
            Err(error) => println!("{{\"bench\":\"{}\",\"error\":\"{error}\"}}", self.bench),
        }
    }
}

/// The smallest value that so large a share of all does not exceed; none of none.
fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count that fits, times a share of at most one"
    )]
    let place = (sorted.len() as f64 * share).ceil() as usize;
    let value = sorted.get(place.saturating_sub(1)).copied()?;
    Some((value * 1000.0).round() / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few_and_many() {
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(percentile(&[2.0], 0.99), Some(2.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 0.5), Some(50.0));
        assert_eq!(percentile(&hundred, 0.99), Some(99.0));
    }

    #[test]
    fn the_line_has_the_agreed_shape() {
        let rows = Row::pair("pause", "4g_1cpu", Ok(&[0.5, 0.7]), Some((1.0, 3.0)));
        let report = Report {
            bench: "restart",
            quick: true,
            rows: rows.into_iter().take(1).collect(),
        };
        assert_eq!(
            serde_json::to_string(&report).unwrap_or_default(),
            r#"{"bench":"restart","quick":true,"rows":[{"metric":"pause_p50_4g_1cpu","unit":"ms","better":"lower","strake":0.5,"peer":null,"peer_value":null,"target":1.0,"runs":2}]}"#
        );
    }
}
