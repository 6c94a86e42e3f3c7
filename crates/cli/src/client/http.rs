//! One exchange over HTTP on the unix socket.

use std::fmt::Display;
use std::io;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST, UPGRADE, USER_AGENT};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use strake_api::rest::Problem;
use strake_observe::{Because, Observation, OsCallFailed, OsContext, Result};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::UnixStream;

use super::Client;
use crate::observations::{AnswerNotUnderstood, ConnectionLost, DaemonSilent, DaemonUnreachable};

/// The largest JSON answer. The observations of a busy daemon are the largest, by far below this.
const MAX_ANSWER: usize = 64 << 20;

/// The protocol that a console speaks after the upgrade.
const CONSOLE: &str = "strake-console";

/// A console's two directions.
pub type ConsoleStream = TokioIo<Upgraded>;
/// The guest's output.
pub type ConsoleReader = ReadHalf<ConsoleStream>;
/// The guest's input.
pub type ConsoleWriter = WriteHalf<ConsoleStream>;

/// A request on its way, with what its failures are told with.
struct Exchange<'a> {
    client: &'a Client,
    method: Method,
    path: &'a str,
    patience: Duration,
}

/// A whole answer of the daemon: success, or it would be a failure.
pub(super) struct Answer {
    request: String,
    status: StatusCode,
    body: Bytes,
}

/// An answer that arrives piece by piece.
#[derive(Debug)]
pub struct Body {
    lost: ConnectionLost,
    body: Incoming,
}

pub(super) async fn exchange<B: Serialize>(
    client: &Client,
    method: Method,
    path: &str,
    body: Option<&B>,
    patience: Duration,
) -> Result<Answer> {
    let exchange = Exchange {
        client,
        method,
        path,
        patience,
    };
    let body = match body {
        None => Bytes::new(),
        Some(body) => serde_json::to_vec(body)
            .map_err(io::Error::other)
            .os("serialise", exchange.name())?
            .into(),
    };
    let request = exchange.request(body)?;
    exchange
        .in_time(async {
            let response = exchange.send(request).await?;
            exchange.whole(response).await
        })
        .await
}

pub(super) async fn download(client: &Client, path: &str, patience: Duration) -> Result<Body> {
    let exchange = Exchange {
        client,
        method: Method::GET,
        path,
        patience,
    };
    let request = exchange.request(Bytes::new())?;
    exchange
        .in_time(async {
            let response = exchange.send(request).await?;
            if !response.status().is_success() {
                return Err(exchange.refused(response).await);
            }
            Ok(Body {
                lost: exchange.lost(),
                body: response.into_body(),
            })
        })
        .await
}

pub(super) async fn upgrade(
    client: &Client,
    path: &str,
    patience: Duration,
) -> Result<ConsoleStream> {
    let exchange = Exchange {
        client,
        method: Method::POST,
        path,
        patience,
    };
    let mut request = exchange.request(Bytes::new())?;
    let headers = request.headers_mut();
    headers.insert(
        CONNECTION,
        hyper::header::HeaderValue::from_static("upgrade"),
    );
    headers.insert(UPGRADE, hyper::header::HeaderValue::from_static(CONSOLE));
    exchange
        .in_time(async {
            let response = exchange.send(request).await?;
            let status = response.status();
            if status == StatusCode::SWITCHING_PROTOCOLS {
                let upgraded = hyper::upgrade::on(response)
                    .await
                    .map_err(|error| exchange.broke(error))?;
                return Ok(TokioIo::new(upgraded));
            }
            if status.is_success() {
                return Err(exchange.strange(status, "it did not switch to the console"));
            }
            Err(exchange.refused(response).await)
        })
        .await
}

impl Exchange<'_> {
    fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn socket(&self) -> String {
        self.client.socket().display().to_string()
    }

    fn request(&self, body: Bytes) -> Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(self.method.clone())
            .uri(self.path)
            .header(HOST, "localhost")
            .header(USER_AGENT, concat!("strake/", env!("CARGO_PKG_VERSION")))
            .header(ACCEPT, "application/json, application/problem+json");
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request
            .body(Full::new(body))
            .map_err(io::Error::other)
            .os("build", self.name())
    }

    /// Bounds an exchange by the request's patience.
    async fn in_time<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match tokio::time::timeout(self.patience, work).await {
            Ok(result) => result,
            Err(_) => Err(DaemonSilent {
                socket: self.socket(),
                request: self.name(),
                seconds: self.patience.as_secs(),
            }
            .into()),
        }
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let stream = UnixStream::connect(self.client.socket())
            .await
            .os("connect", self.socket())
            .because_of(|| DaemonUnreachable {
                socket: self.socket(),
            })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broke(error))?;
        // Ends by itself with the exchange; its failure arrives at the request too.
        tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
        });
        sender
            .send_request(request)
            .await
            .map_err(|error| self.broke(error))
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Answer> {
        if !response.status().is_success() {
            return Err(self.refused(response).await);
        }
        let status = response.status();
        let body = self.body(response).await?;
        Ok(Answer {
            request: self.name(),
            status,
            body,
        })
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes> {
        Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes)
            .map_err(|error| self.broke(error))
    }

    /// What the daemon refused with: its own observation, if it sent one.
    async fn refused(&self, response: Response<Incoming>) -> Observation {
        let status = response.status();
        let refusal = &self.client.refusal;
        refusal.store(status.as_u16(), std::sync::atomic::Ordering::Relaxed);
        match self.body(response).await {
            Err(broke) => broke,
            Ok(body) => match serde_json::from_slice::<Problem>(&body) {
                Ok(problem) => problem.observation,
                Err(_) => {
                    let text = String::from_utf8_lossy(&body);
                    let start: String = text.chars().take(200).collect();
                    self.strange(status, format!("no problem document, but '{start}'"))
                }
            },
        }
    }

    fn strange(&self, status: StatusCode, reason: impl Display) -> Observation {
        AnswerNotUnderstood {
            request: self.name(),
            status: status.as_u16(),
            reason: reason.to_string(),
        }
        .into()
    }

    fn lost(&self) -> ConnectionLost {
        ConnectionLost {
            socket: self.socket(),
            request: self.name(),
        }
    }

    fn broke(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Observation {
        broke(self.lost(), error)
    }
}

fn broke(
    lost: ConnectionLost,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Observation {
    let socket = lost.socket.clone();
    let error = io::Error::other(error);
    Observation::from(lost).because(OsCallFailed::new("exchange", socket, &error))
}

impl Answer {
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body).map_err(|error| {
            AnswerNotUnderstood {
                request: self.request.clone(),
                status: self.status.as_u16(),
                reason: error.to_string(),
            }
            .into()
        })
    }
}

impl Body {
    /// The next piece, none at the end.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(broke(self.lost.clone(), error)),
                Some(Ok(frame)) => {
                    // Trailers are of no interest.
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}
