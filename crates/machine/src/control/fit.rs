//! What is too large for a packet is cut until it fits, and says so.
//!
//! Whoever waits for a reply or for the end of a job must hear of it, whatever hangs below: so a
//! packet never fails for its size. What goes first is what the daemon can ask for again (the
//! passes of jobs), then what is farthest from the reader (causes far down), at last all but the
//! head of a text.

use strake_api::control::{Body, Event, ExitReason, MAX_PACKET, Packet, Reply, RunState};
use strake_api::job::MigrationStatus;
use strake_observe::{Observation, Result};

use super::wire::bad;
use crate::observations::CausesCut;

/// How many levels of causes a packet carries at most. The other end's parser bounds how deep a
/// document is nested (128, two for each level); trees of our own are a fraction of it.
const LEVELS: usize = 32;

/// What is tried in turn until the packet fits.
const STEPS: [Step; 8] = [
    Step::Causes(LEVELS),
    Step::Passes,
    Step::Causes(8),
    Step::Causes(4),
    Step::Causes(2),
    Step::Causes(1),
    Step::Causes(0),
    Step::Texts,
];

enum Step {
    /// Leaves so many levels of causes.
    Causes(usize),
    /// Leaves no passes of jobs.
    Passes,
    /// Leaves the heads of texts.
    Texts,
}

/// What is left of a text that is too long by itself.
const TEXT: usize = 1024;

/// The packet on the wire, cut if it must be.
pub(super) fn encode(packet: &Packet) -> Result<Vec<u8>> {
    if !deep(&packet.body) {
        let bytes = plain(packet)?;
        if bytes.len() <= MAX_PACKET {
            return Ok(bytes);
        }
    }
    let mut packet = packet.clone();
    for step in STEPS {
        step.take(&mut packet.body);
        let bytes = plain(&packet)?;
        if bytes.len() <= MAX_PACKET {
            return Ok(bytes);
        }
    }
    Err(bad(format!("it exceeds {MAX_PACKET} bytes")))
}

impl Step {
    fn take(&self, body: &mut Body) {
        match self {
            Self::Causes(levels) => each(body, &mut |seen| cut(seen, *levels)),
            Self::Texts => each(body, &mut shorten),
            Self::Passes => {
                for job in jobs(body) {
                    job.passes.clear();
                }
            }
        }
    }
}

fn plain(packet: &Packet) -> Result<Vec<u8>> {
    serde_json::to_vec(packet).map_err(|error| bad(error.to_string()))
}

/// Whether something in it has more than [`LEVELS`] levels of causes.
fn deep(body: &Body) -> bool {
    let exceeds = |seen: &Observation| exceeds(seen, LEVELS);
    match body {
        Body::Request(_) => false,
        Body::Reply(Reply::Failed(seen)) | Body::Event(Event::Observed(seen)) => exceeds(seen),
        Body::Reply(Reply::Job(job)) | Body::Event(Event::JobEnded(job)) => {
            job.failure.as_ref().is_some_and(exceeds)
        }
        Body::Reply(Reply::Status(status)) => {
            let failures = status.jobs.iter().filter_map(|job| job.failure.as_ref());
            end(&status.state).is_some_and(exceeds) || failures.into_iter().any(exceeds)
        }
        Body::Event(Event::State(state)) => end(state).is_some_and(exceeds),
        Body::Reply(
            Reply::Done | Reply::Hello { .. } | Reply::Lent(_) | Reply::TookOver { .. },
        )
        | Body::Event(Event::JobAwaitsCommit { .. }) => false,
    }
}

fn end(state: &RunState) -> Option<&Observation> {
    match state {
        RunState::Exited(ExitReason::Failed(seen)) => Some(seen),
        _ => None,
    }
}

fn exceeds(seen: &Observation, levels: usize) -> bool {
    match levels.checked_sub(1) {
        Some(below) => seen.causes().iter().any(|cause| exceeds(cause, below)),
        None => !seen.causes().is_empty(),
    }
}

fn jobs(body: &mut Body) -> &mut [MigrationStatus] {
    match body {
        Body::Reply(Reply::Status(status)) => &mut status.jobs,
        Body::Reply(Reply::Job(job)) | Body::Event(Event::JobEnded(job)) => {
            std::slice::from_mut(job)
        }
        _ => &mut [],
    }
}

/// Every observation in it that is not a cause.
fn each(body: &mut Body, change: &mut dyn FnMut(&mut Observation)) {
    for job in jobs(body) {
        if let Some(seen) = &mut job.failure {
            change(seen);
        }
    }
    match body {
        Body::Reply(Reply::Failed(seen))
        | Body::Event(
            Event::Observed(seen) | Event::State(RunState::Exited(ExitReason::Failed(seen))),
        ) => change(seen),
        Body::Reply(Reply::Status(status)) => {
            if let RunState::Exited(ExitReason::Failed(seen)) = &mut status.state {
                change(seen);
            }
        }
        _ => {}
    }
}

/// Leaves `levels` levels of causes; what was below is counted in the last of them.
fn cut(seen: &mut Observation, levels: usize) {
    if exceeds(seen, levels) {
        *seen = below(seen.clone(), levels);
    }
}

fn below(seen: Observation, levels: usize) -> Observation {
    let mut record = seen.into_record();
    let causes = std::mem::take(&mut record.causes);
    match levels.checked_sub(1) {
        Some(levels) => record
            .causes
            .extend(causes.into_iter().map(|cause| below(cause, levels))),
        // The level of the note itself is one of those allowed.
        None if !causes.is_empty() => record.causes.push(note(causes.iter().map(size).sum())),
        None => {}
    }
    Observation::from_record(record)
}

fn note(count: usize) -> Observation {
    CausesCut { count }.into()
}

/// How many observations a tree has, those included that were left out before.
fn size(seen: &Observation) -> usize {
    if seen.is::<CausesCut>() {
        let count = seen.datum("count").and_then(serde_json::Value::as_u64);
        return count
            .and_then(|count| usize::try_from(count).ok())
            .unwrap_or(1);
    }
    1 + seen.causes().iter().map(size).sum::<usize>()
}

/// Leaves the head of its own text, and counts what hung below.
fn shorten(seen: &mut Observation) {
    let mut record = seen.clone().into_record();
    let count = size(seen) - 1;
    for text in [&mut record.text, &mut record.remedy] {
        let end = (0..=TEXT.min(text.len()))
            .rev()
            .find(|end| text.is_char_boundary(*end))
            .unwrap_or(0);
        if end < text.len() {
            text.truncate(end);
            text.push('…');
        }
    }
    record.data.clear();
    record.causes.clear();
    if count > 0 {
        record.causes.push(note(count));
    }
    *seen = Observation::from_record(record);
}
