//! The tests, one file for each subject. To add one: its function, and a line in its file's table.

mod boot;
mod kill;
mod migrate;
mod power;
mod refuse;
mod restart;
mod snapshots;
mod storage_faults;

use crate::runner::Test;

/// Tests that run only if one of the words names them. A guest of several vCPUs
/// that is moved again and again has hung the lab's emulated processor, which then takes no interrupt
/// any more; on a host whose own KVM runs stock guests there is no reason to leave them out.
#[must_use]
pub fn by_name_only() -> &'static [Test] {
    restart::REPEATED
}

/// What runs without a word, quick ones first.
#[must_use]
pub fn usual() -> Vec<Test> {
    [
        refuse::TESTS,
        boot::TESTS,
        power::TESTS,
        migrate::TESTS,
        snapshots::TESTS,
        restart::TESTS,
        storage_faults::TESTS,
        kill::TESTS,
    ]
    .concat()
}

/// Every test.
#[must_use]
pub fn all() -> Vec<Test> {
    [usual(), by_name_only().to_vec()].concat()
}
