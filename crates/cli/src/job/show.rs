//! A job as text.

use strake_api::job::{Method, PassReport, Phase, Space, Suspend};
use strake_api::rest::Job;

use crate::output::{Align, Table, printable};
use crate::units::{bytes, millis};

/// What is left to copy in a pass.
fn remainder(pass: &PassReport) -> u64 {
    pass.planned_bytes.saturating_sub(pass.read_bytes)
}

/// The job's progress as a bar and a line. `speed` is what was measured, in bytes per second.
pub(super) fn bar(job: &Job, speed: Option<u64>) -> String {
    // With it a line fits into 80 columns.
    const WIDTH: usize = 10;
    let steps = fraction(job, WIDTH as u64);
    let done = usize::try_from(steps).unwrap_or(WIDTH);
    let (done, head) = if done < WIDTH {
        (done, ">")
    } else {
        (WIDTH, "")
    };
    let left = " ".repeat(WIDTH - done - head.len());
    let text = with_speed(job, speed);
    format!("[{}{head}{left}] {text}", "=".repeat(done))
}

/// How far the running pass is, in `steps`.
fn fraction(job: &Job, steps: u64) -> u64 {
    if job.status.phase == Phase::Completed {
        return steps;
    }
    match job.status.passes.last() {
        None => 0,
        Some(pass) if pass.planned_bytes == 0 => steps,
        Some(pass) => {
            let part =
                u128::from(pass.read_bytes) * u128::from(steps) / u128::from(pass.planned_bytes);
            u64::try_from(part).unwrap_or(steps).min(steps)
        }
    }
}

/// The job's progress in one line, with the running pass's own speed.
pub(crate) fn line(job: &Job) -> String {
    let speed = job.status.passes.last().and_then(|pass| {
        pass.read_bytes
            .checked_mul(1000)?
            .checked_div(pass.elapsed_ms)
    });
    with_speed(job, speed)
}

fn with_speed(job: &Job, speed: Option<u64>) -> String {
    let status = &job.status;
    let phase = match status.phase {
        Phase::Preparing => "preparing".to_owned(),
        Phase::Copying if !status.progress.is_on() => "paused".to_owned(),
        Phase::Copying => match status.passes.last() {
            Some(pass) if mirrors(job) => format!("mirroring, pass {}", pass.number),
            Some(pass) => format!("pass {}", pass.number),
            None => "copying".to_owned(),
        },
        Phase::Suspended => "switching over, copying the rest".to_owned(),
        Phase::AwaitingCommit => "switching over, committing".to_owned(),
        Phase::Completed => "completed".to_owned(),
        Phase::Failed => "failed".to_owned(),
        Phase::Cancelled => "cancelled".to_owned(),
        Phase::Interrupted => "interrupted".to_owned(),
    };
    let mut parts = vec![phase];
    if status.phase.is_final() {
        let read = status.passes.iter().map(|pass| pass.read_bytes);
        parts.push(format!(
            "{} copied",
            bytes(read.fold(0, u64::saturating_add))
        ));
    } else if let Some(pass) = status.passes.last() {
        let (read, planned) = (bytes(pass.read_bytes), bytes(pass.planned_bytes));
        parts.push(format!("{read}/{planned}"));
        if let Some(speed) = speed {
            parts.push(format!("{}/s", bytes(speed)));
        }
        parts.push(format!("{} left", bytes(remainder(pass))));
    }
    if let Some(pause) = status.pause_ms {
        parts.push(format!("pause {pause:.1} ms"));
    } else if let (Some(pause), false) = (status.expected_pause_ms, status.phase.is_final()) {
        parts.push(format!("pause ~{pause:.0} ms"));
    }
    parts.join(", ")
}

fn mirrors(job: &Job) -> bool {
    let used = job.status.method.as_deref();
    used.is_some_and(|used| used.method == Method::Mirror)
}

/// Which method is or was in use and why, in one line.
pub(crate) fn method(job: &Job) -> Option<String> {
    let used = job.status.method.as_deref()?;
    let mut text = format!("{}: {}", used.method.name(), used.why);
    if used.mirrored_bytes > 0 {
        text += &format!("; {} mirrored", bytes(used.mirrored_bytes));
    }
    Some(printable(&text))
}

/// The limits of a job in one line.
pub(crate) fn limits(job: &Job) -> String {
    let limits = &job.limits;
    let mut parts = vec![format!("pause {} ms", limits.pause_ms)];
    if limits.suspend == Suspend::Vm {
        parts.push("the whole VM stops for it".to_owned());
    }
    if let Some(rate) = limits.bytes_per_second {
        parts.push(format!("{}/s", bytes(rate)));
    }
    if let Some(iops) = limits.iops {
        parts.push(format!("{iops} requests/s"));
    }
    parts.push(format!("guest latency {}", limits.latency));
    if limits.space == Space::Thick {
        parts.push("thick".to_owned());
    }
    parts.join(", ")
}

/// What the copy costs the guest, in one line.
pub(crate) fn latency(job: &Job) -> Option<String> {
    let seen = job.status.latency.as_ref()?;
    let ms = |us: u64| format!("{}.{:02} ms", us / 1000, us % 1000 / 10);
    let mut text = format!("{} for a read or write", ms(seen.now_us));
    if seen.before_us > 0 {
        text += &format!(", {} before the job", ms(seen.before_us));
    }
    if let Some(target) = seen.target_us {
        text += &format!("; the copy gives way above {}", ms(target));
    }
    Some(text)
}

/// The passes as a table.
pub(crate) fn passes(job: &Job) -> String {
    let mut table = Table::new(&[
        ("PASS", Align::Right),
        ("PLANNED", Align::Right),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("TIME", Align::Right),
        ("DIRTY AFTER", Align::Right),
    ]);
    let last = job.status.passes.len();
    for (index, pass) in job.status.passes.iter().enumerate() {
        // The copy inside the pause is the last pass; after it the guest could dirty nothing.
        let in_pause = index + 1 == last && job.status.pause_ms.is_some();
        let dirty = if in_pause {
            "in the pause".to_owned()
        } else {
            bytes(pass.dirty_after_bytes)
        };
        table.row([
            pass.number.to_string(),
            bytes(pass.planned_bytes),
            bytes(pass.read_bytes),
            bytes(pass.written_bytes),
            millis(pass.elapsed_ms),
            dirty,
        ]);
    }
    table.render()
}

/// How a finished job went, in one line.
pub(crate) fn summary(job: &Job) -> String {
    let status = &job.status;
    let pause = status
        .pause_ms
        .map_or_else(|| "unknown".to_owned(), |pause| format!("{pause:.1} ms"));
    printable(&format!(
        "disk {} of {} is on {}: {}; pause {pause}, {} in all",
        status.disk,
        job.vm,
        job.to,
        job.destination,
        millis(status.elapsed_ms)
    ))
}

#[cfg(test)]
mod tests {
    use strake_api::job::{
        JobId, Latency, LatencySeen, MethodReason, MethodUsed, MigrationLimits, MigrationStatus,
        Progress,
    };

    use super::*;

    fn job(phase: Phase, passes: Vec<PassReport>) -> Job {
        Job {
            vm: "web1".into(),
            source: "/slow/root.raw".into(),
            destination: "/fast/root.raw".into(),
            format: strake_api::image::ImageFormat::Raw,
            source_format: strake_api::image::ImageFormat::Raw,
            kind: strake_api::job::JobKind::Migrate,
            snapshot: None,
            to: "fast".into(),
            limits: MigrationLimits::default(),
            status: MigrationStatus {
                phase,
                passes,
                throughput: 100 << 20,
                expected_pause_ms: Some(41.7),
                elapsed_ms: 1500,
                ..MigrationStatus::new(JobId("j1".into()), "root".into(), 1 << 30)
            },
        }
    }

    fn pass(number: u32, planned: u64, read: u64) -> PassReport {
        PassReport {
            number,
            planned_bytes: planned,
            read_bytes: read,
            written_bytes: read,
            elapsed_ms: 700,
            dirty_after_bytes: 5 << 20,
        }
    }

    #[test]
    fn a_line_names_pass_bytes_speed_remainder_and_pause() {
        let job = job(Phase::Copying, vec![pass(2, 40 << 20, 10 << 20)]);
        assert_eq!(
            line(&job),
            "pass 2, 10.0 MiB/40.0 MiB, 14.3 MiB/s, 30.0 MiB left, pause ~42 ms"
        );
        assert_eq!(
            bar(&job, Some(1 << 20)),
            "[==>       ] pass 2, 10.0 MiB/40.0 MiB, 1.00 MiB/s, 30.0 MiB left, pause ~42 ms"
        );
    }

    #[test]
    fn a_job_that_rests_says_so_and_its_limits_are_told() {
        let mut job = job(Phase::Copying, vec![pass(1, 40 << 20, 10 << 20)]);
        job.status.progress = Progress::Paused;
        assert!(line(&job).starts_with("paused, 10.0 MiB/40.0 MiB"));
        assert_eq!(limits(&job), "pause 300 ms, guest latency auto");
        job.limits.bytes_per_second = Some(50 << 20);
        job.limits.iops = Some(400);
        job.limits.latency = Latency::Us(2500);
        assert_eq!(
            limits(&job),
            "pause 300 ms, 50.0 MiB/s, 400 requests/s, guest latency 2.500 ms"
        );
        assert_eq!(latency(&job), None);
        job.status.latency = Some(Box::new(LatencySeen {
            now_us: 1900,
            before_us: 450,
            target_us: Some(2000),
        }));
        assert_eq!(
            latency(&job).unwrap(),
            "1.90 ms for a read or write, 0.45 ms before the job; the copy gives way above 2.00 ms"
        );
    }

    #[test]
    fn the_method_in_use_and_its_reason_are_told() {
        let mut job = job(Phase::Copying, vec![pass(2, 40 << 20, 10 << 20)]);
        assert_eq!(method(&job), None);
        job.status.method = Some(Box::new(MethodUsed {
            method: Method::Mirror,
            why: MethodReason::WritesTooFast {
                write_rate: 300 << 20,
                copy_rate: 400 << 20,
            },
            mirrored_bytes: 0,
        }));
        assert!(line(&job).starts_with("mirroring, pass 2, "));
        assert_eq!(
            method(&job).unwrap(),
            "mirror: the guest dirties 300 MiB/s, 400 MiB/s are copied"
        );
        job.status.method = Some(Box::new(MethodUsed {
            method: Method::Mirror,
            why: MethodReason::Asked,
            mirrored_bytes: 5 << 20,
        }));
        assert_eq!(method(&job).unwrap(), "mirror: as asked; 5.00 MiB mirrored");
    }

    #[test]
    fn nothing_is_divided_by_zero() {
        assert_eq!(fraction(&job(Phase::Preparing, vec![]), 1000), 0);
        assert_eq!(
            fraction(&job(Phase::Copying, vec![pass(1, 0, 0)]), 1000),
            1000
        );
        let beyond = job(Phase::Copying, vec![pass(1, 1, u64::MAX)]);
        assert_eq!(fraction(&beyond, 9), 9);
        assert!(bar(&beyond, None).starts_with("[==========] pass 1, "));
    }

    #[test]
    fn the_table_marks_the_pass_in_the_pause() {
        let mut job = job(
            Phase::Completed,
            vec![pass(1, 1 << 30, 1 << 30), pass(2, 5 << 20, 5 << 20)],
        );
        job.status.pause_ms = Some(38.25);
        assert_eq!(
            passes(&job),
            "\
PASS   PLANNED      READ   WRITTEN    TIME   DIRTY AFTER
   1  1.00 GiB  1.00 GiB  1.00 GiB  700 ms      5.00 MiB
   2  5.00 MiB  5.00 MiB  5.00 MiB  700 ms  in the pause
"
        );
        assert_eq!(
            summary(&job),
            "disk root of web1 is on fast: /fast/root.raw; pause 38.2 ms, 1.50 s in all"
        );
    }
}
