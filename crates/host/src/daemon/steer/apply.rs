//! Profiles are put in force, taken out, and shown.

use std::collections::BTreeMap;
use std::sync::Arc;

use strake_api::schema::{Part, schema};
use strake_api::steer::{
    ApplyProfiles, EffectiveObject, PlannedChange, ProfileSummary, ProfileText, SteerPlan, When,
};
use strake_observe::{Observation, Result};
use strake_profile::{Explained, Object, Profile, ProfileSet, plan};

use super::objects::{Place, objects, stores_of};
use crate::crash;
use crate::daemon::{Host, guard, note, task};
use crate::inventory::{ProfileRecord, Steering};
use crate::observations::{NoSuchProfile, ProfileInUse, ProfilesRefused, SteeringRefused};

/// Whether something is done or only told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// It is told what it would change.
    Plan,
    /// It is done, unless somebody would miss it.
    Do,
    /// It is done.
    Force,
}

impl Intent {
    /// A plan if `plan` says so.
    #[must_use]
    pub fn of(plan: bool) -> Self {
        if plan { Self::Plan } else { Self::Do }
    }
}

impl Host {
    /// All profiles, the lowest priority first.
    ///
    /// # Errors
    /// The inventory cannot be read.
    pub fn profiles(&self) -> Result<Vec<ProfileSummary>> {
        let objects = self.objects(&self.place_now()?)?;
        let set = self.profiles_now();
        let profiles = set.profiles().iter();
        Ok(profiles.map(|profile| summary(profile, &objects)).collect())
    }

    /// One profile, as it was written.
    ///
    /// # Errors
    /// [`NoSuchProfile`], or the inventory cannot be read.
    pub fn profile(&self, name: &str) -> Result<ProfileText> {
        let set = self.profiles_now();
        let profile = set.get(name).ok_or_else(|| no_such(name))?;
        let record = self.inventory.profiles()?;
        let record = record.into_iter().find(|record| record.name == name);
        let objects = self.objects(&self.place_now()?)?;
        Ok(ProfileText {
            summary: summary(profile, &objects),
            matches: objects
                .iter()
                .filter(|object| profile.selector.selects(object))
                .map(|object| object.id.clone())
                .collect(),
            text: record.ok_or_else(|| no_such(name))?.text,
        })
    }

    /// Puts profiles in force together, or tells what that would change.
    ///
    /// # Errors
    /// [`ProfilesRefused`] with what is wrong with them, or with the conflicts that they would bring
    /// about; what was in force stays in force.
    pub fn apply_profiles(&self, request: &ApplyProfiles) -> Result<SteerPlan> {
        let files = request.profiles.iter().map(|file| file.file.clone());
        let files = files.collect::<Vec<_>>().join(", ");
        let failed = || ProfilesRefused {
            files: files.clone(),
        };
        task(format!("apply {files}"), failed, |_| {
            let mut profiles = Vec::new();
            let mut records = Vec::new();
            for file in &request.profiles {
                let profile = Profile::from_toml(schema(), &file.text, &file.file)?;
                records.push(ProfileRecord {
                    name: profile.name().to_owned(),
                    file: file.file.clone(),
                    text: file.text.clone(),
                });
                profiles.push(Arc::new(profile));
            }
            let _steering = guard(&self.steering);
            let after = self.profiles_now().with(&profiles, &[])?;
            let change = Steering {
                profiles: &records,
                ..Steering::default()
            };
            self.change_profiles(after, &change, Intent::of(request.plan))
        })
    }

    /// Takes a profile out of force, or tells what that would change.
    ///
    /// # Errors
    /// [`NoSuchProfile`]; [`ProfileInUse`] if values of running VMs would change and nobody forces it.
    pub fn remove_profile(&self, name: &str, intent: Intent) -> Result<SteerPlan> {
        let _steering = guard(&self.steering);
        let before = self.profiles_now();
        before.get(name).ok_or_else(|| no_such(name))?;
        let after = before.with(&[], &[name])?;
        if intent == Intent::Do {
            let plan = self.compare_profiles(&before, &after)?;
            let users: Vec<_> = plan
                .changes
                .iter()
                .filter(|change| change.when != When::NextStart)
                .map(|change| format!("{} ({} {})", change.object, change.path, change.shown))
                .collect();
            if !users.is_empty() {
                return Err(ProfileInUse {
                    profile: name.to_owned(),
                    users: users.join(", "),
                }
                .into());
            }
        }
        let change = Steering {
            removed: &[name],
            ..Steering::default()
        };
        self.change_profiles(after, &change, intent)
    }

    /// The caller holds `steering`.
    fn change_profiles(
        &self,
        after: ProfileSet,
        change: &Steering<'_>,
        intent: Intent,
    ) -> Result<SteerPlan> {
        let mut plan = self.compare_profiles(&self.profiles_now(), &after)?;
        if intent == Intent::Plan {
            return Ok(plan);
        }
        refuse_conflicts(&mut plan)?;
        self.inventory.steer(change)?;
        crash::point("after-steering-commit");
        *guard(&self.profiles.0) = Arc::new(after);
        for warning in &plan.warnings {
            note(warning.clone());
        }
        self.bring_all_into_force();
        plan.applied = true;
        Ok(plan)
    }

    /// What another set of profiles would change.
    fn compare_profiles(&self, before: &ProfileSet, after: &ProfileSet) -> Result<SteerPlan> {
        let place = self.place_now()?;
        let (mut all, mut vms) = (Vec::new(), Vec::new());
        for (record, spec) in self.steered()? {
            for (_, object) in objects(&record.name, &spec, &stores_of(&record), &place) {
                all.push(object);
                vms.push(record.name.clone());
            }
        }
        let running: BTreeMap<&str, bool> =
            vms.iter().map(|vm| (vm.as_str(), self.runs(vm))).collect();
        let owner: BTreeMap<(&str, &str), &str> = all
            .iter()
            .zip(&vms)
            .map(|(object, vm)| ((object.kind(), object.id.as_str()), vm.as_str()))
            .collect();
        let told = plan(before, after, &all);
        let changes = told.changes.into_iter().map(|change| {
            let vm = owner.get(&(change.kind.as_str(), change.object.as_str()));
            let runs = vm.and_then(|vm| running.get(vm)).copied().unwrap_or(false);
            PlannedChange {
                when: When::of(change.class, runs),
                object: change.object,
                path: change.path,
                from: change.from,
                to: change.to,
                shown: change.shown,
                class: change.class,
            }
        });
        Ok(SteerPlan {
            applied: false,
            changes: changes.collect(),
            conflicts: told.conflicts.into_iter().map(|(_, seen)| seen).collect(),
            warnings: told.warnings,
        })
    }

    fn objects(&self, place: &Place) -> Result<Vec<Object>> {
        let vms = self.steered()?;
        let all = vms
            .iter()
            .flat_map(|(record, spec)| objects(&record.name, spec, &stores_of(record), place));
        Ok(all.map(|(_, object)| object).collect())
    }

    /// What holds for a VM and its devices, with the history of every value.
    ///
    /// # Errors
    /// No such VM, or the inventory cannot be read.
    pub fn effective_objects(&self, vm: &str) -> Result<Vec<EffectiveObject>> {
        let record = self.inventory.vm(vm)?;
        let place = self.place_now()?;
        let set = self.profiles_now();
        let pending = self.pending(&record, &place);
        let objects = objects(vm, record.spec()?, &stores_of(&record), &place);
        let one = |(part, object): &(Part, Object)| {
            let effective = set.effective(object);
            EffectiveObject {
                object: object.id.clone(),
                kind: part.kind().to_owned(),
                profiles: effective
                    .profiles
                    .iter()
                    .map(|profile| profile.name().to_owned())
                    .collect(),
                values: effective
                    .values
                    .iter()
                    .filter_map(|resolved| Explained::of(schema(), resolved))
                    .collect(),
                conflicts: effective
                    .conflicts
                    .iter()
                    .map(|seen| seen.observation())
                    .collect(),
                pending: pending
                    .iter()
                    .filter(|change| {
                        change.object == object.id
                            && strake_api::schema::schema()
                                .slot(&change.path)
                                .and_then(|slot| schema().field(slot.field))
                                .is_some_and(|field| field.kind == part.kind())
                    })
                    .cloned()
                    .collect(),
            }
        };
        Ok(objects.iter().map(one).collect())
    }
}

/// Nothing is done that brings about a conflict.
pub(super) fn refuse_conflicts(plan: &mut SteerPlan) -> Result<()> {
    if plan.conflicts.is_empty() {
        return Ok(());
    }
    let refused = SteeringRefused {
        conflicts: plan.conflicts.len(),
    };
    Err(Observation::from(refused).because_all(plan.conflicts.drain(..)))
}

fn no_such(profile: &str) -> Observation {
    NoSuchProfile {
        profile: profile.to_owned(),
    }
    .into()
}

fn summary(profile: &Profile, objects: &[Object]) -> ProfileSummary {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let selected = objects
        .iter()
        .filter(|object| profile.selector.selects(object));
    ProfileSummary {
        name: profile.head.name.clone(),
        priority: profile.head.priority,
        file: profile.head.file.clone(),
        description: profile.description.clone(),
        rules: count(profile.rules.len()),
        objects: count(selected.count()),
    }
}
