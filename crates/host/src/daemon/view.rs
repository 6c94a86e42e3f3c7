//! VMs as the API shows them: the inventory's record with the monitor's view.

use strake_api::control::{ExitReason, VmStatus};
use strake_api::export::{ExportSpec, NbdListen};
use strake_api::rest::{Disk, Export, Nic, Vm, VmState};
use strake_nbd::{Address, Security, Uri};
use strake_observe::Result;

use super::steer::Place;
use super::{Host, now_ms, tree};
use crate::inventory::{VmRecord, Workload};
use crate::observations::NoSuchExport;
use crate::storage::chain;

/// Whether the monitor is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    Record,
    Monitor,
}

impl Host {
    /// All VMs, by name. Their monitors are not asked, so that one that hangs holds up nobody.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn vms(&self) -> Result<Vec<Vm>> {
        let records = self.inventory.vms()?;
        let place = self.place_now()?;
        records
            .into_iter()
            .filter(|record| matches!(record.what, Workload::Vm(_)))
            .map(|record| self.view(record, Depth::Record, &place))
            .collect()
    }

    /// One VM, with what its monitor tells.
    ///
    /// # Errors
    /// No such VM, or the inventory cannot be read.
    pub fn vm(&self, name: &str) -> Result<Vm> {
        self.view(self.inventory.vm(name)?, Depth::Monitor, &self.place_now()?)
    }

    fn view(&self, record: VmRecord, depth: Depth, place: &Place) -> Result<Vm> {
        let own = record.spec()?.clone();
        let pending = self.pending(&record, place);
        // In conflict, or with an inventory that nobody steered: its own words.
        let spec = match (&record.in_force, self.runs(&record.name)) {
            (Some(given), true) => given.clone(),
            _ => self
                .effective(&record, place)
                .unwrap_or_else(|_| own.clone()),
        };
        let shown = self.shown(&record, depth)?;
        Ok(Vm {
            revision: record.revision,
            state: shown.state,
            pid: shown.pid,
            uptime_ms: shown.uptime_ms,
            last_exit: shown.last_exit,
            disks: shown.disks,
            nics: record
                .nics
                .into_iter()
                .map(|nic| Nic {
                    name: nic.name,
                    tap: nic.tap,
                    mac: nic.mac,
                    slot: nic.slot,
                })
                .collect(),
            name: record.name,
            spec,
            own,
            pending,
        })
    }

    /// All exports, by name. Their monitors are not asked.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn exports(&self) -> Result<Vec<Export>> {
        let records = self.inventory.vms()?;
        records
            .into_iter()
            .filter(|record| matches!(record.what, Workload::Export(_)))
            .map(|record| self.export_view(record, Depth::Record))
            .collect()
    }

    /// One export, with what its monitor tells.
    ///
    /// # Errors
    /// No such export, or the inventory cannot be read.
    pub fn export(&self, name: &str) -> Result<Export> {
        self.export_view(self.export_record(name)?, Depth::Monitor)
    }

    fn export_view(&self, record: VmRecord, depth: Depth) -> Result<Export> {
        let missing = || NoSuchExport {
            export: record.name.clone(),
        };
        let Workload::Export(spec) = &record.what else {
            return Err(missing().into());
        };
        let shown = self.shown(&record, depth)?;
        let disk = shown.disks.into_iter().next();
        Ok(Export {
            state: shown.state,
            nbd_uri: nbd_uri(&record.name, spec),
            pid: shown.pid,
            uptime_ms: shown.uptime_ms,
            last_exit: shown.last_exit,
            disk: disk.ok_or_else(missing)?,
            spec: spec.clone(),
            name: record.name,
        })
    }

    /// What VMs and exports have in common.
    fn shown(&self, record: &VmRecord, depth: Depth) -> Result<Shown> {
        let cell = self.cell(&record.name)?;
        let allowed = self.allowed_below()?;
        let (state, monitor, trouble) = {
            let live = cell.live();
            (live.state, live.monitor.clone(), live.trouble.clone())
        };
        let status = match depth {
            Depth::Record => None,
            Depth::Monitor => monitor.as_ref().and_then(|monitor| monitor.status()),
        };
        let since_start = || {
            let started = monitor.as_ref()?.started_ms;
            Some(now_ms().saturating_sub(started))
        };
        Ok(Shown {
            state,
            pid: monitor.as_ref().map(|monitor| monitor.process.pid()),
            uptime_ms: status
                .as_ref()
                .map(|status| status.uptime_ms)
                .or_else(since_start),
            last_exit: match (trouble, depth) {
                (Some(seen), _) => Some(ExitReason::Failed(seen)),
                (None, Depth::Record) => record.last_exit.clone(),
                // An end is recorded before it is shown: a record from before the look at what the
                // VM does may not have it.
                (None, Depth::Monitor) => self.inventory.vm(&record.name)?.last_exit,
            },
            disks: record
                .disks
                .iter()
                .cloned()
                .map(|disk| {
                    let snapshots = tree::snapshots(&disk);
                    let looks = chain::look(&disk.image, &allowed).ok().flatten();
                    Disk {
                        image: disk.image.to_string(),
                        format: disk.image.format,
                        datastore: disk.datastore,
                        size_bytes: looks.as_ref().map_or(disk.size, |looks| looks.size),
                        allocated_bytes: looks.as_ref().map(|looks| looks.allocated),
                        snapshots,
                        slot: disk.slot,
                        counters: status
                            .as_ref()
                            .and_then(|status| counters(status, &disk.name)),
                        name: disk.name,
                    }
                })
                .collect(),
        })
    }
}

/// What VMs and exports have in common.
struct Shown {
    state: VmState,
    pid: Option<u32>,
    uptime_ms: Option<u64>,
    last_exit: Option<ExitReason>,
    disks: Vec<Disk>,
}

/// The address of an export, as clients on this host write it.
fn nbd_uri(name: &str, spec: &ExportSpec) -> Option<String> {
    let address = match spec.nbd.clone()? {
        NbdListen::Unix(path) => Address::Unix(path.into()),
        NbdListen::Tcp { host, port } => Address::Tcp { host, port },
    };
    let mut uri = Uri::new(address, name);
    if spec.tls_dir.is_some() {
        uri.security = Security::Tls;
    }
    Some(uri.to_string())
}

fn counters(status: &VmStatus, disk: &str) -> Option<strake_api::control::DiskCounters> {
    status
        .disks
        .iter()
        .find(|of| of.name == disk)
        .map(|of| of.counters)
}
