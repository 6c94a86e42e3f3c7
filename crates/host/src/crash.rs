//! Crash points: named instants at which a test ends the daemon as `kill -9` would.
//!
//! **For tests only.** `STRAKE_CRASH_AT=before-commit straked …` ends the daemon the first time it
//! reaches that instant. Whole-system tests use the same binaries as everybody else, so this is
//! an environment variable, read once, and costs one comparison where nobody set it. Whoever may
//! set the daemon's environment may end it anyway.

use std::sync::OnceLock;

use rustix::process::{Signal, getpid, kill_process};

/// Every crash point, in the order in which a start, a migration and a change of
/// profiles pass them.
pub const CRASH_POINTS: &[&str] = &[
    "before-spawn",
    "after-spawn",
    "after-configure",
    "after-start",
    "before-successor",
    "after-successor-spawned",
    "after-successor-built",
    "after-handed-over",
    "before-handover-commit",
    "after-handover-commit",
    "after-take-over",
    "after-socket-renamed",
    "before-handover-end",
    "after-exit-recorded",
    "before-restart",
    "after-job-reserved",
    "after-destination-created",
    "after-job-recorded",
    "after-destination-named",
    "after-job-accepted",
    "after-job-taken-up",
    "before-commit",
    "after-commit-before-reply",
    "after-commit-reply",
    "after-merge",
    "after-merge-committed",
    "before-source-removal",
    "after-source-removal",
    "before-destination-removal",
    "after-destination-removal",
    "after-snapshot-forgotten",
    "after-layer-removal",
    "within-steering",
    "before-steering-commit",
    "after-steering-commit",
];

/// Ends the daemon here if a test asked for it.
pub(crate) fn point(name: &str) {
    static AT: OnceLock<Option<String>> = OnceLock::new();
    debug_assert!(CRASH_POINTS.contains(&name), "unlisted crash point {name}");
    let at = AT.get_or_init(|| std::env::var("STRAKE_CRASH_AT").ok());
    if at.as_deref() == Some(name) {
        tracing::warn!(name, "crash point reached");
        let _ = kill_process(getpid(), Signal::KILL);
    }
}
