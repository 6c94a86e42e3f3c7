//! Profiles, effective values and changes of values, as the REST API has them.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/profiles` | list of [`ProfileSummary`] |
//! | `POST /v1/profiles` with [`ApplyProfiles`] | [`SteerPlan`] |
//! | `GET /v1/profiles/{name}` | [`ProfileText`] |
//! | `DELETE /v1/profiles/{name}?plan=true\|false&force=true\|false` | [`SteerPlan`] |
//! | `GET /v1/vms/{name}/effective` | list of [`EffectiveObject`] |
//! | `POST /v1/vms/{name}/set` with [`SetValues`] | [`SteerPlan`] |
//! | `POST /v1/labels` with [`SetLabels`] | [`SteerPlan`] |
//! | `GET /v1/schema` | the JSON Schema of a VM's spec |

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use strake_observe::Observation;
use strake_profile::{ChangeClass, Explained, Value};

/// A profile's file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileFile {
    /// Its name, for whoever asks where a value comes from.
    pub file: String,
    /// What is in it: TOML.
    pub text: String,
}

/// Asks for profiles to be put in force together, each in place of the one of its name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyProfiles {
    /// Their files.
    pub profiles: Vec<ProfileFile>,
    /// Only tell what it would change.
    #[serde(default)]
    pub plan: bool,
}

/// A profile among others.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProfileSummary {
    /// Its name.
    pub name: String,
    /// The higher wins.
    pub priority: i32,
    /// The file that it was read from.
    pub file: String,
    /// What it is for.
    pub description: String,
    /// How many rules it has.
    pub rules: u32,
    /// How many objects it is about.
    pub objects: u32,
}

/// A profile as it was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProfileText {
    /// What it is.
    #[serde(flatten)]
    pub summary: ProfileSummary,
    /// The objects that it is about.
    pub matches: Vec<String>,
    /// Its text.
    pub text: String,
}

/// When a changed value is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// At once.
    Now,
    /// With the next start: the VM does not run.
    NextStart,
    /// With the next fast restart.
    FastRestart,
    /// With the guest's next power cycle.
    Reboot,
}

impl When {
    /// When a change of this class is in force.
    #[must_use]
    pub fn of(class: ChangeClass, runs: bool) -> Self {
        match (class, runs) {
            (_, false) => Self::NextStart,
            (ChangeClass::Live, true) => Self::Now,
            (ChangeClass::Restart, true) => Self::FastRestart,
            (ChangeClass::Reboot, true) => Self::Reboot,
        }
    }

    /// For people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Now => "now",
            Self::NextStart => "at the next start",
            Self::FastRestart => "needs a fast restart",
            Self::Reboot => "needs a reboot",
        }
    }
}

/// A value of an object that changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedChange {
    /// The object: `web1`, `web1/root`.
    pub object: String,
    /// The field's path.
    pub path: String,
    /// What it is.
    pub from: Option<Value>,
    /// What it is to be.
    pub to: Option<Value>,
    /// Both, for people.
    pub shown: String,
    /// What the change takes.
    pub class: ChangeClass,
    /// When it is in force.
    pub when: When,
}

/// What a change of profiles, labels or values changes, or would change.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SteerPlan {
    /// Whether it was done.
    pub applied: bool,
    /// Objects × values.
    pub changes: Vec<PlannedChange>,
    /// Conflicts that it brings about; nothing is done then.
    pub conflicts: Vec<Observation>,
    /// What is odd, but no obstacle.
    pub warnings: Vec<Observation>,
}

/// What holds for one object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EffectiveObject {
    /// The object: `web1`, `web1/root`.
    pub object: String,
    /// Its kind.
    pub kind: String,
    /// The profiles that are about it, the lowest priority first.
    pub profiles: Vec<String>,
    /// Its fields, each with its history.
    pub values: Vec<Explained>,
    /// What cannot hold together.
    pub conflicts: Vec<Observation>,
    /// Values that the running machine does not have yet.
    pub pending: Vec<PlannedChange>,
}

/// Asks for other values of a VM and its devices.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetValues {
    /// By field, as `strake set` writes it (`cpus`, `labels.team`, `disk.root.iops`): the value, or
    /// null for none of its own.
    pub values: BTreeMap<String, Option<String>>,
    /// Only tell what it would change.
    #[serde(default)]
    pub plan: bool,
}

/// Asks for other labels of a VM, a datastore or the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetLabels {
    /// `web1`, `datastore/fast` or `host`.
    pub object: String,
    /// By key: the value, or null to take the label away.
    pub labels: BTreeMap<String, Option<String>>,
    /// Only tell what it would change.
    #[serde(default)]
    pub plan: bool,
}
