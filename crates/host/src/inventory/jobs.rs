//! Migration jobs in the inventory, and the transaction that moves a binding.
//!
//! ```text
//!                  ┌──► interrupted ──┐
//!                  │        │         │
//! preparing ──► running ◄───┘         │
//!     │            ├──► committed ────┼──► ended (completed)
//!     └────────────┴──► aborted ◄─────┘
//!                          └─────────────► ended (failed or cancelled)
//! ```
//!
//! `preparing`: the destination's name is taken; its file may exist. `running`: the file is the
//! job's (it is recorded which one it is), and the monitor was or is about to be told. `committed`: the
//! binding names the destination; the source and the journal may still have to be removed.
//! `interrupted`: its VM ended first; the binding stays for now, and the VM's next start takes it up again
//! if it is recorded by then what its source looked like. `aborted`: it was decided that the binding stays; the destination must be removed.

use std::path::PathBuf;

use rusqlite::{Connection, OptionalExtension, Row, params};
use strake_api::job::{JobId, JobKind, MigrationLimits, MigrationStatus, Phase};
use strake_observe::{Observation, Result};

use super::layers::{self, LayerId, LayerRecord};
use super::vms::{binding, users_of_image};
use super::{Attempt, Inventory, from_json, to_json, to_sql};
use crate::observations::{CommitFailed, DestinationExists, DiskBusy, InventoryCorrupt, NoSuchJob};
use crate::{Binding, FileIdentity, Stamp};

/// Ended jobs that are kept for those who ask later.
const KEPT: u32 = 200;

/// Where the inventory is with a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobState {
    /// The destination's name is taken.
    Preparing,
    /// The destination exists and is the job's.
    Running,
    /// Its VM has ended before it, and may take it up again.
    Interrupted,
    /// The binding names the destination.
    Committed,
    /// The binding stays; the destination must go.
    Aborted,
    /// Nothing is left to do.
    Ended,
}

impl JobState {
    fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Interrupted => "interrupted",
            Self::Committed => "committed",
            Self::Aborted => "aborted",
            Self::Ended => "ended",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [
            Self::Preparing,
            Self::Running,
            Self::Interrupted,
            Self::Committed,
            Self::Aborted,
            Self::Ended,
        ]
        .into_iter()
        .find(|state| state.name() == name)
    }
}

/// A job.
#[derive(Debug, Clone)]
pub struct JobRecord {
    /// Its name.
    pub id: JobId,
    /// The VM.
    pub vm: String,
    /// The disk's name in the spec.
    pub disk: String,
    /// The image that it copies from.
    pub source: Binding,
    /// The image that it copies to.
    pub destination: Binding,
    /// The destination's datastore.
    pub to: String,
    /// What it does.
    pub kind: JobKind,
    /// The snapshot that it takes or goes back to.
    pub snapshot: Option<String>,
    /// The layer that it goes back to or writes to.
    pub layer: Option<LayerId>,
    /// Its limits.
    pub limits: MigrationLimits,
    /// Whether the source goes once the destination is authoritative.
    pub remove_source: bool,
    /// Where the inventory is with it.
    pub state: JobState,
    /// Which file the source was.
    pub source_file: Option<FileIdentity>,
    /// The files that were made for it, once they were.
    pub files: Option<JobFiles>,
    /// What the source looked like when the job was interrupted, once it is known.
    pub stamp: Option<Stamp>,
    /// The last status that was recorded.
    pub status: MigrationStatus,
}

/// The files that a job writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobFiles {
    /// Which file the destination is.
    pub destination: FileIdentity,
    /// Which file the journal is, if it has one.
    pub journal: Option<FileIdentity>,
    /// Which file its progress is kept in, if it is.
    pub kept: Option<FileIdentity>,
}

/// A job to be.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// The VM.
    pub vm: String,
    /// The disk's name in the spec.
    pub disk: String,
    /// The disk's size.
    pub size: u64,
    /// The image that it copies from.
    pub source: Binding,
    /// The image that it copies to.
    pub destination: Binding,
    /// The destination's datastore.
    pub to: String,
    /// What it does.
    pub kind: JobKind,
    /// The snapshot that it takes or goes back to.
    pub snapshot: Option<String>,
    /// The layer that it goes back to or writes to.
    pub layer: Option<LayerId>,
    /// Its limits.
    pub limits: MigrationLimits,
    /// Whether the source goes once the destination is authoritative.
    pub remove_source: bool,
    /// Which file the source is.
    pub source_file: Option<FileIdentity>,
}

impl Inventory {
    /// All jobs, the newest last.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn jobs(&self) -> Result<Vec<JobRecord>> {
        self.read("list the jobs", |db| select(db, "ORDER BY seq", []))
    }

    /// All jobs that have not ended.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn unfinished_jobs(&self) -> Result<Vec<JobRecord>> {
        self.read("list the jobs that run", |db| {
            select(db, "WHERE state <> 'ended' ORDER BY seq", [])
        })
    }

    /// The jobs of a VM that have not ended.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn active_jobs(&self, vm: &str) -> Result<Vec<JobRecord>> {
        self.read("list the jobs of a VM", |db| {
            select(db, "WHERE vm = ?1 AND state <> 'ended' ORDER BY seq", [vm])
        })
    }

    /// One job.
    ///
    /// # Errors
    /// [`NoSuchJob`], or the inventory cannot be read.
    pub fn job(&self, id: &JobId) -> Result<JobRecord> {
        self.read("read a job", |db| find(db, id))
    }

    /// Takes the destination's name and the disk for a new job.
    ///
    /// # Errors
    /// [`DiskBusy`] or [`DestinationExists`]; [`InventoryCorrupt`] if the disk is not bound to the
    /// source.
    pub fn reserve_job(&self, new: &NewJob) -> Result<JobRecord> {
        let limits = to_json("a job's limits", &new.limits)?;
        let source_file = new
            .source_file
            .as_ref()
            .map(|file| to_json("a job's source", file))
            .transpose()?;
        self.write("record a job", |tx| {
            let busy = select(
                tx,
                "WHERE vm = ?1 AND disk = ?2 AND state <> 'ended'",
                [&new.vm, &new.disk],
            )?;
            if let Some(other) = busy.into_iter().next() {
                return Err(Observation::from(DiskBusy {
                    disk: new.disk.clone(),
                    job: other.id.to_string(),
                })
                .into());
            }
            let destination = new.destination.location.text()?;
            let by_job = select(
                tx,
                "WHERE destination = ?1 AND state <> 'ended'",
                [destination],
            )?
            .into_iter()
            .map(|job| format!("the destination of job {}", job.id));
            let by_vm = users_of_image(tx, &new.destination.location)?
                .into_iter()
                .map(|(vm, disk)| format!("disk '{}' of VM '{vm}'", disk.name));
            if let Some(user) = by_job.chain(by_vm).next() {
                return Err(Observation::from(DestinationExists {
                    path: destination.to_owned(),
                    user,
                })
                .into());
            }
            // It was looked at outside of this transaction.
            let bound = tx
                .query_row(
                    "SELECT 1 FROM disks WHERE vm = ?1 AND name = ?2 AND image = ?3",
                    params![new.vm, new.disk, new.source.location.text()?],
                    |_| Ok(()),
                )
                .optional()?;
            if bound.is_none() {
                return Err(Observation::from(InventoryCorrupt {
                    record: format!("disk '{}' of VM '{}'", new.disk, new.vm),
                    reason: format!("it is not bound to {}", new.source),
                })
                .into());
            }
            match (new.kind, new.layer) {
                (JobKind::Consolidate, Some(layer)) => {
                    layers::only_below(tx, &new.vm, &new.disk, layer)?;
                }
                (JobKind::Consolidate | JobKind::Revert, None) => {
                    return Err(corrupt(&name(0), "it names no layer").into());
                }
                _ => {}
            }
            let status = |id: JobId| MigrationStatus::new(id, new.disk.clone(), new.size);
            tx.execute(
                "INSERT INTO jobs (vm, disk, source, destination, datastore, limits,
                     remove_source, source_file, source_format, destination_format, kind,
                     snapshot, layer, state, status)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13,
                     'preparing', '')",
                params![
                    new.vm,
                    new.disk,
                    new.source.location.text()?,
                    destination,
                    new.to,
                    limits,
                    new.remove_source,
                    source_file,
                    new.source.format.name(),
                    new.destination.format.name(),
                    new.kind.name(),
                    new.snapshot,
                    new.layer.map(|layer| layer.0),
                ],
            )?;
            let seq = tx.last_insert_rowid();
            let status = to_json("a job's status", &status(name(seq)))?;
            tx.execute(
                "UPDATE jobs SET status = ?2 WHERE seq = ?1",
                params![seq, status],
            )?;
            tx.execute(
                "DELETE FROM jobs WHERE state = 'ended' AND seq NOT IN
                     (SELECT seq FROM jobs WHERE state = 'ended' ORDER BY seq DESC LIMIT ?1)",
                [KEPT],
            )?;
            find(tx, &name(seq))
        })
    }

    /// Notes that the job's files were created and which they are.
    ///
    /// # Errors
    /// The inventory cannot be written.
    pub fn job_running(&self, id: &JobId, files: &JobFiles) -> Result<()> {
        let destination = to_json("a job's destination", &files.destination)?;
        let journal = files.journal.as_ref();
        let journal = journal
            .map(|journal| to_json("a job's journal", journal))
            .transpose()?;
        let kept = files.kept.as_ref();
        let kept = kept
            .map(|kept| to_json("a job's progress", kept))
            .transpose()?;
        self.write("record a job's destination", |tx| {
            step(tx, id, &[JobState::Preparing], JobState::Running)?;
            tx.execute(
                "UPDATE jobs SET destination_file = ?2, journal_file = ?3, kept_file = ?4
                     WHERE seq = ?1",
                params![number(id), destination, journal, kept],
            )?;
            Ok(())
        })
    }

    /// Decides that the binding stays for now: the job's VM has ended before it. Like
    /// [`abort_job`](Self::abort_job), no earlier attempt to commit can come back once this returns `Ok`.
    ///
    /// # Errors
    /// The inventory cannot be written, or the job is not running.
    pub fn interrupt_job(&self, id: &JobId) -> Result<()> {
        self.write("interrupt a job", |tx| {
            step(tx, id, &[JobState::Running], JobState::Interrupted)?;
            tx.execute(
                "UPDATE jobs SET source_stamp = NULL WHERE seq = ?1",
                [number(id)],
            )?;
            Ok(())
        })
    }

    /// Notes what the source of an interrupted job looks like, so that it can be taken up again.
    ///
    /// # Errors
    /// The inventory cannot be written, or the job is not interrupted.
    pub fn stamp_job(&self, id: &JobId, stamp: &Stamp, status: &MigrationStatus) -> Result<()> {
        let stamp = to_json("a job's source", stamp)?;
        let status = to_json("a job's status", status)?;
        self.write("record an interrupted job", |tx| {
            step(tx, id, &[JobState::Interrupted], JobState::Interrupted)?;
            tx.execute(
                "UPDATE jobs SET source_stamp = ?2, status = ?3 WHERE seq = ?1",
                params![number(id), stamp, status],
            )?;
            Ok(())
        })
    }

    /// A new monitor takes an interrupted job up again.
    ///
    /// # Errors
    /// The inventory cannot be written, or the job is not interrupted.
    pub fn take_up_job(&self, id: &JobId) -> Result<()> {
        self.write("take a job up again", |tx| {
            let mut job = step(tx, id, &[JobState::Interrupted], JobState::Running)?;
            (job.status.phase, job.status.failure) = (Phase::Copying, None);
            tx.execute(
                "UPDATE jobs SET source_stamp = NULL, status = ?2 WHERE seq = ?1",
                params![number(id), to_json("a job's status", &job.status)?],
            )?;
            Ok(())
        })
    }

    /// Notes that the limits of a job have changed.
    ///
    /// # Errors
    /// The inventory cannot be written.
    pub fn limit_job(&self, id: &JobId, limits: &MigrationLimits) -> Result<()> {
        let limits = to_json("a job's limits", limits)?;
        self.write("record a job's limits", |tx| {
            tx.execute(
                "UPDATE jobs SET limits = ?2 WHERE seq = ?1 AND state <> 'ended'",
                params![number(id), limits],
            )?;
            Ok(())
        })
    }

    /// Forgets a job that never began.
    ///
    /// # Errors
    /// The inventory cannot be written.
    pub fn drop_job(&self, id: &JobId) -> Result<()> {
        self.write("forget a job", |tx| {
            tx.execute(
                "DELETE FROM jobs WHERE seq = ?1 AND state IN ('preparing', 'running')",
                params![number(id)],
            )?;
            Ok(())
        })
    }

    /// The commit: the binding names the destination from the moment this returns `Ok`.
    ///
    /// # Errors
    /// [`CommitFailed`]. Whether the transaction reached the disk is then not known until the next
    /// one has: see [`Inventory::abort_job`].
    pub fn commit_job(&self, id: &JobId) -> Result<()> {
        self.write("commit a job", |tx| {
            let job = step(tx, id, &[JobState::Running], JobState::Committed)?;
            let moved = rebind(tx, &job)?;
            tx.execute(
                "UPDATE vms SET revision = revision + 1 WHERE name = ?1",
                [&job.vm],
            )?;
            let both: u8 = tx.query_row(
                "SELECT COUNT(of_vm) FROM vms WHERE name = ?1",
                [&job.vm],
                |row| row.get(0),
            )?;
            match moved {
                all if all == 1 + usize::from(both) => Ok(()),
                _ => Err(corrupt(id, "its disk is not bound to its source").into()),
            }
        })
        .map_err(|seen| {
            Observation::from(CommitFailed {
                job: id.to_string(),
            })
            .because(seen)
        })
    }

    /// Decides that the binding stays. Once this returns `Ok`, no earlier attempt to commit can
    /// come back: it overwrites what such an attempt may have left in the write-ahead log. `why`,
    /// if there is one, is kept as the job's failure.
    ///
    /// # Errors
    /// The inventory cannot be written, or the job is already committed.
    pub fn abort_job(&self, id: &JobId, why: Option<&Observation>) -> Result<()> {
        self.write("abort a job", |tx| {
            let mut job = step(
                tx,
                id,
                &[
                    JobState::Preparing,
                    JobState::Running,
                    JobState::Interrupted,
                    JobState::Aborted,
                ],
                JobState::Aborted,
            )?;
            if job.status.phase == Phase::Interrupted {
                // It is final only once its files are gone.
                job.status.phase = Phase::Copying;
            }
            if let Some(why) = why {
                job.status.failure = Some(why.clone());
            }
            tx.execute(
                "UPDATE jobs SET status = ?2 WHERE seq = ?1",
                params![number(id), to_json("a job's status", &job.status)?],
            )?;
            Ok(())
        })
    }

    /// Records how a job ended; nothing is left to do for it.
    ///
    /// # Errors
    /// The inventory cannot be written.
    pub fn end_job(&self, id: &JobId, status: &MigrationStatus) -> Result<()> {
        let status = to_json("a job's status", status)?;
        self.write("record the end of a job", |tx| {
            tx.execute(
                "UPDATE jobs SET state = 'ended', status = ?2 WHERE seq = ?1",
                params![number(id), status],
            )?;
            Ok(())
        })
    }
}

/// What becomes of a disk's record, beside the binding.
struct Next {
    datastore: Option<String>,
    /// Whether Strake made the image.
    created: bool,
    parent: Option<LayerId>,
    below: Vec<PathBuf>,
}

impl Next {
    /// With an image that was made for the job.
    fn made(datastore: Option<String>, parent: Option<LayerId>, below: Vec<PathBuf>) -> Self {
        Self {
            datastore,
            created: true,
            parent,
            below,
        }
    }
}

/// Binds the job's disk to its destination; gives the number of disks that were on its source.
fn rebind(tx: &Connection, job: &JobRecord) -> Attempt<usize> {
    let source = job.source.location.text()?;
    let bound: Option<(Option<i64>, String)> = tx
        .query_row(
            "SELECT parent, below FROM disks WHERE vm = ?1 AND name = ?2 AND image = ?3",
            params![job.vm, job.disk, source],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()?;
    let Some((parent, below)) = bound else {
        return Ok(0);
    };
    let keep = |name: &str| layers::keep_image(tx, &job.vm, &job.disk, name, to_sql(now_ms()));
    let layer_of = |id: LayerId| -> Attempt<LayerRecord> {
        let layers = layers::of_disk(tx, &job.vm, &job.disk)?;
        let layer = layers.into_iter().find(|layer| layer.id == id);
        Ok(layer.ok_or_else(|| corrupt(&job.id, "its layer is not the disk's"))?)
    };
    // What an image over another one has below it.
    let over = |image: &Binding, below: Vec<PathBuf>| -> Result<Vec<PathBuf>> {
        Ok([vec![image.file()?.to_owned()], below].concat())
    };
    let to = Some(job.to.clone()).filter(|to| !to.is_empty());
    let next = match (job.kind, job.layer) {
        (JobKind::Migrate, _) => {
            if parent.is_some() && !job.remove_source {
                // What stays of a chain stays in the tree of the disk.
                keep(&format!("before-{}", job.id))?;
            }
            Next::made(to, None, Vec::new())
        }
        (JobKind::Snapshot, _) => {
            let name = job.snapshot.as_deref().unwrap_or("snapshot");
            let below = over(&job.source, from_json("a disk", &below)?)?;
            Next::made(to, Some(keep(name)?), below)
        }
        (JobKind::Revert, Some(id)) => {
            let layer = layer_of(id)?;
            Next::made(to, Some(id), over(&layer.image, layer.below)?)
        }
        (JobKind::Consolidate, Some(id)) => {
            layers::only_below(tx, &job.vm, &job.disk, id)?;
            let layer = layer_of(id)?;
            tx.execute("DELETE FROM layers WHERE id = ?1", [id.0])?;
            Next {
                datastore: layer.datastore,
                created: layer.created,
                parent: layer.parent,
                below: layer.below,
            }
        }
        (JobKind::Revert | JobKind::Consolidate, None) => {
            return Err(corrupt(&job.id, "it names no layer").into());
        }
    };
    Ok(tx.execute(
        "UPDATE disks SET image = ?4, format = ?5, datastore = ?6, created = ?7, file = ?8,
             parent = ?9, below = ?10
             WHERE image = ?3 AND (vm = ?1 AND name = ?2 OR (vm, name) IN
                 (SELECT of_vm, of_disk FROM vms WHERE name = ?1))",
        params![
            job.vm,
            job.disk,
            source,
            job.destination.location.text()?,
            job.destination.format.name(),
            next.datastore,
            next.created,
            job.files
                .as_ref()
                .map(|files| to_json("a job's destination", &files.destination))
                .transpose()?,
            next.parent.map(|layer| layer.0),
            to_json("a disk", &next.below)?,
        ],
    )?)
}

fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}

/// Moves a job from one of `from` to `to`.
fn step(db: &Connection, id: &JobId, from: &[JobState], to: JobState) -> Attempt<JobRecord> {
    let job = find(db, id)?;
    if !from.contains(&job.state) {
        let reason = format!("it is {}, and cannot be {}", job.state.name(), to.name());
        return Err(corrupt(id, &reason).into());
    }
    db.execute(
        "UPDATE jobs SET state = ?2 WHERE seq = ?1",
        params![number(id), to.name()],
    )?;
    Ok(job)
}

fn corrupt(id: &JobId, reason: &str) -> Observation {
    InventoryCorrupt {
        record: format!("job {id}"),
        reason: reason.to_owned(),
    }
    .into()
}

fn name(seq: i64) -> JobId {
    JobId(format!("job-{seq}"))
}

/// The row of a job; one that no row has for a name that no job has.
fn number(id: &JobId) -> i64 {
    id.0.strip_prefix("job-")
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(-1)
}

fn find(db: &Connection, id: &JobId) -> Attempt<JobRecord> {
    select(db, "WHERE seq = ?1", [number(id)])?
        .into_iter()
        .next()
        .ok_or_else(|| {
            Observation::from(NoSuchJob {
                job: id.to_string(),
            })
            .into()
        })
}

/// The columns of a job as SQLite has them.
struct Raw {
    seq: i64,
    vm: String,
    disk: String,
    source: String,
    destination: String,
    to: String,
    limits: String,
    remove_source: bool,
    state: String,
    source_file: Option<String>,
    destination_file: Option<String>,
    journal_file: Option<String>,
    status: String,
    source_format: String,
    destination_format: String,
    kind: String,
    snapshot: Option<String>,
    layer: Option<i64>,
    kept_file: Option<String>,
    source_stamp: Option<String>,
}

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok(Raw {
        seq: row.get(0)?,
        vm: row.get(1)?,
        disk: row.get(2)?,
        source: row.get(3)?,
        destination: row.get(4)?,
        to: row.get(5)?,
        limits: row.get(6)?,
        remove_source: row.get(7)?,
        state: row.get(8)?,
        source_file: row.get(9)?,
        destination_file: row.get(10)?,
        journal_file: row.get(11)?,
        status: row.get(12)?,
        source_format: row.get(13)?,
        destination_format: row.get(14)?,
        kind: row.get(15)?,
        snapshot: row.get(16)?,
        layer: row.get(17)?,
        kept_file: row.get(18)?,
        source_stamp: row.get(19)?,
    })
}

fn select(db: &Connection, rest: &str, values: impl rusqlite::Params) -> Attempt<Vec<JobRecord>> {
    let mut statement = db.prepare(&format!(
        "SELECT seq, vm, disk, source, destination, datastore, limits, remove_source, state,
             source_file, destination_file, journal_file, status, source_format,
             destination_format, kind, snapshot, layer, kept_file, source_stamp FROM jobs
             {rest}"
    ))?;
    let rows = statement
        .query_map(values, raw)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    rows.into_iter().map(|raw| Ok(job(raw)?)).collect()
}

fn job(raw: Raw) -> Result<JobRecord> {
    let id = name(raw.seq);
    let record = format!("job {id}");
    let file = |text: Option<String>| -> Result<Option<FileIdentity>> {
        text.map(|text| from_json(&record, &text)).transpose()
    };
    let made = file(raw.destination_file)?;
    let journal = file(raw.journal_file)?;
    let kept = file(raw.kept_file)?;
    let stamp = raw.source_stamp.map(|text| from_json(&record, &text));
    Ok(JobRecord {
        vm: raw.vm,
        disk: raw.disk,
        source: binding(&record, &raw.source, &raw.source_format)?,
        destination: binding(&record, &raw.destination, &raw.destination_format)?,
        to: raw.to,
        limits: from_json(&record, &raw.limits)?,
        remove_source: raw.remove_source,
        state: JobState::parse(&raw.state)
            .ok_or_else(|| corrupt(&id, &format!("its state is '{}'", raw.state)))?,
        source_file: file(raw.source_file)?,
        kind: JobKind::named(&raw.kind)
            .ok_or_else(|| corrupt(&id, &format!("it is to '{}'", raw.kind)))?,
        snapshot: raw.snapshot,
        layer: raw.layer.map(LayerId),
        files: made.map(|destination| JobFiles {
            destination,
            journal,
            kept,
        }),
        stamp: stamp.transpose()?,
        status: from_json(&record, &raw.status)?,
        id,
    })
}
