//! VMs, disks and interfaces as objects that profiles are about.

use std::collections::BTreeMap;
use std::sync::Arc;

use strake_api::schema::{Part, schema};
use strake_api::spec::VmSpec;
use strake_observe::{Observation, Result};
use strake_profile::{Identity, Object, ProfileSet, Steer};

use crate::daemon::Host;
use crate::inventory::{Labels, VmRecord};
use crate::observations::EffectiveConflict;

/// Labels of one thing.
type LabelSet = Arc<BTreeMap<String, String>>;

/// What objects are near to: the labels of the host and of its datastores.
#[derive(Debug, Clone)]
pub(in crate::daemon) struct Place {
    host: LabelSet,
    stores: BTreeMap<String, LabelSet>,
}

impl Place {
    pub(super) fn new(mut labels: Labels, stores: impl Iterator<Item = String>) -> Self {
        let key = |kind: &str, name: &str| (kind.to_owned(), name.to_owned());
        let mut host = labels.remove(&key("host", "")).unwrap_or_default();
        host.extend(facts());
        let stores = stores.map(|name| {
            let mut known = labels.remove(&key("datastore", &name)).unwrap_or_default();
            known.insert("name".to_owned(), name.clone());
            (name, Arc::new(known))
        });
        Self {
            stores: stores.collect(),
            host: Arc::new(host),
        }
    }
}

/// What is known of this host without anybody saying it.
fn facts() -> BTreeMap<String, String> {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .map(|text| text.trim().to_owned())
            .unwrap_or_default()
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    [
        ("hostname", read("/proc/sys/kernel/hostname")),
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("arch", std::env::consts::ARCH.to_owned()),
        ("cpus", cpus.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}

/// The objects of a VM with this spec.
pub(super) fn objects(
    vm: &str,
    spec: &VmSpec,
    stores: &BTreeMap<String, Option<String>>,
    place: &Place,
) -> Vec<(Part, Object)> {
    let identity = |part: &Part| Identity {
        kind: part.kind().to_owned(),
        name: match part {
            Part::Vm => vm.to_owned(),
            Part::Disk(name) | Part::Nic(name) => name.clone(),
        },
        labels: spec.labels.clone(),
    };
    let whole = Arc::new(identity(&Part::Vm));
    let object = |part: Part| {
        let mut object = Object::new(part.id(vm), identity(&part));
        object = object.near("host", Arc::clone(&place.host));
        if part != Part::Vm {
            object = object.part_of(Arc::clone(&whole));
        }
        if let Part::Disk(name) = &part
            && let Some(Some(store)) = stores.get(name)
            && let Some(labels) = place.stores.get(store)
        {
            object = object.near("datastore", Arc::clone(labels));
        }
        for (path, value) in spec.values(&part) {
            object = object.own(schema(), &path, value);
        }
        (part, object)
    };
    spec.parts().into_iter().map(object).collect()
}

/// Which datastore each disk lies in.
pub(super) fn stores_of(record: &VmRecord) -> BTreeMap<String, Option<String>> {
    let disks = record.disks.iter();
    disks
        .map(|disk| (disk.name.clone(), disk.datastore.clone()))
        .collect()
}

/// The spec that profiles make of a spec.
pub(super) fn effective_spec(
    set: &ProfileSet,
    spec: &VmSpec,
    objects: &[(Part, Object)],
) -> Result<VmSpec> {
    let mut made = spec.clone();
    for (part, object) in objects {
        let effective = set.effective(object);
        if !effective.conflicts.is_empty() {
            let conflict = EffectiveConflict {
                object: object.id.clone(),
            };
            let causes = effective.conflicts.iter().map(|seen| seen.observation());
            return Err(Observation::from(conflict).because_all(causes));
        }
        for resolved in &effective.values {
            let steered = schema()
                .field(resolved.slot.field)
                .is_some_and(|field| field.steer == Steer::Profiles);
            if steered {
                let path = schema().path(&resolved.slot);
                let value = resolved.value.as_deref().cloned();
                made.put(part, &path, value).map_err(|reason| {
                    Observation::from(crate::observations::Internal {
                        what: format!("'{path}' of {} {reason}", object.id),
                    })
                })?;
            }
        }
    }
    Ok(made)
}

impl Host {
    /// The VMs of the inventory, each with its own spec.
    pub(super) fn steered(&self) -> Result<Vec<(VmRecord, VmSpec)>> {
        let all = self.inventory.vms()?.into_iter();
        let vms = all.filter_map(|record| {
            let spec = record.spec().ok()?.clone();
            Some((record, spec))
        });
        Ok(vms.collect())
    }

    /// What the objects of this host are near to.
    pub(in crate::daemon) fn place_now(&self) -> Result<Place> {
        let stores = self.inventory.datastores()?.into_iter();
        Ok(Place::new(
            self.inventory.labels()?,
            stores.map(|store| store.name),
        ))
    }

    /// The spec that profiles make of a VM's own.
    pub(in crate::daemon) fn effective(&self, record: &VmRecord, place: &Place) -> Result<VmSpec> {
        let spec = record.spec()?;
        let objects = objects(&record.name, spec, &stores_of(record), place);
        effective_spec(&self.profiles_now(), spec, &objects)
    }

    /// The spec that profiles make of that of a VM that is yet to be.
    pub(in crate::daemon) fn effective_of_new(
        &self,
        name: &str,
        spec: &VmSpec,
        stores: &BTreeMap<String, Option<String>>,
    ) -> Result<VmSpec> {
        let objects = objects(name, spec, stores, &self.place_now()?);
        effective_spec(&self.profiles_now(), spec, &objects)
    }
}
