//! Own values and labels change.

use std::collections::BTreeMap;

use strake_api::schema::{parse_target, schema};
use strake_api::spec::{MAX_LABEL_VALUE, MAX_NAME, VmSpec, check_name};
use strake_api::steer::{PlannedChange, SetLabels, SetValues, SteerPlan, When};
use strake_observe::{Observation, Result};
use strake_profile::ChangeClass;

use super::apply::refuse_conflicts;
use super::force::differences;
use super::objects::{Place, effective_spec, objects, stores_of};
use crate::crash;
use crate::daemon::{Host, guard, task};
use crate::inventory::{Steering, VmRecord};
use crate::observations::{SetFailed, ValueRefused};

impl Host {
    /// Gives a VM other values of its own, or tells what that would change.
    ///
    /// # Errors
    /// [`SetFailed`], with the reason; nothing has changed then.
    pub fn set_values(&self, vm: &str, request: &SetValues) -> Result<SteerPlan> {
        let failed = || SetFailed {
            object: vm.to_owned(),
        };
        task(format!("set values of VM '{vm}'"), failed, |_| {
            let _steering = guard(&self.steering);
            let record = self.inventory.vm(vm)?;
            let own = record.spec()?.clone();
            let mut spec = own.clone();
            let mut told = Vec::new();
            for (target, text) in &request.values {
                let (part, path) =
                    parse_target(&own, target).map_err(|reason| refused(target, &reason))?;
                let field = schema()
                    .slot(&path)
                    .and_then(|slot| schema().field(slot.field));
                let field = field.ok_or_else(|| refused(target, "is no field"))?;
                let value = text
                    .as_deref()
                    .map(|text| field.value.parse(text))
                    .transpose()
                    .map_err(|reason| refused(target, &reason))?;
                let was = spec.value(&part, &path);
                spec.put(&part, &path, value.clone())
                    .map_err(|reason| refused(target, &reason))?;
                if was != value && field.path == "labels" {
                    told.push(PlannedChange {
                        object: part.id(vm),
                        path,
                        shown: shown(was.as_ref(), value.as_ref()),
                        from: was,
                        to: value,
                        class: ChangeClass::Live,
                        when: When::Now,
                    });
                }
            }
            spec.validate()?;
            self.check_boot_files(&spec)?;
            let mut plan = self.respec(&record, &spec, &self.place_now()?)?;
            plan.changes.splice(0..0, told);
            if request.plan {
                return Ok(plan);
            }
            refuse_conflicts(&mut plan)?;
            if spec != own {
                self.inventory.steer(&Steering {
                    spec: Some((vm, &spec)),
                    ..Steering::default()
                })?;
                crash::point("after-steering-commit");
                self.bring_all_into_force();
            }
            plan.applied = true;
            Ok(plan)
        })
    }

    /// What another spec, or another place, would make of a VM.
    fn respec(&self, record: &VmRecord, spec: &VmSpec, place: &Place) -> Result<SteerPlan> {
        let set = self.profiles_now();
        let (vm, stores) = (&record.name, stores_of(record));
        let now = self.place_now()?;
        let made = |spec: &VmSpec, place: &Place| {
            effective_spec(&set, spec, &objects(vm, spec, &stores, place))
        };
        let mut plan = SteerPlan::default();
        match (made(record.spec()?, &now), made(spec, place)) {
            (_, Err(seen)) => plan.conflicts = seen.causes().to_vec(),
            (Ok(before), Ok(after)) => {
                after.validate()?;
                let changes = differences(vm, &before, &after, self.runs(vm));
                plan.changes = changes.into_iter().map(|(_, change)| change).collect();
                self.remark_overridden(&mut plan, record, spec, &after);
            }
            (Err(_), Ok(_)) => {} // It settles a conflict.
        }
        Ok(plan)
    }

    /// Own values that a lock holds against are set all the same, and that is said.
    fn remark_overridden(
        &self,
        plan: &mut SteerPlan,
        record: &VmRecord,
        spec: &VmSpec,
        after: &VmSpec,
    ) {
        for part in spec.parts() {
            for (path, value) in spec.values(&part) {
                let own = record.spec().ok();
                let was = own.and_then(|own| own.value(&part, &path));
                let changed = was.as_ref() != Some(&value);
                if changed && after.value(&part, &path).as_ref() != Some(&value) {
                    let overridden = crate::observations::ValueOverridden {
                        object: part.id(&record.name),
                        value: shown_value(&path, &value),
                        path,
                        vm: record.name.clone(),
                    };
                    plan.warnings.push(overridden.into());
                }
            }
        }
    }

    /// Gives a VM, a datastore or the host other labels, or tells what that would change.
    ///
    /// # Errors
    /// [`SetFailed`], with the reason; nothing has changed then.
    pub fn set_labels(&self, request: &SetLabels) -> Result<SteerPlan> {
        let object = request.object.as_str();
        let (kind, name) = match object.split_once('/') {
            _ if object == "host" => ("host", ""),
            Some(("datastore", name)) => ("datastore", name),
            _ => {
                let values = request.labels.iter();
                let values = values.map(|(key, value)| (format!("labels.{key}"), value.clone()));
                return self.set_values(
                    object.strip_prefix("vm/").unwrap_or(object),
                    &SetValues {
                        values: values.collect(),
                        plan: request.plan,
                    },
                );
            }
        };
        let failed = || SetFailed {
            object: object.to_owned(),
        };
        task(format!("label {object}"), failed, |_| {
            if kind == "datastore" {
                self.inventory.datastore(name)?;
            }
            let _steering = guard(&self.steering);
            let mut all = self.inventory.labels()?;
            let labels = all.entry((kind.to_owned(), name.to_owned())).or_default();
            change_labels(labels, &request.labels)?;
            let labels = labels.clone();
            let stores = self.inventory.datastores()?.into_iter();
            let place = Place::new(all, stores.map(|store| store.name));
            let mut plan = SteerPlan::default();
            for (record, spec) in self.steered()? {
                let one = self.respec(&record, &spec, &place)?;
                plan.changes.extend(one.changes);
                plan.conflicts.extend(one.conflicts);
            }
            if request.plan {
                return Ok(plan);
            }
            refuse_conflicts(&mut plan)?;
            self.inventory.steer(&Steering {
                labels: Some((kind, name, &labels)),
                ..Steering::default()
            })?;
            crash::point("after-steering-commit");
            self.bring_all_into_force();
            plan.applied = true;
            Ok(plan)
        })
    }

    fn check_boot_files(&self, spec: &VmSpec) -> Result<()> {
        crate::daemon::create::check_boot_files(&spec.boot)
    }
}

fn change_labels(
    labels: &mut BTreeMap<String, String>,
    changes: &BTreeMap<String, Option<String>>,
) -> Result<()> {
    for (key, value) in changes {
        check_name(key, MAX_NAME).map_err(|reason| refused(key, &reason))?;
        match value {
            Some(value) if value.len() > MAX_LABEL_VALUE || value.chars().any(char::is_control) => {
                return Err(refused(key, "is one line of at most 253 bytes"));
            }
            Some(value) => labels.insert(key.clone(), value.clone()),
            None => labels.remove(key),
        };
    }
    Ok(())
}

fn shown(from: Option<&strake_profile::Value>, to: Option<&strake_profile::Value>) -> String {
    let show = |value: Option<&strake_profile::Value>| {
        value.map_or_else(|| "–".to_owned(), ToString::to_string)
    };
    format!("{} → {}", show(from), show(to))
}

/// A value as its field is written.
fn shown_value(path: &str, value: &strake_profile::Value) -> String {
    let field = schema()
        .slot(path)
        .and_then(|slot| schema().field(slot.field));
    field.map_or_else(|| value.to_string(), |field| field.value.show(value))
}

fn refused(target: &str, reason: &str) -> Observation {
    ValueRefused {
        target: target.escape_debug().to_string(),
        reason: reason.to_owned(),
    }
    .into()
}
