//! Profiles, values and labels over HTTP: [`strake_api::steer`] as routes.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use strake_api::steer::{ApplyProfiles, SetLabels, SetValues};

use super::query::Query;
use super::{Answer, Shared, answer, body};
use crate::Host;
use crate::daemon::Intent;

pub(super) fn routes() -> Router<Arc<Host>> {
    Router::new()
        .route("/v1/profiles", get(profiles).post(apply))
        .route("/v1/profiles/{name}", get(profile).delete(remove))
        .route("/v1/vms/{name}/effective", get(effective))
        .route("/v1/vms/{name}/set", post(set))
        .route("/v1/labels", post(label))
        .route("/v1/schema", get(schema))
}

async fn profiles(State(host): Shared) -> Answer {
    answer(host, StatusCode::OK, |host| host.profiles()).await
}

async fn apply(State(host): Shared, bytes: Bytes) -> Answer {
    let request: ApplyProfiles = body(&bytes)?;
    answer(host, StatusCode::OK, move |host| {
        host.apply_profiles(&request)
    })
    .await
}

async fn profile(State(host): Shared, Path(name): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| host.profile(&name)).await
}

async fn remove(State(host): Shared, Path(name): Path<String>, RawQuery(raw): RawQuery) -> Answer {
    let query = Query::parse(raw.as_deref(), &["plan", "force"])?;
    let intent = match (query.flag("plan")?, query.flag("force")?) {
        (true, _) => Intent::Plan,
        (false, true) => Intent::Force,
        (false, false) => Intent::Do,
    };
    answer(host, StatusCode::OK, move |host| {
        host.remove_profile(&name, intent)
    })
    .await
}

async fn effective(State(host): Shared, Path(name): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| {
        host.effective_objects(&name)
    })
    .await
}

async fn set(State(host): Shared, Path(name): Path<String>, bytes: Bytes) -> Answer {
    let request: SetValues = body(&bytes)?;
    answer(host, StatusCode::OK, move |host| {
        host.set_values(&name, &request)
    })
    .await
}

async fn label(State(host): Shared, bytes: Bytes) -> Answer {
    let request: SetLabels = body(&bytes)?;
    answer(host, StatusCode::OK, move |host| host.set_labels(&request)).await
}

async fn schema() -> Answer {
    Ok(axum::Json(strake_api::schema::json_schema()).into_response())
}
