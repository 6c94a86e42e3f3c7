//! `cargo xtask bench profiles`: how long effective profiles take, as profiles and objects grow, and
//! beside an embedded Nickel that merges the same documents.
//!
//! All of it is computation in one thread, and what is measured is that thread's CPU time: on an idle
//! machine that is the time that passes, and on a busy one it says the same.

mod documents;
#[allow(dead_code, reason = "the other benches use the rest")]
#[path = "../../storage/src/report.rs"]
mod report;

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use rustix::time::{ClockId, clock_gettime};
use strake_profile::{ProfileSet, Schema, plan};

use documents::{FIELDS, MATCHING, Rules};
use report::{Better, Report, Row, median};

/// What the peer is called.
const NICKEL: &str = "nickel-lang 2.2, embedded";

/// Measures effective profiles.
#[derive(Debug, Parser)]
#[command(name = "strake-bench-profiles")]
struct Arguments {
    /// The bench; there is this one.
    #[arg(default_value = "profiles")]
    bench: String,
    /// Fewer runs.
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.quick) {
        Ok(report) => {
            report.print();
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("strake-bench-profiles: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn row(metric: impl Into<String>, unit: &'static str, value: Option<f64>, runs: u32) -> Row {
    Row {
        metric: metric.into(),
        unit,
        better: Better::Lower,
        strake: value,
        dirty: None,
        mirror: None,
        peer: None,
        peer_value: None,
        second_peer: None,
        second_peer_value: None,
        target: None,
        runs,
        why: None,
    }
}

/// What this thread has computed so far.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Seconds that `work` takes, `runs` times.
fn times(runs: u32, mut work: impl FnMut()) -> Vec<f64> {
    let mut once = || {
        let start = cpu_seconds();
        work();
        cpu_seconds() - start
    };
    once(); // What is cold at first is not what is asked.
    (0..runs).map(|_| once()).collect()
}

fn scaled(times: &[f64], factor: f64) -> Option<f64> {
    median(&times.iter().map(|time| time * factor).collect::<Vec<_>>())
}

fn run(quick: bool) -> Result<Report, String> {
    let schema = documents::schema();
    let runs = if quick { 5 } else { 15 };
    let mut rows = Vec::new();
    eprintln!("{FIELDS} fields; {MATCHING} profiles are about each object, each about all fields");
    for profiles in [10, 100, 1000, 10_000] {
        rows.push(one(&schema, profiles, runs)?);
    }
    for objects in [100, 1000, 10_000] {
        rows.push(many(&schema, objects, 1000, if quick { 3 } else { 7 })?);
    }
    for profiles in [10, 100] {
        rows.push(many(&schema, 10_000, profiles, if quick { 3 } else { 7 })?);
    }
    rows.push(reading(&schema, runs)?);
    rows.push(planning(&schema, if quick { 3 } else { 7 })?);
    rows.push(beside(&schema, runs)?);
    Ok(Report {
        bench: "profiles",
        quick,
        rows,
    })
}

fn mixed(schema: &Arc<Schema>, profiles: usize) -> Result<ProfileSet, String> {
    documents::set(schema, &documents::texts(profiles, Rules::Mixed))
}

/// One object among many profiles.
fn one(schema: &Arc<Schema>, profiles: usize, runs: u32) -> Result<Row, String> {
    const OBJECTS: usize = 200;
    let set = mixed(schema, profiles)?;
    let objects: Vec<_> = (0..OBJECTS)
        .map(|index| documents::object(schema, index, profiles))
        .collect();
    for object in &objects {
        let effective = set.effective(object);
        let expected = MATCHING.min(profiles);
        if effective.profiles.len() < expected || !effective.conflicts.is_empty() {
            return Err(format!("{} has {} profiles", object.id, effective.profiles.len()));
        }
    }
    let times = times(runs, || {
        for object in &objects {
            black_box(set.effective(black_box(object)));
        }
    });
    let micros = scaled(&times, 1e6 / OBJECTS as f64);
    let mut row = row(format!("effective_one_of_{profiles}"), "µs", micros, runs);
    row.target = (profiles == 1000).then_some(100.0);
    Ok(row)
}

/// Many objects, in one thread.
fn many(schema: &Arc<Schema>, objects: usize, profiles: usize, runs: u32) -> Result<Row, String> {
    let set = mixed(schema, profiles)?;
    let all: Vec<_> = (0..objects)
        .map(|index| documents::object(schema, index, profiles))
        .collect();
    let times = times(runs, || {
        for object in &all {
            black_box(set.effective(black_box(object)));
        }
    });
    let metric = format!("effective_{objects}_objects_{profiles}_profiles");
    let mut row = row(metric, "s", scaled(&times, 1.0), runs);
    row.target = (objects == 10_000 && profiles == 1000).then_some(1.0);
    Ok(row)
}

/// From texts to an indexed set.
fn reading(schema: &Arc<Schema>, runs: u32) -> Result<Row, String> {
    let texts = documents::texts(1000, Rules::Mixed);
    documents::set(schema, &texts)?;
    let times = times(runs, || {
        let _ = black_box(documents::set(schema, black_box(&texts)));
    });
    Ok(row("read_1000_profiles", "ms", scaled(&times, 1e3), runs))
}

/// What one changed profile of a thousand would change on ten thousand objects.
fn planning(schema: &Arc<Schema>, runs: u32) -> Result<Row, String> {
    let mut texts = documents::texts(1000, Rules::Mixed);
    let before = documents::set(schema, &texts)?;
    if let Some(last) = texts.last_mut() {
        *last = last.replace("text of", "other text of");
    }
    let after = documents::set(schema, &texts)?;
    let objects: Vec<_> = (0..10_000)
        .map(|index| documents::object(schema, index, 1000))
        .collect();
    if plan(&before, &after, &objects).changes.is_empty() {
        return Err("the changed profile changes nothing".to_owned());
    }
    let times = times(runs, || {
        black_box(plan(&before, &after, black_box(&objects)));
    });
    let metric = "plan_one_of_1000_profiles_10000_objects";
    Ok(row(metric, "ms", scaled(&times, 1e3), runs))
}

/// The same documents, from text to values: ours and Nickel's, in turn.
fn beside(schema: &Arc<Schema>, runs: u32) -> Result<Row, String> {
    let texts = documents::texts(MATCHING, Rules::Values);
    let object = documents::object(schema, 0, MATCHING);
    let program = documents::nickel(0, MATCHING);
    agree(schema, &texts, &object, &program)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..=runs {
        let start = cpu_seconds();
        let set = documents::set(schema, black_box(&texts))?;
        black_box(set.effective(&object));
        ours.push(cpu_seconds() - start);
        let start = cpu_seconds();
        let mut context = nickel_lang::Context::new();
        let value = context.eval_deep(black_box(&program));
        black_box(value.map_err(|_| "Nickel refuses the program")?);
        theirs.push(cpu_seconds() - start);
    }
    let metric = "text_to_values_8_profiles_40_fields";
    let mut row = row(metric, "ms", scaled(ours.get(1..).unwrap_or(&[]), 1e3), runs);
    row.peer = Some(NICKEL);
    row.peer_value = scaled(theirs.get(1..).unwrap_or(&[]), 1e3);
    Ok(row)
}

/// Both come to the same values; otherwise nothing is compared.
fn agree(
    schema: &Arc<Schema>,
    texts: &[String],
    object: &strake_profile::Object,
    program: &str,
) -> Result<(), String> {
    let mut context = nickel_lang::Context::new();
    let value = context
        .eval_deep(program)
        .map_err(|_| "Nickel refuses the program")?;
    let json = context.expr_to_json(&value).map_err(|_| "Nickel has no JSON")?;
    let theirs: serde_json::Value =
        serde_json::from_str(&json).map_err(|error| error.to_string())?;
    let set = documents::set(schema, texts)?;
    let effective = set.effective(object);
    for resolved in &effective.values {
        let path = schema.path(&resolved.slot);
        let ours = serde_json::to_value(resolved.value.as_deref())
            .map_err(|error| error.to_string())?;
        let theirs = theirs.get(&path);
        let same = match (ours.as_f64(), theirs.and_then(serde_json::Value::as_f64)) {
            (Some(a), Some(b)) => (a - b).abs() < 0.5,
            _ => theirs == Some(&ours),
        };
        if !same {
            return Err(format!("{path}: ours is {ours}, Nickel's {theirs:?}"));
        }
    }
    Ok(())
}
