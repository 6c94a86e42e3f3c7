//! The API over HTTP: [`strake_api::rest`] as routes.
//!
//! Each handler is one line: it takes the request apart and runs the host's blocking function on a
//! thread of the blocking pool.

mod console;
mod problem;
mod query;
mod steer;

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::Serialize;
use serde::de::DeserializeOwned;
use strake_api::job::{JobId, LimitsChange};
use strake_api::rest::{
    AddDatastore, Consolidate, CreateExport, CreateVm, MigrateDisk, RestartVm, StopVm, TakeSnapshot,
};
use strake_observe::{Observation, Result};

use crate::Host;
use crate::observations::{Internal, RequestRefused};
use problem::Failure;
use query::Query;

type Shared = State<Arc<Host>>;
type Answer = std::result::Result<Response, Failure>;

/// The routes of the API.
pub(crate) fn router(host: Arc<Host>) -> Router {
    Router::new()
        .route("/v1/host", get(host_info))
        .route("/v1/vms", get(vms).post(create))
        .route("/v1/vms/{name}", get(vm).delete(remove))
        .route("/v1/vms/{name}/start", post(start))
        .route("/v1/vms/{name}/stop", post(stop))
        .route("/v1/vms/{name}/restart", post(restart))
        .route("/v1/vms/{name}/log", get(log))
        .route("/v1/vms/{name}/console", post(console::attach))
        .route("/v1/vms/{name}/disks/{disk}/migrate", post(migrate))
        .route(
            "/v1/vms/{name}/disks/{disk}/snapshots",
            get(disk_tree).post(snapshot),
        )
        .route(
            "/v1/vms/{name}/disks/{disk}/snapshots/{snapshot}",
            delete(delete_snapshot),
        )
        .route(
            "/v1/vms/{name}/disks/{disk}/snapshots/{snapshot}/revert",
            post(revert),
        )
        .route("/v1/vms/{name}/disks/{disk}/consolidate", post(consolidate))
        .route("/v1/jobs", get(jobs))
        .route("/v1/jobs/{id}", get(job))
        .route("/v1/jobs/{id}/cancel", post(cancel))
        .route("/v1/jobs/{id}/pause", post(pause_job))
        .route("/v1/jobs/{id}/resume", post(resume_job))
        .route("/v1/jobs/{id}/set", post(set_job))
        .route("/v1/exports", get(exports).post(create_export))
        .route("/v1/exports/{name}", get(export).delete(remove_export))
        .route("/v1/exports/{name}/start", post(start_export))
        .route("/v1/datastores", get(datastores).post(add_datastore))
        .route("/v1/datastores/{name}", delete(remove_datastore))
        .route("/v1/observations", get(observations))
        .merge(steer::routes())
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(host)
}

/// Runs a blocking function of the host.
async fn blocking<T: Send + 'static>(
    host: Arc<Host>,
    work: impl FnOnce(&Arc<Host>) -> Result<T> + Send + 'static,
) -> std::result::Result<T, Failure> {
    let outcome = tokio::task::spawn_blocking(move || work(&host)).await;
    match outcome {
        Ok(result) => result.map_err(Failure::from),
        Err(error) => Err(Failure::from(Observation::from(Internal {
            what: error.to_string(),
        }))),
    }
}

/// Runs a blocking function of the host and answers with what it gives.
async fn answer<T: Serialize + Send + 'static>(
    host: Arc<Host>,
    status: StatusCode,
    work: impl FnOnce(&Arc<Host>) -> Result<T> + Send + 'static,
) -> Answer {
    let value = blocking(host, work).await?;
    Ok((status, axum::Json(value)).into_response())
}

/// Reads a request's body.
fn body<T: DeserializeOwned>(bytes: &Bytes) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        RequestRefused {
            reason: format!("its body: {error}"),
            advice: "send the JSON document that this request takes".to_owned(),
        }
        .into()
    })
}

async fn host_info(State(host): Shared) -> Answer {
    answer(host, StatusCode::OK, |host| host.info()).await
}

async fn vms(State(host): Shared) -> Answer {
    answer(host, StatusCode::OK, |host| host.vms()).await
}

async fn create(State(host): Shared, bytes: Bytes) -> Answer {
    let request: CreateVm = body(&bytes)?;
    answer(host, StatusCode::CREATED, move |host| host.create(&request)).await
}

async fn vm(State(host): Shared, Path(name): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| host.vm(&name)).await
}

async fn remove(State(host): Shared, Path(name): Path<String>, RawQuery(raw): RawQuery) -> Answer {
    let images = Query::parse(raw.as_deref(), &["disks"])?.images()?;
    blocking(host, move |host| host.remove(&name, images)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn start(State(host): Shared, Path(name): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| host.start(&name)).await
}

async fn stop(State(host): Shared, Path(name): Path<String>, bytes: Bytes) -> Answer {
    let how = if bytes.is_empty() {
        StopVm::default()
    } else {
        body(&bytes)?
    };
    answer(host, StatusCode::OK, move |host| host.stop(&name, &how)).await
}

async fn restart(State(host): Shared, Path(name): Path<String>, bytes: Bytes) -> Answer {
    let how: RestartVm = if bytes.is_empty() {
        RestartVm::default()
    } else {
        body(&bytes)?
    };
    answer(host, StatusCode::OK, move |host| {
        if how.fast {
            host.restart_fast(&name, None)
        } else {
            host.restart(&name, &how)
        }
    })
    .await
}

async fn log(State(host): Shared, Path(name): Path<String>, RawQuery(raw): RawQuery) -> Answer {
    let tail = Query::parse(raw.as_deref(), &["tail"])?.number("tail")?;
    let bytes = blocking(host, move |host| host.console_log(&name, tail)).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}

async fn migrate(
    State(host): Shared,
    Path((name, disk)): Path<(String, String)>,
    bytes: Bytes,
) -> Answer {
    let request: MigrateDisk = body(&bytes)?;
    answer(host, StatusCode::ACCEPTED, move |host| {
        host.migrate(&name, &disk, &request)
    })
    .await
}

async fn disk_tree(State(host): Shared, Path((name, disk)): Path<(String, String)>) -> Answer {
    answer(host, StatusCode::OK, move |host| {
        host.disk_tree(&name, &disk)
    })
    .await
}

async fn snapshot(
    State(host): Shared,
    Path((name, disk)): Path<(String, String)>,
    bytes: Bytes,
) -> Answer {
    let request: TakeSnapshot = body(&bytes)?;
    answer(host, StatusCode::ACCEPTED, move |host| {
        host.snapshot(&name, &disk, &request)
    })
    .await
}

async fn delete_snapshot(
    State(host): Shared,
    Path((name, disk, snapshot)): Path<(String, String, String)>,
) -> Answer {
    answer(host, StatusCode::OK, move |host| {
        host.delete_snapshot(&name, &disk, &snapshot)
    })
    .await
}

async fn revert(
    State(host): Shared,
    Path((name, disk, snapshot)): Path<(String, String, String)>,
) -> Answer {
    answer(host, StatusCode::ACCEPTED, move |host| {
        host.revert(&name, &disk, &snapshot)
    })
    .await
}

async fn consolidate(
    State(host): Shared,
    Path((name, disk)): Path<(String, String)>,
    bytes: Bytes,
) -> Answer {
    let request: Consolidate = body(&bytes)?;
    answer(host, StatusCode::ACCEPTED, move |host| {
        host.consolidate(&name, &disk, &request)
    })
    .await
}

async fn jobs(State(host): Shared) -> Answer {
    answer(host, StatusCode::OK, |host| host.jobs()).await
}

async fn job(State(host): Shared, Path(id): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| host.job(&JobId(id))).await
}

async fn cancel(State(host): Shared, Path(id): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| {
        host.cancel_job(&JobId(id))
    })
    .await
}

async fn pause_job(State(host): Shared, Path(id): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| host.pause_job(&JobId(id))).await
}

async fn resume_job(State(host): Shared, Path(id): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| {
        host.resume_job(&JobId(id))
    })
    .await
}

async fn set_job(State(host): Shared, Path(id): Path<String>, bytes: Bytes) -> Answer {
    let change: LimitsChange = body(&bytes)?;
    answer(host, StatusCode::OK, move |host| {
        host.set_job(&JobId(id), &change)
    })
    .await
}

async fn exports(State(host): Shared) -> Answer {
    answer(host, StatusCode::OK, |host| host.exports()).await
}

async fn create_export(State(host): Shared, bytes: Bytes) -> Answer {
    let request: CreateExport = body(&bytes)?;
    answer(host, StatusCode::CREATED, move |host| {
        host.create_export(&request)
    })
    .await
}

async fn export(State(host): Shared, Path(name): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| host.export(&name)).await
}

async fn start_export(State(host): Shared, Path(name): Path<String>) -> Answer {
    answer(host, StatusCode::OK, move |host| host.start_export(&name)).await
}

async fn remove_export(State(host): Shared, Path(name): Path<String>) -> Answer {
    blocking(host, move |host| host.remove_export(&name)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn datastores(State(host): Shared) -> Answer {
    answer(host, StatusCode::OK, |host| host.datastores()).await
}

async fn add_datastore(State(host): Shared, bytes: Bytes) -> Answer {
    let request: AddDatastore = body(&bytes)?;
    answer(host, StatusCode::CREATED, move |host| {
        host.add_datastore(&request)
    })
    .await
}

async fn remove_datastore(State(host): Shared, Path(name): Path<String>) -> Answer {
    blocking(host, move |host| host.remove_datastore(&name)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn observations(RawQuery(raw): RawQuery) -> Answer {
    let since = Query::parse(raw.as_deref(), &["since"])?.number("since")?;
    let kept = strake_observe::recorder().since(since.unwrap_or(0));
    Ok(axum::Json(kept).into_response())
}

async fn no_route() -> Failure {
    Failure::at(
        StatusCode::NOT_FOUND,
        RequestRefused {
            reason: "there is no such resource".to_owned(),
            advice: "use a path of the API, for example /v1/vms".to_owned(),
        },
    )
}

async fn no_method() -> Failure {
    Failure::at(
        StatusCode::METHOD_NOT_ALLOWED,
        RequestRefused {
            reason: "the resource does not take this method".to_owned(),
            advice: "use a method of the API".to_owned(),
        },
    )
}
