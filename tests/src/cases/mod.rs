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

/// Every test, quick ones first.
#[must_use]
pub fn all() -> Vec<Test> {
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
