//! Datastores in the inventory.

use std::path::PathBuf;

use rusqlite::{OptionalExtension, params};
use strake_observe::{Observation, Result};

use super::{Attempt, Inventory};
use crate::observations::{DatastoreExists, DatastoreInUse, NoSuchDatastore};

/// A datastore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatastoreRecord {
    /// Its name.
    pub name: String,
    /// Its directory, canonical.
    pub path: PathBuf,
    /// How many disks of VMs lie on it.
    pub disks: u32,
}

const SELECT: &str = "SELECT name, path,
    (SELECT COUNT(*) FROM disks WHERE disks.datastore = datastores.name) FROM datastores";

fn record(row: &rusqlite::Row<'_>) -> rusqlite::Result<DatastoreRecord> {
    Ok(DatastoreRecord {
        name: row.get(0)?,
        path: PathBuf::from(row.get::<_, String>(1)?),
        disks: row.get(2)?,
    })
}

impl Inventory {
    /// All datastores, by name.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn datastores(&self) -> Result<Vec<DatastoreRecord>> {
        self.read("list the datastores", |db| {
            let mut statement = db.prepare(&format!("{SELECT} ORDER BY name"))?;
            let rows = statement.query_map([], record)?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        })
    }

    /// One datastore.
    ///
    /// # Errors
    /// [`NoSuchDatastore`], or the inventory cannot be read.
    pub fn datastore(&self, name: &str) -> Result<DatastoreRecord> {
        self.read("read a datastore", |db| find(db, name))
    }

    /// Adds a datastore.
    ///
    /// # Errors
    /// [`DatastoreExists`] if the name or the directory is taken.
    pub fn add_datastore(&self, name: &str, path: &str) -> Result<()> {
        self.write("add a datastore", |tx| {
            let taken = tx
                .query_row(
                    &format!("{SELECT} WHERE name = ?1 OR path = ?2"),
                    params![name, path],
                    record,
                )
                .optional()?;
            if let Some(taken) = taken {
                return Err(Observation::from(DatastoreExists {
                    datastore: taken.name,
                    path: taken.path.display().to_string(),
                })
                .into());
            }
            tx.execute(
                "INSERT INTO datastores (name, path) VALUES (?1, ?2)",
                params![name, path],
            )?;
            Ok(())
        })
    }

    /// Removes a datastore; its directory and files stay.
    ///
    /// # Errors
    /// [`NoSuchDatastore`] or [`DatastoreInUse`].
    pub fn remove_datastore(&self, name: &str) -> Result<()> {
        self.write("remove a datastore", |tx| {
            find(tx, name)?;
            let mut statement = tx.prepare(
                "SELECT 'disk ''' || name || ''' of VM ''' || vm || '''' FROM disks
                     WHERE datastore = ?1
                 UNION ALL
                 SELECT coalesce('snapshot ''' || name || '''', 'an image') || ' of disk '''
                     || disk || ''' of VM ''' || vm || '''' FROM layers WHERE datastore = ?1
                 UNION ALL
                 SELECT 'job job-' || seq FROM jobs WHERE datastore = ?1 AND state <> 'ended'",
            )?;
            let users = statement
                .query_map([name], |row| row.get::<_, String>(0))?
                .collect::<rusqlite::Result<Vec<_>>>()?;
            if !users.is_empty() {
                return Err(Observation::from(DatastoreInUse {
                    datastore: name.to_owned(),
                    users: users.join(", "),
                })
                .into());
            }
            tx.execute("DELETE FROM datastores WHERE name = ?1", [name])?;
            tx.execute(
                "DELETE FROM labels WHERE kind = 'datastore' AND object = ?1",
                [name],
            )?;
            Ok(())
        })
    }
}

fn find(db: &rusqlite::Connection, name: &str) -> Attempt<DatastoreRecord> {
    db.query_row(&format!("{SELECT} WHERE name = ?1"), [name], record)
        .optional()?
        .ok_or_else(|| {
            Observation::from(NoSuchDatastore {
                datastore: name.to_owned(),
            })
            .into()
        })
}
