//! The inventory: what exists on this host, in one SQLite database.
//!
//! It is the only truth about where a disk is: the *binding* (disk → image) of [`DiskRecord`]. A
//! migration's commit is one transaction here ([`Inventory::commit_job`]) and nothing else.
//!
//! One connection behind one mutex: transactions are short, and each is durable when it returns
//! (WAL with `synchronous=FULL`). Callers run on blocking threads, never on the runtime's own.

mod datastores;
mod jobs;
mod layers;
mod schema;
mod steer;
#[cfg(test)]
mod tests;
mod vms;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rusqlite::{Connection, Transaction, TransactionBehavior};
use strake_observe::{Observation, OsContext, Result};

pub use datastores::DatastoreRecord;
pub use jobs::{JobFiles, JobRecord, JobState, NewJob};
pub use layers::{LayerId, LayerRecord};
pub use steer::{Labels, ProfileRecord, Steering};
pub use vms::{DiskRecord, NicRecord, StoredState, VmRecord, Workload};

use crate::config::show;
use crate::observations::InventoryFailed;

/// The database.
#[derive(Debug)]
pub struct Inventory {
    path: String,
    connection: Mutex<Connection>,
}

/// Pages in the log at which SQLite writes them to the database itself: its own default.
const CHECKPOINT_PAGES: u32 = 1000;

/// What a transaction survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durability {
    /// The end of this process.
    Process,
    /// A loss of power.
    Power,
}

/// What can go wrong inside of a transaction.
pub(crate) enum Trouble {
    Sql(rusqlite::Error),
    AtCommit(rusqlite::Error),
    Seen(Observation),
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

impl From<Observation> for Trouble {
    fn from(seen: Observation) -> Self {
        Self::Seen(seen)
    }
}

pub(crate) type Attempt<T> = std::result::Result<T, Trouble>;

impl Inventory {
    /// Opens the database, creating it or bringing it to this daemon's schema.
    ///
    /// # Errors
    /// [`InventoryFailed`], or a schema of a newer daemon.
    pub fn open(path: &Path) -> Result<Self> {
        let inventory = |connection| Self {
            path: show(path),
            connection: Mutex::new(connection),
        };
        // For the daemon's account alone; what SQLite puts beside it takes the same permissions.
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .os("open", path.display())?;
        let connection =
            Connection::open(path).map_err(|error| failed(&show(path), "open it", &error, true))?;
        let this = inventory(connection);
        this.prepare()?;
        Ok(this)
    }

    fn prepare(&self) -> Result<()> {
        {
            let connection = self
                .connection
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            connection
                .busy_timeout(std::time::Duration::from_secs(5))
                .and_then(|()| {
                    connection.execute_batch(
                        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;",
                    )
                })
                .map_err(|error| failed(&self.path, "set it up", &error, true))?;
            // The daemon before may have met a failed fsync when it committed, answered nobody, and
            // ended. Its transaction is then in the log as far as the page cache goes, where it
            // reads as committed; after a loss of power it may not be there. So before anything is
            // read, and anybody is told, everything in the log is written to the database itself
            // and synced: what is read from here on is durable. Whoever keeps that from being done
            // keeps the daemon from coming up.
            let busy: i64 = connection
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))
                .map_err(|error| failed(&self.path, "make it durable", &error, true))?;
            if busy != 0 {
                return Err(InventoryFailed {
                    path: self.path.clone(),
                    doing: "make it durable".to_owned(),
                    reason: "another process reads or writes it".to_owned(),
                    undone: true,
                }
                .into());
            }
        }
        self.write("bring its schema up to date", |tx| {
            schema::migrate(tx, &self.path)
        })
    }

    /// Runs one transaction; it is durable when this returns `Ok`, and undone otherwise. Whether
    /// it is undone for certain, [`InventoryFailed`] tells.
    fn write<T>(
        &self,
        doing: &str,
        work: impl FnOnce(&Transaction<'_>) -> Attempt<T>,
    ) -> Result<T> {
        self.transact(doing, Durability::Power, work)
    }

    /// As [`write`](Self::write), but without waiting for the disk: what it decides must not matter
    /// any more after a loss of power. Later transactions make it durable, too.
    fn write_soon<T>(
        &self,
        doing: &str,
        work: impl FnOnce(&Transaction<'_>) -> Attempt<T>,
    ) -> Result<T> {
        self.transact(doing, Durability::Process, work)
    }

    fn transact<T>(
        &self,
        doing: &str,
        durability: Durability,
        work: impl FnOnce(&Transaction<'_>) -> Attempt<T>,
    ) -> Result<T> {
        // A panic inside of a transaction rolls it back, so a poisoned lock guards sound data.
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let run = || -> Attempt<T> {
            if durability == Durability::Process {
                // Nor does it tidy up on the way, which waits for the disk too.
                connection
                    .execute_batch("PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0")?;
            }
            let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = work(&tx)?;
            tx.commit().map_err(Trouble::AtCommit)?;
            Ok(value)
        };
        let done = run();
        if durability == Durability::Process {
            // Whatever came of it. That the setting itself fails is as if the disk had: a later
            // transaction that is to be durable sets it again.
            let _ = connection.execute_batch(&format!(
                "PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}"
            ));
        }
        done.map_err(|trouble| self.told(doing, trouble))
    }

    /// Reads within one transaction, so that what is read belongs together.
    fn read<T>(&self, doing: &str, work: impl FnOnce(&Connection) -> Attempt<T>) -> Result<T> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let run = || -> Attempt<T> {
            let tx = connection.transaction()?;
            work(&tx)
        };
        run().map_err(|trouble| self.told(doing, trouble))
    }

    fn told(&self, doing: &str, trouble: Trouble) -> Observation {
        match trouble {
            Trouble::Seen(seen) => seen,
            Trouble::Sql(error) => failed(&self.path, doing, &error, true),
            Trouble::AtCommit(error) => {
                // Without room the frame that commits is never written. After any other failure
                // it may have been: only a later transaction that is durable makes sure.
                let full = error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull);
                failed(&self.path, doing, &error, full)
            }
        }
    }
}

fn failed(path: &str, doing: &str, error: &rusqlite::Error, undone: bool) -> Observation {
    InventoryFailed {
        path: path.to_owned(),
        doing: doing.to_owned(),
        reason: error.to_string(),
        undone,
    }
    .into()
}

/// SQLite's integers are signed.
fn to_sql(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn from_sql(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// A column that holds JSON.
fn from_json<T: serde::de::DeserializeOwned>(record: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        crate::observations::InventoryCorrupt {
            record: record.to_owned(),
            reason: error.to_string(),
        }
        .into()
    })
}

fn to_json<T: serde::Serialize>(record: &str, value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| {
        crate::observations::InventoryCorrupt {
            record: record.to_owned(),
            reason: error.to_string(),
        }
        .into()
    })
}
