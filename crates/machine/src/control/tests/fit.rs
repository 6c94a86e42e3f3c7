//! What is too large for a packet arrives all the same.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use strake_api::control::{Body, Event, ExitReason, Packet, Reply, RunState, VmStatus};
use strake_api::job::{JobId, MigrationStatus, PassReport, Phase};
use strake_observe::Observation;

use crate::control::{Connection, Received, Sent};
use crate::observations::{CausesCut, NoSuchDisk};

/// What the daemon gets when the monitor says `body`.
fn told(body: Body) -> Body {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let packet = Packet { id: 7, body };
    assert_eq!(Connection::new(ours).send(&packet).unwrap(), Sent::Done);
    match Connection::new(theirs).receive().unwrap() {
        Received::Packet(packet, _) => packet.body,
        other => panic!("{other:?}"),
    }
}

fn observed(seen: Observation) -> Observation {
    match told(Body::Event(Event::Observed(seen))) {
        Body::Event(Event::Observed(seen)) => seen,
        other => panic!("{other:?}"),
    }
}

fn leaf(disk: impl Into<String>) -> Observation {
    NoSuchDisk { disk: disk.into() }.into()
}

fn chain(levels: usize) -> Observation {
    (0..levels).fold(leaf("bottom"), |below, n| {
        leaf(format!("level {n}")).because(below)
    })
}

/// `width` causes on each of `levels` levels.
fn tree(levels: usize, width: usize) -> Observation {
    match levels.checked_sub(1) {
        Some(below) => leaf("branch").because_all((0..width).map(|_| tree(below, width))),
        None => leaf("leaf"),
    }
}

fn size(seen: &Observation) -> u64 {
    1 + seen.causes().iter().map(size).sum::<u64>()
}

/// How many are there, those that were left out included.
fn counted(seen: &Observation) -> u64 {
    if seen.is::<CausesCut>() {
        return seen.datum("count").unwrap().as_u64().unwrap();
    }
    1 + seen.causes().iter().map(counted).sum::<u64>()
}

fn job(passes: usize, failure: Option<Observation>) -> MigrationStatus {
    MigrationStatus {
        phase: Phase::Failed,
        passes: vec![PassReport::default(); passes],
        failure,
        ..MigrationStatus::new(JobId("j1".into()), "root".into(), 1)
    }
}

#[test]
fn what_fits_is_told_whole() {
    let seen = tree(3, 4);
    assert_eq!(observed(seen.clone()), seen);
    let seen = chain(32);
    assert_eq!(observed(seen.clone()), seen);
}

#[test]
fn a_chain_of_causes_that_no_parser_takes_is_cut() {
    let seen = chain(200);
    let got = observed(seen.clone());
    assert_eq!(counted(&got), size(&seen));
    assert!(size(&got) > 30);
    assert_eq!(got.text(), seen.text());
}

#[test]
fn a_tree_of_causes_loses_its_lowest_levels_first() {
    let seen = tree(6, 3);
    let got = observed(seen.clone());
    assert_eq!(counted(&got), size(&seen));
    let first = got.causes().first().unwrap();
    assert_eq!(first.causes().len(), 3);
    // So many at once that none of them fits.
    let seen = leaf("top").because_all((0..10_000).map(|n| leaf(n.to_string())));
    let got = observed(seen.clone());
    assert_eq!(got.text(), seen.text());
    assert_eq!(counted(&got), size(&seen));
}

#[test]
fn a_text_that_is_too_long_by_itself_is_told_by_its_head() {
    let seen = leaf("ä\"".repeat(200_000)).because(leaf("below"));
    let got = observed(seen.clone());
    assert!(got.text().ends_with('…'));
    assert_eq!(got.id(), seen.id());
    assert_eq!(counted(&got), 2);
}

#[test]
fn the_end_of_a_job_is_always_told() {
    let ended = |job| match told(Body::Event(Event::JobEnded(job))) {
        Body::Event(Event::JobEnded(job)) => job,
        other => panic!("{other:?}"),
    };
    // The passes go first and suffice.
    let sent = job(5000, Some(tree(2, 5)));
    let got = ended(sent.clone());
    assert!(got.passes.is_empty());
    assert_eq!(got.failure, sent.failure);
    let sent = job(5000, Some(tree(6, 3)));
    let got = ended(sent.clone());
    assert_eq!(got.phase, Phase::Failed);
    assert_eq!(counted(&got.failure.unwrap()), size(&sent.failure.unwrap()));
}

#[test]
fn replies_are_cut_too() {
    let Body::Reply(Reply::Failed(got)) = told(Body::Reply(Reply::Failed(tree(6, 3)))) else {
        panic!("another reply");
    };
    assert_eq!(counted(&got), size(&tree(6, 3)));
    let status = VmStatus {
        state: RunState::Exited(ExitReason::Failed(tree(6, 3))),
        uptime_ms: 0,
        disks: Vec::new(),
        jobs: vec![job(100, Some(tree(6, 3))); 20],
    };
    let Body::Reply(Reply::Status(got)) = told(Body::Reply(Reply::Status(status))) else {
        panic!("another reply");
    };
    assert_eq!(got.jobs.len(), 20);
    assert!(got.jobs.iter().all(|job| job.failure.is_some()));
}
