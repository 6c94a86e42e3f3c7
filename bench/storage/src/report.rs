//! What a bench prints: a table for people, one line of JSON for everyone else.

use serde::Serialize;

/// Which way is better.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// One metric.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) metric: String,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    /// Ours; none if it could not be measured.
    pub(crate) strake: Option<f64>,
    /// Ours with another method than the usual one.
    #[serde(rename = "strake_dirty", skip_serializing_if = "Option::is_none")]
    pub(crate) dirty: Option<f64>,
    #[serde(rename = "strake_mirror", skip_serializing_if = "Option::is_none")]
    pub(crate) mirror: Option<f64>,
    pub(crate) peer: Option<&'static str>,
    pub(crate) peer_value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) second_peer: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) second_peer_value: Option<f64>,
    pub(crate) target: Option<f64>,
    /// How many runs of each side it is the median of.
    pub(crate) runs: u32,
    /// Why a value is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) why: Option<String>,
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
        let peer = |name: fn(&Row) -> Option<&'static str>| {
            self.rows.iter().find_map(name).unwrap_or("no peer")
        };
        println!(
            "\n| metric | unit | better | strake | dirty | mirror | {} | {} | target |",
            peer(|row| row.peer),
            peer(|row| row.second_peer)
        );
        println!("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
        let show = |value: Option<f64>| value.map_or("–".to_owned(), number);
        for row in &self.rows {
            println!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                row.metric,
                row.unit,
                match row.better {
                    Better::Lower => "lower",
                    Better::Higher => "higher",
                },
                show(row.strake),
                show(row.dirty),
                show(row.mirror),
                show(row.peer_value),
                show(row.second_peer_value),
                show(row.target),
            );
        }
        let mut told = Vec::new();
        for row in &self.rows {
            if let Some(why) = row.why.as_ref().filter(|why| !told.contains(why)) {
                println!("\n{}: {why}", row.metric);
                told.push(why);
            }
        }
        println!();
        match serde_json::to_string(self) {
            Ok(line) => println!("{line}"),
            Err(error) => println!("{{\"bench\":\"{}\",\"error\":\"{error}\"}}", self.bench),
        }
    }
}

fn number(value: f64) -> String {
    if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

/// Three digits after the point are more than any of this is exact to.
pub(crate) fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// The middle of the values; none of none.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len().is_multiple_of(2) {
        let lower = *sorted.get(middle.checked_sub(1)?)?;
        return Some(rounded(f64::midpoint(lower, upper)));
    }
    Some(rounded(upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_few_values() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[2.0]), Some(2.0));
        assert_eq!(median(&[3.0, 1.0]), Some(2.0));
        assert_eq!(median(&[9.0, 1.0, 4.0]), Some(4.0));
    }

    #[test]
    fn the_line_has_the_agreed_shape() {
        let report = Report {
            bench: "storage",
            quick: true,
            rows: vec![Row {
                metric: "idle_total_over_copy_limit".into(),
                unit: "ratio",
                better: Better::Lower,
                strake: Some(1.06),
                dirty: None,
                mirror: None,
                peer: Some("qemu-mirror-background"),
                peer_value: Some(1.14),
                second_peer: None,
                second_peer_value: None,
                target: Some(1.1),
                runs: 5,
                why: None,
            }],
        };
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"bench":"storage","quick":true,"rows":[{"metric":"idle_total_over_copy_limit","unit":"ratio","better":"lower","strake":1.06,"peer":"qemu-mirror-background","peer_value":1.14,"target":1.1,"runs":5}]}"#
        );
    }
}
