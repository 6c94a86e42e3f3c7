//! VMs as the API shows them: the inventory's record with the monitor's view.

use strake_api::control::{ExitReason, VmStatus};
use strake_api::rest::{Disk, Nic, Vm};
use strake_observe::Result;

use super::{Host, now_ms, tree};
use crate::inventory::VmRecord;
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
        records
            .into_iter()
            .map(|record| self.view(record, Depth::Record))
            .collect()
    }

    /// One VM, with what its monitor tells.
    ///
    /// # Errors
    /// No such VM, or the inventory cannot be read.
    pub fn vm(&self, name: &str) -> Result<Vm> {
        self.view(self.inventory.vm(name)?, Depth::Monitor)
    }

    fn view(&self, record: VmRecord, depth: Depth) -> Result<Vm> {
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
        Ok(Vm {
            revision: record.revision,
            state,
            pid: monitor.as_ref().map(|monitor| monitor.process.pid()),
            uptime_ms: status
                .as_ref()
                .map(|status| status.uptime_ms)
                .or_else(since_start),
            last_exit: trouble.map(ExitReason::Failed).or(record.last_exit),
            disks: record
                .disks
                .into_iter()
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
            spec: record.spec,
        })
    }
}

fn counters(status: &VmStatus, disk: &str) -> Option<strake_api::control::DiskCounters> {
    status
        .disks
        .iter()
        .find(|of| of.name == disk)
        .map(|of| of.counters)
}
