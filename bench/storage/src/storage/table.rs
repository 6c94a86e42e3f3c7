//! From samples to rows.

use super::client::Load;
use super::{Extent, LOADS, Sample, Settings, Side};
use crate::report::{Better, Report, Row, median, rounded};

const PEER: &str = "qemu-mirror-background";

/// One line per migration, as it happens.
pub(super) fn line(sample: &Sample) {
    let side = match sample.side {
        Side::Strake => "strake",
        Side::Peer => "peer  ",
    };
    let total = match (sample.total, &sample.why) {
        (Some(total), _) => format!("{total:6.2} s"),
        (None, why) => why.clone().unwrap_or_default(),
    };
    let guest = if sample.load == Load::Idle {
        String::new()
    } else {
        format!(
            ", guest {:.0} → {:.0} IOPS, latency {:.2} → {:.2} ms (worst {:.1}), switch-over gap {} ms",
            sample.before_iops,
            sample.during_iops,
            sample.before_latency_ms.unwrap_or(0.0),
            sample.during_latency_ms.unwrap_or(0.0),
            sample.worst_ms.unwrap_or(0.0),
            sample
                .gap_ms
                .map_or("–".to_owned(), |gap| format!("{gap:.1}")),
        )
    };
    println!(
        "  {side} {:>5}: {total}{guest}, {} sectors lost  {}",
        sample.load.name(),
        sample.bad_sectors,
        sample.note
    );
}

/// What one side measured of one thing.
struct Values {
    value: Option<f64>,
    why: Option<String>,
}

fn values(
    samples: &[Sample],
    side: Side,
    load: Load,
    of: &dyn Fn(&Sample) -> Option<f64>,
) -> Values {
    let own: Vec<&Sample> = samples
        .iter()
        .filter(|sample| sample.side == side && sample.load == load)
        .collect();
    let found: Vec<f64> = own.iter().filter_map(|sample| of(sample)).collect();
    // Half of the runs must have an end: the median of those that happened to converge would
    // praise whoever seldom does.
    if found.len() * 2 > own.len() {
        return Values {
            value: median(&found),
            why: None,
        };
    }
    let reason = own
        .iter()
        .filter_map(|sample| sample.why.clone())
        .next()
        .unwrap_or_else(|| "not measured".to_owned());
    let side = match side {
        Side::Strake => "strake",
        Side::Peer => "peer",
    };
    let failed = own.len() - found.len();
    Values {
        value: None,
        why: Some(format!("{side}: {failed} of {} runs: {reason}", own.len())),
    }
}

struct Metric<'a> {
    name: String,
    unit: &'static str,
    better: Better,
    target: Option<f64>,
    load: Load,
    of: &'a dyn Fn(&Sample) -> Option<f64>,
}

/// All rows.
pub(super) fn report(settings: &Settings, samples: &[Sample], no_peer: Option<String>) -> Report {
    let mut rows = Vec::new();
    let mut add = |metric: Metric<'_>| {
        let ours = values(samples, Side::Strake, metric.load, metric.of);
        let theirs = match &no_peer {
            None => values(samples, Side::Peer, metric.load, metric.of),
            Some(why) => Values {
                value: None,
                why: Some(format!("peer: {why}")),
            },
        };
        let whys: Vec<String> = ours.why.into_iter().chain(theirs.why).collect();
        rows.push(Row {
            metric: metric.name,
            unit: metric.unit,
            better: metric.better,
            strake: ours.value,
            peer: no_peer.is_none().then_some(PEER),
            peer_value: theirs.value,
            target: metric.target,
            runs: settings.rounds,
            why: (!whys.is_empty()).then(|| whys.join("; ")),
        });
    };
    for load in LOADS {
        let name = load.name();
        add(Metric {
            name: format!("{name}_total_over_copy_limit"),
            unit: "ratio",
            better: Better::Lower,
            target: (load == Load::Idle).then_some(1.1),
            load,
            of: &|sample| sample.total.map(|total| total / sample.copy_limit),
        });
        if load == Load::Idle {
            continue;
        }
        add(Metric {
            name: format!("{name}_switch_over_gap_ms"),
            unit: "ms",
            better: Better::Lower,
            target: Some(10.0),
            load,
            of: &|sample| sample.gap_ms,
        });
        add(Metric {
            name: format!("{name}_guest_keeps"),
            unit: "percent of its IOPS",
            better: Better::Higher,
            target: match load {
                Load::Paced(4000) => Some(95.0),
                Load::Max => Some(40.0),
                _ => None,
            },
            load,
            of: &|sample| {
                let before = match load {
                    Load::Paced(rate) => rate as f64,
                    _ => sample.before_iops,
                };
                (before > 0.0).then(|| (sample.during_iops * 100.0 / before).min(100.0))
            },
        });
        add(Metric {
            name: format!("{name}_latency_over_before"),
            unit: "ratio of means",
            better: Better::Lower,
            target: (load == Load::Paced(4000)).then_some(3.0),
            load,
            of: &|sample| Some(sample.during_latency_ms? / sample.before_latency_ms?),
        });
        add(Metric {
            name: format!("{name}_worst_write_ms"),
            unit: "ms",
            better: Better::Lower,
            target: None,
            load,
            of: &|sample| sample.worst_ms,
        });
    }
    add(Metric {
        name: "max_iops_without_migration".to_owned(),
        unit: "IOPS",
        better: Better::Higher,
        target: None,
        load: Load::Max,
        of: &|sample| Some(sample.before_iops),
    });
    let lost = |side: Side| {
        let own: Vec<&Sample> = samples.iter().filter(|it| it.side == side).collect();
        (!own.is_empty()).then(|| {
            let bad: u64 = own.iter().map(|sample| sample.bad_sectors).sum();
            rounded(bad as f64)
        })
    };
    rows.push(Row {
        metric: "sectors_lost_in_all_runs".to_owned(),
        unit: "sectors",
        better: Better::Lower,
        strake: lost(Side::Strake),
        peer: no_peer.is_none().then_some(PEER),
        peer_value: lost(Side::Peer),
        target: Some(0.0),
        runs: settings.rounds,
        why: no_peer,
    });
    Report {
        bench: "storage",
        quick: settings.extent == Extent::Quick,
        rows,
    }
}
