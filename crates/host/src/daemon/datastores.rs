//! Datastores: add, list, remove.

use strake_api::rest::{AddDatastore, Datastore};
use strake_api::spec::{MAX_NAME, check_name};
use strake_observe::Result;

use super::Host;
use crate::config::show;
use crate::inventory::DatastoreRecord;
use crate::observations::{BadName, DatastoreRefused};
use crate::storage::store;

impl Host {
    /// Adds a directory as a datastore.
    ///
    /// # Errors
    /// [`BadName`], [`DatastoreRefused`], or the name or directory is taken.
    pub fn add_datastore(&self, request: &AddDatastore) -> Result<Datastore> {
        let name = &request.name;
        check_name(name, MAX_NAME).map_err(|reason| BadName {
            what: "datastore".to_owned(),
            name: name.clone(),
            reason,
        })?;
        let path = store::admit(name, &request.path)?;
        for other in self.inventory.datastores()? {
            // A bind mount has another path and is the same directory nevertheless.
            if other.path != path && store::same_file(&other.path, &path) {
                return Err(DatastoreRefused {
                    datastore: name.clone(),
                    path: show(&path),
                    reason: format!("it is the directory of datastore '{}'", other.name),
                }
                .into());
            }
        }
        self.inventory.add_datastore(name, &show(&path))?;
        Ok(view(self.inventory.datastore(name)?))
    }

    /// All datastores with their room; one that cannot be reached says why.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn datastores(&self) -> Result<Vec<Datastore>> {
        Ok(self.inventory.datastores()?.into_iter().map(view).collect())
    }

    /// Removes a datastore that nothing uses; its directory stays as it is.
    ///
    /// # Errors
    /// No such datastore, or disks or jobs use it.
    pub fn remove_datastore(&self, name: &str) -> Result<()> {
        self.inventory.remove_datastore(name)
    }
}

fn view(record: DatastoreRecord) -> Datastore {
    let (room, problem) = match store::room(&record.name, &record.path) {
        Ok(room) => (Some(room), None),
        Err(seen) => (None, Some(seen)),
    };
    Datastore {
        path: show(&record.path),
        name: record.name,
        size_bytes: room.map(|room| room.size),
        free_bytes: room.map(|room| room.free),
        disks: record.disks,
        problem,
    }
}
