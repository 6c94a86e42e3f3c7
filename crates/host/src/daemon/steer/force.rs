//! From what is to be to what the machines have.

use strake_api::control::{DiskLimits, Request};
use strake_api::schema::{ChangeClass, Part, Steer, Value, schema};
use strake_api::spec::VmSpec;
use strake_api::steer::{PlannedChange, When};
use strake_observe::Result;

use super::objects::Place;
use crate::daemon::live::Cell;
use crate::daemon::{Host, guard, note};
use crate::inventory::VmRecord;
use crate::monitor::connection::QUICK;

/// How the values of two specs of one VM differ.
pub(super) fn differences(
    vm: &str,
    from: &VmSpec,
    to: &VmSpec,
    runs: bool,
) -> Vec<(Part, PlannedChange)> {
    let mut found = Vec::new();
    for part in to.parts() {
        let paths = schema().fields().iter().filter(|field| {
            field.kind == part.kind() && field.path != "labels" && field.steer != Steer::Fixed
        });
        for field in paths {
            let (was, is) = (from.value(&part, field.path), to.value(&part, field.path));
            if was == is {
                continue;
            }
            let shown = |value: &Option<Value>| match value {
                Some(value) => field.value.show(value),
                None => "–".to_owned(),
            };
            let change = PlannedChange {
                object: part.id(vm),
                path: field.path.to_owned(),
                shown: format!("{} → {}", shown(&was), shown(&is)),
                from: was,
                to: is,
                class: field.change,
                when: When::of(field.change, runs),
            };
            found.push((part.clone(), change));
        }
    }
    found
}

impl Host {
    /// What a running machine does not have yet.
    pub(in crate::daemon) fn pending(
        &self,
        record: &VmRecord,
        place: &Place,
    ) -> Vec<PlannedChange> {
        let (Some(given), true) = (&record.in_force, self.runs(&record.name)) else {
            return Vec::new();
        };
        match self.effective(record, place) {
            Ok(wanted) => differences(&record.name, given, &wanted, true)
                .into_iter()
                .map(|(_, change)| change)
                .collect(),
            Err(_) => Vec::new(), // The conflict itself is told.
        }
    }

    /// What a machine is to be that takes the guest over: what the guest sees of it stays.
    pub(in crate::daemon) fn after_restart(
        &self,
        record: &VmRecord,
        place: &Place,
    ) -> Result<VmSpec> {
        let wanted = self.effective(record, place)?;
        let Some(mut spec) = record.in_force.clone() else {
            return Ok(wanted); // It was started before that was noted.
        };
        spec.labels.clone_from(&wanted.labels);
        for (part, change) in differences(&record.name, &spec.clone(), &wanted, true) {
            if change.class <= ChangeClass::Restart {
                // A value of the effective spec fits the same field of the same VM.
                let _ = spec.put(&part, &change.path, change.to);
            }
        }
        Ok(spec)
    }

    /// A machine that was given this has taken the guest over. Whatever was changed in the meantime
    /// reached the machine before it, at most.
    pub(in crate::daemon) fn given_anew(&self, cell: &Cell, given: &VmSpec) -> Result<()> {
        {
            let _forcing = guard(&self.forcing);
            self.inventory.in_force(&cell.name, given)?;
        }
        self.bring_into_force(cell)
    }

    pub(in crate::daemon) fn runs(&self, vm: &str) -> bool {
        self.existing_cell(vm)
            .is_some_and(|cell| cell.live().monitor.is_some())
    }

    /// Makes true of every machine that runs what can be made true while it runs. What fails is
    /// observed and stays pending; the next change, or the next start of the daemon, tries again.
    pub(in crate::daemon) fn bring_all_into_force(&self) {
        let vms = match self.inventory.vms() {
            Ok(vms) => vms,
            Err(seen) => return note(seen),
        };
        for record in vms {
            if let Some(cell) = self.existing_cell(&record.name)
                && let Err(seen) = self.bring_into_force(&cell)
            {
                note(seen);
            }
        }
    }

    /// Makes true of a machine what can be made true while it runs.
    pub(in crate::daemon) fn bring_into_force(&self, cell: &Cell) -> Result<()> {
        // One at a time, or an older value might overtake a newer one.
        let _forcing = guard(&self.forcing);
        let Some(monitor) = cell.live().monitor.clone() else {
            return Ok(());
        };
        let record = self.inventory.vm(&cell.name)?;
        let Some(given) = record.in_force.clone() else {
            return Ok(()); // It was started before there were profiles: its next start.
        };
        let wanted = self.effective(&record, &self.place_now()?)?;
        let mut has = given.clone();
        has.labels.clone_from(&wanted.labels);
        let live = differences(&cell.name, &given, &wanted, true)
            .into_iter()
            .filter(|(_, change)| change.class == ChangeClass::Live);
        for (part, change) in live {
            let put = |has: &mut VmSpec| has.put(&part, &change.path, change.to.clone());
            if put(&mut has).is_err() {
                continue;
            }
            if let (Part::Disk(disk), "disk.iops" | "disk.bandwidth") = (&part, &*change.path) {
                let request = Request::SetDiskLimits {
                    disk: disk.clone(),
                    limits: limits(&wanted, disk),
                };
                monitor
                    .connection()
                    .call("limit a disk", request, &[], QUICK)?;
            }
        }
        if has != given {
            self.inventory.in_force(&cell.name, &has)?;
        }
        Ok(())
    }
}

/// How fast the guest gets requests through to a disk of this spec.
pub(in crate::daemon) fn limits(spec: &VmSpec, disk: &str) -> DiskLimits {
    let disk = spec.disks.iter().find(|known| known.name == disk);
    DiskLimits {
        iops: disk.and_then(|disk| disk.iops),
        bandwidth: disk.and_then(|disk| disk.bandwidth).map(|rate| rate.0),
    }
}
