//! The console: an HTTP connection that becomes a byte stream both ways.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use strake_observe::{Observation, OsContext};

use super::problem::Failure;
use super::{Answer, blocking};
use crate::Host;
use crate::observations::RequestRefused;

/// The protocol's name in `Upgrade`.
const PROTOCOL: &str = "strake-console";

pub(super) async fn attach(
    State(host): State<Arc<Host>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let asked = request.headers().get(header::UPGRADE);
    if asked.is_none_or(|protocol| protocol != PROTOCOL) {
        return Err(Failure::at(
            StatusCode::UPGRADE_REQUIRED,
            RequestRefused {
                reason: "a console is not an ordinary resource".to_owned(),
                advice: format!("send 'Connection: upgrade' and 'Upgrade: {PROTOCOL}'"),
            },
        ));
    }
    let stream = blocking(host, move |host| host.attach_console(&name)).await?;
    stream
        .set_nonblocking(true)
        .os("fcntl", "a console")
        .map_err(Failure::from)?;
    let mut monitor = tokio::net::UnixStream::from_std(stream)
        .os("epoll_ctl", "a console")
        .map_err(|seen: Observation| Failure::from(seen))?;
    tokio::spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => {
                let mut client = TokioIo::new(upgraded);
                // Either end may go at any time; that is how a console ends.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut monitor).await;
            }
            Err(error) => tracing::info!(%error, "a console was not taken"),
        }
    });
    let mut response: Response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(PROTOCOL));
    Ok(response)
}
