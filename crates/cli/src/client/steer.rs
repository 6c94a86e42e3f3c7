//! Profiles, values and labels.

use hyper::Method;
use strake_api::steer::{
    ApplyProfiles, EffectiveObject, ProfileSummary, ProfileText, SetLabels, SetValues, SteerPlan,
};
use strake_observe::Result;

use super::{Client, PATIENCE, segment};

impl Client {
    /// Every profile, the lowest priority first.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn profiles(&self) -> Result<Vec<ProfileSummary>> {
        self.get("/v1/profiles").await
    }

    /// One profile.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn profile(&self, name: &str) -> Result<ProfileText> {
        self.get(&format!("/v1/profiles/{}", segment(name))).await
    }

    /// Puts profiles in force, or asks what that would change.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn apply_profiles(&self, request: &ApplyProfiles) -> Result<SteerPlan> {
        self.post("/v1/profiles", request, PATIENCE).await
    }

    /// Takes a profile out of force, or asks what that would change.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn remove_profile(&self, name: &str, plan: bool, force: bool) -> Result<SteerPlan> {
        let path = format!("/v1/profiles/{}?plan={plan}&force={force}", segment(name));
        let answer = self
            .exchange::<()>(Method::DELETE, &path, None, PATIENCE)
            .await?;
        answer.read()
    }

    /// What holds for a VM and its devices, and why.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn effective(&self, vm: &str) -> Result<Vec<EffectiveObject>> {
        self.get(&format!("/v1/vms/{}/effective", segment(vm)))
            .await
    }

    /// Gives a VM other values, or asks what that would change.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn set_values(&self, vm: &str, request: &SetValues) -> Result<SteerPlan> {
        let path = format!("/v1/vms/{}/set", segment(vm));
        self.post(&path, request, PATIENCE).await
    }

    /// Gives an object other labels, or asks what that would change.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn set_labels(&self, request: &SetLabels) -> Result<SteerPlan> {
        self.post("/v1/labels", request, PATIENCE).await
    }
}
