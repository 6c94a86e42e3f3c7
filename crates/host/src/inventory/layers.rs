//! Images of disks that others of their images have below them.
//!
//! A snapshot of a disk is its image of then, which is written no more. A new image over it becomes
//! the disk's binding, and the old one a *layer*: with a name it is a snapshot; without one it is
//! only still needed, by the images whose `parent` it is. The chain on the disk is in the images'
//! headers; what is here says which of the files are the disk's own, and what they are to people.

use std::path::PathBuf;

use rusqlite::{Connection, OptionalExtension, Row, params};
use strake_observe::{Observation, Result};

use super::vms::binding;
use super::{Attempt, Inventory, from_json, from_sql};
use crate::observations::{InventoryCorrupt, NoSuchSnapshot};
use crate::{Binding, FileIdentity};

/// Names a layer in the inventory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub(super) i64);

/// A layer of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRecord {
    /// Its name in the inventory.
    pub id: LayerId,
    /// The image.
    pub image: Binding,
    /// Which file it was when it was the disk's own image.
    pub file: Option<FileIdentity>,
    /// The files below it, from the upper ones down.
    pub below: Vec<PathBuf>,
    /// Its datastore.
    pub datastore: Option<String>,
    /// Whether Strake created it.
    pub created: bool,
    /// The layer below it, if that is one of the disk's.
    pub parent: Option<LayerId>,
    /// The snapshot that it is.
    pub name: Option<String>,
    /// When it became one, in milliseconds since the epoch.
    pub taken_ms: u64,
}

impl Inventory {
    /// Takes the name from a snapshot: from then on it is none, and its image only what others need.
    ///
    /// # Errors
    /// [`NoSuchSnapshot`], or the inventory cannot be written.
    pub fn forget_snapshot(&self, vm: &str, disk: &str, name: &str) -> Result<()> {
        self.write("delete a snapshot", |tx| {
            let changed = tx.execute(
                "UPDATE layers SET name = NULL WHERE vm = ?1 AND disk = ?2 AND name = ?3",
                params![vm, disk, name],
            )?;
            if changed == 0 {
                return Err(missing(tx, vm, disk, name)?.into());
            }
            tx.execute(
                "UPDATE vms SET revision = revision + 1 WHERE name = ?1",
                [vm],
            )?;
            Ok(())
        })
    }

    /// Forgets a layer that no image needs any more and whose file is gone or stays for others.
    ///
    /// # Errors
    /// [`InventoryCorrupt`] if it is needed after all.
    pub fn forget_layer(&self, layer: LayerId) -> Result<()> {
        self.write("forget an image", |tx| {
            if tx_is_needed(tx, layer)? {
                return Err(corrupt(layer, "it is still needed").into());
            }
            tx.execute("DELETE FROM layers WHERE id = ?1", [layer.0])?;
            Ok(())
        })
    }

    /// Every layer whose image that is, as VM and disk.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn layers_at(&self, image: &crate::Location) -> Result<Vec<(String, String)>> {
        self.read("look for an image", |db| {
            let mut statement = db.prepare("SELECT vm, disk FROM layers WHERE image = ?1")?;
            let rows =
                statement.query_map([image.text()?], |row| Ok((row.get(0)?, row.get(1)?)))?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        })
    }
}

/// Whether it is a snapshot, or an image of its disk is based on it.
fn tx_is_needed(db: &Connection, layer: LayerId) -> Attempt<bool> {
    let needed = db
        .query_row(
            "SELECT 1 FROM layers WHERE (id = ?1 AND name IS NOT NULL) OR parent = ?1
             UNION ALL SELECT 1 FROM disks WHERE parent = ?1",
            [layer.0],
            |_| Ok(()),
        )
        .optional()?;
    Ok(needed.is_some())
}

fn missing(db: &Connection, vm: &str, disk: &str, name: &str) -> Attempt<Observation> {
    let names: Vec<String> = of_disk(db, vm, disk)?
        .into_iter()
        .filter_map(|layer| layer.name)
        .collect();
    Ok(NoSuchSnapshot {
        disk: disk.to_owned(),
        snapshot: name.to_owned(),
        has: if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        },
    }
    .into())
}

fn corrupt(layer: LayerId, reason: &str) -> Observation {
    InventoryCorrupt {
        record: format!("layer {}", layer.0),
        reason: reason.to_owned(),
    }
    .into()
}

/// The layers of a disk, the oldest first.
pub(super) fn of_disk(db: &Connection, vm: &str, disk: &str) -> Attempt<Vec<LayerRecord>> {
    let mut statement = db.prepare(
        "SELECT id, image, format, file, datastore, created, parent, name, taken_ms, below
             FROM layers WHERE vm = ?1 AND disk = ?2 ORDER BY id",
    )?;
    let rows = statement
        .query_map([vm, disk], raw)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    rows.into_iter().map(|raw| Ok(raw.known()?)).collect()
}

/// The disk's image of now becomes a layer with that name; gives the layer.
pub(super) fn keep_image(
    tx: &Connection,
    vm: &str,
    disk: &str,
    name: &str,
    now_ms: i64,
) -> Attempt<LayerId> {
    tx.execute(
        "INSERT INTO layers (vm, disk, image, format, file, datastore, created, parent, below,
             name, taken_ms)
             SELECT vm, name, image, format, file, datastore, created, parent, below, ?3, ?4
             FROM disks WHERE vm = ?1 AND name = ?2",
        params![vm, disk, name, now_ms],
    )?;
    Ok(LayerId(tx.last_insert_rowid()))
}

/// A layer that the disk alone is based on and that is no snapshot: what may be written.
pub(super) fn only_below(tx: &Connection, vm: &str, disk: &str, layer: LayerId) -> Attempt<()> {
    let (users, named): (i64, bool) = tx.query_row(
        "SELECT (SELECT count(*) FROM layers WHERE parent = ?1)
              + (SELECT count(*) FROM disks WHERE parent = ?1),
             EXISTS (SELECT 1 FROM layers WHERE id = ?1 AND name IS NOT NULL)
          OR NOT EXISTS (SELECT 1 FROM disks WHERE vm = ?2 AND name = ?3 AND parent = ?1)",
        params![layer.0, vm, disk],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    if users == 1 && !named {
        return Ok(());
    }
    Err(corrupt(layer, "other images are based on it, or it is a snapshot").into())
}

/// The columns of a layer as SQLite has them.
struct Raw {
    id: i64,
    image: String,
    format: String,
    file: Option<String>,
    datastore: Option<String>,
    created: bool,
    parent: Option<i64>,
    name: Option<String>,
    taken_ms: i64,
    below: String,
}

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok(Raw {
        id: row.get(0)?,
        image: row.get(1)?,
        format: row.get(2)?,
        file: row.get(3)?,
        datastore: row.get(4)?,
        created: row.get(5)?,
        parent: row.get(6)?,
        name: row.get(7)?,
        taken_ms: row.get(8)?,
        below: row.get(9)?,
    })
}

impl Raw {
    fn known(self) -> Result<LayerRecord> {
        let record = format!("layer {}", self.id);
        Ok(LayerRecord {
            id: LayerId(self.id),
            image: binding(&record, &self.image, &self.format)?,
            file: self
                .file
                .map(|file| from_json(&record, &file))
                .transpose()?,
            below: from_json(&record, &self.below)?,
            datastore: self.datastore,
            created: self.created,
            parent: self.parent.map(LayerId),
            name: self.name,
            taken_ms: from_sql(self.taken_ms),
        })
    }
}
