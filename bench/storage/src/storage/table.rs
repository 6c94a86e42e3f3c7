//! From samples to rows.

use strake_api::job::Method;

use super::client::Load;
use super::qsd::Mode;
use super::{Extent, LOADS, Sample, Settings, Side};
use crate::report::{Better, Report, Row, median, rounded};

const PEERS: [(Mode, &str); 2] = [
    (Mode::Background, "qemu-mirror-background"),
    (Mode::WriteBlocking, "qemu-mirror-write-blocking"),
];

/// One line per migration, as it happens.
pub(super) fn line(sample: &Sample) {
    let side = format!("{:19}", sample.side.name());
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
        "  {side} {:>5}: {total} (limit {:.2} s{}){guest}, {} sectors lost  {}",
        sample.load.name(),
        sample.copy_limit,
        sample
            .passes
            .map_or(String::new(), |passes| format!(", {passes} passes")),
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
    let side = side.name();
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
    /// The peer does not tell this.
    ours_only: bool,
}

/// All rows.
pub(super) fn report(
    settings: &Settings,
    rounds: u32,
    samples: &[Sample],
    no_peer: Option<String>,
) -> Report {
    let mut rows = Vec::new();
    let measured = |load: &Load| samples.iter().any(|sample| sample.load == *load);
    for load in LOADS.into_iter().filter(measured) {
        for metric in metrics(load) {
            rows.push(row(rounds, samples, no_peer.as_deref(), &metric));
        }
    }
    rows.push(lost(rounds, samples, no_peer));
    Report {
        bench: "storage",
        quick: settings.extent == Extent::Quick,
        rows,
    }
}

fn row(rounds: u32, samples: &[Sample], no_peer: Option<&str>, metric: &Metric<'_>) -> Row {
    let ours = |method| values(samples, Side::Strake(method), metric.load, metric.of);
    let (dirty, mirror) = (ours(Method::Dirty).value, ours(Method::Mirror).value);
    let ours = ours(Method::Auto);
    let mut whys: Vec<String> = ours.why.into_iter().collect();
    let mut peers = PEERS.iter().map(|(mode, name)| {
        let theirs = match no_peer {
            None => values(samples, Side::Peer(*mode), metric.load, metric.of),
            Some(why) => Values {
                value: None,
                why: Some(format!("peer: {why}")),
            },
        };
        if !metric.ours_only {
            whys.extend(theirs.why);
        }
        (no_peer.is_none().then_some(*name), theirs.value)
    });
    let (peer, peer_value) = peers.next().unwrap_or_default();
    let (second_peer, second_peer_value) = peers.next().unwrap_or_default();
    drop(peers);
    whys.dedup();
    Row {
        metric: metric.name.clone(),
        unit: metric.unit,
        better: metric.better,
        strake: ours.value,
        dirty,
        mirror,
        peer,
        peer_value,
        second_peer,
        second_peer_value,
        target: metric.target,
        runs: rounds,
        why: (!whys.is_empty()).then(|| whys.join("; ")),
    }
}

/// What is told of one load.
fn metrics(load: Load) -> Vec<Metric<'static>> {
    let name = load.name();
    let metric = |what: &str, unit, better, target, of| Metric {
        name: format!("{name}_{what}"),
        unit,
        better,
        target,
        load,
        of,
        ours_only: false,
    };
    let mut all = vec![
        metric("total_s", "s", Better::Lower, None, &|it: &Sample| it.total),
        metric(
            "total_over_copy_limit",
            "ratio",
            Better::Lower,
            Some(if load == Load::Idle { 1.1 } else { 1.65 }),
            &|it| it.total.map(|total| total / it.copy_limit),
        ),
        metric("copied_over_least", "ratio", Better::Lower, None, &|it| {
            it.copied
        }),
        Metric {
            ours_only: true,
            ..metric("passes", "passes", Better::Lower, None, &|it| {
                it.passes.map(f64::from)
            })
        },
    ];
    if load == Load::Idle {
        return all;
    }
    all.extend([
        metric(
            "switch_over_gap_ms",
            "ms",
            Better::Lower,
            Some(10.0),
            &|it| it.gap_ms,
        ),
        metric("iops_before", "IOPS", Better::Higher, None, &|it| {
            Some(it.before_iops)
        }),
        metric("iops_during", "IOPS", Better::Higher, None, &|it| {
            Some(it.during_iops)
        }),
        metric(
            "guest_keeps",
            "percent of its IOPS",
            Better::Higher,
            match load {
                Load::Paced(4000) => Some(95.0),
                Load::Max => Some(40.0),
                _ => None,
            },
            &|it| {
                let before = match it.load {
                    Load::Paced(rate) => (rate as f64).min(it.before_iops),
                    _ => it.before_iops,
                };
                (before > 0.0).then(|| (it.during_iops * 100.0 / before).min(100.0))
            },
        ),
        metric(
            "mean_latency_over_before",
            "ratio",
            Better::Lower,
            (load == Load::Paced(4000)).then_some(3.0),
            &|it| Some(it.during_latency_ms? / it.before_latency_ms?),
        ),
        metric("p99_before_ms", "ms", Better::Lower, None, &|it| {
            it.before_p99_ms
        }),
        metric("p99_during_ms", "ms", Better::Lower, None, &|it| {
            it.during_p99_ms
        }),
        metric("worst_write_ms", "ms", Better::Lower, None, &|it| {
            it.worst_ms
        }),
    ]);
    all
}

fn lost(rounds: u32, samples: &[Sample], no_peer: Option<String>) -> Row {
    let of = |side: Side| {
        let own: Vec<&Sample> = samples.iter().filter(|it| it.side == side).collect();
        (!own.is_empty()).then(|| {
            let bad: u64 = own.iter().map(|sample| sample.bad_sectors).sum();
            rounded(bad as f64)
        })
    };
    let [first, second] = PEERS;
    Row {
        metric: "sectors_lost_in_all_runs".to_owned(),
        unit: "sectors",
        better: Better::Lower,
        strake: of(Side::Strake(Method::Auto)),
        dirty: of(Side::Strake(Method::Dirty)),
        mirror: of(Side::Strake(Method::Mirror)),
        peer: no_peer.is_none().then_some(first.1),
        peer_value: of(Side::Peer(first.0)),
        second_peer: no_peer.is_none().then_some(second.1),
        second_peer_value: of(Side::Peer(second.0)),
        target: Some(0.0),
        runs: rounds,
        why: no_peer,
    }
}
