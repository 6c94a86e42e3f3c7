//! Profiles, labels of what has no spec, and what running machines were given.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use strake_api::spec::VmSpec;
use strake_observe::{Observation, Result};

use super::{Attempt, Inventory, from_json, to_json};
use crate::crash;
use crate::observations::NoSuchVm;

/// A profile's file as it was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileRecord {
    /// The profile's name.
    pub name: String,
    /// The file's name.
    pub file: String,
    /// What was in it.
    pub text: String,
}

/// Labels by kind of object and its name.
pub type Labels = BTreeMap<(String, String), BTreeMap<String, String>>;

/// One change of what is in force; all of it happens, or nothing.
#[derive(Debug, Default)]
pub struct Steering<'a> {
    /// Profiles that are put in, each in place of the one of its name.
    pub profiles: &'a [ProfileRecord],
    /// Profiles that are taken out.
    pub removed: &'a [&'a str],
    /// A VM's spec in place of the one that it has.
    pub spec: Option<(&'a str, &'a VmSpec)>,
    /// Labels in place of those of an object: kind, name, labels.
    pub labels: Option<(&'a str, &'a str, &'a BTreeMap<String, String>)>,
}

impl Inventory {
    /// All profiles, by name.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn profiles(&self) -> Result<Vec<ProfileRecord>> {
        self.read("list the profiles", |db| {
            let mut statement =
                db.prepare("SELECT name, file, text FROM profiles ORDER BY name")?;
            let rows = statement.query_map([], |row| {
                Ok(ProfileRecord {
                    name: row.get(0)?,
                    file: row.get(1)?,
                    text: row.get(2)?,
                })
            })?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        })
    }

    /// The labels of everything but VMs.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn labels(&self) -> Result<Labels> {
        self.read("list the labels", |db| {
            let mut labels = Labels::new();
            let mut statement = db.prepare("SELECT kind, object, key, value FROM labels")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                labels
                    .entry((row.get(0)?, row.get(1)?))
                    .or_default()
                    .insert(row.get(2)?, row.get(3)?);
            }
            Ok(labels)
        })
    }

    /// Changes what is in force, in one transaction.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn steer(&self, change: &Steering<'_>) -> Result<()> {
        self.write("change what is in force", |tx| {
            for profile in change.profiles {
                tx.execute(
                    "INSERT OR REPLACE INTO profiles (name, file, text) VALUES (?1, ?2, ?3)",
                    params![profile.name, profile.file, profile.text],
                )?;
                crash::point("within-steering");
            }
            for name in change.removed {
                tx.execute("DELETE FROM profiles WHERE name = ?1", [name])?;
            }
            if let Some((vm, spec)) = change.spec {
                let changed = tx.execute(
                    "UPDATE vms SET revision = revision + 1, spec = ?2 WHERE name = ?1",
                    params![vm, to_json(vm, spec)?],
                )?;
                if changed == 0 {
                    return Err(Observation::from(NoSuchVm { vm: vm.to_owned() }).into());
                }
            }
            if let Some((kind, object, labels)) = change.labels {
                set_labels(tx, kind, object, labels)?;
            }
            crash::point("before-steering-commit");
            Ok(())
        })
    }

    /// Notes what a VM's machine has been given.
    ///
    /// # Errors
    /// The inventory cannot be written.
    pub fn in_force(&self, vm: &str, spec: &VmSpec) -> Result<()> {
        self.write("note what is in force", |tx| {
            tx.execute(
                "INSERT OR REPLACE INTO in_force (vm, spec) VALUES (?1, ?2)",
                params![vm, to_json(vm, spec)?],
            )?;
            Ok(())
        })
    }
}

fn set_labels(
    tx: &Transaction<'_>,
    kind: &str,
    object: &str,
    labels: &BTreeMap<String, String>,
) -> Attempt<()> {
    tx.execute(
        "DELETE FROM labels WHERE kind = ?1 AND object = ?2",
        params![kind, object],
    )?;
    for (key, value) in labels {
        tx.execute(
            "INSERT INTO labels (kind, object, key, value) VALUES (?1, ?2, ?3, ?4)",
            params![kind, object, key, value],
        )?;
    }
    Ok(())
}

/// What a VM's machine has been given.
pub(super) fn given(db: &Connection, vm: &str) -> Attempt<Option<VmSpec>> {
    let text: Option<String> = db
        .query_row("SELECT spec FROM in_force WHERE vm = ?1", [vm], |row| {
            row.get(0)
        })
        .optional()?;
    let record = format!("what is in force of VM '{vm}'");
    Ok(text.map(|text| from_json(&record, &text)).transpose()?)
}
