//! The schema and its versions. A version, once released, never changes: a new one is added.

use rusqlite::Transaction;

use super::Attempt;
use crate::observations::InventoryTooNew;

/// Each brings the schema from its index to the next version.
pub(super) const STEPS: &[&str] = &[
    "
    CREATE TABLE datastores (
        name TEXT PRIMARY KEY,
        path TEXT NOT NULL UNIQUE
    ) STRICT;

    CREATE TABLE vms (
        name TEXT PRIMARY KEY,
        revision INTEGER NOT NULL,
        spec TEXT NOT NULL,
        state TEXT NOT NULL,
        last_exit TEXT,
        pid INTEGER,
        pid_start INTEGER,
        started_ms INTEGER
    ) STRICT;

    CREATE TABLE disks (
        vm TEXT NOT NULL REFERENCES vms(name) ON DELETE CASCADE,
        name TEXT NOT NULL,
        position INTEGER NOT NULL,
        slot INTEGER NOT NULL,
        image TEXT NOT NULL,
        datastore TEXT REFERENCES datastores(name),
        size INTEGER NOT NULL,
        read_only INTEGER NOT NULL,
        created INTEGER NOT NULL,
        PRIMARY KEY (vm, name),
        UNIQUE (vm, slot)
    ) STRICT;
    CREATE INDEX disks_by_image ON disks(image);

    CREATE TABLE nics (
        vm TEXT NOT NULL REFERENCES vms(name) ON DELETE CASCADE,
        name TEXT NOT NULL,
        position INTEGER NOT NULL,
        slot INTEGER NOT NULL,
        tap TEXT NOT NULL UNIQUE,
        bridge TEXT,
        mac TEXT NOT NULL UNIQUE,
        PRIMARY KEY (vm, name),
        UNIQUE (vm, slot)
    ) STRICT;

    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        vm TEXT NOT NULL,
        disk TEXT NOT NULL,
        source TEXT NOT NULL,
        destination TEXT NOT NULL,
        datastore TEXT NOT NULL,
        limits TEXT NOT NULL,
        remove_source INTEGER NOT NULL,
        state TEXT NOT NULL,
        inode INTEGER,
        status TEXT NOT NULL
    ) STRICT;
    -- At most one job that has not ended for each disk and for each destination.
    CREATE UNIQUE INDEX active_jobs_by_disk ON jobs(vm, disk) WHERE state <> 'ended';
    CREATE UNIQUE INDEX active_jobs_by_destination ON jobs(destination) WHERE state <> 'ended';
",
    // Files are known by more than their inode's number, which is given again. A job of the first
    // version that is still active has no identity: its files are left alone.
    "
    ALTER TABLE disks ADD COLUMN file TEXT;
    ALTER TABLE jobs DROP COLUMN inode;
    ALTER TABLE jobs ADD COLUMN source_file TEXT;
    ALTER TABLE jobs ADD COLUMN destination_file TEXT;
    ALTER TABLE jobs ADD COLUMN journal_file TEXT;
",
    // A binding is a location (`disks.image`, `jobs.source`, `jobs.destination`) with a format. All
    // images of earlier versions were raw, whatever their names.
    "
    ALTER TABLE disks ADD COLUMN format TEXT NOT NULL DEFAULT 'raw';
    ALTER TABLE jobs ADD COLUMN source_format TEXT NOT NULL DEFAULT 'raw';
    ALTER TABLE jobs ADD COLUMN destination_format TEXT NOT NULL DEFAULT 'raw';
",
    // During a handover a VM has two monitors: `pid` is the one that may run its guest.
    "
    ALTER TABLE vms ADD COLUMN other_pid INTEGER;
    ALTER TABLE vms ADD COLUMN other_pid_start INTEGER;
",
    // Exports stand beside the VMs: their `spec` is that of an export. `of_vm` and `of_disk` name the
    // VM's disk that an export stands for, whose binding moves with the export's.
    "
    ALTER TABLE vms ADD COLUMN kind TEXT NOT NULL DEFAULT 'vm';
    ALTER TABLE vms ADD COLUMN of_vm TEXT;
    ALTER TABLE vms ADD COLUMN of_disk TEXT;
    CREATE UNIQUE INDEX exports_by_disk ON vms(of_vm, of_disk) WHERE of_vm IS NOT NULL;
",
    // Profiles as they were written, the labels of what has no spec, and what each machine was
    // given when it was started or last changed.
    "
    CREATE TABLE profiles (
        name TEXT PRIMARY KEY,
        file TEXT NOT NULL,
        text TEXT NOT NULL
    ) STRICT;

    CREATE TABLE labels (
        kind TEXT NOT NULL,
        object TEXT NOT NULL,
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (kind, object, key)
    ) STRICT;

    CREATE TABLE in_force (
        vm TEXT PRIMARY KEY REFERENCES vms(name) ON DELETE CASCADE,
        spec TEXT NOT NULL
    ) STRICT;
",
    // A job keeps its progress in a file. When it is interrupted, it is recorded what its source
    // looked like then.
    "
    ALTER TABLE jobs ADD COLUMN kept_file TEXT;
    ALTER TABLE jobs ADD COLUMN source_stamp TEXT;
",
    // Images of a disk that others of its images need below them. One with a name is a snapshot.
    // What is below an image is recorded when the operator or this daemon says so; its header, which
    // its VM's monitor may write, must say the same.
    "
    CREATE TABLE layers (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        vm TEXT NOT NULL,
        disk TEXT NOT NULL,
        image TEXT NOT NULL,
        format TEXT NOT NULL,
        file TEXT,
        datastore TEXT REFERENCES datastores(name),
        created INTEGER NOT NULL,
        parent INTEGER,
        name TEXT,
        taken_ms INTEGER NOT NULL,
        below TEXT NOT NULL,
        FOREIGN KEY (vm, disk) REFERENCES disks(vm, name) ON DELETE CASCADE
    ) STRICT;
    CREATE UNIQUE INDEX layers_by_name ON layers(vm, disk, name) WHERE name IS NOT NULL;
    CREATE INDEX layers_by_image ON layers(image);
    ALTER TABLE disks ADD COLUMN parent INTEGER;
    ALTER TABLE disks ADD COLUMN below TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE jobs ADD COLUMN kind TEXT NOT NULL DEFAULT 'migrate';
    ALTER TABLE jobs ADD COLUMN snapshot TEXT;
    ALTER TABLE jobs ADD COLUMN layer INTEGER;
",
];

pub(super) fn migrate(tx: &Transaction<'_>, path: &str) -> Attempt<()> {
    let found: i64 = tx.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let known = i64::try_from(STEPS.len()).unwrap_or(i64::MAX);
    let Some(steps) = usize::try_from(found)
        .ok()
        .and_then(|from| STEPS.get(from..))
    else {
        return Err(strake_observe::Observation::from(InventoryTooNew {
            path: path.to_owned(),
            found,
            known,
        })
        .into());
    };
    for step in steps {
        tx.execute_batch(step)?;
    }
    tx.execute_batch(&format!("PRAGMA user_version = {known}"))?;
    Ok(())
}
