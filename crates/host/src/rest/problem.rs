//! Failures as `application/problem+json`.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use strake_api::rest::Problem;
use strake_observe::Observation;

/// A failed request.
#[derive(Debug)]
pub(super) struct Failure {
    status: StatusCode,
    seen: Box<Observation>,
}

impl Failure {
    pub(super) fn at(status: StatusCode, seen: impl Into<Observation>) -> Self {
        Self {
            status,
            seen: Box::new(seen.into()),
        }
    }
}

impl From<Observation> for Failure {
    fn from(seen: Observation) -> Self {
        Self::at(status_of(&seen), seen)
    }
}

/// The status of the first observation of the tree that has one: the reason below says more than
/// the task that failed for it.
fn status_of(seen: &Observation) -> StatusCode {
    known(seen).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

fn known(seen: &Observation) -> Option<StatusCode> {
    if seen.id().starts_with("profile.") {
        return Some(StatusCode::UNPROCESSABLE_ENTITY);
    }
    own(seen.id()).or_else(|| seen.causes().iter().find_map(known))
}

/// One line for each observation that is the client's to mend.
fn own(id: &str) -> Option<StatusCode> {
    Some(match id {
        "host.no-such-profile"
        | "host.no-such-vm"
        | "host.no-such-export"
        | "host.no-such-disk"
        | "host.no-such-datastore"
        | "host.no-such-snapshot"
        | "host.no-such-job" => StatusCode::NOT_FOUND,
        "host.request-refused" | "host.bad-name" => StatusCode::BAD_REQUEST,
        "api.spec-invalid"
        | "host.value-refused"
        | "api.spec-problems"
        | "host.image-refused"
        | "host.chain-refused"
        | "host.not-a-file"
        | "host.too-many-files"
        | "host.datastore-refused"
        | "host.boot-file-refused"
        | "host.destination-too-small" => StatusCode::UNPROCESSABLE_ENTITY,
        "host.profile-in-use"
        | "host.steering-refused"
        | "host.effective-conflict"
        | "host.vm-exists"
        | "host.datastore-exists"
        | "host.not-a-vm"
        | "host.disk-exported"
        | "host.listen-refused"
        | "host.datastore-in-use"
        | "host.image-in-use"
        | "host.nic-conflict"
        | "host.wrong-state"
        | "host.snapshot-exists"
        | "host.no-snapshots"
        | "host.same-datastore"
        | "host.destination-exists"
        | "host.disk-busy"
        | "host.job-not-active"
        | "host.monitor-unreachable" => StatusCode::CONFLICT,
        "host.datastore-full" => StatusCode::INSUFFICIENT_STORAGE,
        "host.stop-timed-out" | "host.monitor-silent" | "host.start-unclear" => {
            StatusCode::GATEWAY_TIMEOUT
        }
        "host.datastore-unavailable" | "host.kvm-unavailable" | "host.tap-unavailable" => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        _ => return None,
    })
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let seen = *self.seen;
        tracing::info!(status = self.status.as_u16(), %seen, "request failed");
        let problem = Problem {
            kind: format!("tag:strake,2026:{}", seen.id()),
            title: seen.text().to_owned(),
            status: self.status.as_u16(),
            detail: seen.remedy().to_owned(),
            observation: seen,
        };
        let json = [(header::CONTENT_TYPE, "application/problem+json")];
        (
            self.status,
            json,
            axum::Json(problem).into_response().into_body(),
        )
            .into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observations::{CATALOG, CreateFailed, NoSuchDatastore};

    #[test]
    fn the_reason_decides_the_status() {
        let seen = Observation::from(CreateFailed { vm: "a".into() }).because(NoSuchDatastore {
            datastore: "x".into(),
        });
        assert_eq!(status_of(&seen), StatusCode::NOT_FOUND);
        let seen = Observation::from(CreateFailed { vm: "a".into() });
        assert_eq!(status_of(&seen), StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn only_existing_observations_have_a_status() {
        let source = include_str!("problem.rs");
        let ids = source
            .split('"')
            .filter(|part| part.len() > 5 && part.starts_with("host."));
        for id in ids {
            assert!(CATALOG.iter().any(|entry| entry.id == id), "{id}");
        }
    }
}
