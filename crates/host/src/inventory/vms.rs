//! VMs, their disks with the binding, and their interfaces in the inventory.

use std::path::PathBuf;

use rusqlite::{Connection, OptionalExtension, Row, params};
use strake_api::control::ExitReason;
use strake_api::export::ExportSpec;
use strake_api::spec::VmSpec;
use strake_observe::{Observation, Result};

use super::layers::{self, LayerId, LayerRecord};
use super::{Attempt, Inventory, from_json, from_sql, to_json, to_sql};
use crate::observations::{
    DiskExported, InventoryCorrupt, NicConflict, NoSuchVm, NotAVm, VmExists,
};
use crate::{Binding, FileIdentity, Location};

/// What the inventory remembers of a VM's state: what a daemon that comes back must look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredState {
    /// No monitor, or one whose guest has ended.
    Stopped,
    /// A monitor may have been started; whether it was configured is not known. Unless its process
    /// is recorded, it was not.
    Starting,
    /// A monitor runs the guest.
    Running,
    /// The guest asked for a reset: the VM is to be started again once its monitor has ended.
    Restarting,
    /// The monitor ended by itself; `last_exit` says why.
    Failed,
}

impl StoredState {
    fn name(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Restarting => "restarting",
            Self::Failed => "failed",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [
            Self::Stopped,
            Self::Starting,
            Self::Running,
            Self::Restarting,
            Self::Failed,
        ]
        .into_iter()
        .find(|state| state.name() == name)
    }
}

/// What a monitor runs.
#[derive(Debug, Clone, PartialEq)]
pub enum Workload {
    /// A guest.
    Vm(VmSpec),
    /// A disk for other programs.
    Export(ExportSpec),
}

/// A VM or an export.
#[derive(Debug, Clone)]
pub struct VmRecord {
    /// Its name.
    pub name: String,
    /// Grows with each change.
    pub revision: u64,
    /// What it is, in its own words.
    pub what: Workload,
    /// What a VM's machine was given when it last started, with what was changed since.
    pub in_force: Option<VmSpec>,
    /// What was last known of it.
    pub state: StoredState,
    /// Why it last ended.
    pub last_exit: Option<ExitReason>,
    /// Its monitor's process and when that started, in clock ticks since boot.
    pub process: Option<(u32, u64)>,
    /// During a handover the process of the other monitor, which may not run the guest.
    pub other_process: Option<(u32, u64)>,
    /// When the guest was started, in milliseconds since the epoch.
    pub started_ms: Option<u64>,
    /// Its disks, in the spec's order.
    pub disks: Vec<DiskRecord>,
    /// Its interfaces, in the spec's order.
    pub nics: Vec<NicRecord>,
}

/// A disk and its binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRecord {
    /// Its name in the spec.
    pub name: String,
    /// Its PCI slot.
    pub slot: u8,
    /// The binding: where its data is, and in which format.
    pub image: Binding,
    /// The datastore of that image.
    pub datastore: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Whether Strake created the image.
    pub created: bool,
    /// Which file the image was when it was created or, later, when a monitor last got it.
    pub file: Option<FileIdentity>,
    /// The files below the image, from the upper ones down: its header must name the same.
    pub below: Vec<PathBuf>,
    /// The layer that the image is based on, if that is one of the disk's own.
    pub parent: Option<LayerId>,
    /// The layers of the disk, the oldest first: its snapshots, and what is below other images.
    pub layers: Vec<LayerRecord>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicRecord {
    /// Its name in the spec.
    pub name: String,
    /// Its PCI slot.
    pub slot: u8,
    /// Its tap device.
    pub tap: String,
    /// The bridge that the tap joins.
    pub bridge: Option<String>,
    /// Its MAC address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
}

impl VmRecord {
    /// The spec of a VM.
    ///
    /// # Errors
    /// [`NotAVm`]: it is an export.
    pub fn spec(&self) -> Result<&VmSpec> {
        match &self.what {
            Workload::Vm(spec) => Ok(spec),
            Workload::Export(_) => Err(NotAVm {
                name: self.name.clone(),
            }
            .into()),
        }
    }
}

impl Inventory {
    /// All VMs and exports, by name.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn vms(&self) -> Result<Vec<VmRecord>> {
        self.read("list the VMs", |db| {
            let mut statement = db.prepare("SELECT name FROM vms ORDER BY name")?;
            let names = statement
                .query_map([], |row| row.get::<_, String>(0))?
                .collect::<rusqlite::Result<Vec<_>>>()?;
            names.iter().map(|name| find(db, name)).collect()
        })
    }

    /// One VM.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be read.
    pub fn vm(&self, name: &str) -> Result<VmRecord> {
        self.read("read a VM", |db| find(db, name))
    }

    /// Adds a VM that does not run.
    ///
    /// # Errors
    /// [`VmExists`]; [`NicConflict`] if a tap or MAC address belongs to another VM.
    pub fn add_vm(
        &self,
        name: &str,
        spec: &VmSpec,
        disks: &[DiskRecord],
        nics: &[NicRecord],
    ) -> Result<()> {
        let spec = to_json(name, spec)?;
        self.write("add a VM", |tx| {
            if exists(tx, name)? {
                return Err(Observation::from(VmExists {
                    vm: name.to_owned(),
                })
                .into());
            }
            tx.execute(
                "INSERT INTO vms (name, revision, spec, state) VALUES (?1, 1, ?2, 'stopped')",
                params![name, spec],
            )?;
            for (position, disk) in disks.iter().enumerate() {
                add_disk(tx, name, position as u64, disk)?;
            }
            for (position, nic) in nics.iter().enumerate() {
                for (what, column, value) in
                    [("tap", "tap", &nic.tap), ("MAC address", "mac", &nic.mac)]
                {
                    let owner = tx
                        .query_row(
                            &format!("SELECT vm FROM nics WHERE {column} = ?1"),
                            [value],
                            |row| row.get::<_, String>(0),
                        )
                        .optional()?;
                    if let Some(vm) = owner {
                        return Err(Observation::from(NicConflict {
                            what: what.to_owned(),
                            value: value.clone(),
                            vm,
                        })
                        .into());
                    }
                }
                tx.execute(
                    "INSERT INTO nics (vm, name, position, slot, tap, bridge, mac)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                    params![
                        name,
                        nic.name,
                        to_sql(position as u64),
                        nic.slot,
                        nic.tap,
                        nic.bridge,
                        nic.mac
                    ],
                )?;
            }
            Ok(())
        })
    }

    /// Adds an export that is not served yet.
    ///
    /// # Errors
    /// [`VmExists`]; [`DiskExported`] if another export stands for the same disk.
    pub fn add_export(&self, name: &str, spec: &ExportSpec, disk: &DiskRecord) -> Result<()> {
        let text = to_json(name, spec)?;
        let of = spec.of.as_ref();
        self.write("add an export", |tx| {
            if exists(tx, name)? {
                return Err(Observation::from(VmExists {
                    vm: name.to_owned(),
                })
                .into());
            }
            if let Some(of) = of
                && let Some(export) = export_of(tx, &of.vm, Some(&of.disk))?
            {
                return Err(Observation::from(DiskExported {
                    vm: of.vm.clone(),
                    disk: of.disk.clone(),
                    export,
                })
                .into());
            }
            tx.execute(
                "INSERT INTO vms (name, revision, spec, state, kind, of_vm, of_disk)
                     VALUES (?1, 1, ?2, 'stopped', 'export', ?3, ?4)",
                params![name, text, of.map(|of| &of.vm), of.map(|of| &of.disk)],
            )?;
            add_disk(tx, name, 0, disk)
        })
    }

    /// The export that stands for a disk of this VM, if there is one, with the disk.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn export_of(&self, vm: &str) -> Result<Option<(String, String)>> {
        self.read("look for exports", |db| {
            let Some(export) = export_of(db, vm, None)? else {
                return Ok(None);
            };
            let disk = db.query_row(
                "SELECT of_disk FROM vms WHERE name = ?1",
                [&export],
                |row| row.get(0),
            )?;
            Ok(Some((export, disk)))
        })
    }

    /// Removes a VM's record, and with it those of its disks and interfaces.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn remove_vm(&self, name: &str) -> Result<()> {
        self.write("remove a VM", |tx| {
            if tx.execute("DELETE FROM vms WHERE name = ?1", [name])? == 0 {
                return Err(missing(name).into());
            }
            Ok(())
        })
    }

    /// Notes that a monitor is about to be started with these files as its disks.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn vm_starting(&self, name: &str, files: &[(String, FileIdentity)]) -> Result<()> {
        self.write("change a VM", |tx| {
            for (disk, file) in files {
                tx.execute(
                    "UPDATE disks SET file = ?3 WHERE vm = ?1 AND name = ?2",
                    params![name, disk, to_json(name, file)?],
                )?;
            }
            let changed = tx.execute(
                "UPDATE vms SET revision = revision + 1, state = 'starting', pid = NULL,
                     pid_start = NULL, started_ms = NULL, other_pid = NULL,
                     other_pid_start = NULL WHERE name = ?1",
                params![name],
            )?;
            match changed {
                0 => Err(missing(name).into()),
                _ => Ok(()),
            }
        })
    }

    /// Notes which process the monitor is that was just started and was not given anything yet.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn vm_spawned(&self, name: &str, process: (u32, u64)) -> Result<()> {
        self.change(
            name,
            "UPDATE vms SET revision = revision + 1, pid = ?2, pid_start = ?3 WHERE name = ?1",
            params![name, process.0, to_sql(process.1)],
        )
    }

    /// Notes that the guest has ended and why; its monitor is still there.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn vm_ending(&self, name: &str, state: StoredState, why: &ExitReason) -> Result<()> {
        self.change(
            name,
            "UPDATE vms SET revision = revision + 1, state = ?2, last_exit = ?3 WHERE name = ?1",
            params![name, state.name(), to_json(name, why)?],
        )
    }

    /// Notes that the guest runs in this process.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn vm_running(&self, name: &str, process: (u32, u64), started_ms: u64) -> Result<()> {
        self.change(
            name,
            "UPDATE vms SET revision = revision + 1, state = 'running', pid = ?2,
                 pid_start = ?3, started_ms = ?4 WHERE name = ?1",
            params![name, process.0, to_sql(process.1), to_sql(started_ms)],
        )
    }

    /// Notes that no monitor runs any more, and why if it is known.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn vm_ended(&self, name: &str, state: StoredState, why: Option<&ExitReason>) -> Result<()> {
        let why = why.map(|why| to_json(name, why)).transpose()?;
        self.change(
            name,
            "UPDATE vms SET revision = revision + 1, state = ?2, pid = NULL, pid_start = NULL,
                 started_ms = NULL, other_pid = NULL, other_pid_start = NULL, last_exit = COALESCE(?3, last_exit) WHERE name = ?1",
            params![name, state.name(), why],
        )
    }

    /// Notes the process of a monitor that is to take the VM over.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn vm_handover_begins(&self, name: &str, other: (u32, u64)) -> Result<()> {
        self.change(
            name,
            "UPDATE vms SET revision = revision + 1, other_pid = ?2, other_pid_start = ?3
                 WHERE name = ?1",
            params![name, other.0, to_sql(other.1)],
        )
    }

    /// The decision of a handover: from now on the guest is `to`'s, and its VM is `spec`, if that
    /// changes; `given` is what its machine has. `from` must be whose it was. Does not wait for the disk, because the guest waits: a
    /// loss of power ends both monitors anyway.
    ///
    /// # Errors
    /// [`NoSuchVm`] if the guest is not `from`'s any more, or the inventory cannot be written.
    pub fn vm_handed_over(
        &self,
        name: &str,
        from: (u32, u64),
        to: (u32, u64),
        spec: Option<&VmSpec>,
        given: Option<&VmSpec>,
    ) -> Result<()> {
        let spec = spec.map(|spec| to_json(name, spec)).transpose()?;
        let given = given.map(|given| to_json(name, given)).transpose()?;
        self.write_soon("hand a VM over", |tx| {
            let changed = tx.execute(
                "UPDATE vms SET revision = revision + 1, other_pid = pid,
                     other_pid_start = pid_start, pid = ?2, pid_start = ?3,
                     spec = COALESCE(?6, spec)
                     WHERE name = ?1 AND state = 'running' AND pid = ?4 AND pid_start = ?5",
                params![name, to.0, to_sql(to.1), from.0, to_sql(from.1), spec],
            )?;
            if changed == 0 {
                return Err(missing(name).into());
            }
            if let Some(given) = given {
                tx.execute(
                    "INSERT OR REPLACE INTO in_force (vm, spec) VALUES (?1, ?2)",
                    params![name, given],
                )?;
            }
            Ok(())
        })
    }

    /// Makes certain that the guest is still `from`'s.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn vm_handover_called_off(&self, name: &str, from: (u32, u64)) -> Result<()> {
        self.change(
            name,
            "UPDATE vms SET revision = revision + 1, other_pid = NULL, other_pid_start = NULL,
                 pid = ?2, pid_start = ?3 WHERE name = ?1",
            params![name, from.0, to_sql(from.1)],
        )
    }

    /// Notes that only the monitor that has the guest is left.
    ///
    /// # Errors
    /// [`NoSuchVm`], or the inventory cannot be written.
    pub fn vm_handover_ended(&self, name: &str) -> Result<()> {
        self.change(
            name,
            "UPDATE vms SET revision = revision + 1, other_pid = NULL, other_pid_start = NULL
                 WHERE name = ?1",
            params![name],
        )
    }

    fn change(&self, name: &str, sql: &str, values: impl rusqlite::Params) -> Result<()> {
        self.write("change a VM", |tx| match tx.execute(sql, values)? {
            0 => Err(missing(name).into()),
            _ => Ok(()),
        })
    }

    /// Every disk that is bound to the image, as VM and disk.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn users_of_image(&self, image: &Location) -> Result<Vec<(String, DiskRecord)>> {
        self.read("look for an image", |db| users_of_image(db, image))
    }
}

fn add_disk(db: &Connection, vm: &str, position: u64, disk: &DiskRecord) -> Attempt<()> {
    db.execute(
        "INSERT INTO disks (vm, name, position, slot, image, datastore, size,
             read_only, created, file, format, below)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
        params![
            vm,
            disk.name,
            to_sql(position),
            disk.slot,
            disk.image.location.text()?,
            disk.datastore,
            to_sql(disk.size),
            disk.read_only,
            disk.created,
            disk.file
                .as_ref()
                .map(|file| to_json(&disk.name, file))
                .transpose()?,
            disk.image.format.name(),
            to_json(&disk.name, &disk.below)?,
        ],
    )?;
    Ok(())
}

/// An export that stands for this disk of a VM, or for any of its disks.
fn export_of(db: &Connection, vm: &str, disk: Option<&str>) -> Attempt<Option<String>> {
    Ok(db
        .query_row(
            "SELECT name FROM vms WHERE of_vm = ?1 AND of_disk = COALESCE(?2, of_disk)
                 ORDER BY name LIMIT 1",
            params![vm, disk],
            |row| row.get(0),
        )
        .optional()?)
}

pub(super) fn users_of_image(
    db: &Connection,
    image: &Location,
) -> Attempt<Vec<(String, DiskRecord)>> {
    let mut statement = db.prepare(&format!("{DISK}, vm FROM disks WHERE image = ?1"))?;
    let rows = statement.query_map([image.text()?], |row| {
        Ok((row.get::<_, String>(11)?, disk(row)?))
    })?;
    let rows = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    rows.into_iter()
        .map(|(vm, raw)| {
            let layers = layers::of_disk(db, &vm, &raw.name)?;
            Ok((vm, raw.known(layers)?))
        })
        .collect()
}

/// A binding as two columns have it.
pub(super) fn binding(record: &str, location: &str, format: &str) -> Result<Binding> {
    Ok(Binding {
        location: Location::parse(location)?,
        format: format.parse().map_err(|reason| InventoryCorrupt {
            record: record.to_owned(),
            reason,
        })?,
    })
}

fn missing(name: &str) -> Observation {
    NoSuchVm {
        vm: name.to_owned(),
    }
    .into()
}

fn exists(db: &Connection, name: &str) -> Attempt<bool> {
    Ok(db
        .query_row("SELECT 1 FROM vms WHERE name = ?1", [name], |_| Ok(()))
        .optional()?
        .is_some())
}

const DISK: &str =
    "SELECT name, slot, image, datastore, size, read_only, created, file, format, parent, below";

/// The columns of a disk as SQLite has them.
struct RawDisk {
    name: String,
    slot: u8,
    image: String,
    datastore: Option<String>,
    size: i64,
    read_only: bool,
    created: bool,
    file: Option<String>,
    format: String,
    parent: Option<i64>,
    below: String,
}

impl RawDisk {
    fn known(self, layers: Vec<LayerRecord>) -> Result<DiskRecord> {
        let record = format!("disk '{}'", self.name);
        Ok(DiskRecord {
            slot: self.slot,
            image: binding(&record, &self.image, &self.format)?,
            datastore: self.datastore,
            size: from_sql(self.size),
            read_only: self.read_only,
            created: self.created,
            file: self
                .file
                .map(|file| from_json(&record, &file))
                .transpose()?,
            below: from_json(&record, &self.below)?,
            parent: self.parent.map(LayerId),
            layers,
            name: self.name,
        })
    }
}

fn disk(row: &Row<'_>) -> rusqlite::Result<RawDisk> {
    Ok(RawDisk {
        name: row.get(0)?,
        slot: row.get(1)?,
        image: row.get(2)?,
        datastore: row.get(3)?,
        size: row.get(4)?,
        read_only: row.get(5)?,
        created: row.get(6)?,
        file: row.get(7)?,
        format: row.get(8)?,
        parent: row.get(9)?,
        below: row.get(10)?,
    })
}

fn nic(row: &Row<'_>) -> rusqlite::Result<NicRecord> {
    Ok(NicRecord {
        name: row.get(0)?,
        slot: row.get(1)?,
        tap: row.get(2)?,
        bridge: row.get(3)?,
        mac: row.get(4)?,
    })
}

/// The columns of a VM as SQLite has them.
struct Raw {
    revision: i64,
    spec: String,
    state: String,
    last_exit: Option<String>,
    pid: Option<u32>,
    pid_start: Option<i64>,
    started_ms: Option<i64>,
    kind: String,
    other_pid: Option<u32>,
    other_pid_start: Option<i64>,
}

fn find(db: &Connection, name: &str) -> Attempt<VmRecord> {
    let raw = db
        .query_row(
            "SELECT revision, spec, state, last_exit, pid, pid_start, started_ms, other_pid,
                 other_pid_start, kind FROM vms WHERE name = ?1",
            [name],
            |row| {
                Ok(Raw {
                    revision: row.get(0)?,
                    spec: row.get(1)?,
                    state: row.get(2)?,
                    last_exit: row.get(3)?,
                    pid: row.get(4)?,
                    pid_start: row.get(5)?,
                    started_ms: row.get(6)?,
                    other_pid: row.get(7)?,
                    other_pid_start: row.get(8)?,
                    kind: row.get(9)?,
                })
            },
        )
        .optional()?
        .ok_or_else(|| missing(name))?;
    let disks = db
        .prepare(&format!(
            "{DISK} FROM disks WHERE vm = ?1 ORDER BY position"
        ))?
        .query_map([name], disk)?
        .collect::<rusqlite::Result<Vec<_>>>()?
        .into_iter()
        .map(|raw| {
            let layers = layers::of_disk(db, name, &raw.name)?;
            Ok(raw.known(layers)?)
        })
        .collect::<Attempt<_>>()?;
    let nics = db
        .prepare("SELECT name, slot, tap, bridge, mac FROM nics WHERE vm = ?1 ORDER BY position")?
        .query_map([name], nic)?
        .collect::<rusqlite::Result<_>>()?;
    let record = format!("VM '{name}'");
    let what = match raw.kind.as_str() {
        "vm" => Workload::Vm(from_json(&record, &raw.spec)?),
        "export" => Workload::Export(from_json(&record, &raw.spec)?),
        other => {
            return Err(Observation::from(InventoryCorrupt {
                record,
                reason: format!("its kind is '{other}'"),
            })
            .into());
        }
    };
    Ok(VmRecord {
        name: name.to_owned(),
        revision: from_sql(raw.revision),
        what,
        in_force: super::steer::given(db, name)?,
        state: StoredState::parse(&raw.state).ok_or_else(|| {
            Observation::from(InventoryCorrupt {
                record: record.clone(),
                reason: format!("its state is '{}'", raw.state),
            })
        })?,
        last_exit: raw
            .last_exit
            .map(|why| from_json(&record, &why))
            .transpose()?,
        process: raw.pid.zip(raw.pid_start.map(from_sql)),
        other_process: raw.other_pid.zip(raw.other_pid_start.map(from_sql)),
        started_ms: raw.started_ms.map(from_sql),
        disks,
        nics,
    })
}
